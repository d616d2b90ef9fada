"""The numbers of a report, worked by hand on a few questions."""

import pytest

from ragjax.errors import UserError
from ragjax.reporting import Cell, find, row_of
from ragjax.runs import RunFolder
from tests.reporting.cases import line, write_run

BEFORE = [0.0, 0.5, 0.0, 1.0]


def lines(values, recalls=(1.0, 0.0, 0.5, 0.5)):
    return [line(number, f1, recall) for number, (f1, recall) in enumerate(zip(values, recalls, strict=True))]


def pair_of(*cells):
    (pair,) = find(cells, "title", "command").pairs
    return pair


def test_means_changes_and_costs(tmp_path):
    none = write_run(tmp_path / "n", "none", lines(BEFORE), lines(BEFORE), seconds={"embedder": 0, "generator": 0})
    generator = write_run(tmp_path / "g", "generator", lines(BEFORE), lines([1.0, 1.0, 0.5, 0.5]))
    joint = write_run(
        tmp_path / "j", "rag_token", lines(BEFORE), lines([1.0, 1.0, 1.0, 0.0]), seconds={"generator": 70}
    )
    pair = pair_of(joint, none, generator)
    assert [row.label for row in pair.rows] == ["No Ft.", "Ft. Gen.", "RAG-Tok."]
    assert (pair.n, pair.split, pair.metric) == (4, "test", "f1")
    assert pair.counts == {"em": 4, "f1": 4, "contains": 4, "recall_at_5": 4, "hit_at_5": 4}
    assert pair.before["f1"] == 0.375
    assert [row.scores["f1"] for row in pair.rows] == [0.375, 0.75, 0.75]
    # Equal F1: EM, 2/4 and 3/4, decides.
    assert pair.best == "rag_token"
    assert pair.row("generator").change["f1"][0] == 0.375
    assert pair.row("generator").behind["em"][0] == 0.25
    assert pair.row("generator").behind["f1"][0] == 0.0
    assert pair.row("none").change["f1"] is None
    assert pair.row("none").behind["f1"][0] == 0.375
    assert pair.row("rag_token").behind["f1"] is None
    # embedder, generator, search and encode, 10 s each where nothing else is said; evaluation stands apart.
    assert [row.seconds for row in pair.rows] == [20, 40, 100]
    assert [row.relative for row in pair.rows] == [0.5, 1.0, 2.5]
    assert pair.row("rag_token").parts["evaluation"] == 10


def test_the_interval_of_one_seed_is_that_of_the_summary(tmp_path):
    cell = write_run(tmp_path / "g", "generator", lines(BEFORE), lines([1.0, 1.0, 0.5, 0.5]))
    row = pair_of(cell).row("generator")
    assert row.change == {name: tuple(x) for name, x in cell.files.read_summary().change_95.items()}


def test_seeds_are_averaged_and_paired_seed_by_seed(tmp_path):
    first = [
        write_run(tmp_path / f"g{seed}", "generator", lines(BEFORE), lines(values), seed=seed, seconds={"generator": t})
        for seed, values, t in ((0, [1.0, 1.0, 1.0, 1.0], 20), (1, [0.0, 0.5, 0.5, 1.0], 40))
    ]
    # Seed 1 alone is common: there the lead of the generator's row is 0.5 - 0.25.
    other = write_run(tmp_path / "t1", "two_phase", lines(BEFORE), lines([0.0, 0.0, 0.0, 1.0]), seed=1)
    failed = Cell("two_phase", "minilm", "smollm2-135m", 0, RunFolder(tmp_path / "t0"), "It diverged.")
    pair = pair_of(*first, failed, other)
    row = pair.row("generator")
    assert row.seeds == (0, 1)
    assert row.scores["f1"] == 0.75
    assert row.change["f1"][0] == 0.375
    assert row.seconds == 60
    assert pair.row("two_phase").failures == ("It diverged.",)
    assert pair.row("two_phase").seeds == (1,)
    assert pair.row("two_phase").behind["f1"][0] == 0.25


def test_rows_without_a_common_seed_are_compared_in_their_means(tmp_path):
    one = write_run(tmp_path / "g", "generator", lines(BEFORE), lines([1.0, 1.0, 1.0, 1.0]), seed=0)
    other = write_run(tmp_path / "t", "two_phase", lines(BEFORE), lines([0.0, 0.0, 0.0, 1.0]), seed=1)
    assert pair_of(one, other).row("two_phase").behind["f1"][0] == 0.75


def test_without_labels_recall_is_not_known(tmp_path):
    unlabelled = [None] * 4
    cell = write_run(tmp_path / "g", "generator", lines(BEFORE, unlabelled), lines([1.0] * 4, unlabelled))
    pair = pair_of(cell)
    assert pair.counts["recall_at_5"] == 0
    assert pair.row("generator").scores["recall_at_5"] is None
    assert pair.row("generator").change["recall_at_5"] is None


def test_questions_without_labels_are_left_out_of_recall_alone(tmp_path):
    before, after = lines(BEFORE, [None, 0.0, None, 0.5]), lines(BEFORE, [None, 1.0, None, 0.5])
    pair = pair_of(write_run(tmp_path / "e", "embedder", before, after))
    assert pair.counts["recall_at_5"] == 2
    assert pair.row("embedder").change["recall_at_5"][0] == 0.5


def test_without_answers_rows_are_ordered_by_recall(tmp_path):
    before, after = lines([None] * 4), lines([None] * 4, [1.0] * 4)
    pair = pair_of(
        write_run(tmp_path / "n", "none", before, before, decode="none"),
        write_run(tmp_path / "e", "embedder", before, after),
    )
    assert (pair.metric, pair.best) == ("recall_at_5", "embedder")
    assert pair.row("embedder").scores["f1"] is None
    assert pair.row("none").behind["recall_at_5"][0] == 0.5


def test_failures_alone(tmp_path):
    cell = Cell("rag_token", "minilm", "smollm2-135m", 0, RunFolder(tmp_path / "t"), "It diverged.")
    pair = pair_of(cell)
    assert (pair.n, pair.best, pair.metric) == (0, None, None)
    assert not pair.row("rag_token").is_measured


def test_the_pairs_of_models_stand_apart(tmp_path):
    cells = [
        write_run(tmp_path / name, "generator", lines(BEFORE), lines([1.0] * 4), embedder=name)
        for name in ("minilm", "mpnet")
    ]
    assert [pair.embedder for pair in find(cells, "", "").pairs] == ["minilm", "mpnet"]


def test_phases_without_dev_questions_are_told(tmp_path):
    kept = {"generator": None, "embedder": {"step": 3, "figures": {"recall_at_5": 1}, "start": {"recall_at_5": 0}}}
    ends = lines(BEFORE), lines(BEFORE)
    cell = write_run(tmp_path / "i", "independent", *ends, kept=kept)
    assert pair_of(cell).row("independent").cells[0].unselected_phases == ("generator",)
    asked = write_run(tmp_path / "l", "independent", *ends, kept=kept, keep="last")
    taken_over = write_run(tmp_path / "t", "independent", *ends, kept=kept, generator_run=str(tmp_path / "g"))
    for each in (asked, taken_over):
        assert pair_of(each).row("independent").cells[0].unselected_phases == ()


def test_what_does_not_go_together_is_refused_in_one_sentence(tmp_path):
    cell = write_run(tmp_path / "g", "generator", lines(BEFORE), lines(BEFORE))
    others = [line(number + 1, 0.5, 1.0) for number in range(4)]
    other = write_run(tmp_path / "o", "two_phase", others, others)
    unfinished = Cell("two_phase", "minilm", "smollm2-135m", 0, RunFolder(tmp_path / "nothing"))
    unknown = Cell("both", "minilm", "smollm2-135m", 0, cell.files)
    for cells, words in (
        ([], "no run"),
        ([cell, other], "different questions"),
        ([cell, cell], "second generator"),
        ([cell, unfinished], "not finished"),
        ([unknown], "no row 'both'"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            find(cells, "", "")
        assert "\n" not in str(caught.value)


def test_row_of():
    assert row_of("joint", "rag_sequence") == "rag_sequence"
    assert row_of("two_phase", "rag_token") == "two_phase"
