"""Generates texts at half the price with OpenAI's Batch API, which takes files of requests and
answers them within a day.

Prompts, quality gate, journal and outputs are those of generation.py. What is in progress is noted
in `<output>.batches.jsonl`. A batch costs money as soon as it is created, so its file is uploaded
and noted first, and a batch is created only if the server lists none of that file. A batch whose
creation response was lost (the run was killed, the connection broke) is found again that way.
Requests and answers are kept on disk; memory holds one or two integers for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from tqdm import tqdm

from semcse import llm
from semcse.command_line import StopSignal
from semcse.errors import RunError, UserError, without_secrets
from semcse.files import Journal
from semcse.generation import (
    BATCH_PRICE,
    AnswerJournal,
    GenerationRun,
    GenerationTask,
    PendingPaper,
    most_tokens,
)
from semcse.generation_flags import GenerationFlags

log = logging.getLogger(__name__)

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000  # of one file [OpenAI]
# Seconds between two polls. A new batch appears in the server's list within this time.
POLL = 30.0
# Most batches whose answers are read at once: they are on disk, some 60 MB each.
MAX_COLLECTED = 8
ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


class BatchRun(GenerationRun):
    """One run of a task with batches."""

    def __init__(
        self, flags: GenerationFlags, task: GenerationTask, answers: AnswerJournal
    ) -> None:
        super().__init__(flags, task, answers)
        self.path = Path(f"{flags.output}.batches.jsonl")
        self.room = sys.maxsize  # how many requests the server accepts at a time
        # uploaded file -> what is noted of it: the keys of its requests, their cost, its batch
        self.uploads: dict[str, dict[str, Any]] = {}
        self.rejected_before = Counter(answers.rejected)  # key -> rejections in earlier runs
        self.unanswered: Counter[int] = Counter()  # key -> requests without an answer

    def survey(self) -> None:
        """Check the input, then check that the server has a Batch API and that the batches in
        progress belong to this command.

        Raises:
            UserError: bad input, no Batch API, or batches of another command.
        """
        import openai

        super().survey()
        if self.flags.estimate:
            return
        url, retries = self.flags.base_url[0], self.flags.retries
        logging.getLogger("openai").setLevel(logging.WARNING)  # it logs every retry
        with llm.checked_proxies():
            self.api = openai.OpenAI(
                base_url=url, api_key=llm.api_key(), max_retries=retries, timeout=self.flags.timeout
            )
        try:
            with llm.translated_errors():
                list(self.api.batches.list(limit=1).data)
        except (llm.Unanswered, RunError) as error:
            raise UserError(
                f"--base-url {url} has no Batch API ({error})",
                "check the address and the key, or leave --batch out",
            ) from None
        self._read_notes()

    def _read_notes(self) -> None:
        """Read which uploads are in progress, and check that they belong to this command."""
        for _, row in Journal.scan(self.path) if self.path.exists() else ():
            self.uploads.setdefault(row["file"], {}).update(row)
        self.uploads = {file: row for file, row in self.uploads.items() if "done" not in row}
        if self.uploads:
            wanted = (key for paper in self.papers() for key in self.keys(paper))
            if others := self._in_progress().difference(wanted):
                raise UserError(
                    f"{self.path}: {len(others)} requests in progress are not of this command"
                    " (other papers, model, prompts or sampling)",
                    "repeat the command that sent them, or delete the file and lose their cost",
                )

    async def send(self, stop: StopSignal) -> None:
        """Submit batches of what is missing, wait, judge the answers, and submit again what was
        rejected, until every text is accepted or its attempts are used up.
        """
        self.notes = Journal(self.path)
        try:
            with tqdm(desc=self.task.key, unit="request") as bar:
                await self._poll(stop, bar)
        finally:
            self.notes.close()
            self.count["failed"] = self.count["missing"] - self.count["accepted"]
            if self.uploads:
                log.info(
                    "%d batches continue at the server; run the same command to get their answers",
                    len(self.uploads),
                )
            else:
                self.path.unlink()

    async def _poll(self, stop: StopSignal, bar: tqdm[Any]) -> None:
        """Submit and collect until nothing is in progress or the run must stop."""
        news, faults_in_a_row = True, 0
        while not stop.received:
            try:
                if news:
                    self._submit(stop)
                if not self.uploads:
                    return
                for _ in range(100):
                    await asyncio.sleep(0 if stop.received else POLL / 100)
                if not stop.received:
                    news, faults_in_a_row = self._collect_ended(bar), 0
            except llm.Unanswered as fault:
                self.faults[fault.reason] += 1
                news, faults_in_a_row = True, faults_in_a_row + 1
                if faults_in_a_row > self.flags.retries or fault.permanent:
                    raise RunError(
                        f"the server does not accept or answer requests ({fault.reason})",
                        "fix that and run again to continue",
                    ) from None

    def _submit(self, stop: StopSignal) -> None:
        """Upload what is missing, in files of the size that the server accepts."""
        keys, cost = list[int](), 0.0
        with tempfile.TemporaryFile(dir=self.path.parent) as handle:
            for key, price, line in itertools.chain(self._batch_requests(), [(0, 0.0, b"")]):
                full = len(keys) == MAX_REQUESTS or handle.tell() + len(line) > MAX_BYTES
                if keys and (full or not line):
                    if stop.received:
                        return
                    handle.seek(0)
                    with llm.translated_errors():
                        named = ("requests.jsonl", handle)
                        file = self.api.files.create(file=named, purpose="batch").id
                    self._note(file, keys=keys, cost=cost)
                    handle.truncate(handle.seek(0))
                    keys, cost = [], 0.0
                handle.write(line)
                keys.append(key)
                cost += price

    def _note(self, file: str, **what: Any) -> None:
        """Write what is known of an uploaded file to disk."""
        self.notes.append({"file": file} | what)
        self.notes.sync()
        self.uploads.setdefault(file, {}).update(what)

    def _batch_requests(self) -> Iterator[tuple[int, float, bytes]]:
        """Yield key, highest cost and line of the requests that are missing and not in progress, as
        long as the server and --max-cost have room.
        """
        in_progress = self._in_progress()
        reserved = sum(row["cost"] for row in self.uploads.values())
        for pending, slots in filter(None, self.requests()):
            key, first = self._request_key(pending, slots), pending.keys[slots[0]]
            rejected = self.answers.rejected[first]
            if (
                key in in_progress
                or rejected - self.rejected_before[first] >= self.flags.attempts
                or self.unanswered[key] > self.flags.retries
            ):
                continue
            if len(in_progress) >= self.room or self.budget_is_spent(reserved):
                return
            body = self.body(pending.paper, pending.keys, slots)
            read, written = most_tokens(body)
            cost = self.cost([BATCH_PRICE * read, BATCH_PRICE * written])
            in_progress.add(key)
            reserved += cost
            # the name says for which slots the answer is, and after how many rejections
            name = f"{key:016x}-{rejected:x}-{sum(1 << slot for slot in slots):x}"
            row = {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": body}
            yield key, cost, json.dumps(row).encode() + b"\n"

    def _request_key(self, pending: PendingPaper, slots: list[int]) -> int:
        """Return the key of a request, which stays the same when some of its slots are filled."""
        return pending.keys[0 if self.task.structured else slots[0]]

    def _in_progress(self) -> set[int]:
        return {key for row in self.uploads.values() for key in row["keys"]}

    def _batches(self) -> dict[str, Any]:
        """Return uploaded file -> its batch, which is created unless an earlier try did that."""
        batches = {}
        with llm.translated_errors():
            known = dict[str, str]()
            if any("batch" not in row for row in self.uploads.values()):
                known = {one.input_file_id: one.id for one in self.api.batches.list(limit=100)}
            for file, row in self.uploads.items():
                if batch := row.get("batch") or known.get(file):
                    batches[file] = self.api.batches.retrieve(batch)
                else:  # no retries: if the response is lost, a retry would create a second batch
                    batches[file] = self.api.with_options(max_retries=0).batches.create(
                        input_file_id=file, endpoint=ENDPOINT, completion_window="24h"
                    )
                if "batch" not in row:
                    self._note(file, batch=batches[file].id)
        return batches

    def _collect_ended(self, bar: tqdm[Any]) -> bool:
        """Show the state of the batches, collect those that have ended, and return whether there
        are any. Raises a RunError if the server did not run one.
        """
        batches = self._batches()
        counts = [batch.request_counts for batch in batches.values() if batch.request_counts]
        bar.total = len(self._in_progress())
        bar.n = sum(count.completed + count.failed for count in counts)
        bar.set_postfix(batches=len(batches), cost=f"{self.cost(self.answers.billed):.2f}")
        ends = ("completed", "expired", "cancelled", "failed")
        ended = {file: batch for file, batch in batches.items() if batch.status in ends}
        ended = dict(itertools.islice(ended.items(), MAX_COLLECTED))
        self._collect({file: one for file, one in ended.items() if one.status != "failed"})
        self.answers.journal.sync()
        for file in ended:
            self._note(file, done=True)
        largest = max((len(self.uploads.pop(file)["keys"]) for file in ended), default=0)
        not_run = [batch for batch in ended.values() if batch.status in ("cancelled", "failed")]
        faults = [fault for batch in not_run if batch.errors for fault in batch.errors.data or ()]
        said = "; ".join(f"{fault.code}: {fault.message}" for fault in faults)
        if "token_limit_exceeded" in said and largest > 1:
            # the server's queue takes as many requests as are in it now, or half a file
            self.room = len(self._in_progress()) or largest // 2
            log.info("the server's queue is full; sending at most %d requests at a time", self.room)
        elif not_run:
            raise RunError(
                f"a batch has {not_run[0].status} at the server ({said[:300]})",
                "fix that and run again to continue",
            )
        return bool(ended)

    def _collect(self, batches: dict[str, Any]) -> None:
        """Download the answers of batches, then judge and record them in the order of the input."""
        keys = {key for file in batches for key in self.uploads[file]["keys"]}
        if not keys:
            return
        with tempfile.TemporaryFile(dir=self.path.parent) as handle:
            for batch in batches.values():
                for name in filter(None, (batch.error_file_id, batch.output_file_id)):
                    with (
                        llm.translated_errors(),
                        self.api.files.with_streaming_response.content(name) as response,
                    ):
                        handle.writelines(response.iter_bytes())
                    handle.write(b"\n")
            positions, answered, end = _index(handle)
            counts = [batch.request_counts for batch in batches.values() if batch.request_counts]
            if answered < sum(count.completed for count in counts):
                raise llm.Unanswered("a file of answers is cut")
            for pending, slots in filter(None, self.requests()):
                if (key := self._request_key(pending, slots)) in keys:
                    keys.discard(key)  # another paper may have the same texts
                    handle.seek(positions.get(key, end))
                    self._record_line(pending, key, handle.readline())

    def _record_line(self, pending: PendingPaper, key: int, line: bytes) -> None:
        """Judge and record one answer, except what a killed run has recorded of it already."""
        pending.reasons = self.failed.get(pending.paper.id, pending.reasons)
        try:
            answer, rejected, slots = _read_line(line)
        except (llm.Unanswered, RunError) as error:
            again = isinstance(error, llm.Unanswered) and not error.permanent
            reason = error.reason if isinstance(error, llm.Unanswered) else error.what
            self.faults[reason.partition(":")[0]] += 1
            pending.reasons[reason] += 1
            self.unanswered[key] += 1 if again else self.flags.retries + 1
        else:
            recorded = {slot for slot in slots if pending.keys[slot] in self.answers.offsets}
            if self.answers.rejected[pending.keys[slots[0]]] > rejected:
                recorded.add(slots[0])
            self.record(pending, slots, answer, recorded)
        if pending.reasons:
            self.failed[pending.paper.id] = pending.reasons


def _index(handle: IO[bytes]) -> tuple[dict[int, int], int, int]:
    """Return the position of the line of each key, how many requests were answered, and the end."""
    positions, answered, position = dict[int, int](), 0, handle.seek(0)
    for line in handle:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            row = json.loads(line)
            positions[int(row["custom_id"].partition("-")[0], 16)] = position
            answered += row["response"]["status_code"] == 200
        position += len(line)
    return positions, answered, position


def _read_line(line: bytes) -> tuple[llm.Answer, int, list[int]]:
    """Return an answer, how many texts were rejected before it was requested, and its slots.

    Raises:
        Unanswered: there is no answer, or it is not as it should be.
        RunError: the server refuses all requests.
    """
    try:
        row = json.loads(line or b"{}")
        if not row.get("response"):
            code = (row.get("error") or {}).get("code") or "no answer"
            raise llm.Unanswered(without_secrets(str(code)))
        status, body = row["response"]["status_code"], row["response"].get("body")
        if status != 200:
            raise llm.status_error(status, body)
        _, rejected, bits = (int(part, 16) for part in row["custom_id"].split("-"))
        slots = [slot for slot in range(bits.bit_length()) if bits >> slot & 1]
        return llm.read_answer(json.dumps(body).encode()), rejected, slots
    except (ValueError, LookupError, TypeError, AttributeError):
        raise llm.Unanswered("bad body") from None
