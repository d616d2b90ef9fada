"""Puts a comparison's report into experiments/results: figures and ids, no text of the data, no path of a machine.

python -m ragjax.compare --data=$RAGJAX_DATA/popqa --run_dir=runs/compare-popqa --texts=false ...
python experiments/collect_comparison.py --run_dir=runs/compare-popqa --out=experiments/results/comparison.popqa

OUT.html, .md, .csv and .json are the report's own files with $RAGJAX_DATA for the data's folder and runs/NAME for the
comparison's. OUT.svg is the page's first picture, the score against the cost, as a file of its own.
"""

import argparse
import os
import re
from pathlib import Path

from ragjax.errors import UserError
from ragjax.files import read_json, write_atomic
from ragjax.runs import RunFolder

SUFFIXES = (".html", ".md", ".csv", ".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without a suffix")
    flags = parser.parse_args()
    folder = flags.run_dir.absolute()
    if read_json(RunFolder(folder).comparison_file)["options"]["texts"]:
        raise UserError(
            f"{folder} quotes its data: write its report again with --texts=false, which runs nothing anew."
        )
    places = {os.environ.get("RAGJAX_DATA", ""): "$RAGJAX_DATA", str(folder): f"runs/{folder.name}"}
    for suffix in SUFFIXES:
        text = (folder / f"report{suffix}").read_text(encoding="utf-8")
        for place, name in places.items():
            text = text.replace(place, name) if place else text
        if str(Path.home()) in text or str(folder.parent) in text:
            raise UserError(
                f"report{suffix} still names a folder of this machine: set RAGJAX_DATA to that of the data."
            )
        write_atomic(flags.out.with_name(flags.out.name + suffix), text)
        if suffix == ".html":
            write_atomic(flags.out.with_name(f"{flags.out.name}.svg"), first_picture(text))


def first_picture(page: str) -> str:
    """With the page's colours, light and dark, which its lines are drawn in."""
    svg = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    # The rules before the first that is about anything but colours.
    colours = re.search(r"<style>\s*(:root.*?)\* \{", page, re.DOTALL)
    assert svg and colours  # of every report
    return svg[0].replace(">", f"><style>{colours[1]}</style>", 1) + "\n"


if __name__ == "__main__":
    main()
