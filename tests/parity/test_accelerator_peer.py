"""The accelerator check's other side, torch: it does the same work, and the check compares the two."""

import importlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.torch import save_file

from ragjax.models.bert import Bert, BertConfig
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.pretrained import abstract_decoder
from ragjax.training.objectives import AnswerMixture, AnswerObjective
from ragjax.training.step import summed_loss
from ragjax.weights import load_params, resolve_model
from tests.checkout import ROOT

FOLDER = ROOT / "experiments" / "accelerator"

pytestmark = pytest.mark.parity


@pytest.fixture
def scripts(monkeypatch):
    """Gives the check's modules by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", ""))  # peer.py sets it
    names = [path.stem for path in FOLDER.glob("*.py")]
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def loaded(folder, config, shapes, state):
    """Parameters as ragjax reads them from a folder with torch's state."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        {name: tensor.detach().float().contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    return load_params(resolve_model(folder), shapes, "float32")


# peft asks transformers by the older name.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_both_sides_take_the_same_step(scripts, tmp_path):
    """The peer's loss before training, in float32, is ragjax's on the same weights and tokens."""
    peer, common, models = scripts("peer"), scripts("common"), scripts("random_models")
    trainer = peer.Trainer(small=True)
    trainer.generator.float()
    batch = trainer.batch(2)
    got = trainer.loss(batch).item()

    decoder_fields, encoder_fields = common.shape_of("llama3-8b", True), common.shape_of("minilm", True)
    decoder_config, encoder = DecoderConfig.from_hf(decoder_fields), Bert(BertConfig.from_hf(encoder_fields))
    prefix = "base_model.model."
    state = {
        name.removeprefix(prefix).replace(".base_layer", ""): tensor
        for name, tensor in trainer.generator.state_dict().items()
        if "lora_" not in name
    }
    inputs = [jax.ShapeDtypeStruct((1, 1), np.int32)] * 3
    encoder_shapes = jax.eval_shape(encoder.init, jax.random.key(0), *inputs)["params"]
    variables = {
        "generator": {
            "params": loaded(tmp_path / "g", decoder_fields, abstract_decoder(decoder_config)["params"], state)
        },
        "embedder": {"params": loaded(tmp_path / "e", encoder_fields, encoder_shapes, trainer.embedder.state_dict())},
    }
    objective = AnswerObjective(encoder, Decoder(decoder_config), AnswerMixture("rag_token", peer.SCALE))
    ours, _, tokens = models.batch_of(batch["made"], small=True)
    assert tokens == int(batch["mask"].sum())
    total, sums = jax.jit(summed_loss, static_argnums=0)(objective, variables, {}, ours, None)
    np.testing.assert_allclose(got, total / sums["questions"], rtol=1e-5)


def test_the_check_compares_with_torch(tmp_path):
    out = tmp_path / "found.json"
    flags = ["--small", "--seconds=3000", f"--out={out}", "--parts=peer,decode,encode"]
    command = [sys.executable, str(FOLDER / "check.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert {part["status"] for part in parts.values()} == {"ok"}
    assert [one["name"] for one in parts["peer"]["findings"]] == ["joint rag_token bf16 B=1"]
    compared = {one["name"] for part in parts.values() for one in part.get("ratios", [])}
    assert compared == {
        "decode bf16 B=1",
        "decode bf16 B=2",
        "encode minilm float32",
        "encode mpnet float32",
    }
