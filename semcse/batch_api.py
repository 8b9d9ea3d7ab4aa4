"""Generate texts at half the price with OpenAI's Batch API, which takes files of requests and
answers them within a day.

Prompts, quality gate, journal and outputs are those of generation.py. What is in progress is noted
in `<output>.batches.jsonl`. A batch costs money as soon as it is created, so its file is uploaded
and noted first, and a batch is created only if the server lists no batch of that file. This
also finds a batch whose creation response was lost (by a kill or a broken connection).
Memory holds the requests or the answers of one batch.
"""

import asyncio
import contextlib
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
from tqdm import tqdm

from semcse import llm
from semcse.command_line import StopSignal
from semcse.errors import RunError, UserError, without_secrets
from semcse.files import Journal
from semcse.generation import GenerationRun, PendingPaper, most_tokens

log = logging.getLogger(__name__)

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000  # limits of one file [OpenAI]
POLL = 30.0  # seconds between two polls; a new batch is in the server's list by then
ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


class BatchRun(GenerationRun):
    """One run of a task that sends its requests in batches."""

    def connect(self) -> None:
        """Check that the server has a Batch API and that the batches in progress belong to this
        command; otherwise raise a UserError.
        """
        url, retries, timeout = self.flags.base_url[0], self.flags.retries, self.flags.timeout
        with llm.creating_clients() as key:
            self.api = openai.OpenAI(
                base_url=url, api_key=key, max_retries=retries, timeout=timeout
            )
        try:
            with llm.translated_errors():
                self.api.batches.list(limit=1)
        except (llm.Unanswered, RunError) as error:
            what = f"--base-url {url} has no Batch API ({error})"
            raise UserError(what, "check the address and the key, or run without --batch") from None
        self.path = Path(f"{self.flags.output}.batches.jsonl")
        self.room = sys.maxsize  # how many requests the server accepts at a time
        self.rejected_before = Counter(self.answers.rejected)  # key -> rejections in earlier runs
        self.unanswered: Counter[int] = Counter()  # key -> requests without an answer
        # uploaded file -> what is known of it: the keys of its requests, their cost, its batch
        self.uploads: dict[str, dict[str, Any]] = {}
        for _, row in Journal.scan(self.path) if self.path.exists() else ():
            self.uploads.setdefault(row["file"], {}).update(row)
        self.uploads = {file: row for file, row in self.uploads.items() if "done" not in row}
        others = self._in_progress()
        for _, keys in self.papers() if others else ():
            others.difference_update(keys)
        if others:
            what = f"{self.path}: {len(others)} requests in progress belong to another command"
            fix = "repeat the command that sent them, or delete the file and pay again"
            raise UserError(what, fix)

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
                what = f"{len(self.uploads)} batches continue at the server"
                log.info("%s; run the same command to get their answers", what)
            else:
                self.path.unlink()

    async def _poll(self, stop: StopSignal, bar: "tqdm[Any]") -> None:
        """Submit and collect until nothing is in progress or the run must stop."""
        ready_to_submit, faults_in_a_row = True, 0
        while not stop.received:
            try:
                if ready_to_submit:
                    self._submit(stop)
                if not self.uploads:
                    return
                for _ in range(100):
                    await asyncio.sleep(0 if stop.received else POLL / 100)
                if not stop.received:
                    ready_to_submit, faults_in_a_row = self._collect_ended(bar), 0
            except llm.Unanswered as fault:
                self.faults[fault.reason] += 1
                ready_to_submit, faults_in_a_row = True, faults_in_a_row + 1
                if faults_in_a_row > self.flags.retries or fault.permanent:
                    what = f"the server does not accept or answer requests ({fault.reason})"
                    raise RunError(what, "fix that and run again to continue") from None

    def _submit(self, stop: StopSignal) -> None:
        """Upload what is missing, in files of the size that the server accepts."""
        for keys, cost, content in self._request_files():
            if stop.received:
                return
            named = ("requests.jsonl", content)
            with llm.translated_errors():
                file = self.api.files.create(file=named, purpose="batch").id
            self._note(file, keys=keys, cost=cost)

    def _note(self, file: str, **what: Any) -> None:
        """Write what is known of an uploaded file to disk."""
        self.notes.append({"file": file} | what)
        self.notes.sync()
        self.uploads.setdefault(file, {}).update(what)

    def _request_files(self) -> Iterator[tuple[list[int], float, bytes]]:
        """Yield the keys, the highest cost and the content of each file of missing requests."""
        keys, cost, content = list[int](), 0.0, io.BytesIO()
        for key, price, line in self._batch_requests():
            if keys and (len(keys) == MAX_REQUESTS or content.tell() + len(line) > MAX_BYTES):
                yield keys, cost, content.getvalue()
                keys, cost, content = [], 0.0, io.BytesIO()
            keys.append(key)
            cost += price
            content.write(line)
        if keys:
            yield keys, cost, content.getvalue()

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
            cost = self.share * self.cost(*most_tokens(body))
            in_progress.add(key)
            reserved += cost
            # the name holds the slots of the answer and the number of rejections before it
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
        batches, known = {}, dict[str, str]()
        if any("batch" not in row for row in self.uploads.values()):
            with llm.translated_errors():
                known = {one.input_file_id: one.id for one in self.api.batches.list(limit=100)}
        for file, row in self.uploads.items():
            with llm.translated_errors():
                if batch := row.get("batch") or known.get(file):
                    batches[file] = self.api.batches.retrieve(batch)
                else:  # no retries: if the response is lost, a retry would create a second batch
                    batches[file] = self.api.with_options(max_retries=0).batches.create(
                        input_file_id=file, endpoint=ENDPOINT, completion_window="24h"
                    )
            if "batch" not in row:
                self._note(file, batch=batches[file].id)
        return batches

    def _collect_ended(self, bar: "tqdm[Any]") -> bool:
        """Show the state of the batches, collect those that have ended, and return whether there
        are any.
        """
        batches = self._batches()
        counts = [batch.request_counts for batch in batches.values() if batch.request_counts]
        bar.total = len(self._in_progress())
        bar.n = sum(count.completed + count.failed for count in counts)
        bar.set_postfix(batches=len(batches), cost=f"{self.cost(*self.answers.billed):.2f}")
        ends = ("completed", "expired", "cancelled", "failed")
        ended = {file: batch for file, batch in batches.items() if batch.status in ends}
        for file, batch in ended.items():
            if batch.status != "failed":
                self._collect(file, batch)
                self.answers.sync()
            self._note(file, done=True)
            size = len(self.uploads.pop(file)["keys"])
            if batch.status in ("cancelled", "failed"):
                self._lower_room(batch, size)
        return bool(ended)

    def _lower_room(self, batch: Any, size: int) -> None:
        """Send fewer requests at a time if the server's queue was too full for a batch of this
        size. Raise a RunError if the server did not run the batch for another reason.
        """
        faults = batch.errors.data or () if batch.errors else ()
        reasons = "; ".join(f"{fault.code}: {fault.message}" for fault in faults)
        if "token_limit_exceeded" not in reasons or size == 1:
            what = f"the status of a batch is {batch.status} ({reasons[:300]})"
            raise RunError(what, "fix that and run again to continue")
        # the queue has room for as many requests as are in it now, or try half a file
        self.room = len(self._in_progress()) or size // 2
        log.info("the server's queue is full; sending at most %d requests at a time", self.room)

    def _collect(self, file: str, batch: Any) -> None:
        """Download the answers of a batch, then judge and record them in the order of the input."""
        lines, answered = dict[int, bytes](), 0
        for name in filter(None, (batch.error_file_id, batch.output_file_id)):
            with llm.translated_errors():
                content = self.api.files.content(name).content
            for line in content.splitlines():
                with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                    row = json.loads(line)
                    lines[int(row["custom_id"].partition("-")[0], 16)] = line
                    answered += row["response"]["status_code"] == 200
        if batch.request_counts and answered < batch.request_counts.completed:
            raise llm.Unanswered("a file of answers is cut")
        keys = set(self.uploads[file]["keys"])
        for pending, slots in filter(None, self.requests()):
            key = self._request_key(pending, slots)
            if key in keys:
                keys.remove(key)  # another paper may have the same texts
                self._record_line(pending, key, lines.get(key, b"{}"))

    def _record_line(self, pending: PendingPaper, key: int, line: bytes) -> None:
        """Judge and record one answer, except what a killed run has recorded of it already."""
        try:
            answer, rejected, slots = _read_line(line)
        except llm.Unanswered as fault:
            self.faults[fault.reason.partition(":")[0]] += 1
            self.failed[pending.paper.id][fault.reason] += 1
            self.unanswered[key] += self.flags.retries + 1 if fault.permanent else 1
            return
        recorded = {slot for slot in slots if pending.keys[slot] in self.answers.offsets}
        if self.answers.rejected[pending.keys[slots[0]]] > rejected:
            recorded.add(slots[0])
        self.record(pending, slots, answer, recorded)


def _read_line(line: bytes) -> tuple[llm.Answer, int, list[int]]:
    """Return an answer, how many texts were rejected before it was requested, and its slots. Raise
    `Unanswered` if the line holds no answer.
    """
    try:
        row = json.loads(line)
        if not row.get("response"):
            code = (row.get("error") or {}).get("code") or "no answer"
            raise llm.Unanswered(without_secrets(str(code)))
        status, body = row["response"]["status_code"], row["response"].get("body")
        if status != 200:
            fault = llm.status_error(status, body)
            raise fault if isinstance(fault, llm.Unanswered) else llm.Unanswered(fault.what, True)
        _, rejected, bits = (int(part, 16) for part in row["custom_id"].split("-"))
        slots = [slot for slot in range(bits.bit_length()) if bits >> slot & 1]
        return llm.read_answer(json.dumps(body).encode()), rejected, slots
    except (ValueError, LookupError, TypeError, AttributeError):
        raise llm.Unanswered("bad body") from None
