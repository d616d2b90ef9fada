"""Writes a run's models as folders that other libraries load, without ragjax.

    python -m ragjax.export --run_dir=runs/joint --out=exported --merge

OUT/embedder is for sentence-transformers, OUT/adapter for PEFT, and OUT/generator for transformers. The last is written
with --merge, or if all weights of the generator were trained. An unfinished run is exported from its last checkpoint.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from ragjax.commands import flags

_RUN_DIR = absl_flags.DEFINE_string("run_dir", "runs/joint", "Folder of a ragjax.train run.")
_OUT = absl_flags.DEFINE_string("out", "", "Folder to write. It must not exist yet.")
_MERGE = absl_flags.DEFINE_bool("merge", False, "Also write the whole generator, with the adapters merged into it.")
_SHARD = absl_flags.DEFINE_float("max_shard_gb", 5.0, "Largest weight file, in GB of 10^9 bytes.", lower_bound=1e-6)


def main(arguments: Sequence[str]) -> None:
    from ragjax.errors import UserError
    from ragjax.exporting import export_run

    if arguments:
        raise UserError(f"ragjax.export takes flags only, not {arguments[0]!r}: see --help.")
    export_run(_RUN_DIR.value, _OUT.value, _MERGE.value, int(_SHARD.value * 1e9))


if __name__ == "__main__":
    flags.run_command(main, resumes=False)
