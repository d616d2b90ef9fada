"""Bootstrap intervals and the paired test: how sure a mean, or a difference between two systems, is."""

from collections.abc import Sequence

import numpy as np

# At most this many index entries of a bootstrap lie in memory at once (32 MiB as int64).
_DRAWS_AT_ONCE = 1 << 22

# Up to this many numbers all 2^n patterns of signs are counted.
_ALL_SIGNS = 13

Interval = tuple[float, float, float]


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval | None:
    """(mean, low, high): the mean with its 95 % percentile-bootstrap interval (Efron 1979).

    values: [n], one per question, drawn again with replacement `resamples` times. The same seed gives the
    same interval. None if there are no values.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"values must be one-dimensional, not of shape {numbers.shape}")
    if numbers.size == 0:
        return None
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // numbers.size)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = numbers[rng.integers(numbers.size, size=(stop - start, numbers.size))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(numbers.mean()), float(low), float(high)


def seeds_interval(values: Sequence[Sequence[float]], seed: int = 0, resamples: int = 10_000) -> Interval | None:
    """(mean, low, high) over seeds and questions: 95 % percentile interval of the bootstrap that draws both again.

    values: [S, n], a row for each training seed, a column for each question. Every resample draws S seeds and n
    questions with replacement, each question with its values under all seeds drawn (Owen 2007, "The pigeonhole
    bootstrap"), so that an interval holds the luck of the training as well as that of the questions. One seed gives
    what `mean_interval` gives; two or three tell little of other seeds, and the interval is then too narrow rather
    than too wide. None if there are no values. Raises ValueError if the rows differ in length.
    """
    table = np.array(values, np.float64)
    if table.size == 0:
        return None
    if len(table) == 1:
        return mean_interval(table[0].tolist(), seed, resamples)
    seeds, questions = table.shape
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // questions)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        shares = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=stop - start) / seeds  # [resamples, S]
        drawn = rng.integers(questions, size=(stop - start, questions))
        means[start:stop] = np.take_along_axis(shares @ table, drawn, axis=1).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(table.mean()), float(low), float(high)


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


def paired_p_value(
    before: Sequence[float | None], after: Sequence[float | None], seed: int = 0, resamples: int = 10_000
) -> float | None:
    """Two-sided p of the paired randomisation test: how often random signs give a mean difference as large.

    Under the null hypothesis each question's two values could as well be swapped (Fisher 1935; Smucker, Allan and
    Carterette 2007 for retrieval). With up to 13 questions that differ all sign patterns are counted, with more a
    sample of `resamples`, in which the one that was seen counts too. before, after: as for paired_interval.
    """
    pairs = zip(before, after, strict=True)
    differences = [new - old for old, new in pairs if old is not None and new is not None]
    if not differences:
        return None
    moved = np.array([difference for difference in differences if difference != 0])
    seen = abs(moved.sum())
    # Sums of the same numbers in another order differ by rounding.
    least = seen - 1e-9 * max(seen, 1.0)
    if len(moved) <= _ALL_SIGNS:
        patterns = (np.arange(1 << len(moved))[:, None] >> np.arange(len(moved))) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ moved) >= least))
    rng = np.random.default_rng(seed)
    larger, step = 0, max(1, _DRAWS_AT_ONCE // len(moved))
    for start in range(0, resamples, step):
        signs = rng.choice((-1.0, 1.0), (min(step, resamples - start), len(moved)))
        larger += int(np.sum(np.abs(signs @ moved) >= least))
    return (larger + 1) / (resamples + 1)
