"""Prompts in, texts out: the only code that knows the API of language models (OpenAI's chat
completions, which vLLM and most servers speak).

A job wants some short texts of every paper. Each wanted text is a slot, known by a hash of all that
decides its answer. Every answer goes into `<output>.journal.jsonl` as it arrives, and slots with an
accepted answer are never sent again: a run that was killed, or that gets more papers or wants more
texts, pays only for what is missing. The input is streamed three times: to check and count it, to
send what is missing, to write the output in its order.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import errno
import functools
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import tyro
from tqdm import tqdm

import files
from files import Journal, RunError, StopSignal, UserError
from load_data import Paper, normalise, read_papers, shard_slice

log = logging.getLogger(__name__)

BACKOFF = (0.5, 60.0)  # seconds: the n-th retry waits a random time up to 0.5 * 2^n, at most 60
LONGEST_RETRY_AFTER = 120.0  # seconds that a server may make a request wait
# failures in a row, and seconds without any answer if there ever was one, after which a run ends
GONE = (50, 60.0)
GRACE = 5.0  # seconds that Ctrl-C waits for answers in flight: they are paid
SAME_WORDS = 0.8  # share of common words (Jaccard) from which two texts count as the same [ours]
# characters read of a text; so many a word are too many: cleaning takes time by the square
LONGEST_TEXT, CHARS_PER_WORD = 4_000, 40
COPIED = 0.7  # share of its word 5-grams in a source from which a text counts as copied [ours]
CHARS_PER_TOKEN = 4  # rule of thumb for English, for --estimate and what batches under way may cost
BATCH_PRICE = 0.5  # share of its price that an answer from a batch costs [OpenAI]


@dataclass(frozen=True)
class Prompt:
    """One instruction to the model."""

    name: str
    system: str
    task: str  # stands after the paper's text; "{n}" in it becomes the number of texts asked for


@dataclass(frozen=True)
class Job:
    """What a script wants of every paper."""

    key: Literal["summaries", "query"]  # where the texts go
    prompts: tuple[Prompt, ...]  # slot i has prompt i modulo their number
    texts: int  # texts wanted of a paper
    least: int  # papers with fewer are left out of the output
    words: tuple[int, int]  # fewest and most words of a text
    at_once: bool = False  # one request with a JSON schema for all missing texts of a paper
    keep: bool = False  # leave papers alone that have something under `key` already


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


# The quality gate

_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d\u00ab\u00bb", '\'\'""""')
_MARK = re.compile(r"^(?:[-*+•>]+|#{1,6}|\(?\d{1,2}[.)])\s+")
_PREAMBLE = r"(?:sure|certainly|of course|okay|here(?:'s| is| are))\b[^:]{0,120}"
_LABEL = re.compile(
    rf"^(?:{_PREAMBLE}|(?:[\w-]+ ){{0,2}}(?:summary|answer|query|sentence|output)(?: \d+)?):\s*",
    re.I,
)
_QUOTED = re.compile(r"""(["'`])((?:(?!\1).)*)\1\.?""")
_REFUSAL = re.compile(
    r"i(?:'m| am) (?:sorry|unable|not able)|sorry\b|i apologi[sz]e|i (?:cannot|can't|do"
    r" not|don't)\b|not applicable|(?:n/?a|none|null)\W*$|please provide"
    r"|.*\bas an? (?:ai|(?:large )?language model)\b",
    re.I | re.S,
)
_REPORTED = re.compile(  # "The study shows that ...": what it shows is the text
    r"(?:(?:the|this|these|a|an|our) )?(?:\w+"
    r" ){0,2}(?:study|paper|article|abstract|research|work|results?|findings?|authors|researchers|conclusion)"
    r"(?: (?:of|in) (?:the|this) (?:\w+ )?(?:study|paper|article|abstract|research))?"
    r" (?:also"
    r" )?(?:is|was|shows?|showed|finds?|found|reveals?|revealed|suggests?|suggested|demonstrates?|demonstrated|indicates?|concludes?|concluded)"
    r" that ",
    re.I,
)
_ABOUT_STUDY = re.compile(
    r"\b(?:[Ww]e|[Oo]urs?|[Tt]he (?:authors?|researchers|investigators))\b"
    r"|\b(?:[Tt]h(?:e|is|ese)|[Aa]n?|[Pp]resent|[Cc]urrent) (?:\w+"
    r" )?(?:study|studies|paper|article|manuscript|report|summary)\b"
    r"|\b[Tt]his (?:\w+"
    r" )?(?:work|research|review|investigation|analysis|experiment|abstract|text)\b"
    r"|\b[Tt]he (?:scientific|given) abstract\b|\b[Oo]ne[- ]sentence\b"
    r"|\b(?:[Tt]he|[Tt]his) (?:subject|sentence|statement|question) (?:is|above)\b|\b[Ff]indings?"
    r" above\b"
    r"|\b[Ii]s a (?:\w+ )?fact\b|\b[Aa] (?:single )?fact (?:in|about)\b"
)


def clean(text: str) -> str:
    """A model's answer without what stands around its text: thoughts, preamble, label, quotes,
    markdown, list mark. Several lines stay several lines.
    """
    text, before = (
        re.sub(
            r"<think>.*?(?:</think>|\Z)",
            "",
            text.encode(errors="replace").decode().translate(_STRAIGHT),
            flags=re.S,
        )[:LONGEST_TEXT],
        "",
    )
    while before != text:
        before = text
        lines = [line for line in map(_bare, re.sub(r"```\w*", "\n", text).splitlines()) if line]
        while len(lines) > 1 and lines[0].endswith(":"):
            del lines[0]
        text = "\n".join(lines)
    return text


def _bare(line: str) -> str:
    """One line without what may stand at its ends, emphasis, control characters and runs of white
    space.
    """
    line = re.sub(r"\*\*|(?<!\w)__|__(?!\w)", "", re.sub(r"[\x00-\x1f\x7f]", " ", line))
    line = re.sub(r"(?<!\w)\*(?=\S)([^*]+)(?<=\S)\*(?!\w)", r"\1", " ".join(line.split()))
    line = _LABEL.sub("", _MARK.sub("", line))
    quoted = _QUOTED.fullmatch(line)
    line = quoted[2].strip() if quoted else line
    reported = _REPORTED.match(line)
    return line[reported.end() :][:1].upper() + line[reported.end() + 1 :] if reported else line


def judge(
    text: str, paper: Paper, others: Iterable[str], job: Job, cut: bool = False
) -> str | None:
    """Why a cleaned text on `paper`, of which `others` were accepted before, must not enter the
    data; None if it may. `cut`: the token limit ended it.
    """
    reasons: dict[str, Callable[[], object]] = {
        "cut off": lambda: cut,
        "empty": lambda: not re.search(r"\w", text),
        "refusal": lambda: _REFUSAL.match(text),
        "several lines": lambda: "\n" in text,
        "too short": lambda: len(text.split()) < job.words[0],
        "too long": (
            lambda: len(text.split()) > job.words[1] or len(text) > CHARS_PER_WORD * job.words[1]
        ),
        "repeats the prompt": lambda: any(_shared(text, _all_prompts(job.prompts), 4)),
        "speaks of the study": lambda: _ABOUT_STUDY.search(text),
        "a question": lambda: job.key == "summaries" and text.endswith("?"),
        "copies the title": lambda: alike(text, paper.title),
        "copies the abstract": lambda: copied(text, paper.abstract),
        "near-duplicate": lambda: any(alike(text, other) for other in others),
    }
    return next((reason for reason, applies in reasons.items() if applies()), None)


def copied(text: str, source: str) -> bool:
    """Whether most word 5-grams of a text stand in the source; a text of fewer than eight words is
    compared with whole sentences instead.
    """
    if len(_words(text).split()) < 8:
        return any(alike(text, sentence) for sentence in re.split(r"(?<=[.!?:])\s+", source))
    found = _shared(text, source, 5)
    return sum(found) >= COPIED * len(found)


@functools.lru_cache(8)
def _all_prompts(prompts: tuple[Prompt, ...]) -> str:
    """What the model was told in any request, each part once."""
    return " ".join(
        dict.fromkeys(part for prompt in prompts for part in (prompt.system, prompt.task))
    )


def _shared(text: str, source: str, n: int) -> list[bool]:
    """Of every n words in a row of a text, whether they stand in the source."""
    words, whole = _words(text).split(), _words(source)
    return [f" {' '.join(words[i : i + n])} " in whole for i in range(len(words) - n + 1)]


def alike(one: str, two: str) -> bool:
    """Whether two texts consist of nearly the same words."""
    a, b = _word_set(one), _word_set(two)
    return len(a & b) >= SAME_WORDS * max(1, len(a | b))


@functools.lru_cache(1024)
def _word_set(text: str) -> frozenset[str]:
    return frozenset(_words(text).split())


@functools.lru_cache(1024)
def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", normalise(text)), ""])


def parse_texts(text: str) -> list[str]:
    """The whole strings of an answer that should be JSON {"texts": [...]}, also of one that was
    cut; the lines of an answer in prose. Never raises.
    """
    found = []
    for string, colon in (
        re.findall(r'("(?:[^"\\]|\\.)*+"?)(\s*:)?', text, re.S) if re.search(r"[\[{]", text) else []
    ):
        with contextlib.suppress(ValueError):
            found += [] if colon else [str(json.loads(string, strict=False))]
    return found or text.splitlines()


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
        text = files.without_secrets(str(choice["message"].get("content") or ""))
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
        f"HTTP {status}: {' '.join(files.without_secrets(str(message)).split())[:200]}", again=False
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


# The run


class Answers:
    """The journal, and where in it the accepted text of each slot stands: two integers a text, so
    that millions fit into memory.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        with path.open("rb") as journal:
            lines = sum(1 for _ in journal)
        self.journal = Journal(path, keep=_is_whole)
        self.offsets: dict[int, int] = {}
        # refused answers by slot: a new attempt gets a new seed
        self.rejected: Counter[int] = Counter()
        # read and written, and the share in both of answers from batches
        self.tokens = [0, 0, 0, 0]
        for offset, row in Journal.scan(path):
            self._note(offset, row)
            lines -= 1
        if lines:
            log.warning(
                "%s: left out %d torn or damaged rows; what they held is asked for again",
                path,
                lines,
            )

    def _note(self, offset: int, row: dict[str, Any]) -> None:
        if "rejected" in row:
            self.rejected[row["key"]] += 1
        else:
            self.offsets[row["key"]] = offset
        tokens = [row["prompt_tokens"], row["completion_tokens"]]
        self.tokens = [
            old + new
            for old, new in zip(
                self.tokens, tokens + (tokens if "batch" in row else [0, 0]), strict=True
            )
        ]

    def add(self, row: dict[str, Any]) -> None:
        """Keep one answer for good."""
        self._note(self.journal.append(row | {"sum": _sum(row)}), row)

    def texts(self, keys: list[int]) -> dict[int, str]:
        """Slot -> accepted text, of slots with these keys."""
        return {
            slot: self.journal.row_at(self.offsets[key])["text"]
            for slot, key in enumerate(keys)
            if key in self.offsets
        }

    def close(self) -> None:
        """Close the journal; an empty one is removed."""
        self.journal.close()
        if not self.journal.path.stat().st_size:
            self.journal.path.unlink()


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row of the journal is as it was written. Rows of earlier versions have no sum."""
    kinds = {
        "key": int,
        "id": str,
        "slot": int,
        "text": str,
        "prompt_tokens": int,
        "completion_tokens": int,
    }
    return all(type(row.get(name)) is kind for name, kind in kinds.items()) and row.get(
        "sum", _sum(row)
    ) == _sum(row)


def _sum(row: dict[str, Any]) -> str:
    return _hash(*sorted((name, value) for name, value in row.items() if name != "sum")).hex()


@dataclass
class Work:
    """One paper of which texts are missing."""

    paper: Paper
    number: int  # its place in the input: decides which server is asked
    keys: list[int]  # by slot
    texts: dict[int, str]  # accepted so far, by slot
    # why answers were refused or did not come
    reasons: Counter[str] = field(default_factory=Counter)
    taken: bool = True  # the server takes its text


class Run:
    """One run of a job: sends what is missing, judges what comes, writes what there is."""

    def __init__(self, flags: Flags, job: Job, answers: Answers) -> None:
        self.flags, self.job, self.answers, self.started = flags, job, answers, time.monotonic()
        self.count, self.rejected, self.faults = Counter[str](), Counter[str](), Counter[str]()
        self.failed: dict[str, Counter[str]] = {}  # paper id -> reasons
        self.tokens_before = list(answers.tokens)

    def papers(self) -> Iterator[Paper]:
        """The papers of this shard of the input, from its beginning."""
        part = shard_slice(self.flags.shard)
        return itertools.islice(
            read_papers(self.flags.input, need=("abstract",), skip_invalid=self.flags.skip_invalid),
            part.start,
            None,
            part.step,
        )

    def cost(self, tokens: list[int]) -> float:
        """Price of tokens, counted as in Answers."""
        read, written = (tokens[i] - (1 - BATCH_PRICE) * tokens[i + 2] for i in (0, 1))
        return (read * self.flags.price_in + written * self.flags.price_out) / 1e6

    def spent(self, reserved: float = 0.0) -> bool:
        """Whether --max-cost is reached, given what requests under way may cost."""
        return (
            self.flags.max_cost is not None
            and self.cost(self.answers.tokens) + reserved >= self.flags.max_cost
        )

    def keys(self, paper: Paper) -> list[int]:
        """The slots wanted of a paper as 64-bit hashes of prompt, model, parameters, text and slot
        number; none if it keeps what it has.
        """
        if self.job.keep and getattr(paper, self.job.key):
            return []
        shared = [
            self.flags.model,
            self.flags.temperature,
            self.flags.top_p,
            self.flags.max_tokens,
            paper.title,
            paper.abstract,
        ]
        slots = zip(range(self.job.texts), itertools.cycle(self.job.prompts), strict=False)
        return [
            int.from_bytes(_hash(prompt.system, prompt.task, *shared, slot), "big")
            for slot, prompt in slots
        ]

    def missing(self, keys: list[int]) -> list[list[int]]:
        """The slots without an accepted answer, parted into requests."""
        slots = [slot for slot, key in enumerate(keys) if key not in self.answers.offsets]
        return [slots] * bool(slots) if self.job.at_once else [[slot] for slot in slots]

    def body(self, paper: Paper, keys: list[int], slots: list[int]) -> dict[str, Any]:
        """One request: system, paper, task in this order, so that requests about one paper begin
        alike and servers can reuse the prefix.
        """
        prompt, n, flags = (
            self.job.prompts[slots[0] % len(self.job.prompts)],
            len(slots),
            self.flags,
        )
        seed = (keys[slots[0]] + self.answers.rejected[keys[slots[0]]]) % 2**31
        text = (
            f"Title: {paper.title}\n\nAbstract:"
            f" {paper.abstract}\n\n{prompt.task.replace('{n}', str(n))}"
        )
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}]
        sampling = {
            "temperature": flags.temperature,
            "top_p": flags.top_p,
            "max_tokens": flags.max_tokens * n,
            "seed": seed,
        }
        if not self.job.at_once:
            return {"model": flags.model, "messages": messages, **sampling}
        texts = {"type": "array", "items": {"type": "string"}, "minItems": n, "maxItems": n}
        schema = {
            "type": "object",
            "properties": {"texts": texts},
            "required": ["texts"],
            "additionalProperties": False,
        }
        form = {
            "type": "json_schema",
            "json_schema": {"name": "texts", "strict": True, "schema": schema},
        }
        return {"model": flags.model, "messages": messages, **sampling, "response_format": form}

    def survey(self) -> None:
        """Check the whole input and count what is wanted and missing; with --estimate, say what
        that would cost.
        """
        tokens = [0, 0]
        for paper in self.papers():
            keys = self.keys(paper)
            requests = self.missing(keys)
            self.count.update(
                papers=1, texts=len(keys), missing=sum(map(len, requests)), requests=len(requests)
            )
            for body in (
                self.body(paper, keys, slots) for slots in requests if self.flags.estimate
            ):
                tokens = [old + new for old, new in zip(tokens, most_tokens(body), strict=True)]
        log.info(
            "%(papers)d papers, %(texts)d texts wanted, %(missing)d missing: %(requests)d requests",
            self.count,
        )
        if self.flags.estimate:
            log.info(
                "about %d tokens to read (%d characters each) and at most %d to write, not counting"
                " retries",
                tokens[0],
                CHARS_PER_TOKEN,
                tokens[1],
            )
            log.info(
                "cost: at most about %.2f",
                self.cost(tokens + (tokens if self.flags.batch else [0, 0])),
            )

    async def send(self, stop: StopSignal) -> None:
        """Send all that is missing with a fixed number of workers. When that must end early,
        answers in flight are waited for: they are paid.
        """
        client, source = Client(self.flags), self._source()
        self.faults = client.faults
        tasks = []
        for _ in range(self.flags.concurrency):
            tasks.append(asyncio.create_task(self._work(client, source)))
            # its first request leaves before the next worker makes its own
            await asyncio.sleep(0.0002)
        done, running = set[asyncio.Task[None]](), set(tasks)
        have = self.count["texts"] - self.count["missing"]
        with tqdm(
            total=self.count["texts"], initial=have, desc=self.job.key, unit="text", mininterval=1
        ) as bar:
            while (
                running
                and not stop.received
                and not client.stopping.is_set()
                and not any(task.exception() for task in done)
            ):
                done, running = await asyncio.wait(
                    running, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION
                )
                bar.set_postfix(
                    tokens=sum(self.answers.tokens[:2]),
                    cost=f"{self.cost(self.answers.tokens):.2f}",
                    failed=self.count["failed"],
                    refresh=False,
                )
                bar.update(have + self.count["accepted"] - bar.n)
        patience = self.flags.timeout if client.stopping.is_set() else GRACE
        client.stopping.set()
        await asyncio.wait(tasks, timeout=patience)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for server in client.servers:
            await server.close()
        for fault in ends:
            if isinstance(fault, Exception):
                raise fault

    def _source(self) -> Iterator[tuple[Work, list[int]] | None]:
        """All requests to send, those of one paper together; None now and then where papers need
        none, to let other work go on.
        """
        for number, paper in enumerate(self.papers()):
            keys = self.keys(paper)
            requests = self.missing(keys)
            work = Work(paper, number, keys, self.answers.texts(keys) if requests else {})
            yield from ((work, slots) for slots in requests)
            if not requests and number % 100 == 0:
                yield None

    async def _work(self, client: Client, source: Iterator[tuple[Work, list[int]] | None]) -> None:
        """One worker: takes request after request from the source that all workers share."""
        for item in source:
            if item is None:
                await asyncio.sleep(0)
            else:
                await self._fill(client, *item)
            if client.stopping.is_set():
                break

    async def _fill(self, client: Client, work: Work, slots: list[int]) -> None:
        """Ask for the texts of these slots until each has an accepted one or the attempts are used
        up.
        """
        for _ in range(self.flags.attempts):
            if self.spent():
                client.stopping.set()
            if not work.taken:
                break
            try:
                answer = await client.ask(self.body(work.paper, work.keys, slots), work.number)
            except Unanswered as fault:
                work.reasons[fault.reason] += len(slots)
                work.taken = fault.again
                break
            slots = self._judge(work, slots, answer) if answer else []
            if not slots:
                return
        self.count["failed"] += len(slots)
        self.failed[work.paper.id] = work.reasons

    def _judge(
        self, work: Work, slots: list[int], answer: Answer, kept: Collection[int] = ()
    ) -> list[int]:
        """Journal the texts of an answer, good or bad, and return the slots that still have none;
        texts of slots in `kept` are in the journal already.
        """
        texts = (
            [*parse_texts(answer.text), *[""] * len(slots)] if self.job.at_once else [answer.text]
        )
        left, tokens, batch = [], answer.tokens, {"batch": True} if self.flags.batch else {}
        for slot, text in zip(slots, map(clean, texts), strict=False):
            if slot in kept:  # and so are the tokens, with the first slot's
                tokens = (0, 0)
                continue
            # of a cut list the whole texts are good
            cut = answer.cut and not (self.job.at_once and text)
            if self.job.key == "query":  # what follows on further lines explains the query
                text, cut = text.partition("\n")[0], cut and "\n" not in text
            reason = judge(text, work.paper, work.texts.values(), self.job, cut)
            row = {
                "key": work.keys[slot],
                "id": work.paper.id,
                "slot": slot,
                "text": text,
                "prompt_tokens": tokens[0],
                "completion_tokens": tokens[1],
            }
            self.answers.add(row | batch | ({"rejected": reason} if reason else {}))
            tokens = (0, 0)
            if reason:
                left.append(slot)
                work.reasons[reason] += 1
                self.rejected[reason] += 1
            else:
                work.texts[slot] = text
                self.count["accepted"] += 1
        return left

    def write(self) -> None:
        """Write the output in the input's order, and the list of papers that have fewer texts than
        wanted.
        """
        output, failures = self.flags.output, Path(f"{self.flags.output}.failed.jsonl")
        opened = gzip.open if output.suffix == ".gz" else open
        with contextlib.ExitStack() as stack:
            failed = stack.enter_context(
                stack.enter_context(files.atomic_path(failures)).open("w", encoding="utf-8")
            )
            good = cast(
                IO[str],
                stack.enter_context(
                    opened(stack.enter_context(files.atomic_path(output)), "wt", encoding="utf-8")
                ),
            )
            for paper in self.papers():
                keys = self.keys(paper)
                texts = tuple(self.answers.texts(keys).values())
                if len(texts) < len(keys):
                    reasons = self.failed.get(paper.id) or {"not asked": len(keys) - len(texts)}
                    failed.write(
                        json.dumps(
                            {
                                "id": paper.id,
                                "have": len(texts),
                                "want": len(keys),
                                "reasons": reasons,
                            },
                            ensure_ascii=False,
                        )
                        + "\n"
                    )
                    self.count["papers_failed"] += 1
                if len(texts) >= min(self.job.least, len(keys)):
                    row = paper.as_row() | (
                        {self.job.key: texts if self.job.key == "summaries" else texts[0]}
                        if texts
                        else {}
                    )
                    good.write(json.dumps(row, ensure_ascii=False) + "\n")
                    self.count["papers_written"] += 1
        if not self.count["papers_failed"]:
            failures.unlink()

    def report(self) -> None:
        """Log what this run did and write it beside the output."""
        tokens = [
            now - before
            for now, before in zip(self.answers.tokens, self.tokens_before, strict=True)
        ]
        report = {
            **{
                name: self.count[name]
                for name in (
                    "papers",
                    "texts",
                    "missing",
                    "accepted",
                    "failed",
                    "papers_written",
                    "papers_failed",
                )
            },
            "rejected": dict(self.rejected.most_common()),
            "faults": dict(self.faults.most_common()),
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "cost": self.cost(tokens),
            "cost_of_all_runs": self.cost(self.answers.tokens),
            "seconds": round(time.monotonic() - self.started, 1),
            "prompts": {one.name: _hash(one.system, one.task).hex() for one in self.job.prompts},
            **{
                name: getattr(self.flags, name)
                for name in (
                    "model",
                    "temperature",
                    "top_p",
                    "max_tokens",
                    "attempts",
                    "concurrency",
                    "batch",
                )
            },
        }
        files.write_json(Path(f"{self.flags.output}.report.json"), report)
        log.info("%s", "; ".join(f"{name}: {value}" for name, value in report.items()))


def most_tokens(body: dict[str, Any]) -> list[int]:
    """About how many tokens a request has, and how many its answer has at most."""
    return [
        sum(len(message["content"]) for message in body["messages"]) // CHARS_PER_TOKEN,
        body["max_tokens"],
    ]


def _hash(*parts: object) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()


def run_job(flags: Flags, job: Job, road: type[Run] = Run) -> None:
    """Do what a script's command line asks for, request by request or on another `road`: see the
    first lines of this file.

    Raises:
        UserError: bad flags or input, or another run works on this output.
        RunError: servers refuse all requests or are gone, or --max-cost is reached. All answers are
            kept.
    """
    check(flags)
    if flags.shard != "1/1":
        flags = replace(
            flags,
            output=flags.output.with_name(
                f"shard-{flags.shard.replace('/', '-of-')}.{flags.output.name}"
            ),
        )
    output = flags.output
    with (
        files.lock(output.with_name(f".{output.name}.lock")),
        contextlib.closing(Answers(Path(f"{output}.journal.jsonl"))) as answers,
    ):
        if (
            not flags.batch
            and (pending := Path(f"{output}.batches.jsonl")).exists()
            and pending.stat().st_size
        ):
            raise UserError(
                f"{pending}: batches are under way",
                "run with --batch, or delete the file to pay for their answers anew",
            )
        run = road(flags, job, answers)
        run.survey()
        if flags.estimate:
            return
        try:
            with StopSignal() as stop:
                asyncio.run(run.send(stop))
                stop.raise_received()
            run.write()
        finally:
            run.report()
        if run.spent() and run.count["papers_failed"]:
            raise RunError(
                f"--max-cost {flags.max_cost} is reached, {run.count['papers_failed']} papers are"
                " unfinished",
                "raise it and run again",
            )
        if run.count["papers_failed"] and not run.count["papers_written"]:
            raise RunError(
                f"no paper got the texts it needs, so {output} is empty",
                f"the reasons stand in {output}.failed.jsonl",
            )
