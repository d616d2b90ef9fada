"""The one exception that users meet. Imports nothing of ragjax, so that every room may raise it."""

import re

# Characters of another library's message that are quoted: some hold a whole stack of causes in one line.
_QUOTED = 200


class UserError(Exception):
    """Something that the user can mend: a wrong flag, a missing file, a model that does not fit.

    The message is one sentence that names the file, flag or value, and says what to do about it. Commands
    print it without a traceback and exit with status 1; a bug raises anything else.
    """


def reason(error: BaseException) -> str:
    """What another library's error says, to stand inside ours: its first sentence, or its class's name."""
    sentence = re.split(r"\.?\n|\.\s", str(error).strip())[0].rstrip(".:") or type(error).__name__
    return sentence if len(sentence) <= _QUOTED else f"{sentence[: _QUOTED - 3]}..."


class DivergedError(UserError):
    """Training came to a non-finite loss, gradient or vector."""
