"""What the commands share: a flag for each field of a configuration, --version, and the way from flags to `main`."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import app, flags, logging

from ragjax.commands.ends import end_of, leave_others, take_signals
from ragjax.errors import UserError
from ragjax.fields import Checked, flag_text
from ragjax.version import __version__
from ragjax.voice import say

FLAGS = flags.FLAGS
Config = TypeVar("Config", bound=Checked)
# Flags defined here belong to the command that asks for them: its --help lists them.
flags.disclaim_key_flags()


def define_flags(config: type[Checked], but: Sequence[str] = ()) -> None:
    """Defines --NAME for each field of a configuration that is not in `but`, with its help and choices."""
    for field in dataclasses.fields(config):
        if field.name not in but:
            define_field(field, field.default)


def define_overrides(config: type[Checked], but: Sequence[str] = ()) -> None:
    """Defines --NAME for each field of a run's configuration that is not in `but`, to be left out or to override it."""
    for field in dataclasses.fields(config):
        if field.name not in but:
            define_field(field, default=None)


def define_field(field: dataclasses.Field, default: Any) -> None:
    text, choices, kind = (field.metadata[key] for key in ("help", "choices", "kind"))
    name = field.name
    if choices:
        flags.DEFINE_enum(name, default, choices, text)
    elif kind is bool:
        flags.DEFINE_bool(name, default, text)
    elif kind is int:
        flags.DEFINE_integer(name, default, text)
    elif kind is float:
        flags.DEFINE_float(name, default, text)
    else:
        flags.DEFINE_string(name, None if default is None else flag_text(default), text)


def parsed(config: type[Config], but: Sequence[str] = ()) -> Config:
    """The parsed flags as a configuration, without those in `but`. Raises UserError where one is out of bounds."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in but]
    return config(**{name: FLAGS[name].value for name in names})


def given(config: type[Checked], but: Sequence[str] = ()) -> dict[str, Any]:
    """What the command line gives of the flags that `define_overrides` has defined: {field: value}.

    Raises UserError where one is out of bounds.
    """
    names = [field.name for field in dataclasses.fields(config) if field.name not in but]
    values = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    config(**values)  # checks them
    return values


def run_command(main: Callable[[Sequence[str]], None], resumes: bool = True, trains: bool = False) -> None:
    """Parses the flags, runs `main(arguments without the program's name)` and exits as `ragjax.commands.ends` says.

    resumes: the command keeps what it has done, and continues from there when it is run again.
    trains: it does so when SIGTERM ends it, too, and may wait for a step to be saved.
    """

    def guarded(argv: Sequence[str]) -> None:
        # At INFO, JAX reports every accelerator that is missing.
        logging.set_verbosity(logging.WARNING)
        _use_compilation_cache()
        if trains:
            take_signals()
        main(argv[1:])

    def body() -> None:
        if "--version" in sys.argv[1:]:
            say(f"ragjax {__version__}", everywhere=True)
        else:
            app.run(guarded, flags_parser=_parse)

    code = end_of(body, FLAGS.flag_values_dict, resumes)
    leave_others(code)
    sys.exit(code)


def _parse(argv: Sequence[str]) -> list[str]:
    """What is left of the command line without its flags. Raises UserError for a flag that cannot be read."""
    try:
        return FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())} (--help lists the flags)") from error


def _use_compilation_cache() -> None:
    """XLA's persistent cache, so that a second run does not compile again; JAX_COMPILATION_CACHE_DIR overrides it."""
    import jax

    from ragjax.files import default_cache_dir

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = default_cache_dir() / "xla"
    with contextlib.suppress(OSError):  # where it cannot be, JAX would complain of each program that it compiles
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
