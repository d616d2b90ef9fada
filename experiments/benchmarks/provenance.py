"""What every result says of how it was made."""

import os
import sys
from importlib.metadata import version
from typing import Any

import jax


def provenance(*packages: str) -> dict[str, Any]:
    """The command, the versions of ragjax, jax and `packages`, and the machine."""
    return {
        "command": " ".join(["python", *map(_public, sys.argv)]),
        "versions": {name: version(name) for name in ("ragjax", "jax", *packages)},
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def _public(argument: str) -> str:
    """The data's folder by the variable that stands for it, and no folder of this machine."""
    data = os.environ.get("RAGJAX_DATA")
    return argument.replace(data, "$RAGJAX_DATA") if data else argument
