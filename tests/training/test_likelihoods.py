"""The frozen generator's kept answer log-probs: what they are worth, when they are found again, what is forgotten."""

import dataclasses
import functools
import hashlib
import json

import jax
import numpy as np
import pytest

from ragjax.costs import Ledger, forward_flops
from ragjax.data.batches import sequence_lengths
from ragjax.data.dataset import load_dataset
from ragjax.data.prompts import PromptBuilder
from ragjax.data.questions import Passage
from ragjax.errors import UserError
from ragjax.models.lora import LoraConfig
from ragjax.parallel import Replicated
from ragjax.pipeline import build_pipeline, load_models
from ragjax.pretrained import init_lora, load_generator
from ragjax.retrieval import ArrayVectors, ExactIndex, Retriever
from ragjax.scoring import score_answers
from ragjax.training.answer_scorer import RowLimits, row_limits
from ragjax.training.signals import ANSWERS, AnswerAssembler, LikelihoodAssembler
from ragjax.training.step import summed_loss
from ragjax.training.strategies import STRATEGIES, Phase
from tests.tiny_runs import batch_of, run_of, tiny_world
from tests.training.signals_worker import LIMITS, Scorer, on_eight_devices, pairs_of, placed, random_adapters

RETRIEVER = STRATEGIES["two_phase"][1]
# The same phase with the generator's forward pass inside the step.
WHOLE_GRAPH = Phase("whole", ("embedder",), ANSWERS, RETRIEVER.rates)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def dataset(world):
    """The tiny data set, its training answers of one to four words."""
    dataset = load_dataset(world.data)
    train = [
        dataclasses.replace(question, answers=(question.answers[0] + " north" * (i % 4),))
        for i, question in enumerate(dataset.train)
    ]
    return dataclasses.replace(dataset, train=train)


@pytest.fixture(scope="module")
def pipeline(world, dataset):
    """Tiny models, the generator with adapters of which neither factor is zero."""
    config = world.config("unused", remat="none")
    pipeline = build_pipeline(config, dataset, *load_models(config), show_progress=False)
    return pipeline.with_trained({"generator": {"lora": random_adapters(pipeline.generator.lora, 1)}})


@pytest.fixture(scope="module")
def generator(pipeline):
    return pipeline.generator


@pytest.fixture(scope="module")
def pairs(generator):
    return pairs_of(generator)


# --- the embedder's gradient


@pytest.mark.parametrize(
    ("objective", "retriever"),
    [("rag_token", "marginal"), ("rag_sequence", "marginal"), ("rag_token", "emdr2")],
)
def test_kept_scores_give_the_gradient_of_the_whole_graph(world, dataset, pipeline, tmp_path, objective, retriever):
    """Four questions (and a filler) under the same passages, with the generator in the graph and with numbers.

    With the very numbers of the graph the gradients agree to 1e-6. The kept ones come from other batches: a sum of
    log-probs of about -20 is then rounded otherwise, by 1e-6, and so is each passage's share in the answer.
    """
    config = world.config(
        tmp_path, objective=objective, retriever_objective=retriever, batch_size=5, dev_every=0, score_scale=5.0
    )
    questions, rng = dataset.train[:4], np.random.default_rng(2)
    # The tiny embedder's passages are nearly parallel: a gradient through them is a difference of almost equal numbers.
    vectors = rng.standard_normal((len(dataset.passages), pipeline.embedder.config.hidden_size)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pipeline = dataclasses.replace(pipeline, retriever=Retriever(ExactIndex(vectors), ArrayVectors(vectors)))
    rows = np.stack([rng.choice(len(dataset.passages), config.top_k, replace=False) for _ in questions])

    run = run_of(config, pipeline, dataset)
    graph = AnswerAssembler(run, WHOLE_GRAPH.trains)
    asked = batch_of(graph, questions)
    batch = first(graph.with_passages(asked, rows).batch)
    frozen = {"generator": pipeline.generator.variables}
    expected, (sums, scores) = gradient_and_scores(graph.objective, pipeline, frozen, batch)

    keeper = LikelihoodAssembler(run, RETRIEVER.trains)
    found, _ = keeper.score(asked, [rows], placed(run), Ledger())
    kept = first(keeper.scored_batch(asked, rows, found))
    # Room for longer answers than these.
    padding = kept.answer_mask.shape[1] - scores.shape[2]
    mask, scores = (
        np.pad(batch.rows.answer_mask, ((0, 0), (0, padding))),
        np.pad(scores, ((0, 0), (0, 0), (0, padding))),
    )
    np.testing.assert_array_equal(kept.answer_mask, mask)
    scores = np.where(mask[:, None], scores, 0.0)
    # Eight units in the last place of the largest: 2 were seen, and 6 where LLVM does not optimise (`make test`).
    rounding = 8 * np.spacing(np.abs(scores).max())
    np.testing.assert_allclose(kept.answer_log_probs, scores, rtol=0, atol=rounding)
    for numbers, tolerance in ((kept._replace(answer_log_probs=scores), 1e-6), (kept, 1e-5)):
        got, their_sums = embedder_gradient(keeper.objective, pipeline, {}, numbers)
        assert set(their_sums) == set(sums)
        for name, value in sums.items():
            np.testing.assert_allclose(their_sums[name], value, rtol=tolerance, err_msg=name)
        largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
        for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            # A bias on all keys changes nothing under a softmax: its gradient is rounding noise.
            norm = largest if name.endswith("self/key/bias") else np.linalg.norm(other)
            assert norm > 0, name
            assert np.linalg.norm(one - other) <= tolerance * norm, name


@functools.partial(jax.jit, static_argnums=0)
def compiled_with_scores(objective, trainable, frozen, batch):
    """The graph's gradient, sums and scores out of one program: another one rounds the scores otherwise."""

    def loss(trainable):
        total, sums = summed_loss(objective, trainable, frozen, batch, None)
        return total, (sums, score_answers(objective.generator, frozen["generator"], batch.rows))

    return jax.grad(loss, has_aux=True)(trainable)


def gradient_and_scores(objective, pipeline, frozen, batch):
    """(gradient, (sums, scores [B, K, T])) of the graph."""
    return jax.device_get(compiled_with_scores(objective, {"embedder": pipeline.embedder.variables}, frozen, batch))


compiled_gradient = jax.jit(jax.grad(summed_loss, argnums=1, has_aux=True), static_argnums=0)


def embedder_gradient(objective, pipeline, frozen, batch):
    """(gradient, sums)."""
    trainable = {"embedder": pipeline.embedder.variables}
    return jax.device_get(compiled_gradient(objective, trainable, frozen, batch, None))


def first(batch):
    """The one device's one micro-batch."""
    return jax.tree.map(lambda leaf: leaf[0, 0], batch)


def test_an_assembler_scores_what_is_new_and_nothing_else(world, dataset, pipeline, tmp_path):
    config = world.config(tmp_path, dev_every=0)
    run = run_of(config, pipeline, dataset)
    assembler = LikelihoodAssembler(run, RETRIEVER.trains)
    questions, ledger = dataset.train[:2], Ledger()
    scored = assembler.assemble(batch_of(assembler, questions), placed(run), ledger)
    lengths = []
    for question, rows in zip(questions, scored.passage_rows, strict=True):
        answer = pipeline.prompts.answer(question.answers[0])
        for passage in pipeline.passages(rows):
            lengths.append(len(pipeline.prompts.prompt([passage], question.question, 9).ids) + len(answer) - 1)
    assert scored.figures["generator_tokens"] == sum(lengths) == ledger.part("generator").tokens
    assert ledger.part("generator").backward_tokens == 0
    assert set(scored.work) == {"embedder"} and scored.work["embedder"].backward_tokens > 0
    assert (assembler.position, len(assembler.likelihoods)) == (1, 6)
    again = assembler.assemble(batch_of(assembler, questions, step=1), placed(run), ledger)
    assert again.figures["generator_tokens"] == 0 and ledger.part("generator").tokens == sum(lengths)
    jax.tree.map(np.testing.assert_array_equal, again.batch, scored.batch)
    assembler.rewind(0)
    assert (assembler.position, len(assembler.likelihoods)) == (0, 0)


# --- values


def test_scores_are_the_generators_whatever_batch_they_come_in(generator, pairs, tmp_path):
    """70 pairs of different lengths (17 rows and more), some of them alone, answers of a program of their own."""
    prompts, answers = pairs
    assert sum(len(answer) > LIMITS.usual_answer for answer in answers) > 2
    expected = generator.score_tokens(prompts, answers)
    together = Scorer(generator, LIMITS, tmp_path / "together.jsonl")
    scores, cost = together.score(prompts, answers)
    assert [score.dtype for score in scores] == [np.float32] * len(prompts)
    lengths = sequence_lengths([[prompt] for prompt in prompts], answers)
    assert sum(lengths) > 16 * LIMITS.row_length  # more than one call
    assert cost.tokens == sum(lengths) and cost.backward_tokens == 0
    assert cost.flops == pytest.approx(forward_flops(generator.size, lengths, sum(map(len, answers))))
    for got, other in zip(scores, expected, strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-5, atol=1e-5)
    alone = Scorer(generator, LIMITS, tmp_path / "alone.jsonl")
    long = next(i for i, answer in enumerate(answers) if len(answer) > LIMITS.usual_answer)
    for i in (0, 1, long):
        ((score,), _) = alone.score([prompts[i]], [answers[i]])
        np.testing.assert_allclose(score, expected[i], rtol=1e-5, atol=1e-5)


def test_scores_of_texts_are_answer_log_probs(generator, tmp_path):
    prompts, answers = ["Who wrote the book?", "The old town is"], ["The author", "under the stone bridge"]
    scorer = Scorer(generator, LIMITS, tmp_path / "a.jsonl")
    scores, _ = scorer.score([*map(generator.prompt_ids, prompts)], [*map(generator.answer_ids, answers)])
    for got, expected in zip(scores, generator.answer_log_probs(prompts, answers), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_second_call_finds_the_same_bits(generator, pairs, tmp_path):
    prompts, answers = (part[:5] for part in pairs)
    path = tmp_path / "a.jsonl"
    scorer = Scorer(generator, LIMITS, path)
    first, _ = scorer.score(prompts, answers)
    content = path.read_bytes()
    for again in (scorer, Scorer(generator, LIMITS, path)):
        # In another order, a pair twice, and all by themselves.
        order = [3, 1, 1, 4, 0, 2]
        scores, cost = again.score([prompts[i] for i in order], [answers[i] for i in order])
        assert (cost.tokens, cost.flops, again.position, len(again)) == (0, 0.0, 1, 5)
        for i, score in zip(order, scores, strict=True):
            assert score.dtype == np.float32
            np.testing.assert_array_equal(score, first[i])
    assert path.read_bytes() == content


def test_a_pair_that_comes_twice_is_scored_once(generator, pairs, tmp_path):
    prompts, answers = pairs
    scorer = Scorer(generator, LIMITS, tmp_path / "a.jsonl")
    scores, cost = scorer.score([prompts[0], prompts[1], prompts[0]], [answers[0], answers[1], answers[0]])
    assert len(scorer) == 2
    assert cost.tokens == sum(len(prompts[i]) + len(answers[i]) - 1 for i in (0, 1))
    np.testing.assert_array_equal(scores[0], scores[2])
    assert not np.array_equal(scores[0], scores[1])


# --- which places the values come from


def echo(variables, rows):
    """In place of log-probs: each answer token, and a thousand times the token in the place that predicts it."""
    devices, size = rows.answer_index.shape[:2]
    values = np.zeros((devices, size, rows.answer_index.shape[3]), np.float32)
    for device, place in np.ndindex(devices, size):
        row, column = np.moveaxis(rows.answer_index[device, place, 0], -1, 0)
        values[device, place] = rows.answer_tokens[device, place] + 1000 * rows.tokens[device, row, column]
    return values


@pytest.fixture
def echoing(monkeypatch):
    """Nothing is computed, nothing is compiled."""
    monkeypatch.setattr(Replicated, "compile_map", lambda self, function: echo)


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_every_pair_gets_its_own_values(generator, tmp_path, monkeypatch, echoing, devices):
    """Packed into rows, rows into calls, calls over devices: for any number of pairs."""
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    rng = np.random.default_rng(devices)
    for case, count in enumerate([1, 2, 7, 40, 150, 400]):
        prompts = [rng.integers(0, 300, rng.integers(3, 30)).tolist() for _ in range(count)]
        answers = [rng.integers(0, 300, rng.choice([1, 2, 4, 9])).tolist() for _ in range(count)]
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        limits = row_limits(lengths, 3, max(lengths), list(map(len, answers)))
        scorer = Scorer(generator, dataclasses.replace(limits, usual_answer=4), tmp_path / f"{case}.jsonl")
        scores, _ = scorer.score(prompts, answers)
        for prompt, answer, score in zip(prompts, answers, scores, strict=True):
            np.testing.assert_array_equal(score, np.array(answer) + 1000 * np.array([prompt[-1], *answer[:-1]]))


# --- keys


def scored_tokens(generator, path, prompt, answer) -> int:
    """0 where the pair is found in the file."""
    return Scorer(generator, LIMITS, path).score([prompt], [answer])[1].tokens


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"param_dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "nf4"}],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_another_way_to_store_or_compute_never_hits(world, generator, tmp_path, echoing, changes):
    path = tmp_path / "a.jsonl"
    assert scored_tokens(generator, path, [5, 6], [7]) == 2
    assert scored_tokens(generator, path, [5, 6], [7]) == 0
    other = load_generator(world.generator, lora=generator.config.lora, **{"param_dtype": "float32"} | changes)
    assert scored_tokens(dataclasses.replace(other, lora=generator.lora), path, [5, 6], [7]) == 2


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "full"}], ids=str)
def test_another_way_to_compile_hits(world, generator, tmp_path, echoing, changes):
    path = tmp_path / "a.jsonl"
    assert scored_tokens(generator, path, [5, 6], [7]) == 2
    other = load_generator(world.generator, lora=generator.config.lora, **changes)
    assert other.config != generator.config
    assert scored_tokens(dataclasses.replace(other, lora=generator.lora), path, [5, 6], [7]) == 0


def test_one_changed_weight_never_hits(world, generator, tmp_path, echoing):
    """Of the adapters; of the source's file; of the base, where it is what was trained."""
    path = tmp_path / "a.jsonl"
    assert scored_tokens(generator, path, [5, 6], [7]) == 2
    changed = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-6), generator.lora)
    for name in ("q_proj", "v_proj"):
        layers = generator.lora["layers"]["self_attn"]
        lora = {
            "layers": {
                **generator.lora["layers"],
                "self_attn": {**layers, name: changed["layers"]["self_attn"][name]},
            }
        }
        assert scored_tokens(dataclasses.replace(generator, lora=lora), path, [5, 6], [7]) == 2
    source = dataclasses.replace(generator.source, sha256=hashlib.sha256(b"another").hexdigest())
    assert scored_tokens(dataclasses.replace(generator, source=source), path, [5, 6], [7]) == 2
    wider = load_generator(world.generator, lora=LoraConfig(4, alpha=3.0))
    assert scored_tokens(dataclasses.replace(wider, lora=generator.lora), path, [5, 6], [7]) == 2
    plain = load_generator(world.generator)
    assert scored_tokens(plain, path, [5, 6], [7]) == 2
    assert scored_tokens(plain, path, [5, 6], [7]) == 0
    norm = plain.params["norm"]["scale"].at[3].add(1e-6)
    trained = dataclasses.replace(plain, params={**plain.params, "norm": {"scale": norm}})
    assert scored_tokens(trained, path, [5, 6], [7]) == 2


def test_fresh_adapters_are_no_trained_ones(world, generator, tmp_path, echoing):
    path = tmp_path / "a.jsonl"
    fresh = dataclasses.replace(generator, lora=init_lora(generator, seed=0))
    assert scored_tokens(fresh, path, [5, 6], [7]) == 2
    assert scored_tokens(generator, path, [5, 6], [7]) == 2


def test_another_prompt_or_answer_never_hits(generator, tmp_path, echoing):
    """Style, question, passage, where the passage is cut, the answer; a limit that cuts nothing is no change."""
    passage = Passage("p", "Town", "The river runs past the old town and under the stone bridge to the sea.")
    tokens = len(PromptBuilder(generator.tokenizer, 2, 999, 500).passage(passage))

    def pair(limit=99, style="paper", question="Which country?", text=passage.text, title="Town", answer="sea"):
        builder = PromptBuilder(generator.tokenizer, generator.eos_token_id, limit, 500, style)
        ids = builder.answer(answer)
        return builder.prompt([Passage("p", title, text)], question, reserve=len(ids)).ids, ids

    path = tmp_path / "a.jsonl"
    limits = RowLimits(512, 4, 8, 40)

    def is_new(**changes) -> bool:
        prompt, answer = pair(**changes)
        return Scorer(generator, limits, path).score([prompt], [answer])[1].tokens > 0

    assert is_new() and not is_new() and not is_new(limit=tokens)
    for changes in (
        {"limit": tokens - 1},
        {"style": "chat"},
        {"question": "Which country ?"},
        {"text": passage.text + "."},
        {"title": ""},
        {"answer": "Sea"},
        {"answer": "sea "},
    ):
        assert is_new(**changes), changes
        assert not is_new(**changes), changes


def test_a_key_knows_where_the_answer_starts(generator, tmp_path, echoing):
    path = tmp_path / "a.jsonl"
    assert scored_tokens(generator, path, [5, 6], [7, 2]) == 3
    assert scored_tokens(generator, path, [5], [6, 7, 2]) == 3
    assert scored_tokens(generator, path, [5, 6, 7], [2]) == 3


# --- the file


def three_batches(generator, path):
    """(the scorer, its position after each of three calls)."""
    scorer, positions = Scorer(generator, LIMITS, path), []
    for start in (10, 20, 30):
        scorer.score([[start, 1], [start, 2]], [[start], [start, start]])
        positions.append(scorer.position)
    return scorer, positions


def is_kept(scorer, start) -> bool:
    """Looked up without scoring what is missing."""
    keys = [scorer.cache._key([start, 1], [start]), scorer.cache._key([start, 2], [start, start])]
    found = {key in scorer.cache._records for key in keys}
    assert len(found) == 1  # a call's pairs are kept together or not at all
    return found.pop()


def test_rewinding_forgets_exactly_what_came_later(generator, tmp_path, echoing):
    path = tmp_path / "a.jsonl"
    scorer, positions = three_batches(generator, path)
    content = path.read_bytes()
    scorer.rewind(positions[2])
    assert path.read_bytes() == content and len(scorer) == 6
    scorer.rewind(positions[0])
    for again in (scorer, Scorer(generator, LIMITS, path)):
        assert [is_kept(again, start) for start in (10, 20, 30)] == [True, False, False]
        assert (again.position, len(again)) == (positions[0], 2)
    assert content.startswith(path.read_bytes())
    three_batches(generator, path)
    assert path.read_bytes() == content
    scorer = Scorer(generator, LIMITS, path)
    scorer.rewind(0)
    assert (scorer.position, len(scorer), path.read_bytes()) == (0, 0, b"")


@pytest.mark.parametrize("missing", [1, 2, 30])
def test_a_last_line_that_was_cut_off_is_forgotten(generator, tmp_path, echoing, missing):
    path = tmp_path / "a.jsonl"
    _, positions = three_batches(generator, path)
    path.write_bytes(path.read_bytes()[:-missing])
    again = Scorer(generator, LIMITS, path)
    assert [is_kept(again, start) for start in (10, 20, 30)] == [True, True, False]
    assert again.position == positions[1]
    # What is scored next stands in a line of its own.
    again.score([[30, 1]], [[30]])
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3
    assert len(Scorer(generator, LIMITS, path)) == 5


def test_damage_names_the_file(generator, tmp_path, echoing):
    path = tmp_path / "scores.jsonl"
    three_batches(generator, path)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"{\n", b"7\n", b"\xff\xfe\n", b"\n", lines[1].replace(b":", b"")):
        path.write_bytes(lines[0] + damaged + lines[2])
        with pytest.raises(UserError, match=r"scores\.jsonl is damaged .*delete it"):
            Scorer(generator, LIMITS, path)


# --- 1 and 8 devices


@pytest.mark.slow
def test_one_and_eight_devices_give_the_same_scores(world, generator, pairs):
    found = on_eight_devices(world)
    names = {name for name in found if name.startswith("scores")}
    expected = generator.score_tokens(*pairs)
    assert len(names) == len(expected)
    for i, score in enumerate(expected):
        np.testing.assert_allclose(found[f"scores {i}"], score, rtol=1e-5, atol=1e-5)


# --- leaving one passage out


def test_leaving_one_out_equals_enumeration(world, dataset, pipeline, tmp_path):
    """KL from the softmax over k of -log p(y | all passages but k) to p(z|x), from prompts made here."""
    config = world.config(
        tmp_path, strategy="two_phase", retriever_objective="loop", retriever_temperature=2.0, batch_size=3
    )
    run = run_of(config, pipeline, dataset)
    assembler = LikelihoodAssembler(run, RETRIEVER.trains)
    questions = dataset.train[:3]
    scored = assembler.assemble(batch_of(assembler, questions), placed(run), Ledger())
    trainable = {"embedder": pipeline.embedder.variables}
    found = assembler.objective(trainable, {}, first(scored.batch), None)
    store, expected = pipeline.store, []
    for question, rows in zip(questions, scored.passage_rows.tolist(), strict=True):
        answer = pipeline.prompts.answer(question.answers[0])
        without = [
            pipeline.prompts.prompt(
                [store[row] for row in rows if row != left_out], question.question, reserve=len(answer)
            ).ids
            for left_out in rows
        ]
        likelihoods = [
            float(np.sum(s, dtype=np.float64)) for s in pipeline.generator.score_tokens(without, [answer] * 3)
        ]
        target = np.exp(-np.array(likelihoods) / 2.0 - np.logaddexp.reduce(-np.array(likelihoods) / 2.0))
        vectors = pipeline.embedder.encode([store[row].embedder_text for row in rows]).astype(np.float64)
        scores = config.score_scale * vectors @ pipeline.embedder.encode([question.question])[0].astype(np.float64)
        expected.append(float(target @ (np.log(target) - scores + np.logaddexp.reduce(scores))))
    assert assembler.pairs_scored == 9
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4, atol=1e-5)
    assert np.std(expected) > 0
