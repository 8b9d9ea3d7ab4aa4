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
import gzip
import hashlib
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from tqdm import tqdm

from semcse import files
from semcse.command_line import StopSignal
from semcse.errors import RunError, UserError
from semcse.files import Journal
from semcse.llm import Answer, Client, Flags, Unanswered, check
from semcse.papers import Paper, read_papers, shard_slice
from semcse.quality_gate import Job, clean, judge, parse_texts

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds that Ctrl-C waits for answers in flight: they are paid
CHARS_PER_TOKEN = 4  # rule of thumb for English, for --estimate and what batches under way may cost
BATCH_PRICE = 0.5  # share of its price that an answer from a batch costs [OpenAI]


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
