"""What of a mapped file is in memory."""

from pathlib import Path

import pytest


def resident(path):
    """Bytes of the files under a path that are in this process's memory; skips where the system does not tell."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("a system that does not tell what is in memory")
    pages, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = str(path) in line
        elif inside and line.startswith("Rss:"):
            pages += int(line.split()[1])
    return 1024 * pages
