"""The accelerator check: it runs whole on a CPU with little installed, and it can find fault."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkout import ROOT, in_checkout

FOLDER = ROOT / "experiments" / "accelerator"

pytestmark = [pytest.mark.slow, in_checkout]

# What a machine with an accelerator may lack.
BLOCKER = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"faiss", "gguf", "tensorboardX"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture
def scripts(monkeypatch):
    """Gives the check's modules by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = [path.stem for path in FOLDER.glob("*.py")]
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_the_whole_check_runs_on_a_cpu_without_faiss_gguf_and_tensorboard(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    out = tmp_path / "found.json"
    command = [sys.executable, str(FOLDER / "check.py"), "--small", "--seconds=3000", f"--out={out}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert list(parts) == ["right", "step", "peer", "decode", "encode", "search"]
    assert len(done.stdout.splitlines()) == len(parts) + 2
    for name, part in parts.items():
        assert part["status"] == "ok" or (name == "peer" and part["status"] == "skipped"), part
        assert part["device"]["versions"]["jax"]
    right = [one for one in parts["right"]["findings"] if "ok" in one]
    assert len(right) == 29, [one["name"] for one in right]
    assert all(one["ok"] and 0 <= one["error"] <= one["bound"] for one in right)
    for name in ("step", "decode", "encode", "search"):
        ours = [one for one in parts[name]["findings"] if one["side"] == "ragjax"]
        rates = [rate for one in ours for key, rate in one.items() if key.endswith("_per_second")]
        assert len(rates) >= len(ours) > 0
        assert min(rates) > 0
        assert not [one for one in ours if "skipped" in one or "error" in one]


def test_a_wrong_number_is_found(scripts):
    compared = scripts("right").compared
    expected = {"a": np.array([3.0, 4.0]), "noise": np.array([1e-9])}
    assert compared(expected, expected, 1e-4)["ok"]
    off = compared({"a": np.array([3.0, 4.001]), "noise": np.array([2e-9])}, expected, 1e-4)
    assert not off["ok"]
    assert off["worst"] == "a"
    np.testing.assert_allclose(off["error"], 0.001 / 5, rtol=1e-6)
    broken = compared({"a": np.array([3.0, np.nan]), "noise": np.array([1e-9])}, expected, 1e-4)
    assert (broken["ok"], broken["error"]) == (False, None)


def test_reduced_precision_would_be_found(scripts, monkeypatch):
    """Factors cut to the ten bits that TF32 keeps."""
    right = scripts("right")

    def tf32(x):
        return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    monkeypatch.setattr(right.jax, "jit", lambda function, **_: lambda x, y: np.matmul(tf32(x), tf32(y)))
    found = right.product_error()
    assert not found["ok"]
    assert 1e-4 < found["error"] < 2e-3


def test_another_order_of_additions_is_no_fault(scripts, monkeypatch):
    """Products summed in four pieces: float32 all the same, as another device's kernels have it."""
    right = scripts("right")
    expected = right.Pair("minilm", "llama3-8b", "float32", True).on(jax.devices()[0])

    def in_pieces(x, y):
        parts = zip(jnp.array_split(x, 4, axis=-1), jnp.array_split(y, 4, axis=-2), strict=True)
        return sum(jnp.matmul(one, other) for one, other in parts)

    for module in ("attention", "layers", "products"):
        monkeypatch.setattr(f"ragjax.models.{module}.matmul", in_pieces)
    got = right.Pair("minilm", "llama3-8b", "float32", True).on(jax.devices()[0])
    for part, values in got.items():
        found = right.compared(values, expected[part], right.BOUNDS["float32"])
        assert 0 < found["error"] < found["bound"] / 5, (part, found)


def test_cached_decoding_that_differs_is_found(scripts, monkeypatch):
    right = scripts("right")
    pair = right.Pair("minilm", "llama3-8b", "float32", True)
    real = right.decode_mixture

    def other_prompts(model, prompts, *rest, **options):
        return real(model, [[prompt[:-1] for prompt in group] for group in prompts], *rest, **options)

    monkeypatch.setattr(right, "decode_mixture", other_prompts)
    assert not right.cached_decoding(pair)["ok"]


def write_part(folder: Path, name: str, text: str) -> None:
    start = "import sys, time\nrecords = next(a.split('=', 1)[1] for a in sys.argv if a.startswith('--records='))\n"
    (folder / name).write_text(start + text, encoding="utf-8")


def test_a_part_that_fails_or_hangs_hides_no_other(scripts, monkeypatch, tmp_path, capsys):
    check = scripts("check")
    one = 'open(records, \'a\').write(\'{"name": "x", "tokens_per_second": 1200.0}\\n{"name": "half a li\')\n'
    write_part(tmp_path, "fails.py", one + "raise ValueError('it broke')\n")
    write_part(tmp_path, "hangs.py", one + "time.sleep(60)\n")
    write_part(tmp_path, "wrong.py", 'open(records, \'a\').write(\'{"name": "y", "ok": false}\\n\')\n')
    write_part(tmp_path, "works.py", one)
    write_part(tmp_path, "dies.py", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")
    parts = {name: (0.2, [("ragjax", [f"{name}.py"], [])]) for name in ("fails", "hangs", "wrong", "works", "dies")}
    monkeypatch.setattr(check, "PARTS", parts | {"lacks": (0.1, [("peer", ["works.py"], ["no_such_package"])])})
    monkeypatch.setattr(check.common, "HERE", tmp_path)
    monkeypatch.setattr(check, "_GRACE", 1.0)
    out = tmp_path / "found.json"
    earlier = {"status": "ok", "seconds": 1.0, "findings": [], "device": {}}
    out.write_text(json.dumps({"parts": {"earlier": earlier}}), encoding="utf-8")
    monkeypatch.setattr(
        check, "describe_device", lambda: {"kind": "X", "count": 1, "platform": "gpu", "versions": {"jax": "1"}}
    )
    monkeypatch.setattr(
        sys, "argv", ["check.py", f"--out={out}", "--seconds=12", "--parts=fails, hangs,wrong,works,works,dies,lacks"]
    )
    assert check.main() == 1
    found = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "earlier": "ok",
        "fails": "failed",
        "hangs": "cut off",
        "wrong": "wrong",
        "works": "ok",
        "dies": "failed",
        "lacks": "skipped",
    }
    assert found["fails"]["notes"] == ["ValueError: it broke"]
    assert found["dies"]["notes"] == ["dies.py ended with -9"]
    assert found["hangs"]["findings"] == [{"side": "ragjax", "name": "x", "tokens_per_second": 1200.0}]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("works") and "x 1,200 tokens/s" in line for line in lines)
    assert any(line.startswith("wrong") and "WRONG: y" in line for line in lines)
    assert any(line.startswith("lacks") and "no_such_package not installed" in line for line in lines)


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"parts": 3}'])
def test_a_file_of_something_else_is_left_alone(scripts, monkeypatch, tmp_path, text):
    out = tmp_path / "mine.json"
    out.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["check.py", f"--out={out}"])
    with pytest.raises(SystemExit, match="mine.json is no result of this check"):
        scripts("check").main()
    assert out.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("names", ["right,speed", "", ","])
def test_unknown_parts_are_refused_by_name(scripts, monkeypatch, capsys, names):
    monkeypatch.setattr(sys, "argv", ["check.py", f"--parts={names}"])
    with pytest.raises(SystemExit):
        scripts("check").main()
    error = capsys.readouterr().err
    assert ("speed: choose of right, step" if "speed" in names else "nothing: choose of right, step") in error


def test_a_killed_check_leaves_no_process_behind(tmp_path):
    """The part that runs would keep an accelerator's memory."""
    write_part(
        tmp_path,
        "waits.py",
        f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}.')\ntime.sleep(60)\n",
    )
    start = (
        "import pathlib, check; check.PARTS = {'waits': (1.0, [('ragjax', ['waits.py'], [])])}; "
        f"check.common.HERE = pathlib.Path({str(tmp_path)!r}); check.main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", start, "--small", "--parts=waits", f"--out={tmp_path / 'found.json'}"]
    process = subprocess.Popen(command, env=environment)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text(encoding="utf-8").endswith(".")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text(encoding="utf-8")[:-1]), 0)


@pytest.mark.parametrize("seconds", ["0", "-5", "nan"])
def test_no_time_is_refused(scripts, monkeypatch, capsys, seconds):
    monkeypatch.setattr(sys, "argv", ["check.py", f"--seconds={seconds}"])
    with pytest.raises(SystemExit):
        scripts("check").main()
    assert "give a number above 0" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_at_once(scripts, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for out, words in ((tmp_path, "cannot be read"), (tmp_path / "file" / "found.json", "file")):
        monkeypatch.setattr(sys, "argv", ["check.py", f"--out={out}"])
        with pytest.raises(SystemExit, match=words):
            scripts("check").main()


def test_the_large_check_is_not_started_on_a_cpu(scripts, monkeypatch, tmp_path):
    check = scripts("check")
    monkeypatch.setattr(check, "describe_device", lambda: {"platform": "cpu"})
    monkeypatch.setattr(sys, "argv", ["check.py", f"--out={tmp_path / 'found.json'}"])
    with pytest.raises(SystemExit, match="only a CPU"):
        check.main()


def test_ratios_join_findings_of_one_name(scripts):
    check = scripts("check")
    ours = {"name": "a", "side": "ragjax", "tokens_per_second": 30.0, "planned_bytes": 6}
    theirs = {"name": "a", "side": "peer", "tokens_per_second": 20.0, "peak_bytes": 12}
    parts = {
        "step": {"findings": [ours, {"name": "b", "side": "ragjax", "tokens_per_second": 1.0}], "device": "A"},
        "peer": {"findings": [theirs], "device": "A"},
        "another card's": {"findings": [theirs], "device": "B"},
    }
    check.add_ratios(parts)
    expected = {"name": "a", "tokens_per_second": 1.5, "planned_bytes_over_peak_bytes": 0.5}
    assert parts["peer"]["ratios"] == [expected]
    assert "ratios" not in parts["step"]
    assert "ratios" not in parts["another card's"]


def test_a_measurement_without_time_or_memory_says_so(scripts, tmp_path):
    common = scripts("common")
    path = tmp_path / "records"

    def too_large():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.\nmore")

    def broken():
        raise RuntimeError("INTERNAL: something else")

    recorder = common.Recorder(path, seconds=60.0, small=True)
    recorder.measure("large", too_large)
    recorder.measure("broken", broken)
    recorder.measure_each("two", lambda: {": a": {"loss": float("nan"), "ok": False}, ": b": {"loss": 1.0}})
    common.Recorder(path, seconds=-1.0, small=True).measure("late", broken)
    large, failed, a, b, late = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (large["error"], large["detail"][:18]) == ("out of memory", "RESOURCE_EXHAUSTED")
    assert failed == {"name": "broken", "ok": False, "error": "RuntimeError: INTERNAL: something else"}
    assert (a, b) == ({"name": "two: a", "loss": None, "ok": False}, {"name": "two: b", "loss": 1.0})
    assert late["name"] == "late"
    assert "s left" in late["skipped"]


def test_the_lengths_are_whole(scripts):
    common = scripts("common")
    found = common.lengths(False)
    assert len(found["questions"]) == 256
    assert len(found["passages"]) >= 1000
    for one in found["questions"]:
        assert len(one["prompts"]) == common.PASSAGES
        # Five prompts hold the frame five times, the concatenated one once.
        assert max(one["prompts"]) < one["concatenated"] < sum(one["prompts"])


def test_peaks_are_found_by_the_devices_own_names(scripts):
    common = scripts("common")
    assert common.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert common.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert common.peak_flops("NVIDIA L40S") == 362e12
    assert common.peak_flops("NVIDIA L4") == 121e12
    assert common.peak_flops("NVIDIA L40") == 181e12
    assert common.peak_flops("NVIDIA H100 NVL") == 835e12
    assert common.peak_flops("TPU v5") == 459e12
    assert common.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert common.peak_flops("TPU v5 lite") == 197e12
    assert common.peak_flops("cpu") is None
    assert common.utilisation(989e12, 2.0, "NVIDIA H100 80GB HBM3") == 0.5
    assert common.utilisation(1.0, 1.0, "cpu") is None
