"""Answers questions from a trained run, and shows the passages that the answers rest on.

    python -m ragjax.ask --run_dir=runs/joint "What is the capital of France?"
    python -m ragjax.ask --run_dir=runs/joint                    # asks for questions; end with Ctrl-D
    python -m ragjax.ask --run_dir=runs/joint --json < questions.txt    # lines of text, or JSON with "question"

Prints the answer with its probability p(y|x). Of each passage it prints p(z|x), how likely the embedder considers it to
help, and p(z|x,y), how much of the answer's probability comes from it.
"""

import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from ragjax.commands import console, flags
from ragjax.config import DecodeConfig, RetrievalConfig
from ragjax.errors import UserError
from ragjax.voice import say

_RUN_DIR = absl_flags.DEFINE_string("run_dir", "runs/joint", "Folder of a ragjax.train run.")
_DATA = absl_flags.DEFINE_string("data", "", "Where the run's data are now. Left out: where the run found them.")
_TOP_K = absl_flags.DEFINE_integer("top_k", 0, "Passages per question; 0: as many as the run has.", lower_bound=0)
_JSON = absl_flags.DEFINE_bool("json", False, "Print one line of JSON per question, and nothing else.")
flags.define_overrides(DecodeConfig)
flags.define_overrides(RetrievalConfig)


def main(arguments: Sequence[str]) -> None:
    import dataclasses

    from ragjax.generation import check_decoding
    from ragjax.runs import ask, open_run

    question = console.checked(" ".join(arguments).strip())
    if arguments and not question:
        raise UserError(console.NOTHING_ASKED)
    overrides = flags.given(DecodeConfig)
    run = open_run(_RUN_DIR.value, data=_DATA.value, search=flags.given(RetrievalConfig))
    config = dataclasses.replace(run.config, top_k=_TOP_K.value or run.config.top_k, **overrides)
    check_decoding(config)
    run.pipeline.check_top_k(config.top_k)  # before the first question is typed
    if sentence := run.unfinished():
        say(sentence, to_stderr=True)
    is_terminal = sys.stdout.isatty() and not _JSON.value

    def answer(question: str) -> None:
        found = ask(run.pipeline, console.checked(question), config, console.Stream() if is_terminal else None)
        if _JSON.value:
            say(console.json_line(question, found), flush=True)
        else:
            console.print_answer(found, is_streamed=is_terminal)

    if question:
        answer(question)
    else:
        console.answer_lines(answer, as_json=_JSON.value)


if __name__ == "__main__":
    flags.run_command(main, resumes=False)
