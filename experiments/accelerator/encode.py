"""How fast passages are encoded: MiniLM's and MPNet's shapes over HotPotQA's passage lengths.

    python experiments/accelerator/encode.py [--small]

Embedder.encode_passages, tokenisation included: texts of like length share a batch, and padding counts as time but not
as tokens.
MFU counts 2N FLOPs a token and, in float32 too, compares with the device's bfloat16 peak.
"""

import functools
import itertools
import time
from typing import Any

import common
import jax
import numpy as np
import random_models as models
from common import Recorder

from ragjax.pretrained import Embedder


def run(recorder: Recorder) -> None:
    for dtype, name in itertools.product(
        ("float32",) if recorder.small else ("bfloat16", "float32"), ("minilm", "mpnet")
    ):
        recorder.measure(f"encode {name} {dtype}", functools.partial(measure, name, dtype, recorder.small))


def measure(name: str, dtype: str, small: bool) -> dict[str, Any]:
    config = common.shape_of(name, small)
    module, variables = models.encoder(config, dtype)
    tokenizer = common.word_tokenizer(name, small)
    embedder = Embedder(None, module.config, tokenizer, module, variables["params"], common.LONGEST_TEXT[name])
    texts, tokens = common.word_texts(name, small)
    found: list[np.ndarray] = []
    began = time.perf_counter()
    embedder.encode_passages(texts, common.TEXTS_AT_ONCE)
    first = time.perf_counter() - began
    seconds = common.timed(
        lambda: found.append(embedder.encode_passages(texts, common.TEXTS_AT_ONCE)), lambda _: None, seconds=1
    )
    flops = 2 * models.model_size(module, variables).layer_weights * tokens
    return {
        "seconds": seconds,
        "compile_seconds": first - seconds,  # of a program for each length and number of texts
        "passages_per_second": len(texts) / seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": common.utilisation(flops, seconds, jax.devices()[0].device_kind),
        "ok": bool(np.isfinite(found[-1]).all()),
    }


if __name__ == "__main__":
    common.main(run)
