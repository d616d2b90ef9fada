"""What commands print at their end: tables of scores, cost and rates, as plain text."""

from collections.abc import Mapping, Sequence

from ragjax.costs import TRAINING_PARTS
from ragjax.evaluation.statistics import Interval

METRICS = ("em", "f1", "contains", "recall_at_5", "hit_at_5")
# Recall and hit are recorded at these ranks whatever --top_k is.
RANKS = (1, 5, 10, 20)


def before_after_table(
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    intervals: Mapping[str, Sequence[float] | None],
) -> str:
    """Scores before and after training, one line per metric of METRICS, as aligned text.

    before, after: metric -> fraction or None, as in summary.json. intervals: metric -> what paired_interval
    returned. What is None or missing is printed as "-".
    """
    lines = [("metric", "before", "after", "change", "95 % interval of the change")]
    for name in METRICS:
        old, new, interval = before.get(name), after.get(name), intervals.get(name)
        change = None if old is None or new is None else new - old
        span = "-" if interval is None else f"[{interval[1]:+.3f}, {interval[2]:+.3f}]"
        lines.append((name, _number(old, ".3f"), _number(new, ".3f"), _number(change, "+.3f"), span))
    return _aligned(lines)


def evaluation_table(results: Sequence[Mapping]) -> str:
    """Scores of several decoders and numbers of passages, one line each, as aligned text.

    results: of an evaluation.json: [{"decode", "top_k", "scores": {metric: (mean, low, high) or None}, ...}]. Answer
    metrics stand with their 95 % intervals, retrieval metrics at the line's own k.
    """
    lines = [("decode", "k", "em", "f1", "contains", "recall@k", "hit@k", "answer in context", "mrr@10")]
    for result in results:
        scores, k = result["scores"], result["top_k"]
        answers = [_with_interval(scores[name]) for name in ("em", "f1", "contains")]
        found = (f"recall_at_{k}", f"hit_at_{k}", "answer_in_context", "mrr_at_10")
        means = [_number(scores[name] and scores[name][0], ".3f") for name in found]
        lines.append((result["decode"], str(k), *answers, *means))
    return _aligned(lines)


def retrieval_table(scores: Mapping[str, Interval | None]) -> str:
    """What is found, one line for each rank, as aligned text. scores: metric -> (mean, low, high) or None."""
    lines = [("rank", "recall", "hit", "mrr")]
    for rank in RANKS:
        names = (f"recall_at_{rank}", f"hit_at_{rank}", f"mrr_at_{rank}")
        lines.append((str(rank), *(_with_interval(scores.get(name)) for name in names)))
    return _aligned(lines)


def pairs_table(pairs: Sequence[Mapping]) -> str:
    """Differences between two runs, one line for each decoder, k and metric, as aligned text.

    pairs: of an evaluation.json: [{"decode", "top_k", "metric", "first", "second", "difference": (mean, low, high),
    "p_value"}], the difference being second - first.
    """
    lines = [("decode", "k", "metric", "first", "second", "difference", "95 % interval", "p")]
    for pair in pairs:
        mean, low, high = pair["difference"]
        values = [_number(pair[side], ".3f") for side in ("first", "second")]
        span = f"[{low:+.3f}, {high:+.3f}]"
        label = (pair["decode"], str(pair["top_k"]), pair["metric"])
        lines.append((*label, *values, f"{mean:+.3f}", span, f"{pair['p_value']:.3f}"))
    return _aligned(lines)


def cost_table(cost: Mapping) -> str:
    """What a run cost, one line per part, as aligned text.

    cost: the "cost" of summary.json: {"seconds", "tokens", "flops"} for the whole run and for each of
    "embedder", "generator", "search", "encode" and "evaluation". The total does not hold the evaluation,
    which stands below it.
    """
    parts = [(name, cost.get(name) or {}) for name in TRAINING_PARTS]
    parts += [("total", cost), ("evaluation (apart)", cost.get("evaluation") or {})]
    lines = [("part", "seconds", "tokens", "TFLOPs")]
    for name, part in parts:
        flops = part.get("flops")
        tera = None if flops is None else flops / 1e12
        lines.append(
            (
                name,
                _number(part.get("seconds"), ",.1f"),
                _number(part.get("tokens"), ",.0f"),
                _number(tera, ",.3f"),
            )
        )
    return _aligned(lines)


def strategy_table(costs: Sequence[Mapping]) -> str:
    """What each strategy costs, one line each, as aligned text.

    costs: the "strategy_costs" of summary.json: [{"strategy", "seconds" (None: not known), "is_measured"}].
    """
    generator = next((cost["seconds"] for cost in costs if cost["strategy"] == "generator"), None)
    lines = [("strategy", "seconds", "of generator's", "figures")]
    for cost in costs:
        seconds = cost["seconds"]
        ratio = None if seconds is None or not generator else seconds / generator
        known = "-" if seconds is None else "measured" if cost["is_measured"] else "estimated"
        lines.append((cost["strategy"], _number(seconds, ",.1f"), _number(ratio, ".2f"), known))
    return _aligned(lines)


def comparison_table(rows: Sequence[Mapping]) -> str:
    """Strategies side by side, one line each, as aligned text; "-" for what was not measured.

    rows: {"label", "em", "f1", "recall_at_5": fractions, "change": (mean, low, high) of F1 against the untrained
    models, "seconds" of training, "relative" to the generator's alone}.
    """
    lines = [("strategy", "em", "f1", "recall@5", "f1 against untrained", "training s", "of generator's")]
    for row in rows:
        change = row["change"]
        span = "-" if change is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*change)
        scores = [_number(row[name], ".3f") for name in ("em", "f1", "recall_at_5")]
        cost = (_number(row["seconds"], ",.0f"), _number(row["relative"], ".2f"))
        lines.append((row["label"], scores[0], scores[1], scores[2], span, *cost))
    return _aligned(lines)


def rates_table(trials: Sequence[Mapping]) -> str:
    """The trials of a learning-rate search, one line each, as aligned text; "-" for what was not measured.

    trials: of search.json: {"phase", "rates": {model: rate}, "steps", "dev_loss", "em", "f1", "recall_at_5"}.
    """
    lines = [("phase", "embedder_lr", "generator_lr", "steps", "dev_loss", "em", "f1", "recall_at_5")]
    for trial in trials:
        rates = [_number(trial["rates"].get(model), "g") for model in ("embedder", "generator")]
        loss = "diverged" if trial["diverged"] else _number(trial["dev_loss"], ".4f")
        scores = [_number(trial[name], ".3f") for name in ("em", "f1", "recall_at_5")]
        lines.append((trial["phase"], *rates, str(trial["steps"]), loss, *scores))
    return _aligned(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_interval(interval: Interval | None) -> str:
    return "-" if interval is None else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right, a rule under the first row."""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)
