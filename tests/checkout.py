"""What tests read that only a checkout has: documents, pins, experiments. The wheel's suite runs without them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
in_checkout = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(),
    reason="reads files that only a checkout has",
)
