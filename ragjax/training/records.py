"""The records of training: metrics.jsonl (each step once, also after a resume) and TensorBoard events.

tensorboardX is imported where it is used: a step can be built where it is missing.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ragjax.files import append_line, read_whole_lines, write_atomic
from ragjax.runs import RunFolder
from ragjax.voice import is_first

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends a line a step. Lines hold only what the run determines; timings go to TensorBoard alone."""

    def __init__(self, files: RunFolder):
        """files: of the run."""
        self._files, self._path = files, files.metrics_file
        self._writer: SummaryWriter | None = None

    def start_phase(self, phase: str) -> None:
        """Drops what an attempt without a checkpoint left of this phase."""
        self.rewind(phase, -1)

    def rewind(self, phase: str, step: int) -> None:
        """Keeps a phase's lines up to `step`; a line that was cut off by a kill is dropped too."""
        from tensorboardX import SummaryWriter

        self._keep(lambda its_phase, its_step: its_phase != phase or its_step <= step)
        if is_first():
            self._writer = SummaryWriter(str(self._files.events(phase)), purge_step=step + 1)

    def write(self, line: Mapping[str, Any], timings: Mapping[str, float] | None = None) -> None:
        """One step's figures; `timings` are shown in TensorBoard but not in the file."""
        append_line(self._path, json.dumps(line))
        if self._writer is None:
            return
        for name, value in {**line, **(timings or {})}.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _keep(self, wanted: Callable[[str, int], bool]) -> None:
        if not self._path.exists():
            return
        mend = "repair or remove that line, which records a step of training"
        lines = read_whole_lines(self._path, lambda line: (str(line["phase"]), int(line["step"])), mend)
        write_atomic(self._path, "".join([text for text, place in lines if wanted(*place)]))
