"""ragjax.evaluation.predictions: predictions, their order and score, and evaluations that were cut off."""

import dataclasses
import json

import numpy as np
import pytest

from ragjax import metrics
from ragjax.config import RunConfig
from ragjax.data.prompts import Prompt
from ragjax.data.questions import Passage, Question
from ragjax.errors import UserError
from ragjax.evaluation import predictions
from ragjax.evaluation.predictions import evaluate, summarise
from ragjax.generation import Decoded
from ragjax.pipeline import first_line
from ragjax.pretrained import load_generator
from ragjax.retrieval import Retrieval
from tests.tiny import write_tiny_llama

PASSAGES = [Passage(f"p{i}", "", f"passage {i}") for i in range(8)]
# Prompts of very different lengths, the shortest in the middle: batches by length mix up the order of the file.
QUESTIONS = [
    Question("long", "x" * 40, ("answer of long",), ("p0",)),
    Question("short", "x", ("answer of short", "The other."), ("p4", "p7")),
    Question("middle", "x" * 20, ("answer of middle",), ()),
    Question("longest", "x" * 50, ("something else",), ("p7",)),
    Question("shorter", "x" * 5, ("answer of shorter",), ("p1", "p2")),
]


class Pipeline:
    """Stands in for the real one: passages p0, p1, .. for everyone, "answer of ID" for each question."""

    class Size:
        layer_weights = head_weights = lora_weights = layers = attention_width = 1

    key, params, content_hash = "tiny", {}, "corpus"

    def __init__(self):
        self.batches: list[list[str]] = []  # as they were decoded, by question id
        self.seeds: dict[str, int] = {}
        self.prompt_passages: dict[str, list[int]] = {}
        self.embedder = self.generator = self.prompts = self.store = self
        self.size, self.cut, self.is_encoded_anew = self.Size(), frozenset(), False
        self.dies_at: int | None = None
        self._ids = {question.question: question.id for question in QUESTIONS}

    def __len__(self):
        return len(PASSAGES)

    def query_tokens(self, texts):
        return [list(text) for text in texts]

    def retrieve_each(self, texts, counts):
        return {k: self._found(len(texts), k) for k in counts}

    def _found(self, questions, k):
        rows = np.tile(np.arange(k), (questions, 1))
        return Retrieval(rows, np.tile(np.float32(0.9 - 0.1 * np.arange(k)), (questions, 1)))

    def ids_of(self, rows):
        return [PASSAGES[row].id for row in rows]

    def passages(self, rows):
        return [PASSAGES[row] for row in rows]

    def check_room(self, question, passages, reserve):
        pass

    def decoding_prompts(self, text, rows, scores, config):
        assert len(rows) == len(scores) == config.top_k
        self.prompt_passages[self._ids[text]] = list(rows)
        prompt = Prompt([ord(character) for character in text], self.cut)
        return [prompt] * len(rows), np.log(np.full(len(rows), 1 / len(rows)))

    def prepared(self, arrangement):
        return self

    def decode_answers(self, prompts, log_weights, config, batch_size, seeds):
        if self.dies_at == len(self.batches):
            raise KeyboardInterrupt
        assert len(prompts) <= batch_size
        assert log_weights.shape == (len(prompts), config.top_k)
        ids = [self._ids["".join(map(chr, group[0]))] for group in prompts]
        self.batches.append(ids)
        self.seeds |= dict(zip(ids, seeds, strict=True))
        return [Decoded([ord(character) for character in f"answer of {id}"], -1.5, 30) for id in ids]

    def prediction(self, tokens):
        return first_line("".join(map(chr, tokens)))


def run_evaluation(pipeline, path, questions=QUESTIONS, **changes):
    options = {"top_k": 3, "score_scale": 20.0, "max_new_tokens": 4, "eval_batch_size": 2} | changes
    measured = evaluate(pipeline, questions, path, RunConfig(**options))
    return measured.records, measured.cost


def test_records_stand_in_the_order_of_the_questions_whatever_the_batches(tmp_path):
    pipeline = Pipeline()
    records, _ = run_evaluation(pipeline, tmp_path / "out" / "p.jsonl")
    assert pipeline.batches == [["short", "shorter"], ["middle", "long"], ["longest"]]
    assert [record["id"] for record in records] == [question.id for question in QUESTIONS]
    assert [record["prediction"] for record in records] == [f"answer of {question.id}" for question in QUESTIONS]
    assert [record["em"] for record in records] == [1, 1, 1, 0, 1]
    lines = (tmp_path / "out" / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_changes_nothing(tmp_path, batch_size):
    records, _ = run_evaluation(Pipeline(), tmp_path / "p.jsonl", eval_batch_size=batch_size)
    assert records == run_evaluation(Pipeline(), tmp_path / "q.jsonl")[0]


def test_recall_is_taken_at_five_though_the_prompt_holds_fewer(tmp_path):
    pipeline = Pipeline()
    records, _ = run_evaluation(pipeline, tmp_path / "p.jsonl", top_k=2)
    assert pipeline.prompt_passages["short"] == [0, 1]
    assert [[passage["id"] for passage in record["passages"]] for record in records] == [["p0", "p1"]] * 5
    assert [record["recall_at_5"] for record in records] == [1, 0.5, None, 0, 1]  # p4 is the fifth, p7 the eighth
    assert [record["hit_at_5"] for record in records] == [1, 1, None, 0, 1]
    shares = [passage["probability"] for passage in records[0]["passages"]]
    assert shares == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], abs=1e-6)  # 20 * (0.9 - 0.8)


def test_recall_looks_no_further_than_five_though_the_prompt_holds_more(tmp_path):
    records, _ = run_evaluation(Pipeline(), tmp_path / "p.jsonl", top_k=8)
    assert [len(record["passages"]) for record in records] == [8] * 5
    assert [record["recall_at_5"] for record in records] == [1, 0.5, None, 0, 1]


def test_summary_means_leave_out_questions_without_positives(tmp_path):
    records, _ = run_evaluation(Pipeline(), tmp_path / "p.jsonl")
    summary = summarise(records)
    assert summary["recall_at_5"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert summary["em"] == pytest.approx(4 / 5)
    assert summarise(records[2:3])["recall_at_5"] is None


def test_a_finished_file_is_read_back(tmp_path):
    first = Pipeline()
    records, cost = run_evaluation(first, tmp_path / "p.jsonl")
    again = Pipeline()
    assert run_evaluation(again, tmp_path / "p.jsonl") == (records, cost)
    assert again.batches == []


def test_cut_passages_are_counted_whoever_answers(tmp_path):
    """By the first process, by one that continues it, and by one that reads the finished file back."""
    path, config = tmp_path / "p.jsonl", RunConfig(top_k=3, eval_batch_size=2)
    for dies_at in (1, None, 0):
        pipeline = Pipeline()
        pipeline.cut, pipeline.dies_at = frozenset({"p3"}), dies_at
        if dies_at == 1:
            with pytest.raises(KeyboardInterrupt):
                evaluate(pipeline, QUESTIONS, path, config)
        else:
            assert evaluate(pipeline, QUESTIONS, path, config).passages_cut == {"p3"}
    assert json.loads((tmp_path / "p.cost.json").read_text())["passages_cut"] == ["p3"]
    assert evaluate(Pipeline(), QUESTIONS, tmp_path / "q.jsonl", config).passages_cut == frozenset()


def interrupted(path, at: int, questions=QUESTIONS, **changes) -> None:
    pipeline = Pipeline()
    pipeline.dies_at = at
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(pipeline, path, questions, **changes)


def partial(path):
    return path.with_name(path.name + ".partial")


def test_an_interrupted_evaluation_continues_after_its_last_batch(tmp_path):
    path = tmp_path / "p.jsonl"
    interrupted(path, at=2)
    assert not path.exists()
    pipeline = Pipeline()
    records, cost = run_evaluation(pipeline, path)
    assert pipeline.batches == [["longest"]]
    whole, whole_cost = run_evaluation(Pipeline(), tmp_path / "whole.jsonl")
    assert records == whole
    assert (cost.flops, cost.tokens) == (whole_cost.flops, whole_cost.tokens)
    assert not partial(path).exists()


@pytest.mark.parametrize("damage", [b"{]", b"\xff\xfe", b"7", b'["a", []]', None])
def test_a_damaged_line_is_named(tmp_path, damage):
    """Not a traceback; a line that was cut off by a kill is the file's last and has no end."""
    path = tmp_path / "p.jsonl"
    interrupted(path, at=2)
    lines = partial(path).read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    lines[1] = lines[1].replace(b'"id"', b'"is"') if damage is None else damage + b"\n"
    partial(path).write_bytes(b"".join(lines))
    with pytest.raises(UserError) as caught:
        run_evaluation(Pipeline(), path)
    assert str(caught.value).startswith(f"{partial(path)} line 2 is damaged (")
    assert str(caught.value).endswith("): delete it, and its questions will be answered again")
    partial(path).unlink()
    assert run_evaluation(Pipeline(), path)[0] == run_evaluation(Pipeline(), tmp_path / "whole.jsonl")[0]


def test_a_batch_whose_line_was_cut_off_is_done_again(tmp_path):
    path = tmp_path / "p.jsonl"
    interrupted(path, at=2)
    partial(path).write_bytes(partial(path).read_bytes()[:-9])
    pipeline = Pipeline()
    records, _ = run_evaluation(pipeline, path)
    assert pipeline.batches == [["middle", "long"], ["longest"]]
    assert records == run_evaluation(Pipeline(), tmp_path / "whole.jsonl")[0]


@pytest.mark.parametrize(
    "earlier",
    [
        {"eval_batch_size": 1},
        {"eval_batch_size": 3},
        {"questions": QUESTIONS[2:]},
        {"questions": QUESTIONS[:4]},
        {"max_new_tokens": 5},
        {"decode": "rag_token"},
    ],
)
def test_batches_of_another_evaluation_are_not_taken_for_ours(tmp_path, earlier):
    """--eval_limit and --eval_batch_size may differ between two commands on one predictions file."""
    path = tmp_path / "p.jsonl"
    interrupted(path, at=1, **earlier)
    records, _ = run_evaluation(Pipeline(), path)
    assert records == run_evaluation(Pipeline(), tmp_path / "whole.jsonl")[0]


def test_scores_are_those_of_the_metrics_over_all_accepted_answers(tmp_path):
    (record,), _ = run_evaluation(Pipeline(), tmp_path / "p.jsonl", QUESTIONS[1:2])
    for name, function in (("em", metrics.exact_match), ("f1", metrics.f1), ("contains", metrics.contains_answer)):
        assert record[name] == function("answer of short", ["answer of short", "The other."])
    assert record["answers"] == ["answer of short", "The other."]


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("  Paris \n", "Paris"),
        ("Paris\n\n### Question:\nWhat", "Paris"),
        ("\n\nParis\nRome", "Paris"),
        ("Paris\r\nRome", "Paris"),
        ("\tSão Paulo\u2029x", "São Paulo"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_a_prediction_is_the_first_line_stripped(text, prediction):
    assert first_line(text) == prediction


def test_special_tokens_are_no_part_of_a_prediction(tmp_path):
    generator = load_generator(write_tiny_llama(tmp_path))
    ids = generator.tokenizer("the town", add_special_tokens=False)["input_ids"]
    assert generator.decode([1, *ids, 0, 2]) == "the town"


def test_nothing_is_asked_twice_when_writing_fails(tmp_path, monkeypatch):
    """What was answered before the disk filled up is kept."""
    path, append = tmp_path / "p.jsonl", predictions.append_line

    def full(target, line):
        if "middle" in line:
            raise UserError("no space")
        append(target, line)

    monkeypatch.setattr(predictions, "append_line", full)
    with pytest.raises(UserError, match="no space"):
        run_evaluation(Pipeline(), path)
    monkeypatch.undo()
    pipeline = Pipeline()
    run_evaluation(pipeline, path)
    assert pipeline.batches == [["middle", "long"], ["longest"]]


def test_costs_are_written_beside_the_predictions(tmp_path):
    _, cost = run_evaluation(Pipeline(), tmp_path / "test.after.jsonl")
    written = json.loads((tmp_path / "test.after.cost.json").read_text())
    assert written.pop("made_from")["top_k"] == 3
    assert written == {**dataclasses.asdict(cost), "passages_cut": []}
    # The embedder's question, three prompts as long, and 30 new tokens a question.
    assert cost.tokens == 4 * sum(len(question.question) for question in QUESTIONS) + 30 * len(QUESTIONS)


@pytest.mark.parametrize(
    "other",
    [
        {"top_k": 4},
        {"num_beams": 2},
        {"score_scale": 1.0},
        {"questions": QUESTIONS[:4]},
        {"sample_seed": 1},
        {"prompt": "chat"},
        {"max_passage_tokens": 5},
    ],
)
def test_a_finished_file_of_something_else_is_refused(tmp_path, other):
    run_evaluation(Pipeline(), tmp_path / "p.jsonl")
    before = (tmp_path / "p.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds predictions of other models, questions or settings: move it away"):
        run_evaluation(Pipeline(), tmp_path / "p.jsonl", **other)
    assert (tmp_path / "p.jsonl").read_bytes() == before


def test_a_finished_file_of_other_models_is_refused(tmp_path):
    run_evaluation(Pipeline(), tmp_path / "p.jsonl")
    for name, value in (("key", "other"), ("content_hash", "other"), ("is_encoded_anew", True)):
        other = Pipeline()
        setattr(other, name, value)
        with pytest.raises(UserError, match="holds predictions of other models"):
            run_evaluation(other, tmp_path / "p.jsonl")


def test_a_finished_file_is_read_back_whatever_its_texts_hold(tmp_path):
    """Some characters end a line in Python and none in JSON."""
    pipeline = Pipeline()
    odd = dataclasses.replace(QUESTIONS[0], answers=("one\u2028two", "three\x85four"))
    records, _ = run_evaluation(pipeline, tmp_path / "p.jsonl", [odd])
    assert run_evaluation(pipeline, tmp_path / "p.jsonl", [odd])[0] == records
    assert records[0]["answers"] == list(odd.answers)


def test_the_batch_size_is_no_setting_of_a_finished_file(tmp_path):
    records, _ = run_evaluation(Pipeline(), tmp_path / "p.jsonl")
    assert run_evaluation(Pipeline(), tmp_path / "p.jsonl", eval_batch_size=3)[0] == records


def test_draws_depend_on_a_question_s_place_and_the_seed(tmp_path):
    seeds = []
    for number, (batch_size, seed) in enumerate([(2, 0), (3, 0), (2, 1)]):
        pipeline = Pipeline()
        options = {"eval_batch_size": batch_size, "sample_seed": seed}
        run_evaluation(pipeline, tmp_path / f"{number}.jsonl", **options)
        seeds.append(pipeline.seeds)
    assert seeds[0] == seeds[1]
    assert set(seeds[0].values()).isdisjoint(seeds[2].values())
    assert len(set(seeds[0].values())) == len(QUESTIONS)


def test_retrieval_is_scored_at_the_passages_read_too(tmp_path):
    """p4 is the fifth passage, p7 the eighth; "passage 4" is accepted where it is read."""
    asked = [dataclasses.replace(QUESTIONS[1], answers=("passage 4",)), QUESTIONS[3]]
    wide, _ = run_evaluation(Pipeline(), tmp_path / "wide.jsonl", asked, top_k=8)
    narrow, _ = run_evaluation(Pipeline(), tmp_path / "narrow.jsonl", asked, top_k=4)
    for name, (eight, four) in {
        "recall_at_5": ([0.5, 0], [0.5, 0]),
        "hit_at_5": ([1, 0], [1, 0]),
        "mrr_at_10": ([1 / 5, 1 / 8], [1 / 5, 1 / 8]),
        "answer_in_context": ([1, 0], [0, 0]),
    }.items():
        assert [record[name] for record in wide] == pytest.approx(eight)
        assert [record[name] for record in narrow] == pytest.approx(four)
    assert [(record["recall_at_8"], record["hit_at_8"]) for record in wide] == [(1, 1), (1, 1)]
    assert [(record["recall_at_4"], record["hit_at_4"]) for record in narrow] == [(0, 0), (0, 0)]
