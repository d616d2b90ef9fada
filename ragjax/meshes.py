"""How a mesh of devices is written: data:D,fsdp:F,tensor:T."""

from collections.abc import Mapping

from ragjax.errors import UserError

# Devices that differ in DATA or FSDP alone work on different questions; those that differ in FSDP also keep different
# parts of the weights, and so do those that differ in TENSOR, which work on one question together.
DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")


def read_mesh(text: str) -> dict[str, int]:
    """The sizes of the axes that a text such as "data:2,fsdp:4" names; {} for the empty text.

    Raises:
      UserError: it is not written so, or names an axis twice.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition(":")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(
                f"--mesh={text} has the entry {part!r}: write each of the axes {', '.join(AXES)} at most once and with "
                "its number of devices, as in data:2,fsdp:4."
            )
        sizes[name] = int(size)
    return sizes


def mesh_text(sizes: Mapping[str, int]) -> str:
    """What `read_mesh` reads."""
    return ",".join(f"{name}:{size}" for name, size in sizes.items())
