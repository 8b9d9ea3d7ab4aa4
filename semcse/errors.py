"""TODO: say what this file is for: semcse.errors."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

# environment variables whose values nothing that we write may hold
SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class UserError(Exception):
    """Bad usage or input: exit 2. `what` names the file, line or setting; `mend` says what to do
    about it.
    """

    exit_code = 2

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}; {mend}")
        self.what = what


class RunError(UserError):
    """A fault at run time (non-finite loss, a server gone): exit 1, everything done so far is kept."""

    exit_code = 1


class Terminated(BaseException):
    """SIGTERM arrived. A BaseException, like KeyboardInterrupt, so that no `except Exception`
    swallows it.
    """


@contextlib.contextmanager
def memory_named(settings: str) -> Iterator[None]:
    """Turn a lack of memory in the block, the machine's or a GPU's, into a RunError that names the
    `settings` to lower.
    """
    try:
        yield
    # torch raises RuntimeErrors, of which OutOfMemoryError is only one
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", str(error)
        ):
            raise
        raise RunError(
            f"out of memory ({str(error)[:200]})",
            f"free some and continue, or start again with a lower {settings}",
        ) from None


def without_secrets(text: str) -> str:
    """`text` with stars for the values of SECRETS, which a server may have sent back; words of
    fewer than eight characters ("EMPTY") are no secrets.
    """
    for value in (os.environ.get(name, "").strip() for name in SECRETS):
        text = text.replace(value, "***") if len(value) >= 8 else text
    return text


def printable(text: str) -> str:
    """`text` for one line of a terminal or log: no secrets; line breaks, control and direction
    characters and half surrogate pairs as escapes.
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode()
        for one in without_secrets(text)
    )
