"""The matrix: which runs there are, in which folders, and what each takes over."""

import dataclasses

import pytest

from ragjax.comparison import Planned, plan_cells
from ragjax.config import ROWS, CompareConfig, RunConfig
from ragjax.errors import UserError
from ragjax.runs import RunRecord

BASE = RunConfig(run_dir="matrix", objective="rag_sequence", retriever_objective="pdist", refresh_passages=3)


def plan(**options) -> list[Planned]:
    return plan_cells(BASE, CompareConfig(**options))


def by_row(cells: list[Planned]) -> dict[str, Planned]:
    return {cell.row: cell for cell in cells}


def test_rows_stand_in_the_order_of_the_paper_whatever_order_is_asked():
    assert [cell.row for cell in plan()] == list(ROWS)
    assert [cell.row for cell in plan(strategies="rag_token,none,generator")] == ["none", "generator", "rag_token"]


def test_a_row_is_a_strategy_with_its_objective():
    flags = {
        row: (cell.config.strategy, cell.config.objective, cell.config.retriever_objective)
        for row, cell in by_row(plan()).items()
    }
    assert flags == {
        "none": ("none", "rag_sequence", "marginal"),
        "embedder": ("embedder", "rag_sequence", "marginal"),
        "generator": ("generator", "rag_sequence", "marginal"),
        "independent": ("independent", "rag_sequence", "marginal"),
        "two_phase": ("two_phase", "rag_sequence", "pdist"),
        "rag_sequence": ("joint", "rag_sequence", "pdist"),
        "rag_token": ("joint", "rag_token", "pdist"),
    }
    # Passages follow an embedder where one moves.
    follow = {row for row, cell in by_row(plan()).items() if cell.config.refresh_passages}
    assert follow == {"embedder", "independent", "two_phase", "rag_sequence", "rag_token"}
    # Every row answers, also the one whose run by itself would not.
    assert {cell.config.decode for cell in plan()} == {"concat"}


def test_cells_go_by_pair_then_seed_and_what_trains_nothing_has_one_seed():
    cells = plan(
        strategies="none,generator", seeds="3,1", embedders="minilm,mpnet", generators="/models/a b,smollm2-135m"
    )
    assert [(cell.config.embedder, cell.config.generator, cell.config.seed, cell.row) for cell in cells] == [
        (embedder, generator, seed, row)
        for embedder in ("minilm", "mpnet")
        for generator in ("/models/a b", "smollm2-135m")
        for seed, row in ((3, "none"), (3, "generator"), (1, "generator"))
    ]
    assert cells[0].config.run_dir == "matrix/cells/minilm-a-b/seed3/none"
    assert len({cell.config.run_dir for cell in cells}) == len(cells)


def test_models_of_one_name_get_folders_of_their_own_whatever_their_order():
    one, other = (
        {cell.config.embedder: cell.config.run_dir for cell in plan(strategies="none", embedders=names)}
        for names in (("/a/tuned", "/b/tuned"), ("/b/tuned", "/a/tuned"))
    )
    assert one == other and len(set(one.values())) == 2


def test_what_an_earlier_cell_has_trained_alike_is_taken_over():
    cells = plan(seeds="0,1", embedders="minilm,mpnet")
    for cell in cells:
        taken = cell.taking_over([other for other in cells if other is not cell]).config
        beside = cell.config.run_dir.removesuffix(cell.row)
        assert taken.embedder_run == (f"{beside}embedder" if cell.row == "independent" else "")
        assert taken.generator_run == (f"{beside}generator" if cell.row in ("independent", "two_phase") else "")
        assert dataclasses.replace(taken, embedder_run="", generator_run="") == cell.config


def test_a_cell_that_has_begun_goes_on_with_what_it_took_then(tmp_path):
    config = dataclasses.replace(BASE, run_dir=str(tmp_path))
    rows = by_row(plan_cells(config, CompareConfig()))
    alone = rows["two_phase"]
    alone.files.path.mkdir(parents=True)
    record = RunRecord(alone.config, ("generator", "retriever"), {})
    alone.files.begin(record, learning_rates={}, index={}, versions={}, devices=[])
    assert rows["two_phase"].taking_over([rows["generator"]]).config.generator_run == ""
    assert rows["independent"].taking_over([rows["generator"]]).config.generator_run == rows["generator"].config.run_dir
    alone.files.config_file.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"two_phase/config\.json does not describe a run"):
        rows["two_phase"].taking_over([rows["generator"]])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strategies": "joint"}, "--strategies=joint is not known: choose from none, embedder,"),
        ({"strategies": ""}, "--strategies= is not known: choose from none, embedder,"),
        ({"seeds": "0,x"}, "--seeds=0,x is not a list of numbers from 0 on: write it as 0,1"),
        ({"seeds": "-1"}, "--seeds=-1 is not a list of numbers from 0 on"),
        ({"seeds": "0.5"}, "--seeds=0.5 is not a list of numbers from 0 on"),
        ({"embedders": "minilm,,mpnet"}, "--embedders=minilm,,mpnet has an empty entry"),
        ({"generators": ""}, "--generators= has an empty name in its list"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(options, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        CompareConfig(**options)
