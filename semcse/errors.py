"""The exceptions that end a script with one error line, and text that is safe to print.

Exit codes: 0 done; 2 bad usage or bad input (UserError), and nothing was written; 1 a fault at run
time (RunError, a full disk), and everything done so far is kept; 130 Ctrl-C; 143 SIGTERM.
"""

import contextlib
import os
import re
from collections.abc import Iterator


class UserError(Exception):
    """Bad usage or bad input. `what` names the file, line or setting; `fix` says what to do."""

    exit_code = 2

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}; {fix}")
        self.what, self.fix = what, fix


class RunError(UserError):
    """A fault at run time, such as a non-finite loss or a server that is gone."""

    exit_code = 1


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, it is not caught by `except Exception`."""


@contextlib.contextmanager
def memory_named(settings: str) -> Iterator[None]:
    """Raise a RunError that names the `settings` to lower if the block runs out of memory."""
    try:
        yield
    # torch raises OutOfMemoryError for a GPU, but a plain RuntimeError for the CPU.
    except (MemoryError, RuntimeError) as error:
        causes = "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED"
        if isinstance(error, RuntimeError) and not re.search(causes, str(error)):
            raise
        fix = f"free some memory and continue, or start again with a lower {settings}"
        raise RunError(f"out of memory ({str(error)[:200]})", fix) from None


def without_secrets(text: str) -> str:
    """Replace API keys and tokens in `text`, which a server may have sent back, with stars."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:  # shorter values, such as "EMPTY", are placeholders
            text = text.replace(value, "***")
    return text


def printable(text: str) -> str:
    """Return `text` without secrets and with every character escaped that could garble a line."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in without_secrets(text)
    )
