"""Ask one or several OpenAI-compatible servers for texts.

The openai package does HTTP, proxies, exponential backoff and Retry-After. `ServerPool` adds three
things: a retry goes to the next server, fewer requests are in flight after HTTP 429 and timeouts,
and a run ends when no server answers any more. Batches (batch_api.py) share the rest of this
module. The import takes a second, so scripts import it only to send requests.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import httpx2
import openai

from semcse.errors import RunError, UserError, without_secrets

# A run ends after this many failures in a row and this many seconds without any answer.
GONE_AFTER_FAILURES, GONE_AFTER_SECONDS = 50, 60.0
RETRY_COUNT = "x-stainless-retry-count"  # header in which the openai package counts retries


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
        self.reason, self.permanent = reason, permanent


def read_answer(body: bytes) -> Answer:
    """Parse the body of a response; a ValueError says that it is not a complete chat completion."""
    try:
        data = json.loads(body)
        choice, usage = data["choices"][0], data.get("usage") or {}
        counts = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        tokens = [min(max(0, int(count)), 10**9) for count in counts]
        text = without_secrets(str(choice["message"].get("content") or ""))
        return Answer(text, choice.get("finish_reason") == "length", *tokens)
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("not a chat completion") from error


def status_error(status: int, message: object) -> Unanswered | RunError:
    """Return what an HTTP status means for the request, for its paper or for the whole run."""
    if status in (401, 403):
        what = f"a server refuses the key (HTTP {status})"
        return RunError(what, "set OPENAI_API_KEY to a key that it accepts and run again")
    if status == 404:
        what = "a server does not know this path, model or batch (HTTP 404)"
        return RunError(what, "check --base-url (most end in /v1) and --model, and run again")
    if status in (408, 409, 425, 429) or status >= 500:
        return Unanswered(f"HTTP {status}")
    text = " ".join(without_secrets(str(message)).split())
    return Unanswered(f"HTTP {status}: {text[:200]}", permanent=True)


def connection_fault(error: BaseException) -> str:
    """Name the kind of an error of the HTTP client, for the report."""
    if isinstance(error, httpx2.TimeoutException):
        return "timeout"
    return "bad body" if isinstance(error, httpx2.DecodingError) else "connection"


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Turn the errors of the openai package in the block into `Unanswered` or, if they concern all
    requests, into `RunError`.
    """
    try:
        yield
    except openai.APIStatusError as error:
        raise status_error(error.status_code, error.body) from None
    except ValueError:
        raise Unanswered("bad body") from None
    except (openai.OpenAIError, httpx2.HTTPError) as error:
        raise Unanswered(connection_fault(error.__cause__ or error)) from error


@contextlib.contextmanager
def creating_clients() -> Iterator[str]:
    """Yield the key for all servers, from OPENAI_API_KEY, to a block that creates clients. Raise a
    UserError if the key, a proxy variable or an address cannot be used.
    """
    logging.getLogger("openai").setLevel(logging.WARNING)  # it logs every retry
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key-needed"
    if not (key.isascii() and key.isprintable()):
        what = "OPENAI_API_KEY contains characters that an HTTP header cannot contain"
        raise UserError(what, "set it again, on one line")
    try:
        yield key
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        what = f"a proxy or --base-url cannot be used ({error})"
        raise UserError(what, "correct --base-url, HTTP_PROXY, HTTPS_PROXY or ALL_PROXY") from None


class ServerPool(openai.DefaultAsyncHttpxClient):
    """The HTTP client of all servers, with at most `concurrency` requests in flight. The openai
    package calls `send` for each request, and again for each of at most `retries` retries after the
    pause that it chooses. An answer may take `timeout` seconds.
    """

    def __init__(
        self, base_urls: Sequence[str], concurrency: int, retries: int, timeout: float
    ) -> None:
        with creating_clients() as key:
            super().__init__(limits=httpx2.Limits(), timeout=timeout)
            options: dict[str, Any] = {"max_retries": retries, "http_client": self}
            self.servers = [
                openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, **options)
                for url in base_urls
            ]
        self.urls = [server.base_url.join("chat/completions") for server in self.servers]
        self.concurrency = concurrency
        self.limit = float(concurrency)  # limit of requests in flight, lower after faults
        self.in_flight = 0
        self.stopping = False  # once it is set, no more requests are sent
        self.faults: Counter[str] = Counter()
        self._failures_in_a_row = 0
        self._last_answer = self._last_cut = float("-inf")

    async def ask(self, body: dict[str, Any], server: int) -> Answer:
        """Send one request to the server with this number, modulo the number of servers.

        Raises:
            Unanswered: This request had no answer after all retries.
            RunError: No request is answered: the key or the URL is wrong, or the servers are gone.
            asyncio.CancelledError: The request was not sent, because the run is stopping.
        """
        first = self.servers[server % len(self.servers)]
        with translated_errors():
            try:
                response = await first.post("/chat/completions", cast_to=httpx2.Response, body=body)
            except openai.RateLimitError as error:
                # The package gives up early on a pause of more than two minutes.
                if int(error.request.headers[RETRY_COUNT]) < first.max_retries:
                    what = "a server accepts no more requests for now (HTTP 429)"
                    raise RunError(what, "run again later to continue") from None
                raise
            return read_answer(response.content)

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request or a retry as soon as fewer than `limit` are in flight. The openai package
        tries again after an httpx2.RequestError.
        """
        while self.in_flight >= self.limit and not self.stopping:
            await asyncio.sleep(0.1)
        if self.stopping:
            raise asyncio.CancelledError
        retry = int(request.headers[RETRY_COUNT])
        request.url = self.urls[(self.urls.index(request.url) + retry) % len(self.urls)]
        request.headers["Host"] = request.url.netloc.decode()
        self.in_flight += 1
        try:
            response = await super().send(request, **options)
            if response.is_success:
                read_answer(response.content)
        except httpx2.RequestError as error:
            self._count_fault(connection_fault(error))
            raise
        except ValueError as error:
            self._count_fault("bad body")
            raise httpx2.DecodingError(str(error), request=request) from error
        finally:
            self.in_flight -= 1
        if response.is_success:
            self._failures_in_a_row, self._last_answer = 0, time.monotonic()
            self.limit = min(float(self.concurrency), self.limit + 1 / self.limit)
        else:
            self._count_fault(f"HTTP {response.status_code}")
        return response

    def _count_fault(self, kind: str) -> None:
        """Lower the limit if a server is overloaded, and end the run if no server answers."""
        now = time.monotonic()
        self.faults[kind] += 1
        if kind in ("HTTP 429", "timeout") and now - self._last_cut >= 1:
            self.limit, self._last_cut = max(1.0, 0.7 * self.limit), now
        self._failures_in_a_row += kind != "HTTP 429"
        silent = now - self._last_answer > GONE_AFTER_SECONDS
        if silent and self._failures_in_a_row >= GONE_AFTER_FAILURES:
            what = f"{self._failures_in_a_row} requests in a row failed, the last with: {kind}"
            raise RunError(what, "check --base-url and its server, and run again to continue")
