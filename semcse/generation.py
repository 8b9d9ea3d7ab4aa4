"""Generate texts on papers with a language model, and never pay for the same text twice.

A task wants some short texts of every paper. Each wanted text is a slot, and its key is a hash of
everything that decides the answer. Every answer is appended to `<output>.journal.jsonl` as soon as
it arrives, and a slot with an accepted text is never requested again: a run that was killed, or
that wants more texts than before, pays only for what is missing. A run reads its input three times:
to count what is missing (survey), to request it (send), and to write the output in order (write).
"""

import asyncio
import contextlib
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tqdm import tqdm

from semcse import files
from semcse.command_line import StopSignal
from semcse.errors import RunError, UserError
from semcse.files import Journal
from semcse.papers import Paper, read_papers, shard_slice
from semcse.quality_gate import clean, judge, parse_texts

if TYPE_CHECKING:
    from semcse.llm import Answer

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds that Ctrl-C waits for answers in flight, because they are billed anyway
CHARS_PER_TOKEN = 4  # a rule of thumb for English, for estimates of costs
BATCH_PRICE = 0.5  # what a token costs in a batch, as a share of its usual price [OpenAI]
TOKENS = ("prompt_tokens", "completion_tokens")
COUNTS = "papers texts missing requests accepted failed papers_written papers_failed".split()
BASE_URL = re.compile(r"https?://(\[[\da-f:.]+\]|[^\s/?#@:]+)(:\d{1,5})?(/[^\s?#]*)?", re.I)
# The smallest and the largest value of each number.
BOUNDS: dict[str, tuple[float, float]] = {
    "concurrency": (1, 1000),
    "temperature": (0, 10),
    "top_p": (0.001, 1),
    "timeout": (0.001, 1e6),
    "max_cost": (0, math.inf),
    **dict.fromkeys(("max_tokens", "attempts"), (1, 1e6)),
    **dict.fromkeys(("retries", "price_in", "price_out"), (0, 1e6)),
}


@dataclass(frozen=True)
class GenerationFlags:
    """The flags of every script that uses a language model."""

    input: Path = tyro.MISSING  # papers file with abstracts
    output: Path = tyro.MISSING  # papers file to write, gzipped if its name ends in .gz
    # OpenAI-compatible server, such as http://127.0.0.1:8000/v1. Repeat the flag to share the work
    # among several servers. The environment variable OPENAI_API_KEY holds their key.
    base_url: tuple[str, ...] = ()
    model: str = tyro.MISSING  # name of the model on the server
    concurrency: int = 32  # largest number of requests in flight; falls after HTTP 429 and timeouts
    temperature: float = 0.7  # sampling temperature [A]
    top_p: float = 0.95  # nucleus sampling [A]
    max_tokens: int = 120  # largest number of tokens of a text; longer texts are rejected
    attempts: int = 3  # largest number of answers to request until one passes the quality gate
    retries: int = 8  # how often a request is sent again after a server or network error
    timeout: float = 120.0  # seconds to wait for an answer
    price_in: float = 0.0  # price of a million prompt tokens
    price_out: float = 0.0  # price of a million completion tokens
    max_cost: float = math.inf  # stop when the answers in the journal have cost this much in total
    batch: bool = False  # use OpenAI's Batch API: half the price, answers within a day
    estimate: bool = False  # print what the missing texts would cost, and send nothing
    skip_invalid: bool = False  # count and log bad lines of the input instead of stopping
    shard: str = "1/1"  # part of the papers, such as 2/4; docs/scaling.md shows how to merge parts


@dataclass(frozen=True)
class GenerationTask:
    """The texts that a script requests for every paper."""

    key: Literal["summaries", "query"]  # key of the papers file that holds the texts
    system: str  # the system prompt
    # Name -> instruction, which follows the paper's text; the slots take them in turn. "{n}" stands
    # for the number of texts to write.
    prompts: dict[str, str]
    texts: int  # number of texts to request for a paper
    min_texts: int  # papers with fewer texts are not written
    words: tuple[int, int]  # fewest and most words of a text
    structured: bool = False  # request all missing texts of a paper at once, with a JSON schema
    keep_existing: bool = False  # request nothing for papers that have a text already


def check_flags(flags: GenerationFlags) -> None:
    """Check the flags before anything is read. Raise a UserError that names the flag at fault."""
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(flags, name) <= high:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is out of range", f"give a number from {low} to {high:g}")
    if not flags.base_url or not all(map(BASE_URL.fullmatch, flags.base_url)):
        what = "--base-url is missing or is not of the form http(s)://host[:port]/path"
        raise UserError(what, "name a server, and put its key into OPENAI_API_KEY")
    if flags.batch and len(flags.base_url) > 1:
        raise UserError("--batch works with one --base-url only", "name one server")
    if flags.max_cost < math.inf and not flags.price_in + flags.price_out > 0:
        raise UserError("--max-cost needs a price", "give --price-in and --price-out")
    if flags.output.is_dir() or os.path.realpath(flags.output) == os.path.realpath(flags.input):
        raise UserError(f"--output {flags.output} is a folder or the input", "name another file")
    if os.path.exists(flags.input) and not (flags.input.is_file() or flags.input.is_dir()):
        what = f"--input {flags.input} is a pipe or device, and papers are read three times"
        raise UserError(what, "write them to a file first")
    shard_slice(flags.shard)


def generate_texts(flags: GenerationFlags, task: GenerationTask) -> None:
    """Run a generation script. Raise a RunError if the servers refuse all requests or stop
    answering, or if --max-cost is reached; all answers are kept.
    """
    check_flags(flags)
    if flags.shard != "1/1":
        name = f"shard-{flags.shard.replace('/', '-of-')}.{flags.output.name}"
        flags = replace(flags, output=flags.output.with_name(name))
    output, kind = flags.output, GenerationRun
    if flags.batch:
        from semcse.batch_api import BatchRun as kind
    with (
        files.lock(output.with_name(f".{output.name}.lock")),
        contextlib.closing(AnswerJournal(Path(f"{output}.journal.jsonl"))) as answers,
    ):
        batches = Path(f"{output}.batches.jsonl")
        if not flags.batch and batches.exists() and batches.stat().st_size:
            what = f"{batches}: batches are in progress"
            raise UserError(what, "run with --batch, or delete the file and pay again")
        run = kind(flags, task, answers)
        run.survey()
        if flags.estimate:
            return
        run.connect()
        try:
            with StopSignal() as stop:
                asyncio.run(run.send(stop))
                stop.raise_received()
            run.write()
        finally:
            run.report()
        run.check_completeness()


@dataclass
class PendingPaper:
    """A paper that lacks some texts."""

    paper: Paper
    index: int  # position in the input, which decides the server that is asked first
    keys: list[int]  # key of each slot
    texts: dict[int, str]  # slot -> accepted text
    refused: bool = False  # whether the server rejects the text of this paper


class GenerationRun:
    """One run of a task that sends each request by itself (BatchRun sends files of requests)."""

    def __init__(
        self, flags: GenerationFlags, task: GenerationTask, answers: "AnswerJournal"
    ) -> None:
        self.flags, self.task, self.answers = flags, task, answers
        self.share = BATCH_PRICE if flags.batch else 1.0  # share of the usual price
        self.count = Counter(dict.fromkeys((*COUNTS, *TOKENS), 0))
        self.rejected, self.faults = Counter[str](), Counter[str]()
        # paper id -> why texts were not accepted
        self.failed: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def survey(self) -> None:
        """Check the whole input and count what is missing; with --estimate, print its cost."""
        read = written = 0
        for paper, keys in self.papers():
            requests = self.missing(keys)
            missing = sum(map(len, requests))
            self.count.update(papers=1, texts=len(keys), missing=missing, requests=len(requests))
            for slots in requests if self.flags.estimate else ():
                tokens = most_tokens(self.body(paper, keys, slots))
                read, written = read + tokens[0], written + tokens[1]
        log.info(
            "%(papers)d papers, %(texts)d texts wanted, %(missing)d missing: %(requests)d requests",
            self.count,
        )
        if self.flags.estimate:
            log.info(
                "about %d tokens to read and at most %d to write, without retries; they cost at"
                " most about %.2f",
                *(read, written, self.share * self.cost(read, written)),
            )

    def connect(self) -> None:
        """Prepare the clients of the servers."""
        from semcse.llm import ServerPool

        flags = self.flags
        self.pool = ServerPool(flags.base_url, flags.concurrency, flags.retries, flags.timeout)
        self.faults = self.pool.faults

    async def send(self, stop: StopSignal) -> None:
        """Request all missing texts with a fixed number of workers. If that ends early, wait for
        the answers in flight, because they are billed anyway.
        """
        requests, workers = self.requests(), list[asyncio.Task[None]]()
        async with self.pool as pool:
            for _ in range(self.flags.concurrency):
                workers.append(asyncio.create_task(self._work(requests)))
                await asyncio.sleep(0.0002)  # so that the first requests are sent one by one
            await self._show_progress(stop, workers)
            pool.stopping = True
            await asyncio.wait(workers, timeout=GRACE if stop.received else self.flags.timeout)
            for worker in workers:
                worker.cancel()
            ends = await asyncio.gather(*workers, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _show_progress(self, stop: StopSignal, workers: list[asyncio.Task[None]]) -> None:
        """Update the progress bar until all workers are done or the run must stop."""
        running, missing = set(workers), self.count["missing"]
        with tqdm(total=missing, desc=self.task.key, unit="text", mininterval=1) as bar:
            while running and not stop.received and not self.pool.stopping:
                _, running = await asyncio.wait(running, timeout=0.2)
                cost, failed = self.cost(*self.answers.billed), self.count["failed"]
                bar.set_postfix(cost=f"{cost:.2f}", failed=failed, refresh=False)
                bar.update(self.count["accepted"] - bar.n)

    async def _work(self, requests: Iterator[tuple[PendingPaper, list[int]] | None]) -> None:
        """Send one request after another from the iterator that all workers share."""
        try:
            for request in requests:
                if request:
                    await self._fill(*request)
                else:
                    await asyncio.sleep(0)
                if self.pool.stopping:
                    break
        except Exception:
            self.pool.stopping = True
            raise

    async def _fill(self, pending: PendingPaper, slots: list[int]) -> None:
        """Request texts for these slots until all are accepted or the attempts are used up."""
        from semcse.llm import Unanswered

        for _ in range(self.flags.attempts):
            if self.budget_is_spent():
                self.pool.stopping = True
            if pending.refused:
                break
            body = self.body(pending.paper, pending.keys, slots)
            try:
                answer = await self.pool.ask(body, pending.index)
            except Unanswered as fault:
                self.failed[pending.paper.id][fault.reason] += len(slots)
                pending.refused = fault.permanent
                break
            slots = self.record(pending, slots, answer)
            if not slots:
                return
        self.count["failed"] += len(slots)

    def record(
        self, pending: PendingPaper, slots: list[int], answer: "Answer", done: Collection[int] = ()
    ) -> list[int]:
        """Judge the texts of an answer, append them to the journal, accepted or not, and return the
        slots whose texts were rejected. Slots in `done` are in the journal already.
        """
        texts = [answer.text]
        if self.task.structured:
            texts = [*parse_texts(answer.text), *[""] * len(slots)]
        left, usage = [], {name: getattr(answer, name) for name in TOKENS}
        for slot, text in zip(slots, map(clean, texts), strict=False):
            if slot not in done:
                text, reason = self._judge(pending, text, answer.cut)
                row = {"key": pending.keys[slot], "id": pending.paper.id, "slot": slot}
                row |= {"text": text} | usage
                row |= {"batch": True} if self.flags.batch else {}
                row |= {"rejected": reason} if reason else {}
                self.answers.add(row)
                self.count.update(usage)
                if reason:
                    left.append(slot)
                    self.failed[pending.paper.id][reason] += 1
                    self.rejected[reason] += 1
                else:
                    pending.texts[slot] = text
                    self.count["accepted"] += 1
            usage = dict.fromkeys(TOKENS, 0)  # the first slot counts the tokens of the whole answer
        return left

    def _judge(self, pending: PendingPaper, text: str, cut: bool) -> tuple[str, str | None]:
        """Return the text to record and why it is rejected, if it is."""
        is_query = self.task.key == "query"
        if is_query:  # further lines explain the query
            text, cut = text.partition("\n")[0], cut and "\n" not in text
        if self.task.structured and text:  # the token limit ended the list, not this text
            cut = False
        return text, judge(
            text,
            title=pending.paper.title,
            abstract=pending.paper.abstract,
            prompt=" ".join([self.task.system, *self.task.prompts.values()]),
            words=self.task.words,
            others=pending.texts.values(),
            question=is_query,
            cut=cut,
        )

    def write(self) -> None:
        """Write the output in the order of the input, and list the papers that lack texts."""
        output, failures = self.flags.output, Path(f"{self.flags.output}.failed.jsonl")
        open_text: Any = gzip.open if output.suffix == ".gz" else open
        with (
            files.atomic_path(failures) as failed_path,
            files.atomic_path(output) as output_path,
            failed_path.open("w", encoding="utf-8") as failed,
            open_text(output_path, "wt", encoding="utf-8") as written,
        ):
            for paper, keys in self.papers():
                texts = list(self.answers.texts(keys).values())
                have, want = len(texts), len(keys)
                if have < want:
                    reasons = self.failed.get(paper.id) or {"not asked": want - have}
                    row = {"id": paper.id, "have": have, "want": want, "reasons": reasons}
                    failed.write(json.dumps(row, ensure_ascii=False) + "\n")
                    self.count["papers_failed"] += 1
                if have >= min(self.task.min_texts, want):
                    row = paper.as_row()
                    if texts:
                        row[self.task.key] = texts if self.task.key == "summaries" else texts[0]
                    written.write(json.dumps(row, ensure_ascii=False) + "\n")
                    self.count["papers_written"] += 1
        if not self.count["papers_failed"]:
            failures.unlink()

    def report(self) -> None:
        """Log what this run did, and write it next to the output."""
        system = self.task.system
        flags = "model temperature top_p max_tokens attempts concurrency batch".split()
        report = {
            **self.count,
            "rejected": dict(self.rejected.most_common()),
            "faults": dict(self.faults.most_common()),
            "cost": self.share * self.cost(*(self.count[name] for name in TOKENS)),
            "cost_of_all_runs": self.cost(*self.answers.billed),
            "prompts": {name: hash_of(system, text) for name, text in self.task.prompts.items()},
            **{name: getattr(self.flags, name) for name in flags},
        }
        files.write_json(Path(f"{self.flags.output}.report.json"), report)
        log.info("%s", "; ".join(f"{name}: {value}" for name, value in report.items()))

    def check_completeness(self) -> None:
        """Raise a RunError if --max-cost was reached or if no paper has the texts it needs."""
        unfinished, output = self.count["papers_failed"], self.flags.output
        if unfinished and self.budget_is_spent():
            what = f"--max-cost is reached and {unfinished} papers are unfinished"
            raise RunError(what, "raise it and run again")
        if unfinished and not self.count["papers_written"]:
            what = f"no paper got the texts it needs, so {output} is empty"
            raise RunError(what, f"see the reasons in {output}.failed.jsonl")

    def papers(self) -> Iterator[tuple[Paper, list[int]]]:
        """Yield each paper of this shard with the keys of its slots, in the order of the input."""
        part = shard_slice(self.flags.shard)
        papers = read_papers(self.flags.input, ("abstract",), self.flags.skip_invalid)
        for paper in itertools.islice(papers, part.start, None, part.step):
            yield paper, self.keys(paper)

    def requests(self) -> Iterator[tuple[PendingPaper, list[int]] | None]:
        """Yield a paper and the slots of one request, until all missing texts are requested.
        Yield None where papers need no request, so that the caller can let other tasks run.
        """
        for index, (paper, keys) in enumerate(self.papers()):
            requests = self.missing(keys)
            if requests:
                pending = PendingPaper(paper, index, keys, self.answers.texts(keys))
                yield from ((pending, slots) for slots in requests)
            elif index % 100 == 0:
                yield None

    def keys(self, paper: Paper) -> list[int]:
        """Return the 64-bit key of each slot of a paper: a hash of prompt, model, sampling
        parameters, paper and slot number. The list is empty if the paper keeps its existing text.
        """
        flags, task = self.flags, self.task
        if task.keep_existing and getattr(paper, task.key):
            return []
        sampling = (flags.temperature, flags.top_p, flags.max_tokens)
        parts = (flags.model, *sampling, paper.title, paper.abstract)
        prompts = itertools.islice(itertools.cycle(task.prompts.values()), task.texts)
        return [
            int(hash_of(task.system, prompt, *parts, slot), 16)
            for slot, prompt in enumerate(prompts)
        ]

    def missing(self, keys: list[int]) -> list[list[int]]:
        """Return the slots without an accepted answer, grouped into requests."""
        slots = [slot for slot, key in enumerate(keys) if key not in self.answers.offsets]
        if self.task.structured:
            return [slots] if slots else []
        return [[slot] for slot in slots]

    def body(self, paper: Paper, keys: list[int], slots: list[int]) -> dict[str, Any]:
        """Return the JSON body of a request. The prompt follows the paper, so that servers can
        reuse the prefix that the requests on one paper share.
        """
        prompts, n, first = list(self.task.prompts.values()), len(slots), keys[slots[0]]
        prompt = prompts[slots[0] % len(prompts)].replace("{n}", str(n))
        text = f"Title: {paper.title}\n\nAbstract: {paper.abstract}\n\n{prompt}"
        body = {
            "model": self.flags.model,
            "messages": [
                {"role": "system", "content": self.task.system},
                {"role": "user", "content": text},
            ],
            "temperature": self.flags.temperature,
            "top_p": self.flags.top_p,
            "max_tokens": self.flags.max_tokens * n,
            "seed": (first + self.answers.rejected[first]) % 2**31,  # a new one for each attempt
        }
        if self.task.structured:
            texts = {"type": "array", "items": {"type": "string"}, "minItems": n, "maxItems": n}
            schema: dict[str, Any] = {"type": "object", "properties": {"texts": texts}}
            schema |= {"required": ["texts"], "additionalProperties": False}
            json_schema = {"name": "texts", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return body

    def cost(self, read: float, written: float) -> float:
        """Return the usual price of these numbers of prompt and completion tokens."""
        return (read * self.flags.price_in + written * self.flags.price_out) / 1e6

    def budget_is_spent(self, reserved: float = 0.0) -> bool:
        """Return whether --max-cost is reached, given what requests in progress may cost."""
        return self.cost(*self.answers.billed) + reserved >= self.flags.max_cost


class AnswerJournal(Journal):
    """The journal of all answers. For each accepted text, memory holds two integers: the key of its
    slot and its position in the file.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        with path.open("rb") as lines:
            damaged = sum(1 for _ in lines)
        super().__init__(path, keep=_is_intact)
        self.offsets: dict[int, int] = {}  # key -> position of the accepted text
        self.rejected: Counter[int] = Counter()  # key -> number of rejected texts
        # Prompt tokens and completion tokens; tokens of batches are multiplied by BATCH_PRICE.
        self.billed = [0.0, 0.0]
        for offset, row in self.scan(path):
            self._count(offset, row)
            damaged -= 1
        if damaged:
            log.warning("%s: left out %d torn or damaged rows", path, damaged)

    def _count(self, offset: int, row: dict[str, Any]) -> None:
        if "rejected" in row:
            self.rejected[row["key"]] += 1
        else:
            self.offsets[row["key"]] = offset
        for i, name in enumerate(TOKENS):
            self.billed[i] += row[name] * (BATCH_PRICE if "batch" in row else 1)

    def add(self, row: dict[str, Any]) -> None:
        """Append one text, with a checksum."""
        self._count(self.append(row | {"sum": _checksum(row)}), row)

    def texts(self, keys: list[int]) -> dict[int, str]:
        """Return slot -> accepted text for the slots with these keys."""
        return {
            slot: self.row_at(self.offsets[key])["text"]
            for slot, key in enumerate(keys)
            if key in self.offsets
        }

    def close(self) -> None:
        """Close the journal, and remove it if it is empty."""
        super().close()
        if not self.path.stat().st_size:
            self.path.unlink()


def _is_intact(row: dict[str, Any]) -> bool:
    """Return whether a row is as it was written. Rows of early versions have no checksum."""
    keys = {"key", "id", "slot", "text", *TOKENS}
    return keys <= row.keys() and row.get("sum", _checksum(row)) == _checksum(row)


def _checksum(row: dict[str, Any]) -> str:
    return hash_of(*sorted(item for item in row.items() if item[0] != "sum"))


def hash_of(*parts: object) -> str:
    """Return a 64-bit hash, in hexadecimal, that is the same in every run and version."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def most_tokens(body: dict[str, Any]) -> tuple[int, int]:
    """Return about how many tokens a request has, and how many its answer has at most."""
    characters = sum(len(message["content"]) for message in body["messages"])
    return characters // CHARS_PER_TOKEN, body["max_tokens"]
