"""The printed tables."""

from ragjax.evaluation import report


def test_before_after_table():
    before = {"em": 0.1, "f1": 0.25, "contains": 0.3, "recall_at_5": None, "hit_at_5": 1.0}
    after = {"em": 0.35, "f1": 0.2, "contains": 0.3, "recall_at_5": None, "hit_at_5": 1.0}
    intervals = {"em": (0.25, 0.1, 0.4), "f1": (-0.05, -0.1125, 0.01), "recall_at_5": None}
    assert report.before_after_table(before, after, intervals).splitlines() == [
        "metric       before  after  change  95 % interval of the change",
        "-----------  ------  -----  ------  ---------------------------",
        "em            0.100  0.350  +0.250             [+0.100, +0.400]",
        "f1            0.250  0.200  -0.050             [-0.113, +0.010]",
        "contains      0.300  0.300  +0.000                            -",
        "recall_at_5       -      -       -                            -",
        "hit_at_5      1.000  1.000  +0.000                            -",
    ]


def test_cost_table():
    cost = {
        "seconds": 63.04,
        "tokens": 1_234_567,
        "flops": 3.5e14,
        "embedder": {"seconds": 12.34, "tokens": 4567, "flops": 5e13},
        "generator": {"seconds": 50.0, "tokens": 1_230_000, "flops": 3e14},
        "search": {"seconds": 0.7, "tokens": 0, "flops": 2e9},
        "evaluation": {"seconds": 100.0, "tokens": 99, "flops": None},
    }
    assert report.cost_table(cost).splitlines() == [
        "part                seconds     tokens   TFLOPs",
        "------------------  -------  ---------  -------",
        "embedder               12.3      4,567   50.000",
        "generator              50.0  1,230,000  300.000",
        "search                  0.7          0    0.002",
        "encode                    -          -        -",
        "total                  63.0  1,234,567  350.000",
        "evaluation (apart)    100.0         99        -",
    ]


def test_the_table_of_strategies():
    costs = [
        {"strategy": "generator", "seconds": 1200.0, "is_measured": True},
        {"strategy": "two_phase", "seconds": 1800.04, "is_measured": False},
        {"strategy": "joint", "seconds": None, "is_measured": False},
    ]
    assert report.strategy_table(costs).splitlines() == [
        "strategy   seconds  of generator's    figures",
        "---------  -------  --------------  ---------",
        "generator  1,200.0            1.00   measured",
        "two_phase  1,800.0            1.50  estimated",
        "joint            -               -          -",
    ]


def test_the_table_of_an_evaluation():
    scores = {"em": (0.25, 0.1, 0.4), "f1": (0.5, 0.4, 0.6), "contains": None, "answer_in_context": (0.75, 0.5, 1.0)}
    scores |= {"recall_at_5": None, "hit_at_5": None, "recall_at_1": (0.125, 0.0, 0.5), "hit_at_1": (0.2, 0.0, 0.5)}
    scores |= {"mrr_at_10": (0.3, 0.1, 0.5)}
    lines = report.evaluation_table(
        [{"decode": "concat", "top_k": 1, "scores": scores}, {"decode": "rag_token", "top_k": 5, "scores": scores}]
    ).splitlines()
    assert lines[2].split() == (
        ["concat", "1", "0.250", "[0.100,", "0.400]", "0.500", "[0.400,", "0.600]", "-", "0.125", "0.200", "0.750"]
        + ["0.300"]
    )
    assert lines[3].split()[-4:] == ["-", "-", "0.750", "0.300"]


def test_the_table_of_pairs():
    pair = {"decode": "concat", "top_k": 5, "metric": "em", "first": 0.25, "second": 0.125, "p_value": 0.0314}
    lines = report.pairs_table([pair | {"difference": (-0.125, -0.25, 0.0)}]).splitlines()
    wanted = ["concat", "5", "em", "0.250", "0.125", "-0.125", "[-0.250,", "+0.000]", "0.031"]
    assert lines[2].split() == wanted
