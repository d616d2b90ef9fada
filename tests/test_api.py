"""The public face: what `import ragjax` gives and what it costs, and the commands as functions."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ragjax
from ragjax.errors import UserError
from ragjax.runs import Summary
from tests.checkout import ROOT, in_checkout
from tests.tiny_runs import questions, read_lines, tiny_world

PAGE = ROOT / "docs" / "python.md"
PUBLIC = {
    "Answer",
    "CompareConfig",
    "EvaluateConfig",
    "PrepareConfig",
    "Run",
    "RunConfig",
    "SearchConfig",
    "compare",
    "evaluate",
    "load_embedder",
    "load_generator",
    "losses",
    "metrics",
    "open_run",
    "prepare",
    "search_rates",
    "train",
}


def python(source: str) -> str:
    """What a fresh interpreter prints, in which a warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_public_names_are_there():
    assert set(ragjax.__all__) >= PUBLIC
    assert set(dir(ragjax)) >= PUBLIC
    for name in ragjax.__all__:
        assert getattr(ragjax, name) is not None
    with pytest.raises(AttributeError, match="module 'ragjax' has no attribute 'trian'"):
        ragjax.trian  # noqa: B018  the lookup is what is tested


def test_type_checkers_see_the_same_names():
    """They follow the imports that a running program skips."""
    source = Path(ragjax.__file__).read_text(encoding="utf-8")
    seen = set(re.findall(r"^    from ragjax\S* import \w+ as (\w+)$", source, re.MULTILINE))
    assert seen | {"__version__"} == set(ragjax.__all__)


def test_importing_loads_nothing_heavy():
    source = (
        "import sys, ragjax; print(sorted({name.split('.')[0] for name in sys.modules} & {'jax', 'numpy', 'absl'}))"
    )
    assert python(source) == "[]\n"
    assert python("import ragjax; print(ragjax.RunConfig().top_k)") == "5\n"


@pytest.mark.parametrize(("name", "home"), [("train", "api"), ("evaluate", "api"), ("compare", "comparison")])
def test_a_command_of_the_same_name_does_not_hide_a_function(name, home):
    """In whatever order the two are met: the name in the package is the function."""
    after = f"import ragjax, ragjax.{name}; print(ragjax.{name}.__module__, callable(ragjax.{name}))"
    before = f"import ragjax; ragjax.{name}; import ragjax.{name}; print(ragjax.{name} is ragjax.{home}.{name})"
    imported = f"from ragjax.{name} import __name__ as a; from ragjax import {name}; print(a, callable({name}))"
    assert python(after).startswith(f"ragjax.{home}") and python(after).endswith(" True\n")
    assert python(before) == "True\n"
    assert python(imported) == f"{name} True\n"


@pytest.mark.parametrize("name", ["train", "evaluate", "prepare", "compare", "lr_search", "ask", "export", "index"])
def test_a_command_runs_without_warnings(name):
    command = [sys.executable, "-W", "error", "-m", f"ragjax.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    assert f"python -m ragjax.{name}" in done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def run(world) -> ragjax.Run:
    """Its models are those that training holds: nothing is loaded again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragjax.api.open_run", None)
        return ragjax.train(
            world.config(world.folder / "api-run", strategy="generator", max_steps=2, eval_limit=2, keep="last")
        )


def test_train_gives_the_run_that_it_has_trained(world, run):
    assert (run.folder, run.step) == (world.folder / "api-run", 2)
    assert isinstance(run.summary, Summary)
    assert (run.summary.strategy, run.summary.n) == ("generator", 2)
    opened = ragjax.open_run(run.folder)
    assert opened.summary == run.summary
    question = questions()["test"][0]["question"]
    mine, same = run.ask(question), opened.ask(question)
    assert isinstance(mine, ragjax.Answer)
    assert (mine.text, mine.probability) == (same.text, same.probability)
    assert ragjax.train(run.config).step == 2  # it has ended, and is opened


def test_a_run_that_has_only_retrieved_can_be_asked(world, tmp_path):
    config = world.config(tmp_path / "run", strategy="embedder", max_steps=2, generator_lr=None, keep="best")
    trained = ragjax.train(config)
    assert trained.ask(questions()["test"][0]["question"]).passages
    assert trained.step == trained.summary.kept["embedder"]["step"]


def test_a_run_or_its_folder_is_evaluated(run, tmp_path):
    evaluation = ragjax.evaluate(run, split="dev", eval_limit=3, top_k=2, decode="rag_token", out=str(tmp_path / "a"))
    (result,) = evaluation.results
    assert (evaluation.questions, evaluation.n, result.decode, result.top_k) == ("dev.first3", 3, "rag_token", 2)
    assert [line["id"] for line in result.predictions] == [question["id"] for question in questions()["dev"][:3]]
    assert result.predictions == read_lines(result.path)
    assert result.scores["f1"][0] == pytest.approx(sum(line["f1"] for line in result.predictions) / 3)
    other = ragjax.evaluate(run.folder, split="dev", eval_limit=3, top_k=2, decode="rag_token", out=str(tmp_path / "b"))
    assert other.results[0].predictions == result.predictions
    shorter = ragjax.evaluate(run, split="dev", eval_limit=3, max_new_tokens=1, out=str(tmp_path / "c"))
    cost = json.loads(shorter.results[0].path.with_suffix(".cost.json").read_text())
    assert cost["made_from"]["max_new_tokens"] == 1


def test_functions_refuse_what_commands_refuse(run):
    with pytest.raises(UserError, match=r"--split=valid is not known: choose from train, dev, test\."):
        ragjax.evaluate(run, split="valid")
    with pytest.raises(UserError, match=r"--num_beams=0 is out of range: give a number at least 1\."):
        ragjax.evaluate(run, num_beams=0)
    with pytest.raises(UserError, match="--run_dir already names the models"):
        ragjax.evaluate(run, embedder="minilm")
    with pytest.raises(UserError, match="--strategy=none trains nothing, so there is no rate to search"):
        ragjax.search_rates(ragjax.RunConfig(strategy="none"), ragjax.SearchConfig())
    with pytest.raises(UserError, match=r"holds a run with --top_k=3 \(now 2\)"):
        ragjax.train(ragjax.RunConfig(**{**vars(run.config), "top_k": 2}))
    with pytest.raises(UserError, match="was opened without its generator, which --decode=concat needs"):
        ragjax.evaluate(ragjax.open_run(run.folder, with_generator=False))
    with pytest.raises(TypeError, match="splitt"):
        ragjax.evaluate(run, splitt="dev")


@in_checkout
def test_the_page_on_python_is_true(world, tmp_path, monkeypatch, capsys):
    """docs/python.md, line for line, with tiny models under the names of real ones."""
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for name, folder in (("minilm", world.embedder), ("smollm2-135m", world.generator)):
        assert f'"{name}"' in block
        block = block.replace(f'"{name}"', repr(str(folder)))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"[012] generator {Path('runs/first')}", printed[-1])  # the step whose state is kept
    assert str(names["found"]["winner"]) in printed
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"first", "rates"}
    assert [(result.decode, result.top_k) for result in names["evaluation"].results] == [
        (decode, k) for decode in ("concat", "rag_token") for k in (1, 5)
    ]
