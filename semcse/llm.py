"""TODO: say what this file is for: semcse.llm."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import errno
import json
import logging
import os
import random
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from semcse import errors
from semcse.errors import RunError, UserError
from semcse.papers import shard_slice

log = logging.getLogger(__name__)


BACKOFF = (0.5, 60.0)  # seconds: the n-th retry waits a random time up to 0.5 * 2^n, at most 60
LONGEST_RETRY_AFTER = 120.0  # seconds that a server may make a request wait
# failures in a row, and seconds without any answer if there ever was one, after which a run ends
GONE = (50, 60.0)


@dataclass(frozen=True)
class Flags:
    """The flags of every script that uses a language model."""

    input: Path = tyro.MISSING  # papers file with abstracts
    # papers file to write, gzipped if it ends in .gz; its journal, list of failures and report
    # stand beside it
    output: Path = tyro.MISSING
    # OpenAI-compatible server, such as http://127.0.0.1:8000/v1; repeat it to share the work; its
    # key: OPENAI_API_KEY
    base_url: tuple[str, ...] = ()
    model: str = tyro.MISSING  # name of the model on the server
    concurrency: int = 32  # most requests in flight; fewer after HTTP 429 and timeouts
    temperature: float = 0.7  # sampling temperature [A]
    top_p: float = 0.95  # nucleus sampling [A]
    max_tokens: int = 120  # most tokens of a text; longer ones are refused as cut off
    attempts: int = 3  # answers asked for until one passes the quality gate
    retries: int = 8  # times a request is sent again after a fault of server or network
    timeout: float = 120.0  # seconds to wait for one answer
    price_in: float = 0.0  # price of a million prompt tokens
    price_out: float = 0.0  # price of a million generated tokens
    # send no more once all answers in the journal, those of earlier runs too, have cost this much
    max_cost: float | None = None
    # ask through OpenAI's Batch API: half the price, answers within a day; the same command comes
    # back for batches that it left
    batch: bool = False
    estimate: bool = False  # say what the missing texts would cost, and send nothing
    # count and log bad lines of the input instead of stopping at the first
    skip_invalid: bool = False
    # such as 2/4: do the second of four shares of the papers, into files of its own
    # (docs/scaling.md: how to merge them)
    shard: str = "1/1"


def check(flags: Flags) -> None:
    """Refuse flags that cannot work.

    Raises:
        UserError: names the flag.
    """
    bounds = {
        "concurrency": (1, 1000),
        "temperature": (0, 10),
        "top_p": (0.001, 1),
        "max_tokens": (1, 1e6),
        "attempts": (1, 1e6),
        "retries": (0, 1e6),
    }
    for name, (least, most) in (
        bounds | {"timeout": (0.001, 1e6), "price_in": (0, 1e6), "price_out": (0, 1e6)}
    ).items():
        if not least <= getattr(flags, name) <= most:
            raise UserError(
                f"--{name.replace('_', '-')} is out of range", f"give {least} to {most:g}"
            )
    urls = [urllib.parse.urlsplit(url) for url in flags.base_url]
    if not urls or any(
        url.scheme not in ("http", "https") or not url.hostname or url.username or url.query
        for url in urls
    ):
        raise UserError(
            "--base-url is missing or not plain http(s)://host[:port]/path",
            "name a server; a key belongs into OPENAI_API_KEY",
        )
    if flags.batch and len(urls) > 1:
        raise UserError("--batch with several --base-url", "name one server")
    if flags.max_cost is not None and not flags.price_in + flags.price_out > 0:
        raise UserError("--max-cost without a price", "give --price-in and --price-out")
    if os.path.isdir(flags.output) or os.path.realpath(flags.output) == os.path.realpath(
        flags.input
    ):
        raise UserError(f"--output {flags.output} is a folder or the input", "name another file")
    if (
        os.path.exists(flags.input)
        and not os.path.isfile(flags.input)
        and not os.path.isdir(flags.input)
    ):
        raise UserError(
            f"--input {flags.input} is a pipe or device, and papers are read three times",
            "write them to a file first",
        )
    if not (api_key().isascii() and api_key().isprintable()):
        raise UserError(
            "OPENAI_API_KEY holds characters that no HTTP header may", "set it again, on one line"
        )
    shard_slice(flags.shard)


def api_key() -> str:
    """The key for all servers."""
    return os.environ.get("OPENAI_API_KEY", "").strip() or "no-key-needed"


# The client


class Answer(NamedTuple):
    """One paid answer: its text, whether the token limit cut it, and tokens read and written."""

    text: str
    cut: bool
    tokens: tuple[int, int]


def read_answer(body: bytes) -> Answer:
    """Parse the body of a response.

    Raises:
        ValueError: it is not a whole chat completion.
    """
    try:
        data = json.loads(body)
        choice, usage = data["choices"][0], data.get("usage") or {}
        read, written = (
            min(max(0, int(usage.get(name) or 0)), 10**9)
            for name in ("prompt_tokens", "completion_tokens")
        )
        text = errors.without_secrets(str(choice["message"].get("content") or ""))
        return Answer(text, choice.get("finish_reason") == "length", (read, written))
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("not a chat completion") from error


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header (seconds or an HTTP date) asks for, at most
    LONGEST_RETRY_AFTER.
    """
    seconds = 0.0
    with contextlib.suppress(ValueError):
        date = email.utils.parsedate_tz(value)
        seconds = email.utils.mktime_tz(date) - time.time() if date else float(value or 0)
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER)


class Unanswered(Exception):
    """A request without an answer. Sending it `again` after `wait` seconds may help; otherwise the
    server does not take this paper's text.
    """

    def __init__(self, reason: str, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.again, self.wait = reason, again, wait


def meaning(status: int, wait: str | None, message: object) -> Unanswered | RunError:
    """What an HTTP status says about the request, its paper or the whole run."""
    if status in (401, 403):
        return RunError(
            f"a server refuses the key (HTTP {status})",
            "set OPENAI_API_KEY to one that it takes and run again",
        )
    if status == 404:
        return RunError(
            "a server knows no such path, model or batch (HTTP 404)",
            "check --base-url (most end in /v1) and --model, and run again",
        )
    if status in (408, 409, 425, 429) or status >= 500:
        return Unanswered(f"HTTP {status}", wait=retry_after(wait))
    return Unanswered(
        f"HTTP {status}: {' '.join(errors.without_secrets(str(message)).split())[:200]}",
        again=False,
    )


@contextlib.contextmanager
def named_faults() -> Iterator[None]:
    """Turn all that goes wrong with a request in the block into Unanswered or, if it concerns every
    request, RunError.
    """
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        raise meaning(
            error.status_code, error.response.headers.get("retry-after"), error.body
        ) from None
    except TimeoutError:
        raise Unanswered("timeout") from None
    except ValueError:
        raise Unanswered("bad body") from None
    # the HTTP libraries have many of their own; one that stays ends the run
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unanswered("connection") from error


def _plain_http() -> Any:
    """httpx's transport for http:// servers, on bare asyncio streams: with 256 requests in flight
    httpx's own costs four times the processor time.
    """
    import httpx2

    class PlainHttp(httpx2.AsyncBaseTransport):
        def __init__(self) -> None:
            self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            while self.idle and self.idle[-1][0].at_eof():
                self.idle.pop()[1].close()
            reader, writer = (
                self.idle.pop()
                if self.idle
                else await asyncio.open_connection(request.url.host, request.url.port or 80)
            )
            again = False
            try:
                fields = b"".join(b"%s: %s\r\n" % field for field in request.headers.raw)
                writer.write(
                    b"%s %s HTTP/1.1\r\n%s\r\n"
                    % (request.method.encode(), request.url.raw_path, fields)
                    + await request.aread()
                )
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(b":") for line in lines)
                }
                response = httpx2.Response(
                    int(first.split()[1]),
                    headers=headers,
                    content=await _read_body(reader, headers),
                )
                again = (
                    b"close" not in headers.get(b"connection", b"").lower() and not reader.at_eof()
                )
                return response
            finally:
                if again:
                    self.idle.append((reader, writer))
                else:
                    writer.close()

        async def aclose(self) -> None:
            for _, writer in self.idle:
                writer.close()

    return PlainHttp()


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[bytes, bytes]) -> bytes:
    """An HTTP body in whichever way its length is told."""
    if b"chunked" not in headers.get(b"transfer-encoding", b"").lower():
        return await (
            reader.readexactly(int(headers[b"content-length"]))
            if b"content-length" in headers
            else reader.read()
        )
    body = b""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    while await reader.readline() not in (b"\r\n", b""):
        pass
    return body


class Client:
    """Sends chat completions to one or several servers: retries by its own rules, and less at a
    time after HTTP 429 and timeouts.
    """

    def __init__(self, flags: Flags) -> None:
        import openai

        clients = [
            openai.DefaultAsyncHttpxClient(
                transport=None if url.startswith("https") else _plain_http()
            )
            for url in flags.base_url
        ]
        options: dict[str, Any] = {"api_key": api_key(), "max_retries": 0, "timeout": None}
        self.servers = [
            openai.AsyncOpenAI(base_url=url, http_client=http, **options)
            for url, http in zip(flags.base_url, clients, strict=True)
        ]
        self.flags, self.stopping, self.faults = flags, asyncio.Event(), Counter[str]()
        self.limit, self._active, self._cut_at = float(flags.concurrency), 0, float("-inf")
        self._in_a_row, self._heard_at = 0, float("-inf")

    async def ask(self, body: dict[str, Any], server: int) -> Answer | None:
        """The answer to one request; None once the run is stopping. It goes to server number
        `server`, each retry to the next one.

        Raises:
            Unanswered: no answer to this request, after all retries.
            RunError: no answer to any request: wrong key, wrong URL, server gone.
        """
        attempt = 0
        while not self.stopping.is_set():
            if self._active >= self.limit:
                await asyncio.sleep(0.1)
                continue
            self._active += 1
            try:
                return await self._send(body, server + attempt)
            except Unanswered as fault:
                self._count_fault(fault.reason)
                if not fault.again or attempt == self.flags.retries:
                    raise
                wait = max(fault.wait, random.uniform(0, min(BACKOFF[1], BACKOFF[0] * 2**attempt)))
            finally:
                self._active -= 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), wait)
            attempt += 1
        return None

    async def _send(self, body: dict[str, Any], server: int) -> Answer:
        with named_faults():
            async with asyncio.timeout(self.flags.timeout):
                one = self.servers[server % len(self.servers)]
                answer = read_answer(
                    await one.post(f"{one.base_url}chat/completions", cast_to=bytes, body=body)
                )
        self._in_a_row, self._heard_at = 0, time.monotonic()
        self.limit = min(float(self.flags.concurrency), self.limit + 1 / self.limit)
        return answer

    def _count_fault(self, reason: str) -> None:
        """Count faults by kind and in a row: ask for less at a time when a server has too much to
        do, end the run when nothing is answered any more.
        """
        now = time.monotonic()
        self.faults[reason.partition(":")[0]] += 1
        self._in_a_row += reason != "HTTP 429"
        if reason in ("HTTP 429", "timeout") and now - self._cut_at >= 1:
            self.limit, self._cut_at = max(1.0, 0.7 * self.limit), now
        if self._in_a_row >= GONE[0] and now - self._heard_at > GONE[1]:
            raise RunError(
                f"{self._in_a_row} requests in a row failed, the last with: {reason}",
                "check --base-url and its server; run again to go on",
            )
