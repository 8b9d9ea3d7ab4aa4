"""What comes back from a language model: an `Answer`, or why there is none.

Single requests (server_pool.py) and batches (batch_api.py) share this module. It imports openai
only when it is used, because the import takes a second.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from semcse.errors import RunError, UserError, without_secrets


class Answer(NamedTuple):
    """One paid answer."""

    text: str
    cut: bool  # whether the token limit ended the text
    prompt_tokens: int
    completion_tokens: int


class Unanswered(Exception):
    """A request that got no answer. It is `permanent` if the server rejects the text of the paper,
    so that asking again does not help.
    """

    def __init__(self, reason: str, permanent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent


def api_key() -> str:
    """Return the key for all servers, from the environment variable OPENAI_API_KEY.

    Raises:
        UserError: the key cannot be sent in an HTTP header.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key-needed"
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            "OPENAI_API_KEY contains characters that an HTTP header cannot contain",
            "set it again, on one line",
        )
    return key


def read_answer(body: bytes) -> Answer:
    """Parse the body of a response.

    Raises:
        ValueError: the body is not a complete chat completion.
    """
    try:
        data = json.loads(body)
        choice, usage = data["choices"][0], data.get("usage") or {}
        tokens = [
            min(max(0, int(usage.get(name) or 0)), 10**9)
            for name in ("prompt_tokens", "completion_tokens")
        ]
        text = without_secrets(str(choice["message"].get("content") or ""))
        return Answer(text, choice.get("finish_reason") == "length", *tokens)
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("not a chat completion") from error


def status_error(status: int, message: object) -> Unanswered | RunError:
    """Return what an HTTP status means for the request, for its paper or for the whole run."""
    if status in (401, 403):
        return RunError(
            f"a server refuses the key (HTTP {status})",
            "set OPENAI_API_KEY to a key that it accepts and run again",
        )
    if status == 404:
        return RunError(
            "a server does not know this path, model or batch (HTTP 404)",
            "check --base-url (most end in /v1) and --model, and run again",
        )
    if status in (408, 409, 425, 429) or status >= 500:
        return Unanswered(f"HTTP {status}")
    said = " ".join(without_secrets(str(message)).split())
    return Unanswered(f"HTTP {status}: {said[:200]}", permanent=True)


def connection_fault(error: BaseException | None) -> str:
    """Name the kind of an error of the HTTP client, for the report."""
    import httpx2

    if isinstance(error, httpx2.TimeoutException):
        return "timeout"
    return "bad body" if isinstance(error, httpx2.DecodingError) else "connection"


@contextlib.contextmanager
def checked_proxies() -> Iterator[None]:
    """Raise a UserError if the block cannot create a client because of a proxy variable."""
    import httpx2

    try:
        yield
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise UserError(
            f"a proxy or --base-url cannot be used ({error})",
            "correct or unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, or correct --base-url",
        ) from None


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Turn the errors of the openai package in the block into `Unanswered` or, if they concern all
    requests, into `RunError`.
    """
    import httpx2
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        raise status_error(error.status_code, error.body) from None
    except openai.APIConnectionError as error:
        raise Unanswered(connection_fault(error.__cause__)) from error
    except ValueError:
        raise Unanswered("bad body") from None
    except (openai.OpenAIError, httpx2.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unanswered(connection_fault(error)) from error
