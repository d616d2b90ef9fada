"""metrics.jsonl: each step once, also after a resume; a damaged line is named."""

import json

import pytest

from ragjax.errors import UserError
from ragjax.runs import RunFolder
from ragjax.training.records import MetricsLog

LINES = [{"phase": phase, "step": step, "loss": 1.0} for phase in ("generator", "retriever") for step in (1, 2, 3)]


@pytest.fixture
def files(tmp_path):
    files = RunFolder(tmp_path)
    files.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return files


def steps(files):
    lines = map(json.loads, files.metrics_file.read_text().splitlines())
    return [(line["phase"][0], line["step"]) for line in lines]


def rewound(files, phase="retriever", step=1):
    log = MetricsLog(files)
    try:
        log.rewind(phase, step)
    finally:
        log.close()


def test_later_steps_of_the_phase_and_a_line_that_was_cut_off_are_dropped(files):
    with files.metrics_file.open("a") as file:
        file.write('{"phase": "retriever", "st')
    rewound(files)
    assert steps(files) == [("g", 1), ("g", 2), ("g", 3), ("r", 1)]


@pytest.mark.parametrize("damage", [b"{]", b"\xff\xfe", b"7", b"null", b'{"phase": "generator"}', b'{"step": 2}'])
def test_a_damaged_line_is_named_and_nothing_is_lost(files, damage):
    lines = files.metrics_file.read_bytes().splitlines(keepends=True)
    lines[1] = damage + b"\n"
    files.metrics_file.write_bytes(b"".join(lines))
    with pytest.raises(UserError) as caught:
        rewound(files)
    message = str(caught.value)
    assert message.startswith(f"{files.metrics_file} line 2 is damaged (") and "\n" not in message
    assert message.endswith("): repair or remove that line, which records a step of training")
    assert files.metrics_file.read_bytes() == b"".join(lines)
