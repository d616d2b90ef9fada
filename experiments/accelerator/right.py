"""Whether ragjax computes on this device what it computes elsewhere.

    python experiments/accelerator/right.py [--small]

- losses and their gradients against float64, differenced;
- float32 products against float64;
- two random pairs of models, BERT with LLaMA and MPNet with Mistral: hidden states, question vectors, answer
  log-probabilities, gradients of all weights and three SGD steps, in float32 and in bfloat16 on this device, against
  float32 on this machine's CPU; the same of LLaMA with quantised layers and adapters;
- greedy answers over cached prompts against the plain network, read anew for each token;
- a training step repeated bit for bit.

An error is the norm of a difference over the norm of what it is compared with.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import random_models as models
from common import Recorder

from ragjax import losses
from ragjax.data.batches import Shape, make_batch, round_up
from ragjax.generation import Rule, decode_mixture
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.encoders import sentence_vectors
from ragjax.models.lora import LoraConfig
from ragjax.models.products import matmul
from ragjax.scoring import score_answers
from ragjax.training.objectives import AnswerMixture, AnswerObjective
from ragjax.training.step import summed_loss

Tree = Mapping[str, Any]

# The norm's share that an error may have. Reduced-precision float32 products (TF32, a bfloat16 pass) would leave 5e-4
# and more; bfloat16 itself leaves up to 1.2e-2 on a CPU, in the gradients.
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
_SIZES = {"vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
_FULL = {"hidden_size": 256, "intermediate_size": 512}
_SMALL = {"hidden_size": 32, "intermediate_size": 64}
_QUESTIONS = 3
_STEPS, _RATE, _SCALE = 3, 0.01, 5.0


def run(recorder: Recorder) -> None:
    for name, check in LOSSES.items():
        recorder.measure(f"{name} against float64", check)
    recorder.measure("float32 product against float64", product_error)
    small = recorder.small
    llama, mistral = ("minilm", "llama3-8b"), ("mpnet", "mistral-7b")
    compare(recorder, "bert+llama", lambda dtype: Pair(*llama, dtype, small), ("float32", "bfloat16"))
    # --small leaves some out: the time goes into compiling.
    dtypes = ("float32",) if small else ("float32", "bfloat16")
    compare(recorder, "llama nf4 with adapters", lambda dtype: Pair(*llama, dtype, small, "nf4", "partial"), dtypes)
    compare(recorder, "mpnet+mistral", lambda dtype: Pair(*mistral, dtype, small, remat="full"), dtypes)
    if not small:
        compare(recorder, "llama int8 with adapters", lambda dtype: Pair(*llama, dtype, small, "int8"), ("float32",))


def compare(recorder: Recorder, name: str, make: Callable[[str], "Pair"], dtypes: Sequence[str]) -> None:
    """Records what a pair of models gives here in each dtype beside what the CPU gives in float32."""
    reference: dict[str, Any] = {}

    def errors(dtype: str) -> dict[str, dict[str, Any]]:
        pair = make(dtype)
        if not reference:
            reference.update(pair.on(jax.devices("cpu")[0]))
        got = pair.on(jax.devices()[0])
        return {f": {part}": compared(got[part], reference[part], BOUNDS[dtype]) for part in got}

    for dtype in dtypes:
        recorder.measure_each(f"{name} {dtype}", functools.partial(errors, dtype))
        if dtype == "float32" and "adapters" not in name:
            recorder.measure(f"{name} {dtype}: cached decoding", lambda: cached_decoding(make("float32")))
            recorder.measure(f"{name} {dtype}: repeated step", lambda: repeated_step(make("float32")))


def compared(got: Any, expected: Any, bound: float) -> dict[str, Any]:
    """The largest error over the leaves, each against its own norm; what is rounding noise, against the largest leaf's.

    A key's bias, say, has gradient 0: a softmax does not see it.
    """
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    pairs = [(path, np.asarray(one, np.float64), np.asarray(other, np.float64)) for (path, one), other in pairs]
    largest = max(np.linalg.norm(other) for _, _, other in pairs)
    errors = {}
    for path, one, other in pairs:
        norm = max(np.linalg.norm(other), 1e-3 * largest) or 1.0
        error = float(np.linalg.norm(one - other) / norm)
        errors[jax.tree_util.keystr(path, simple=True, separator="/")] = error if np.isfinite(error) else np.inf
    where = max(errors, key=errors.get)
    error = errors[where] if np.isfinite(errors[where]) else None  # JSON has no infinity
    return {"error": error, "bound": bound, "ok": error is not None and error <= bound, "worst": where}


# ---- losses


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


# Each loss by its formula in float64: (docs [B, K], answers [B, K, T], mask [B, T], constant answers) -> [B]. The last
# are the answers where no gradient reaches them.
_FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "rag_token_nll": lambda d, a, m, _: -np.sum(m * np.logaddexp.reduce(d[:, :, None] + a, axis=1), axis=-1),
    "rag_sequence_nll": lambda d, a, m, _: -np.logaddexp.reduce(d + np.sum(a * m[:, None], -1), axis=-1),
    "emdr2_nll": lambda d, _, m, c: -np.logaddexp.reduce(d + np.sum(c * m[:, None], -1), axis=-1),
    "perplexity_distillation_nll": lambda d, _, m, c: _kl(_log_softmax(np.sum(c * m[:, None], -1)), d),
    "replug_lsr_nll": lambda d, _, m, c: _kl(d, _log_softmax(np.exp(np.sum(c * m[:, None], -1)))),
}


def loss_error(name: str) -> dict[str, Any]:
    """Of a loss over question and passage vectors and answer log-probs, with its gradient by central differences."""
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=(4, 16)) / 4, rng.normal(size=(4, 5, 16)) / 4
    answers = -rng.exponential(2.0, size=(4, 5, 6))
    mask = np.arange(6) < np.array([1, 3, 6, 2])[:, None]

    def reference(x: np.ndarray, answers: np.ndarray, fixed: np.ndarray = answers) -> np.ndarray:
        docs = _log_softmax(_SCALE * np.einsum("be,bke->bk", x, z))
        return _FORMULAS[name](docs, answers, mask, fixed)

    def loss(x: jax.Array, answers: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = getattr(losses, name)(losses.doc_log_probs(x, jnp.float32(z), _SCALE), answers, jnp.asarray(mask))
        return jnp.sum(values), values

    inputs = jnp.float32(x), jnp.float32(answers)
    gradients, values = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*inputs)
    expected = {
        "value": reference(x, answers),
        "to vectors": differences(lambda x: reference(x, answers).sum(), x),
        "to answers": differences(lambda answers: reference(x, answers).sum(), answers),
    }
    return compared({"value": values, "to vectors": gradients[0], "to answers": gradients[1]}, expected, 1e-5)


def ranking_error() -> dict[str, Any]:
    """Of multiple negatives ranking."""
    rng = np.random.default_rng(2)
    x, z = rng.normal(size=(4, 16)) / 4, rng.normal(size=(9, 16)) / 4

    def reference(x: np.ndarray) -> np.ndarray:
        return -np.diagonal(_log_softmax(_SCALE * x @ z.T))

    def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = losses.multiple_negatives_ranking_nll(x, jnp.float32(z), _SCALE)
        return jnp.sum(values), values

    gradient, values = jax.jit(jax.grad(loss, has_aux=True))(jnp.float32(x))
    expected = {"value": reference(x), "to vectors": differences(lambda x: reference(x).sum(), x)}
    return compared({"value": values, "to vectors": gradient}, expected, 1e-5)


def differences(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient of a float64 function by central differences."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[place] = step
        gradient[place] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


LOSSES = {name: functools.partial(loss_error, name) for name in _FORMULAS}
LOSSES["multiple_negatives_ranking_nll"] = ranking_error


def product_error() -> dict[str, Any]:
    """Of ragjax's float32 product; for comparison, of the platform's default."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(64, 1024)), rng.normal(size=(1024, 64))
    exact = np.float64(np.float32(x)) @ np.float64(np.float32(y))
    found = compared(jax.jit(matmul)(jnp.float32(x), jnp.float32(y)), exact, 1e-5)
    by_default = compared(jax.jit(jnp.matmul)(jnp.float32(x), jnp.float32(y)), exact, 1e-5)
    return found | {"error_of_the_platforms_default": by_default["error"]}


# ---- models


class Pair:
    """An embedder and a generator with one set of random weights, and a batch for them."""

    def __init__(
        self, encoder: str, decoder: str, dtype: str, small: bool, stored: str | None = None, remat: str = "none"
    ):
        width = _SMALL if small else _FULL
        heads = {"num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 20}
        encoder_config = common.MODELS[encoder] | _SIZES | width
        self.config = common.MODELS[decoder] | _SIZES | width | heads
        self.adapters = stored is not None
        self.embedder, _ = models.encoder(encoder_config, dtype)
        lora = LoraConfig(rank=4, alpha=8.0) if self.adapters else None
        self.generator = Decoder(
            DecoderConfig.from_hf(self.config, dtype=dtype, quantize=stored, lora=lora, remat=remat)
        )
        rng = np.random.default_rng(4)
        self.variables = {
            "embedder": _random(self.embedder, None, rng),
            "generator": _random(self.generator, "full_logits", rng),
        }
        stretch = 1 if small else 5  # rows of more than one block of attention
        chosen = [
            {"question": 9, "prompts": [(12 + 5 * k) * stretch + i for k in range(5)], "answer": 1 + 2 * i}
            for i in range(_QUESTIONS)
        ]
        made = models.examples(chosen, _SIZES["vocab_size"], _SIZES["vocab_size"], width["hidden_size"])
        self.prompts = [example.prompts for example in made]
        self.batch = make_batch(made, Shape(15, 64 if small else 192, 8), _QUESTIONS, 16)
        loss = "rag_token" if decoder == "llama3-8b" else "rag_sequence"
        self.objective = AnswerObjective(self.embedder, self.generator, AnswerMixture(loss, _SCALE))
        self.probe = jax.jit(self._probe)

    def on(self, device: jax.Device) -> dict[str, Any]:
        """What is compared, computed there."""
        return jax.device_get(self.probe(*jax.device_put((self.variables, self.batch), device)))

    def _probe(self, variables: Tree, batch: Any) -> dict[str, Any]:
        """What is compared between devices."""
        trained = dict(variables["generator"])
        frozen = {"generator": {"params": trained.pop("params")}} if self.adapters else {}
        trainable = {"embedder": variables["embedder"], "generator": trained}
        gradient_of = jax.grad(lambda tree: summed_loss(self.objective, tree, frozen, batch, None)[0] / _QUESTIONS)

        def descend(moved: Tree, _: None) -> tuple[Tree, Tree]:
            gradient = gradient_of(jax.tree.map(jnp.add, trainable, moved))
            return jax.tree.map(lambda way, change: way - _RATE * change, moved, gradient), gradient

        # The way that the weights have gone, not their difference: in a weight near 1 that is a few units of rounding.
        moved, gradients = jax.lax.scan(descend, jax.tree.map(jnp.zeros_like, trainable), None, length=_STEPS)
        rows, generator = batch.rows, variables["generator"]
        hidden = self.generator.apply(generator, rows.tokens, rows.segment_ids, rows.positions)
        scores = score_answers(self.generator, generator, rows)
        vectors = sentence_vectors(self.embedder, variables["embedder"], batch.question_tokens, batch.question_lengths)
        return {
            "question vectors": vectors,
            "hidden states": jnp.where(rows.segment_ids[:, :, None] > 0, hidden.astype(jnp.float32), 0.0),
            "answer log-probs": jnp.where(rows.answer_mask[:, None], scores, 0.0),
            "gradients": jax.tree.map(lambda leaf: leaf[0], gradients),
            "three SGD steps": moved,
        }


def _random(module: Any, method: str | None, rng: np.random.Generator) -> Tree:
    """Random numbers for every leaf, norms and biases and both halves of an adapter included."""

    def fill(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name == "codes":
            return rng.integers(-127, 128, leaf.shape).astype(leaf.dtype)
        if name == "absmax":
            return rng.uniform(0.02, 0.05, leaf.shape).astype(leaf.dtype)
        # A projection makes a quarter of its input's size, so that rounding grows no more than in trained models.
        deviation = 0.25 * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1
        return (float(name == "scale") + deviation * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, models.abstract_variables(module, method))


class _Model:
    """What decoding needs to know of a generator."""

    eos_token_id = 2
    end_ids = (2,)

    def __init__(self, pair: Pair):
        self.module, self.variables = pair.generator, jax.device_put(pair.variables["generator"])


def cached_decoding(pair: Pair) -> dict[str, Any]:
    """Greedy answers under a mixture of each question's prompts, and their log-probability, against the plain path."""
    rule = Rule(max_new_tokens=8, end_ids=_Model.end_ids)
    model = _Model(pair)
    weights = np.log(np.random.default_rng(5).dirichlet(np.ones(common.PASSAGES), _QUESTIONS)).astype(np.float32)
    answers = decode_mixture(model, pair.prompts, weights, rule, batch_size=_QUESTIONS)
    differing, off = 0, 0.0
    for prompts, prior, answer in zip(pair.prompts, weights, answers, strict=True):
        tokens, total = plain_greedy(model, prompts, prior, rule)
        differing += tokens != answer.tokens
        off = max(off, abs(total - answer.log_prob) / abs(total))
    return {"differing_answers": differing, "error": off, "bound": 1e-4, "ok": differing == 0 and off <= 1e-4}


def plain_greedy(model: _Model, prompts: list[list[int]], prior: np.ndarray, rule: Rule) -> tuple[list[int], float]:
    """(tokens, log-probability with the end token): all prompts are read again for each token."""
    tokens: list[int] = []
    total = 0.0
    while True:
        rows = np.zeros((len(prompts), round_up(max(map(len, prompts)) + rule.max_new_tokens, 64)), np.int32)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt) + len(tokens)] = [*prompt, *tokens]
        last = np.array([len(prompt) + len(tokens) - 1 for prompt in prompts])
        log_probs = np.logaddexp.reduce(np.asarray(_next(model.module, model.variables, rows, last)) + prior[:, None])
        is_full = len(tokens) == rule.max_new_tokens
        chosen = rule.end_ids[0] if is_full else int(np.argmax(log_probs))
        total += float(log_probs[chosen])
        if chosen in rule.end_ids:
            return tokens, total
        tokens.append(chosen)


@functools.partial(jax.jit, static_argnums=0)
def _next(module: Decoder, variables: Tree, rows: jax.Array, last: jax.Array) -> jax.Array:
    """log p of the token after column `last` of every row, [R, V]."""
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    segments = (positions <= last[:, None]).astype(jnp.int32)
    logits = module.apply(variables, rows, segments, positions, method="full_logits")
    return jax.nn.log_softmax(logits[jnp.arange(len(rows)), last])


def repeated_step(pair: Pair) -> dict[str, Any]:
    """Three SGD steps, run twice: equal bits or not. A fact about the platform, not a fault."""
    inputs = jax.device_put((pair.variables, pair.batch))
    first, second = (jax.tree.leaves(jax.device_get(pair.probe(*inputs))) for _ in range(2))
    return {"is_bitwise_equal": all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))}


if __name__ == "__main__":
    common.main(run)
