"""Which strategy, why, how sure, and what would change it: a pure function of the findings.

The row with the best mean is not the advice: every row whose paired difference from it is within chance (its 95 %
interval holds 0) counts as good, and of these the cheapest is taken. So nothing is said that the intervals do not bear.
"""

import dataclasses
import math

from ragjax.evaluation.statistics import Interval
from ragjax.reporting.cells import LABELS
from ragjax.reporting.findings import Intervals, PairFindings, RowFindings
from ragjax.reporting.formats import METRIC_NAMES, count, listed, percent, span, times, with_span
from ragjax.voice import duration

# Fewer questions cannot show anything at 95 %: even if all agree, a two-sided sign test has p >= 2 / 2^5 = 0.06. A
# bootstrap interval of them may have no width at all.
FEWEST_QUESTIONS = 6
# Fewer seeds than this tell little of other seeds.
_FEW_SEEDS = 3
# Beyond this factor more questions are no way to settle a difference.
_MOST_QUESTIONS = 100


@dataclasses.dataclass(frozen=True)
class Advice:
    """What the findings of one pair of models advise."""

    choice: str | None  # the row to take; None where nothing can be told
    as_good: tuple[str, ...]  # rows within chance of the best, itself among them
    verdict: str
    reasons: tuple[str, ...]
    unknown: tuple[str, ...]
    would_change: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """All sentences, the verdict first."""
        return [self.verdict, *self.reasons, *self.unknown, *self.would_change]


def is_real(interval: Interval | None, questions: int) -> bool:
    """Whether a difference is more than chance, as far as `questions` can tell."""
    return interval is not None and questions >= FEWEST_QUESTIONS and not interval[1] <= 0 <= interval[2]


def advise(pair: PairFindings, searched: bool = False) -> Advice:
    """The advice of one pair of models. searched: learning rates were searched for these runs."""
    best = pair.row(pair.best) if pair.best else None
    unknown = _unknown(pair)
    if best is None or pair.metric is None:
        return Advice(None, (), "No run has a result, so there is nothing to choose from.", (), unknown, ())
    judge = _Judge(pair, pair.metric, best)
    choice, verdict = judge.verdict()
    reasons = judge.reasons(choice, searched)
    return Advice(choice, tuple(judge.as_good), verdict, reasons, unknown, judge.would_change(choice))


class _Judge:
    """The sentences on one pair that has a best row."""

    def __init__(self, pair: PairFindings, metric: str, best: RowFindings):
        self._pair, self._metric, self._best = pair, metric, best
        self._name = METRIC_NAMES[metric]
        self._n = pair.counts[metric]
        self._rows = {row.row: row for row in pair.rows if row.scores.get(metric) is not None}
        self.as_good = [name for name, row in self._rows.items() if row is best or not self._is_real(row.behind)]

    @property
    def _gains(self) -> list[RowFindings]:
        """The rows that are ahead of the untrained models beyond chance."""
        return [row for row in self._rows.values() if self._is_gain(row)]

    def _is_real(self, intervals: Intervals) -> bool:
        return is_real(intervals[self._metric], self._n)

    def _is_gain(self, row: RowFindings) -> bool:
        """Whether a row is ahead of the untrained models beyond chance."""
        change = row.change[self._metric]
        return self._is_real(row.change) and change is not None and change[0] > 0

    def _score(self, row: RowFindings) -> str:
        return f"{percent(row.scores[self._metric])} %"

    def verdict(self) -> tuple[str | None, str]:
        """(the row to take, the sentence that says so)."""
        best, metric, name = self._best, self._metric, self._name
        if self._n < FEWEST_QUESTIONS:
            return None, (
                f"{count(self._n, 'question')} cannot tell what was learned: at least {FEWEST_QUESTIONS} are needed "
                "for any difference to be more than chance, and some hundreds to tell strategies apart."
            )
        if best.row == "none":
            return "none", f"Keep the models as they are: no strategy has a higher {name} than the untrained models."
        if not self._is_real(best.change):
            what = "the best mean is within chance of them" if self._gains else "nothing was learned beyond chance"
            return "none", (
                f"Keep the models as they are: {what}. {best.label} changes {name} by {_points(best.change[metric])}, "
                "an interval that holds 0."
            )
        if not self._is_gain(best):
            return "none", (
                f"Keep the models as they are: {best.label} lowers {name} by {_points(best.change[metric])}, which is "
                "more than chance."
            )
        choice = min(self.as_good, key=lambda row: self._rows[row].seconds or 0.0)
        row = self._rows[choice]
        if len([row for row in self._rows if row != "none"]) == 1:
            return choice, (
                f"{row.label} works: {name} goes from {percent(self._pair.before[metric])} % to {self._score(row)}, "
                f"{_points(row.change[metric])}, which is more than chance."
            )
        if len(self.as_good) == 1:
            return choice, f"Take {row.label}: its {name} of {self._score(row)} is ahead of all others beyond chance."
        return choice, (
            f"Take {row.label}: {name} {self._score(row)} for {duration(row.seconds or 0.0)} of training, the cheapest "
            f"of the {len(self.as_good)} rows that chance does not tell apart."
        )

    def reasons(self, choice: str | None, searched: bool) -> tuple[str, ...]:
        if self._n < FEWEST_QUESTIONS:
            return ()
        found = []
        best, metric, name = self._best, self._metric, self._name
        row = self._rows.get(choice or "")
        others = [self._rows[each].label for each in self.as_good if each not in (choice, best.row)]
        if row and row is not best and "none" not in (row.row, best.row):
            lead, ratio = row.behind[metric], _ratio(best, row)
            found.append(
                f"{best.label} has the highest {name}, {self._score(best)}, but its lead of {_points(lead)} over "
                f"{row.label} is within chance, and it takes {ratio} times as long to train."
            )
        if others and choice != "none":
            found.append(f"{listed(others)} {'is' if len(others) == 1 else 'are'} within chance of {best.label}, too.")
        if row and row.row != "none" and len(self._rows) > 1:
            found.append(
                f"Against the untrained models {row.label} changes {name} by {_points(row.change[metric])} "
                f"(95 % paired interval, {count(self._n, 'question')}, {count(len(row.seeds), 'seed')})."
            )
        if choice == "none" and self._gains:
            gains = [f"{each.label} {with_span(each.change[metric])}" for each in self._gains]
            found.append(f"Taken alone, these gains over the untrained models are clear: {listed(gains)} points.")
        behind = [each for each in self._rows.values() if each is not best and self._is_real(each.behind)]
        if behind and len(self._rows) > 1:
            leads = [f"{each.label} {with_span(each.behind[metric])}" for each in behind]
            found.append(f"{best.label} is ahead beyond chance, in points of {name}, of {listed(leads)}.")
        if row and metric != "recall_at_5" and is_real(row.change["recall_at_5"], self._pair.counts["recall_at_5"]):
            found.append(f"{row.label} changes Recall@5 by {_points(row.change['recall_at_5'])}, more than chance.")
        return (*found, *self._paper(searched))

    def _paper(self, searched: bool) -> list[str]:
        """What the paper advises for the case at hand, and how it fares here."""
        if len([row for row in self._rows if row != "none"]) < 2:
            return []
        if self._pair.counts["recall_at_5"]:
            case, advised = "passages are labelled", ["independent"]
        elif searched:
            case, advised = "passages have no labels and the learning rates are open", ["two_phase"]
        else:
            case, advised = "passages have no labels and the learning rates are known", ["rag_sequence", "rag_token"]
        known = [row for row in advised if row in self._rows]
        labels = " or ".join(LABELS[row] for row in advised)
        if not known:
            fate = "which has no result here"
        elif self._best.row in known:
            fate = "which has the best mean here"
        elif any(row in self.as_good for row in known):
            fate = "which is within chance of the best here"
        else:
            fate = f"which is behind {self._best.label} here"
        return [f"Where {case}, Lawton et al. (2025, section 6) advise {labels}, {fate}."]

    def would_change(self, choice: str | None) -> tuple[str, ...]:
        """What to do to know more."""
        found = []
        row, metric = self._rows.get(choice or ""), self._metric
        lead = None
        if choice == "none" and self._best.row != "none":
            lead = self._best.change[metric]
        elif row is not None and row is not self._best:
            lead = row.behind[metric]
        if lead is not None and not is_real(lead, self._n):
            found.append(_needed(self._best.label, lead, self._n))
        trained = [len(each.seeds) for each in self._rows.values() if each.row != "none"]
        if trained and min(trained) < _FEW_SEEDS:
            found.append("Runs with further seeds (--seeds) would tell how much of this is the luck of one training.")
        if self._pair.counts["recall_at_5"] == 0:
            found.append(
                "Labelled passages (positive_ids) would tell what the embedder finds, and let it be trained alone."
            )
        if any(cell.unselected_phases for each in self._pair.rows for cell in each.cells):
            found.append("A dev split would let each phase keep its best state instead of its last.")
        return tuple(found)


def _points(interval: Interval | None) -> str:
    """A difference in a sentence."""
    return "an unknown amount" if interval is None else f"{100 * interval[0]:+.1f} points {span(interval)}"


def _ratio(dear: RowFindings, cheap: RowFindings) -> str:
    return times(dear.seconds / cheap.seconds if dear.seconds and cheap.seconds else None)


def _needed(label: str, lead: Interval, n: int) -> str:
    """How many questions would show a lead of that size: an interval's width falls with the root of their number."""
    mean, low, high = lead
    half = (high - low) / 2
    factor = math.inf if mean <= 0 else (half / mean) ** 2
    if factor > _MOST_QUESTIONS:
        return (
            f"{label}'s lead is so small against its interval that more questions of this kind would hardly settle it."
        )
    needed = float(f"{max(factor, 1.0) * n:.2g}")
    return f"If {label}'s lead is as large as measured, about {needed:,.0f} questions, instead of {n:,}, would show it."


def _unknown(pair: PairFindings) -> tuple[str, ...]:
    """What the findings cannot say."""
    failed = [cell for row in pair.rows for cell in row.cells if cell.failure]
    found = [f"{LABELS[cell.row]}, seed {cell.seed}, has no result: {cell.failure}" for cell in failed]
    trained = [row for row in pair.rows if row.row != "none" and row.is_measured]
    seeds = {len(row.seeds) for row in trained}
    if seeds == {1}:
        found.append("One seed was trained: how far another training would come out elsewhere is not known.")
    elif seeds and min(seeds) < _FEW_SEEDS:
        found.append("So few seeds tell little of others: the intervals are rather too narrow than too wide.")
    if pair.n and not pair.counts["recall_at_5"]:
        found.append(f"No {pair.split} question has labelled passages, so Recall@5 is not known.")
    if pair.metric == "recall_at_5":
        found.append("No answers were measured: the rows are compared by what they retrieve.")
    phases = {phase for row in pair.rows for cell in row.cells for phase in cell.unselected_phases}
    if phases:
        found.append(f"No dev questions tell the best state of {listed(sorted(phases))}: the last one was kept.")
    missing = [label for row, label in LABELS.items() if row != "none" and pair.row(row) is None]
    if missing and trained:
        found.append(f"{listed(missing)} {'was' if len(missing) == 1 else 'were'} not tried.")
    return tuple(found)
