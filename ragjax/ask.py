"""Answers one question from a trained run, and shows the passages it rests on.

    python -m ragjax.ask --run_dir=runs/joint "What is the capital of France?"

Prints the answer with its probability under the concatenated prompt, and each passage's p(z|x).
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from ragjax import flags

_RUN_DIR = absl_flags.DEFINE_string("run_dir", "runs/joint", "Folder of a ragjax.train run.")
_TOP_K = absl_flags.DEFINE_integer("top_k", 0, "Passages to read; 0: as many as the run.", lower_bound=0)


def main(arguments: Sequence[str]) -> None:
    from ragjax.errors import UserError
    from ragjax.pipeline import ask, open_run

    question = " ".join(arguments).strip()
    if not question:
        raise UserError('Ask something: python -m ragjax.ask --run_dir=FOLDER "your question".')
    run = open_run(_RUN_DIR.value)
    answer = ask(run, question, _TOP_K.value or run.config.top_k)
    print(f"\n{answer.text}   (probability {answer.probability:.3f})\n")
    for rank, (passage, share) in enumerate(zip(answer.passages, answer.probabilities, strict=True), start=1):
        print(f"{rank}. p(z|x) = {share:.3f}  [{passage.id}]  {passage.prompt_text}")


if __name__ == "__main__":
    flags.run_command(main)
