"""Proves and measures ragjax on the accelerator that it finds. Who has a GPU or TPU at hand runs this:

    python experiments/accelerator/check.py                      # all parts, at most about 8 minutes
    python experiments/accelerator/check.py --parts=right,step   # some of them
    python experiments/accelerator/check.py --small              # tiny models, for a CPU

    right    losses, models, gradients, decoding against float64 and against this machine's CPU
    step     the training step of LLaMA-3-8B's shape: seconds, tokens/s, MFU, memory, compilation
    peer     the same step in torch, transformers and peft, and the ratio
    decode   prefill and decoding of the 8B shape; transformers' generate beside it
    encode   passages a second of MiniLM's and MPNet's shapes; sentence-transformers beside it
    search   exact search among 1 and 10 million vectors

Each part is a process of its own (two, where there is a peer), so that none hides another's failure; each prints a
line as it ends and is put into the JSON file --out, where parts of an earlier call stay. The most telling come first,
and a part starts nothing new once its share of --seconds is over. Nothing is downloaded: weights are random, lengths
are HotPotQA's (lengths.json). Wanted are jax for the accelerator, flax, optax, numpy, transformers, tokenizers,
safetensors, huggingface_hub, orbax-checkpoint, absl-py, matplotlib, jinja2 and tqdm; torch, peft and
sentence-transformers for the peers, whose parts are skipped without them. faiss, gguf and tensorboardX may be missing.

Exit code 0 if no part failed and nothing was found wrong, 1 otherwise.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common

from ragjax.errors import UserError
from ragjax.files import write_json

PEER = "peer"
# Each part's share of --seconds, and its processes: (whose, script and arguments, packages that it needs).
PARTS: dict[str, tuple[float, list[tuple[str, list[str], list[str]]]]] = {
    "right": (0.2, [("ragjax", ["right.py"], [])]),
    "step": (0.35, [("ragjax", ["step.py"], [])]),
    "peer": (0.11, [(PEER, ["peer.py", "train"], ["torch", "peft"])]),
    "decode": (0.17, [("ragjax", ["decode.py"], []), (PEER, ["peer.py", "decode"], ["torch"])]),
    "encode": (
        0.11,
        [("ragjax", ["encode.py"], []), (PEER, ["peer.py", "encode"], ["torch", "sentence_transformers"])],
    ),
    "search": (0.06, [("ragjax", ["search.py"], [])]),
}
_SHOWN_ERRORS = 5000  # characters of a process's errors
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "torch", "peft", "sentence-transformers")
_OURS_OF_TWO = 2 / 3  # of a part's time goes to ragjax where a peer follows: it compiles
_GRACE = 20.0  # seconds beyond its share after which a process is ended
# What a line shows of a finding, most telling first.
_SHOWN = {"tokens_per_second": "tokens/s", "passages_per_second": "passages/s", "questions_per_second": "questions/s"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", type=part_names, default=list(PARTS), help="which parts, separated by commas")
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together (480)")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"), help="JSON file to write or add to")
    flags = parser.parse_args()
    if not flags.seconds > 0:
        parser.error(f"--seconds={flags.seconds:g}: give a number above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: ends the running part's process too
    result = read_result(flags.out)
    try:
        write_json(flags.out, result)
    except UserError as error:
        sys.exit(f"error: {error}")
    device = describe_device()
    if device["platform"] == "cpu" and not flags.small:
        sys.exit(
            "jax sees no GPU or TPU here, only a CPU: look at its driver and packages, or try the check with --small"
        )
    print(f"{device['kind']}, {device['count']} device(s), jax {device['versions']['jax']}", flush=True)
    share = sum(PARTS[part][0] for part in flags.parts)
    due, failed = time.monotonic(), False
    for part in flags.parts:
        due += flags.seconds * PARTS[part][0] / share
        found = run_part(part, due, flags.small)
        found |= {"command": " ".join(["python", *sys.argv]), "device": device}
        result["parts"][part] = found
        add_ratios(result["parts"])
        write_json(flags.out, result)
        print(line_of(part, found), flush=True)
        failed |= found["status"] not in ("ok", "skipped")
    print(f"written to {flags.out}")
    return int(failed)


def part_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: choose of {', '.join(PARTS)}")
    return sorted(set(names), key=list(PARTS).index)


def read_result(path: Path) -> dict[str, Any]:
    """What an earlier call wrote, or an empty result. Ends the program where the file is something else."""
    if not path.exists():
        return {"parts": {}}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        dict(result["parts"])
    except OSError as error:
        sys.exit(f"{path} cannot be read ({error.strerror}): name another file with --out")
    except (ValueError, TypeError, KeyError):
        sys.exit(f"{path} is no result of this check: name another file with --out, or remove it")
    return result


def describe_device() -> dict[str, Any]:
    """Asked for in a process of its own, because whoever asks takes most of the device's memory."""
    code = "import jax; d = jax.devices(); print(d[0].device_kind, d[0].platform, len(d), sep='\\n')"
    try:
        environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}
        asked = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        sys.exit("jax did not answer within two minutes which devices there are: is the driver well?")
    if asked.returncode:
        sys.exit(f"jax finds no device: {last_line(asked.stderr)}")
    kind, platform, count = asked.stdout.strip().splitlines()[-3:]
    return {
        "kind": kind,
        "platform": platform,
        "count": int(count),
        "cores": os.cpu_count(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {name: version_of(name) for name in VERSIONS},
    }


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_part(part: str, due: float, small: bool) -> dict[str, Any]:
    """The part's status and findings, by `due` (time.monotonic)."""
    began = time.monotonic()
    processes = PARTS[part][1]
    statuses, findings, errors = [], [], []
    for place, (side, command, packages) in enumerate(processes):
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            statuses.append("skipped")
            errors.append(f"{' and '.join(missing)} not installed")
            continue
        left = due - time.monotonic()
        if left < 0:
            statuses.append("skipped")
            errors.append(f"no time left for {' '.join(command)}")
            continue
        seconds = left * (_OURS_OF_TWO if place + 1 < len(processes) else 1)
        status, found, error = run_process(command, seconds, small)
        statuses.append(status)
        findings += [{"side": side, **one} for one in found]
        errors += [error] if error else []
    if any(one.get("ok") is False for one in findings):
        statuses.append("wrong")
    worst = next((status for status in ("failed", "wrong", "cut off", "ok") if status in statuses), "skipped")
    result = {"status": worst, "seconds": time.monotonic() - began, "findings": findings}
    return result | ({"notes": errors} if errors else {})


def run_process(command: Sequence[str], seconds: float, small: bool) -> tuple[str, list[dict[str, Any]], str | None]:
    """(ok, failed or cut off; what it found; why it failed)."""
    # With the default of three quarters the largest cases do not fit.
    memory = {} if "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ else {"XLA_CLIENT_MEM_FRACTION": "0.92"}
    environment = {**memory, **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    environment["JAX_TRACEBACK_FILTERING"] = "off"  # the last line then says what broke
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and "cpu" not in platforms.split(","):
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"  # what is compared with
    if small:
        # Programs that run a few times: compiling them is all the work.
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        arguments = [f"--seconds={seconds}", f"--records={records}", *(["--small"] if small else [])]
        script, *choice = command
        process = [sys.executable, str(common.HERE / script), *choice, *arguments]
        status, error = "ok", None
        try:
            done = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=seconds + _GRACE)
            print(done.stderr[-_SHOWN_ERRORS:] if done.returncode else tracebacks(done.stderr), end="", file=sys.stderr)
            if done.returncode:
                status, error = "failed", last_line(done.stderr) or f"{script} ended with {done.returncode}"
        except subprocess.TimeoutExpired as late:
            status, error = "cut off", f"{script} was ended after {seconds + _GRACE:.0f} s"
            print((late.stderr or b"").decode(errors="replace")[-_SHOWN_ERRORS:], file=sys.stderr)
        lines = records.read_text(encoding="utf-8").splitlines(keepends=True) if records.exists() else []
        return status, [json.loads(line) for line in lines if line.endswith("\n")], error


def tracebacks(text: str) -> str:
    """What a process that went on wrote of cases that broke; libraries' chatter is left out."""
    place = text.find("Traceback (most recent call last)")
    return text[place:][-_SHOWN_ERRORS:] if place >= 0 else ""


def last_line(text: str) -> str:
    return next((line for line in reversed(text.strip().splitlines()) if line.strip()), "")[:500]


def add_ratios(parts: dict[str, Any]) -> None:
    """Puts ragjax's speed and memory over the peer's into each part that has a peer's findings, on one device."""
    for part in parts.values():
        found = {
            one["name"]: one
            for other in parts.values()
            if other["device"] == part["device"]
            for one in other["findings"]
            if is_ours(one)
        }
        theirs = [one for one in part["findings"] if not is_ours(one)]
        ratios = [ratio(found[one["name"]], one) for one in theirs if one["name"] in found]
        if ratios := [one for one in ratios if len(one) > 1]:
            part["ratios"] = ratios


def is_ours(finding: Mapping[str, Any]) -> bool:
    return finding["side"] != PEER


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """ragjax over peer, for what both have; of memory, XLA's plan for the step over what torch had in use at most."""
    result: dict[str, Any] = {"name": ours["name"]}
    for key in ("tokens_per_second", "prefill_tokens_per_second", "passages_per_second"):
        if ours.get(key) and theirs.get(key):
            result[key] = ours[key] / theirs[key]
    if ours.get("planned_bytes") and theirs.get("peak_bytes"):
        result["planned_bytes_over_peak_bytes"] = ours["planned_bytes"] / theirs["peak_bytes"]
    return result


def line_of(part: str, found: Mapping[str, Any]) -> str:
    """A part in one line."""
    findings, shown = found["findings"], []
    wrong = [one["name"] for one in findings if one.get("ok") is False]
    without = [one["name"] for one in findings if "skipped" in one or "error" in one and "bound" not in one]
    if part == "right" and findings:
        shown.append(f"{sum(one.get('ok') is True for one in findings)} checks right")
        repeated = [one["is_bitwise_equal"] for one in findings if "is_bitwise_equal" in one]
        shown.append(f"steps repeat bit for bit: {'yes' if repeated and all(repeated) else 'no'}")
    for one in findings:
        rate = next((name for name in _SHOWN if one.get(name)), None)
        if rate and is_ours(one):
            mfu = f", MFU {one['mfu']:.2f}" if one.get("mfu") else ""
            shown.append(f"{one['name']} {one[rate]:,.0f} {_SHOWN[rate]}{mfu}")
    for one in found.get("ratios", []):
        shown += [f"{one['name']} {name} {value:.2f}x the peer's" for name, value in one.items() if name != "name"]
    shown += [f"WRONG: {', '.join(wrong)}"] if wrong else []
    shown += [f"without a figure: {', '.join(without)}"] if without else []
    return f"{part:7} {found['status']:8} {found['seconds']:4.0f} s  {'; '.join([*shown, *found.get('notes', [])])}"


if __name__ == "__main__":
    sys.exit(main())
