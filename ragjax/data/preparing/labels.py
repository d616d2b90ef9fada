"""Which passages of a corpus are a question's positives, from what its source says of them.

A source names a positive by its passage's id, by its page's title, or by both. The id serves while the passages are the
source's own and whole. For another corpus, and for passages that documents were cut into, the page is known and the
passage is not: RULE says which is taken. The corpus streams by once; what is kept grows with the questions.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ragjax.data.passages import PassageStore
from ragjax.data.questions import Passage, Question, missing_positive
from ragjax.data.sources import Asked, Label
from ragjax.errors import UserError
from ragjax.metrics import contains_answer, normalize_answer

RULE = (
    "a label that names a passage is that passage; one that names a page or a document, by its title or its id, is "
    "every passage of it whose text contains an accepted answer, or else its passage if it has only one; titles are "
    "equal apart from case, underscores and white space; yes and no are not looked for"
)
# What became of the labels, in the words of provenance.json.
NAMED = "labels that name a passage"
ANSWERED = "labels matched by page and answer"
ALONE = "labels matched by the only passage of their page"
UNKNOWN = "labels whose page or passage the corpus does not have"
UNDECIDED = "labels whose page has several passages and none with an answer"
NAMELESS = "labels by ids of another corpus, without a title"
UNLABELLED = "questions without positives"
LOST = (UNKNOWN, UNDECIDED, NAMELESS)

_NOT_LOOKED_FOR = {"", "yes", "no", "noanswer"}


@dataclass
class _Page:
    """What a label stands for, as the corpus goes by. key: how its passages are known; None: they cannot be."""

    key: tuple[str, str] | None
    answers: tuple[str, ...]
    passages: int = 0
    first: str = ""
    answered: list[str] = field(default_factory=list)

    def see(self, passage: Passage) -> None:
        self.passages += 1
        self.first = self.first or passage.id
        if self.answers and contains_answer(passage.text, self.answers):
            self.answered.append(passage.id)


class Matcher:
    """Finds the positives of questions while the corpus is written: `see` each passage, then ask for `questions`."""

    def __init__(
        self,
        asked: Mapping[str, Sequence[Asked]],
        *,
        is_own: bool,
        is_whole: bool = True,
        titles: Mapping[str, str] | None = None,
    ):
        """is_own: the corpus is that of the questions' source. is_whole: its passages are not cut from documents.

        titles: of the passages that labels name by ids which the corpus does not have, as `titles_of` finds them.
        """
        self._is_own, self._is_whole, self._titles = is_own, is_whole, titles or {}
        self._pages: dict[tuple[str, str], list[_Page]] = {}
        self._asked = {
            split: [(each, [self._page_of(each, label) for label in each.labels]) for each in questions]
            for split, questions in asked.items()
        }
        self.counts: Counter[str] = Counter()

    def see(self, passage: Passage, document: str) -> None:
        """Takes note of a passage of the corpus; document: the id of what it is, or was cut from."""
        if self._pages:
            for key in (("id", document), ("title", same_title(passage.title))):
                for page in self._pages.get(key, ()):
                    page.see(passage)

    def questions(self, split: str, store: PassageStore) -> Iterator[Question]:
        """The questions of a split with their positives in the finished corpus, in order.

        Raises UserError for a label that is a fault of its file: an id that the source's own corpus does not have.
        """
        for asked, pages in self._asked[split]:
            found = zip(asked.labels, pages, strict=True)
            positives = [passage for label, page in found for passage in self._positives(label, page, store)]
            if not positives:
                self.counts[UNLABELLED] += 1
            yield Question(asked.id, asked.question, asked.answers, tuple(dict.fromkeys(positives)))

    def _page_of(self, asked: Asked, label: Label) -> _Page | None:
        """The page that a label stands for; None where it names a passage."""
        if self._is_own and label.id:
            if self._is_whole:
                return None
            key = ("id", label.id)
        else:
            title = label.title or self._titles.get(label.id, "")
            key = ("title", same_title(title)) if title else None
        page = _Page(key, tuple(a for a in asked.answers if normalize_answer(a) not in _NOT_LOOKED_FOR))
        if key:
            self._pages.setdefault(key, []).append(page)
        return page

    def _positives(self, label: Label, page: _Page | None, store: PassageStore) -> list[str]:
        """The passages of a label, which is counted by what became of it."""
        found: list[str] = []
        if page is None:
            outcome, found = (NAMED, [label.id]) if label.id in store else (UNKNOWN, [])
        elif page.key is None:
            outcome = NAMELESS
        elif page.answered:
            outcome, found = ANSWERED, page.answered
        elif page.passages == 1:
            outcome, found = ALONE, [page.first]
        else:
            outcome = UNDECIDED if page.passages else UNKNOWN
        if outcome == UNKNOWN and self._is_own and label.id and label.place:
            raise missing_positive(label.id, lambda fault, mend: UserError(f"{label.place}: {fault}; {mend}"))
        self.counts[outcome] += 1
        return found


def titles_of(asked: Mapping[str, Sequence[Asked]], passages: Callable[[], Iterable[Passage]]) -> dict[str, str]:
    """The titles of the passages that labels name by their ids alone, from the corpus that has these ids."""
    wanted = {label.id for each in asked.values() for one in each for label in one.labels if not label.title}
    return {passage.id: passage.title for passage in passages() if passage.id in wanted} if wanted else {}


def same_title(title: str) -> str:
    """The form in which two spellings of a title are equal."""
    return " ".join(unicodedata.normalize("NFC", title).replace("_", " ").casefold().split())
