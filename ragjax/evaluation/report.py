"""What a run prints at its end: paired bootstrap intervals and the tables of scores and cost, as plain
text.
"""

from collections.abc import Mapping, Sequence

import numpy as np

METRICS = ("em", "f1", "contains", "recall_at_5", "hit_at_5")
COST_PARTS = ("embedder", "generator", "search", "encode")

# At most this many index entries of a bootstrap lie in memory at once (32 MiB as int64).
_DRAWS_AT_ONCE = 1 << 22

Interval = tuple[float, float, float]


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval | None:
    """(mean, low, high): the mean with its 95 % percentile-bootstrap interval (Efron 1979).

    values: [n], one per question, drawn again with replacement `resamples` times. The same seed gives the
    same interval. None if there are no values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"values must be one-dimensional, not of shape {values.shape}")
    if values.size == 0:
        return None
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // values.size)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = values[rng.integers(values.size, size=(stop - start, values.size))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def paired_interval(
    before: Sequence[float | None], after: Sequence[float | None], seed: int = 0, resamples: int = 10_000
) -> Interval | None:
    """(mean of after - before, low, high): 95 % interval of the paired bootstrap over questions.

    before, after: [n] values of the same questions in the same order. A question with None on either side
    (recall without positives) is left out; None if no question is left. Raises ValueError if the lengths
    differ.
    """
    pairs = zip(before, after, strict=True)
    differences = [new - old for old, new in pairs if old is not None and new is not None]
    return mean_interval(differences, seed, resamples)


def before_after_table(
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    intervals: Mapping[str, Interval | None],
) -> str:
    """Scores before and after training, one line per metric of METRICS, as aligned text.

    before, after: metric -> fraction or None, as in summary.json. intervals: metric -> what paired_interval
    returned. What is None or missing is printed as "-".
    """
    rows = [("metric", "before", "after", "change", "95 % interval of the change")]
    for name in METRICS:
        old, new, interval = before.get(name), after.get(name), intervals.get(name)
        change = None if old is None or new is None else new - old
        span = "-" if interval is None else f"[{interval[1]:+.3f}, {interval[2]:+.3f}]"
        rows.append((name, _number(old, ".3f"), _number(new, ".3f"), _number(change, "+.3f"), span))
    return _aligned(rows)


def scores_table(intervals: Mapping[str, Interval | None]) -> str:
    """One evaluation's scores with their 95 % intervals, one line per metric of METRICS, as aligned text."""
    rows = [("metric", "mean", "95 % interval")]
    for name in METRICS:
        interval = intervals.get(name)
        mean, span = (None, "-") if interval is None else (interval[0], f"[{interval[1]:.3f}, {interval[2]:.3f}]")
        rows.append((name, _number(mean, ".3f"), span))
    return _aligned(rows)


def cost_table(cost: Mapping) -> str:
    """What a run cost, one line per part, as aligned text.

    cost: the "cost" of summary.json: {"seconds", "tokens", "flops"} for the whole run and for each of
    "embedder", "generator", "search", "encode" and "evaluation". The total does not hold the evaluation,
    which stands below it.
    """
    parts = [(name, cost.get(name) or {}) for name in COST_PARTS]
    parts += [("total", cost), ("evaluation (apart)", cost.get("evaluation") or {})]
    rows = [("part", "seconds", "tokens", "TFLOPs")]
    for name, part in parts:
        flops = part.get("flops")
        tera = None if flops is None else flops / 1e12
        rows.append(
            (
                name,
                _number(part.get("seconds"), ",.1f"),
                _number(part.get("tokens"), ",.0f"),
                _number(tera, ",.3f"),
            )
        )
    return _aligned(rows)


def strategy_table(costs: Sequence[Mapping]) -> str:
    """What each strategy costs, one line each, as aligned text.

    costs: the "strategy_costs" of summary.json: [{"strategy", "seconds" (None: not known), "is_measured"}].
    """
    generator = next((cost["seconds"] for cost in costs if cost["strategy"] == "generator"), None)
    rows = [("strategy", "seconds", "of generator's", "figures")]
    for cost in costs:
        seconds = cost["seconds"]
        ratio = None if seconds is None or not generator else seconds / generator
        known = "-" if seconds is None else "measured" if cost["is_measured"] else "estimated"
        rows.append((cost["strategy"], _number(seconds, ",.1f"), _number(ratio, ".2f"), known))
    return _aligned(rows)


def search_table(trials: Sequence[Mapping]) -> str:
    """The trials of a learning-rate search, one line each, as aligned text; "-" for what was not measured.

    trials: of search.json: {"phase", "rates": {model: rate}, "steps", "dev_loss", "em", "f1", "recall_at_5"}.
    """
    rows = [("phase", "embedder_lr", "generator_lr", "steps", "dev_loss", "em", "f1", "recall_at_5")]
    for trial in trials:
        rates = [_number(trial["rates"].get(model), "g") for model in ("embedder", "generator")]
        loss = "diverged" if trial["diverged"] else _number(trial["dev_loss"], ".4f")
        scores = [_number(trial[name], ".3f") for name in ("em", "f1", "recall_at_5")]
        rows.append((trial["phase"], *rates, str(trial["steps"]), loss, *scores))
    return _aligned(rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right, a rule under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
