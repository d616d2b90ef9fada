"""What is said at the terminal: no other module prints or draws a progress bar.

Of several processes that JAX has joined only the first speaks, and only it writes files that they would share
(`ragjax.files`): the others are silent.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def is_first() -> bool:
    """Whether this process is the one that speaks and writes. Asking wakes JAX's devices."""
    import jax  # takes a second, which a command that refuses its flags does not need

    return jax.process_index() == 0


def say(
    text: str = "", *, to_stderr: bool = False, end: str = "\n", flush: bool = False, everywhere: bool = False
) -> None:
    """Prints on standard output, or on standard error.

    everywhere: by any process, for what each says of itself (why it ends, its version). No device is woken for that.
    """
    if everywhere or is_first():
        print(text, file=sys.stderr if to_stderr else sys.stdout, end=end, flush=flush)


def warn(text: str) -> None:
    """A warning on standard error, above the progress bars that are being drawn."""
    if is_first():
        from tqdm import tqdm

        tqdm.write(f"warning: {text}", file=sys.stderr)


def counted(count: int, noun: str) -> str:
    """In a sentence: "1 device", "8 devices", "2 micro-batches"."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """In a sentence: "2 h 05 min", "12 min", "1.7 min", "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 570:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def progress(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    shown: bool = True,
) -> "tqdm":
    """A progress bar on standard error: over `items`, or one that is moved by its `update`.

    desc: what is going on. unit: what is counted. total, initial: how many there are, and were done before. shown:
    False draws nothing.
    """
    from tqdm import tqdm

    return tqdm(
        items,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        dynamic_ncols=True,
        disable=not (shown and is_first()),
    )
