"""The commands as a user meets them: help, version, and what they print on a finished run."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import ragjax
from ragjax.config import (
    DecodeConfig,
    DryRunConfig,
    EvaluateConfig,
    IndexConfig,
    PrepareConfig,
    ProcessConfig,
    RetrievalConfig,
    RunConfig,
)
from ragjax.errors import UserError
from ragjax.evaluation import evaluate_runs, paired_interval, paired_p_value, print_evaluation, runs
from ragjax.fields import flag_text
from ragjax.pretrained import Generator
from ragjax.runs import ask, open_run
from ragjax.training import train
from tests.checkout import ROOT, in_checkout
from tests.tiny_runs import PLACES, passages, questions, read_lines, tiny_world, write_data

DEFAULTS = ROOT / "docs" / "defaults.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def finished(world) -> Path:
    folder = world.folder / "commands-run"
    train(world.config(folder, max_steps=2, eval_limit=2))
    return folder


def help_of(world, command: str) -> str:
    done = world.command("-m", f"ragjax.{command}", "--help")
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_help_of_train_explains_every_field_and_no_other_library(world):
    text = help_of(world, "train")
    assert "Fine-tunes a retrieval-augmented generation pipeline" in text
    words = "".join(text.split())  # lines are also broken behind hyphens
    for field in [field for config in (RunConfig, DryRunConfig, ProcessConfig) for field in dataclasses.fields(config)]:
        shown = f"--[no]{field.name}:" if isinstance(field.default, bool) else f"--{field.name}:"
        assert shown in words, field.name
        assert "".join(field.metadata["help"].split()) in words, field.name
    assert "<none|generator|joint|embedder|independent|two_phase|auto>" in words
    flags = set(re.findall(r"^  --(?:\[no\])?(\w+):", text, re.MULTILINE))
    assert flags == fields_of(RunConfig, DryRunConfig, ProcessConfig)


def fields_of(*configs):
    return {field.name for config in configs for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("evaluate", fields_of(EvaluateConfig, DecodeConfig, RetrievalConfig)),
        ("ask", {"run_dir", "data", "top_k", "json"} | fields_of(DecodeConfig, RetrievalConfig)),
        ("prepare", fields_of(PrepareConfig)),
        ("index", fields_of(IndexConfig)),
        ("export", {"run_dir", "out", "merge", "max_shard_gb"}),
    ],
)
def test_the_help_of_other_commands_lists_their_flags(world, command, flags):
    text = help_of(world, command)
    assert f"python -m ragjax.{command}" in text
    assert set(re.findall(r"^  --(?:\[no\])?(\w+):", text, re.MULTILINE)) == flags


def test_ask_offers_no_decoder_that_gives_no_answer(world):
    text = " ".join(help_of(world, "ask").split())
    assert "<concat|rag_token|rag_sequence>:" in text and "none: measure retrieval" not in text
    done = world.command("-m", "ragjax.ask", "--decode=none", "why?")
    assert done.returncode == 1
    assert "--decode=none: value should be one of <concat|rag_token|rag_sequence>" in done.stderr


@pytest.mark.parametrize("command", ["train", "evaluate", "ask", "export"])
def test_version_is_printed(world, command):
    done = world.command("-m", f"ragjax.{command}", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ragjax {ragjax.__version__}\n", "")


def test_arguments_that_are_no_flags_are_refused(world):
    done = world.command("-m", "ragjax.train", "joint")
    assert done.returncode == 1
    assert "takes flags only, not 'joint'" in done.stderr


def test_evaluate_prints_scores_and_writes_a_line_for_each_question(world, finished):
    flags = ("--split=dev", "--eval_batch_size=2", "--top_k=1,3", "--decode=concat,rag_sequence", "--num_beams=2")
    done = world.command("-m", "ragjax.evaluate", f"--run_dir={finished}", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{finished} at step 2, 4 questions (dev)" in done.stdout
    for word in ("decode", "em", "f1", "contains", "recall@k", "answer in context", "mrr@10", "TFLOPs"):
        assert word in done.stdout
    result = json.loads((finished / "predictions" / "dev.evaluation.json").read_text())
    decoders = ("concat-beams2", "rag_sequence-thorough-beams2")
    wanted = [(decoder, k) for decoder in decoders for k in (1, 3)]
    assert [(each["decode"], each["top_k"]) for each in result["results"]] == wanted
    for each in result["results"]:
        records = read_lines(Path(each["predictions"]))
        assert [record["id"] for record in records] == [question["id"] for question in questions()["dev"]]
        assert {len(record["passages"]) for record in records} == {each["top_k"]}
        scores = each["scores"]
        for name in ("em", "f1", f"recall_at_{each['top_k']}", "answer_in_context", "mrr_at_10"):
            assert scores[name][0] == pytest.approx(np.mean([record[name] for record in records]))
        assert scores["recall_at_1"][0] <= scores["recall_at_5"][0] if each["top_k"] == 1 else True
    # The same passages are found whatever reads them; of one passage concatenated and mixed are the same prompt.
    by_setting = {(each["decode"], each["top_k"]): read_lines(Path(each["predictions"])) for each in result["results"]}
    assert [line["prediction"] for line in by_setting[wanted[0]]] == [
        line["prediction"] for line in by_setting[wanted[2]]
    ]


def evaluated(finished, out, overrides=None, **fields):
    config = EvaluateConfig(run_dir=str(finished), eval_batch_size=2, out=str(out or ""), **fields)
    evaluation = evaluate_runs(config, overrides or {})
    print_evaluation(evaluation)
    return evaluation.as_json()


def test_what_training_found_is_not_decoded_again(finished, tmp_path):
    (result,) = evaluated(finished, tmp_path, eval_limit=2)["results"]
    assert result["predictions"] == str(finished / "predictions" / "test.after.jsonl")
    assert not list(tmp_path.glob("*.jsonl"))


def test_evaluation_repeats_what_training_found(finished, tmp_path, monkeypatch):
    """From the checkpoint, into another file: the table after training, line for line."""
    monkeypatch.setattr(runs, "holds", lambda *_: False)
    (result,) = evaluated(finished, tmp_path, eval_limit=2)["results"]
    assert result["predictions"] == str(tmp_path / "test.first2.concat.k3.jsonl")
    again = (tmp_path / "test.first2.concat.k3.jsonl").read_bytes()
    assert again == (finished / "predictions" / "test.after.jsonl").read_bytes()


def test_predictions_of_something_else_are_refused(finished, tmp_path):
    """Under the same name in a folder of one's own: other models, or another longest answer."""
    evaluated(finished, tmp_path, split="dev")
    before = (tmp_path / "dev.concat.k3.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"dev\.concat\.k3\.jsonl holds predictions of other models, questions or sett"):
        evaluated(finished, tmp_path, {"max_new_tokens": 3}, split="dev")
    assert (tmp_path / "dev.concat.k3.jsonl").read_bytes() == before


def test_the_answer_under_each_passage_is_written_on_request(finished, tmp_path):
    (result,) = evaluated(finished, tmp_path, split="dev", passage_answers=True)["results"]
    opened = open_run(finished)
    for record in read_lines(Path(result["predictions"])):
        for entry in record["passages"]:
            (row,) = opened.pipeline.store.rows_of([entry["id"]])
            prompt = opened.pipeline.prompts.prompt(opened.pipeline.passages([row]), record["question"], reserve=24).ids
            (tokens,) = opened.pipeline.generator.generate_tokens([prompt], opened.config.max_new_tokens)
            assert entry["answer"] == opened.pipeline.prediction(tokens)


def test_models_are_evaluated_as_they_are(world, finished, tmp_path):
    """Without a run: what the table before training holds."""
    models = {"embedder": str(world.embedder), "generator": str(world.generator), "data": str(world.data)}
    config = EvaluateConfig(**models, eval_limit=2, top_k="3", out=str(tmp_path))
    (result,) = evaluate_runs(config, {"max_new_tokens": open_run(finished).config.max_new_tokens}).as_json()["results"]
    before = read_lines(finished / "predictions" / "test.before.jsonl")
    found = read_lines(Path(result["predictions"]))
    assert [record["prediction"] for record in found] == [record["prediction"] for record in before]


def test_models_read_as_many_passages_as_there_are(world, tmp_path):
    """Of a corpus with fewer than the default number."""
    data = write_data(tmp_path / "data", passages()[:2], {"test": [questions()["train"][0]]})
    models = {"embedder": str(world.embedder), "generator": str(world.generator), "data": str(data)}
    config = EvaluateConfig(**models, top_k="2,1", out=str(tmp_path / "out"))
    results = evaluate_runs(config, {"max_new_tokens": 2}).as_json()["results"]
    assert [each["top_k"] for each in results] == [2, 1]
    with pytest.raises(UserError, match="--top_k=5 is more than the 2 passages"):
        evaluate_runs(EvaluateConfig(**models), {})


def test_a_file_of_questions_is_answered(finished, tmp_path):
    asked = questions()["train"][:3]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    result = evaluated(finished, tmp_path, questions=str(tmp_path / "mine.jsonl"))
    assert (result["questions"], result["n"]) == ("mine", 3)
    records = read_lines(tmp_path / "mine.concat.k3.jsonl")
    assert [record["id"] for record in records] == [question["id"] for question in asked]


def test_two_runs_are_compared_question_by_question(world, finished, tmp_path, capsys):
    other = world.folder / "commands-other"
    train(world.config(other, strategy="none", eval_limit=2))
    result = evaluated(finished, tmp_path, split="dev", paired_with=str(other))
    assert f"compared with {other} at step 0" in capsys.readouterr().out
    mine = read_lines(tmp_path / "dev.concat.k3.jsonl")
    theirs = read_lines(tmp_path / "paired" / "dev.concat.k3.jsonl")
    for pair in result["pairs"]:
        values = [[record[pair["metric"]] for record in records] for records in (mine, theirs)]
        assert pair["difference"] == paired_interval(*values)
        assert pair["p_value"] == paired_p_value(*values)
        assert pair["second"] - pair["first"] == pytest.approx(pair["difference"][0])
    answers = {"em", "f1", "contains", "answer_in_context"}
    retrieval = {f"{name}_at_{k}" for name in ("recall", "hit") for k in (1, 3, 5, 10, 20)} | {"mrr_at_10"}
    assert {pair["metric"] for pair in result["pairs"]} == answers | retrieval
    without = evaluated(finished, None, split="dev", paired_with=str(other))
    assert without["pairs"] == result["pairs"]
    assert (other / "predictions" / "dev.concat.k3.jsonl").is_file()


def test_runs_over_other_passages_make_no_pairs(world, finished, tmp_path):
    data = write_data(tmp_path / "data", passages()[:29], questions())
    train(world.config(tmp_path / "run", strategy="none", eval_limit=1, data=str(data)))
    with pytest.raises(UserError, match="retrieves from other passages than .*commands-run, so their scores cannot"):
        evaluated(finished, tmp_path / "out", split="dev", paired_with=str(tmp_path / "run"))
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_evaluated_as_it_stands(world, tmp_path, capsys):
    """Into a file that training does not take for its own table after the last step."""
    train(world.config(tmp_path / "run", max_steps=2, eval_limit=1))
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "predictions" / "test.after.jsonl").unlink()
    evaluate_runs(EvaluateConfig(run_dir=str(tmp_path / "run"), eval_limit=1), {})
    assert f"{tmp_path / 'run'} is not finished: its state of step 2 is used." in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run" / "predictions").glob("*.jsonl")}
    assert names == {"test.before.jsonl", "test.first1.concat.k3.jsonl"}


@pytest.mark.parametrize(
    ("fields", "overrides", "sentence"),
    [
        (
            {"decode": "concat,beam"},
            {},
            "--decode=beam is not known: choose from concat, rag_token, rag_sequence, none.",
        ),
        ({"top_k": "5;10"}, {}, "--top_k=5;10 is not a list of positive numbers: write it as 1,5,10."),
        ({"top_k": "0"}, {}, "--top_k=0 is not a list of positive numbers: write it as 1,5,10."),
        ({"top_k": "1,999"}, {}, "--top_k=999 is more than the "),
        ({"paired_with": "runs/typo"}, {}, "runs/typo holds no config.json: give --run_dir the folder of a ragjax.tra"),
        (
            {"decode": "rag_token"},
            {"temperature": 0.5},
            "--temperature=0.5 samples answers, which needs --decode=con",
        ),
        ({}, {"temperature": 0.5, "num_beams": 2}, "--temperature=0.5 samples answers, which needs --decode=concat"),
        ({}, {"top_p": 1.5}, "--top_p=1.5 is out of range: give a number above 0 and at most 1."),
        ({"questions": "nowhere.jsonl"}, {}, "nowhere.jsonl cannot be read (No such file or directory)"),
        ({"generator": "smollm2-135m"}, {}, "--run_dir already names the models: leave it out, or --embedder and"),
        ({"data": "sample"}, {}, "was made with a different --data (sha256"),
        ({"data": "nowhere"}, {}, 'there is no data folder "nowhere"'),
    ],
)
def test_what_cannot_be_evaluated_is_refused(finished, tmp_path, fields, overrides, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        evaluated(finished, tmp_path, overrides, **fields)
    assert not list(tmp_path.iterdir())


def test_a_split_without_questions_is_refused(finished, tmp_path, monkeypatch):
    opened = open_run(finished)
    without = dataclasses.replace(opened, dataset=dataclasses.replace(opened.dataset, dev=[]))
    monkeypatch.setattr(runs, "open_run", lambda *_, **__: without)
    with pytest.raises(UserError, match="dev split has no questions"):
        evaluated(finished, tmp_path, split="dev")


# --- ask


def test_ask_shows_the_answer_and_its_passages(world, finished):
    done = world.command("-m", "ragjax.ask", f"--run_dir={finished}", "Which number has the town", "Arby?")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Unable to initialize backend" not in done.stderr  # nor other lines that libraries log as INFO
    answer, *shown = [line for line in done.stdout.splitlines() if line]
    assert re.search(r"\(probability [01]\.\d{3}\)$", answer)
    number = r"(0\.\d{3}|1\.000)"
    pattern = rf"(\d)\. p\(z\|x\) = {number}  p\(z\|x,y\) = {number}  \[p(\d+)\]  (\w+): .*"
    places = [re.fullmatch(pattern, line) for line in shown]
    assert [int(match[1]) for match in places] == [1, 2, 3]
    assert all(PLACES[int(match[4])] == match[5] for match in places)
    shares = [float(match[2]) for match in places]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=2e-3)
    assert sum(float(match[3]) for match in places) == pytest.approx(1, abs=2e-3)


def test_programs_ask_line_by_line(world, finished):
    asked = ["Which number has the town Arby?", "Where is Corvo?"]
    command = ("-m", "ragjax.ask", f"--run_dir={finished}", "--json", "--top_k=2", "--decode=rag_sequence")
    record = json.dumps({"id": "q1", "question": asked[1]})
    done = world.command(*command, input=f"\ufeff{asked[0]}\r\n\r\n{record}\r\n")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["question"] for line in lines] == asked
    for line in lines:
        assert line.keys() == {"question", "answer", "probability", "passages"}
        assert [entry.keys() for entry in line["passages"]] == [{"id", "title", "text", "probability", "posterior"}] * 2


def logits_of(generator, prompt, text) -> float:
    """log p(answer and its end | prompt), from the plain logits."""
    ids = [*prompt, *generator.answer_ids(text)]
    logits = np.asarray(generator.logits(np.array([ids]))[0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.array([log_probs[place - 1, ids[place]] for place in range(len(prompt), len(ids))])


@pytest.mark.parametrize("decoder", ["concat", "rag_token", "rag_sequence"])
def test_an_answer_has_the_probability_of_its_tokens(finished, decoder):
    """As the decoder defines it, and the posterior by Bayes' rule, from each prompt's plain logits."""
    opened = open_run(finished)
    pipeline, question = opened.pipeline, questions()["test"][0]["question"]
    shown = []
    answer = ask(opened.pipeline, question, dataclasses.replace(opened.config, top_k=2, decode=decoder), shown.append)
    assert shown[-1] == answer.text
    assert len(shown) > 1 or decoder == "rag_sequence"
    assert answer.probabilities.sum() == pytest.approx(1)
    prompts = [pipeline.prompts.prompt([passage], question, reserve=24).ids for passage in answer.passages]
    under = np.exp([logits_of(pipeline.generator, prompt, answer.text) for prompt in prompts])
    joint = answer.probabilities * under.prod(axis=1)
    np.testing.assert_allclose(answer.posterior, joint / joint.sum(), rtol=1e-3)
    together = pipeline.prompts.prompt(answer.passages, question, reserve=24).ids
    wanted = {
        "concat": np.exp(logits_of(pipeline.generator, together, answer.text).sum()),
        "rag_token": (answer.probabilities @ under).prod(),
        "rag_sequence": joint.sum(),
    }[decoder]
    assert answer.probability == pytest.approx(wanted, rel=1e-3)


def test_a_very_unlikely_answer_has_a_posterior(finished, monkeypatch):
    """exp(-1000) is too small for a float64; the ratio of two such numbers is not."""
    opened = open_run(finished)
    scored = [np.array([-1000.0]), np.array([-1001.0])]
    monkeypatch.setattr(Generator, "score_tokens", lambda self, prompts, answers: scored[: len(prompts)])
    answer = ask(opened.pipeline, questions()["test"][0]["question"], dataclasses.replace(opened.config, top_k=2))
    first, second = answer.probabilities * [1, np.exp(-1)]
    np.testing.assert_allclose(answer.posterior, [first / (first + second), second / (first + second)], rtol=1e-9)


def test_a_question_longer_than_the_window_is_refused(finished):
    opened = open_run(finished)
    with pytest.raises(UserError, match=r'the question "Where is Arby\? .*\.\.\.", its .* are \d+ tokens longer'):
        ask(opened.pipeline, "Where is Arby? " * 400, opened.config)


def test_a_question_is_needed(world, finished):
    for arguments in ((), ("",), ("  ",)):
        done = world.command("-m", "ragjax.ask", f"--run_dir={finished}", *arguments, input="\n")
        assert done.returncode == 1
    assert "error: Ask something" in done.stderr


@in_checkout
def test_every_default_stands_in_the_table():
    """docs/defaults.md: `| --flag | default | why |`, with the default as it is now."""
    rows = {}
    for line in DEFAULTS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if match := re.fullmatch(r"`?--(\w+)`?", cells[0]):
            assert match[1] not in rows, f"--{match[1]} stands there twice"
            rows[match[1]] = cells[1:]
    assert rows.keys() == {field.name for field in dataclasses.fields(RunConfig)}
    for field in dataclasses.fields(RunConfig):
        default = rows[field.name][0]
        assert same_value(default.strip('`" '), field.default), f"--{field.name}: {default} is {field.default!r}"


def same_value(shown: str, value) -> bool:
    """Whether the table's text says the value: numbers in any spelling, true/false, and words for what is left open."""
    if value is None:
        return shown.lower() in {"empty", "none", "the phase's"}
    if isinstance(value, tuple):
        return shown == flag_text(value)
    if isinstance(value, bool):
        return shown.lower() == str(value).lower()
    if isinstance(value, int | float):
        try:
            return float(shown) == value
        except ValueError:
            return False
    return shown == value or (value == "" and shown.lower() in {"", "empty", "none", "runs/strategy"})
