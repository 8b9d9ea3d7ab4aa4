"""Prompts in, texts out at half the price: OpenAI's Batch API, which takes files of requests and
answers them within a day.

Prompts, quality gate, journal and outputs are those of language_model.py. What is under way stands
in `<output>.batches.jsonl`: an uploaded file of requests is noted before its batch, which costs
money, is created, and a batch is created only if the server's list has none of that file. So one
that was created unheard (a run was killed, the line was cut) is found again. Requests and answers
lie on disk; memory holds an integer or two for each.
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
from typing import Any

from tqdm import tqdm

from semcse import errors
from semcse.command_line import StopSignal
from semcse.errors import RunError, UserError
from semcse.files import Journal
from semcse.generation import Answers, Run, Work, most_tokens
from semcse.llm import Answer, Flags, Unanswered, api_key, meaning, named_faults, read_answer
from semcse.quality_gate import Job

log = logging.getLogger(__name__)


MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000  # of one file [OpenAI]
# seconds between two looks at the batches; a batch stands in the server's list so long after it was
# created
POLL = 30.0
AT_ONCE = 8  # batches whose answers are taken in together: they lie on disk, some 60 MB each


class BatchRun(Run):
    """A run that asks through batches."""

    def __init__(self, flags: Flags, job: Job, answers: Answers) -> None:
        super().__init__(flags, job, answers)
        # requests that the server lets be under way
        self.path, self.room = Path(f"{flags.output}.batches.jsonl"), sys.maxsize
        # uploaded file -> the keys of its requests, what they cost at most, its batch
        self.sent: dict[str, dict[str, Any]] = {}
        # by key: refused texts of earlier runs; requests without an answer
        self.before, self.refused = Counter(answers.rejected), Counter[int]()

    def survey(self) -> None:
        """As every run; then reach the server and recall what is under way. A UserError if there is
        no Batch API, or that is not of this command.
        """
        import openai

        super().survey()
        if self.flags.estimate:
            return
        url = self.flags.base_url[0]
        self.api = openai.OpenAI(
            base_url=url,
            api_key=api_key(),
            max_retries=self.flags.retries,
            timeout=self.flags.timeout,
        )
        try:
            with named_faults():
                list(self.api.batches.list(limit=1).data)
        except (Unanswered, RunError) as fault:
            raise UserError(
                f"--base-url {url} has no Batch API ({fault})",
                "check address and key, or leave --batch out",
            ) from None
        for _, row in Journal.scan(self.path) if self.path.exists() else ():
            self.sent.setdefault(row["file"], {}).update(row)
        self.sent = {file: sent for file, sent in self.sent.items() if "done" not in sent}
        if self.sent and (
            others := self._under_way().difference(
                key for paper in self.papers() for key in self.keys(paper)
            )
        ):
            what = (
                f"{self.path}: {len(others)} requests under way are not of this command (other"
                " papers, model, prompts or sampling)"
            )
            raise UserError(
                what,
                "repeat the command that sent them, or delete the file and lose what they cost",
            )

    async def send(self, stop: StopSignal) -> None:
        """Ask for what is missing, wait, judge, and ask again for what was refused, until every
        text is there or its attempts are used up.
        """
        self.notes, news, missed = Journal(self.path), True, 0
        try:
            with tqdm(desc=self.job.key, unit="request") as bar:
                while not stop.received:
                    try:
                        if news:
                            self._submit(stop)
                        for _ in range(100 if self.sent else 0):
                            await asyncio.sleep(0 if stop.received else POLL / 100)
                        if stop.received or not self.sent:
                            break
                        news, missed = self._look(bar), 0
                    except Unanswered as fault:
                        self.faults[fault.reason] += 1
                        news, missed = True, missed + 1
                        if missed > self.flags.retries or not fault.again:
                            raise RunError(
                                f"the server takes or tells nothing ({fault.reason})",
                                "mend that and run again: it goes on",
                            ) from None
        finally:
            self.notes.close()
            self.count["failed"] = self.count["missing"] - self.count["accepted"]
            if self.sent:
                log.info(
                    "%d batches go on at the server; the same command comes back for their answers",
                    len(self.sent),
                )
            else:
                self.path.unlink()

    def _key(self, work: Work, slots: list[int]) -> int:
        """What a request is known by, whatever of it has been answered."""
        return work.keys[0 if self.job.at_once else slots[0]]

    def _under_way(self) -> set[int]:
        return {key for sent in self.sent.values() for key in sent["keys"]}

    def _note(self, file: str, **what: Any) -> None:
        """Keep for good what is known of an uploaded file."""
        self.notes.append({"file": file} | what)
        self.notes.sync()
        self.sent.setdefault(file, {}).update(what)

    def _requests(self) -> Iterator[tuple[int, float, bytes]]:
        """Key, cost at most and line of every request that is missing and not under way, as far as
        the server and --max-cost have room.
        """
        under_way, reserved = self._under_way(), sum(sent["cost"] for sent in self.sent.values())
        for work, slots in filter(None, self._source()):
            key, rejected = (
                self._key(work, slots),
                self.answers.rejected[first := work.keys[slots[0]]],
            )
            if (
                key in under_way
                or rejected - self.before[first] >= self.flags.attempts
                or self.refused[key] > self.flags.retries
            ):
                continue
            if len(under_way) >= self.room or self.spent(reserved):
                return
            body, name = (
                self.body(work.paper, work.keys, slots),
                f"{key:016x}-{rejected:x}-{sum(1 << slot for slot in slots):x}",
            )
            cost = self.cost(most_tokens(body) * 2)
            under_way.add(key)
            reserved += cost
            yield (
                key,
                cost,
                json.dumps(
                    {
                        "custom_id": name,
                        "method": "POST",
                        "url": "/v1/chat/completions",
                        "body": body,
                    }
                ).encode()
                + b"\n",
            )

    def _submit(self, stop: StopSignal) -> None:
        """Upload what is missing, in files that the server takes."""
        keys, costs = list[int](), 0.0
        with tempfile.TemporaryFile(dir=self.path.parent) as handle:
            for key, cost, line in itertools.chain(self._requests(), [(0, 0.0, b"")]):
                if keys and (
                    not line or len(keys) == MAX_REQUESTS or handle.tell() + len(line) > MAX_BYTES
                ):
                    if stop.received:
                        return
                    handle.seek(0)
                    with named_faults():
                        file = self.api.files.create(
                            file=("requests.jsonl", handle), purpose="batch"
                        ).id
                    self._note(file, keys=keys, cost=costs)
                    handle.truncate(handle.seek(0))
                    keys, costs = [], 0.0
                handle.write(line)
                keys.append(key)
                costs += cost

    def _states(self) -> dict[str, Any]:
        """Uploaded file -> its batch, which is created unless an earlier try has done that."""
        states = {}
        with named_faults():
            listed = (
                self.api.batches.list(limit=100)
                if any("batch" not in sent for sent in self.sent.values())
                else ()
            )
            names = {
                batch.input_file_id: batch.id
                for batch in listed
                if batch.input_file_id in self.sent
            }
            for file, sent in self.sent.items():
                if name := sent.get("batch") or names.get(file):
                    states[file] = self.api.batches.retrieve(name)
                else:  # without retries: one whose answer is lost would make two of them
                    once = self.api.with_options(max_retries=0)
                    states[file] = once.batches.create(
                        input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
                    )
                if "batch" not in sent:
                    self._note(file, batch=states[file].id)
        return states

    def _look(self, bar: tqdm[Any]) -> bool:
        """Show how the batches are and take in those that have ended; whether any has. A RunError
        if the server would not run one.
        """
        states = self._states()
        counts = sum(
            (Counter(dict(state.request_counts or ())) for state in states.values()), Counter[str]()
        )
        bar.total, bar.n = len(self._under_way()), counts["completed"] + counts["failed"]
        bar.set_postfix(
            batches=len(states),
            failed=counts["failed"],
            accepted=self.count["accepted"],
            cost=f"{self.cost(self.answers.tokens):.2f}",
        )
        ended = {
            file: state
            for file, state in states.items()
            if state.status in ("completed", "expired", "cancelled", "failed")
        }
        ended = dict(itertools.islice(ended.items(), AT_ONCE))
        self._collect({file: state for file, state in ended.items() if state.status != "failed"})
        self.answers.journal.sync()
        for file in ended:
            self._note(file, done=True)
        largest = max((len(self.sent.pop(file)["keys"]) for file in ended), default=0)
        unwilling = [state for state in ended.values() if state.status in ("cancelled", "failed")]
        said = "; ".join(
            f"{fault.code}: {fault.message}"
            for state in unwilling
            for fault in (state.errors and state.errors.data) or ()
        )
        # of the queue: it takes as many requests as are in it now, or half a file
        if "token_limit_exceeded" in said and largest > 1:
            self.room = len(self._under_way()) or largest // 2
            log.info(
                "the server's queue is full: from now on at most %d requests at a time", self.room
            )
        elif unwilling:
            raise RunError(
                f"a batch has {unwilling[0].status} at the server ({said[:300]})",
                "mend that and run again: it goes on",
            )
        return bool(ended)

    def _collect(self, states: dict[str, Any]) -> None:
        """Download the answers of batches, and judge and journal them in the order of the input."""
        keys = {key for file in states for key in self.sent[file]["keys"]}
        with tempfile.TemporaryFile(dir=self.path.parent) as handle:
            for name in [
                name
                for state in states.values()
                for name in (state.error_file_id, state.output_file_id)
                if name
            ]:
                with (
                    named_faults(),
                    self.api.files.with_streaming_response.content(name) as response,
                ):
                    handle.writelines(response.iter_bytes())
                handle.write(b"\n")
            places, good, end = dict[int, int](), 0, handle.seek(0)
            for line in handle:
                with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                    row = json.loads(line)
                    places[int(row["custom_id"].partition("-")[0], 16)] = end
                    good += row["response"]["status_code"] == 200
                end += len(line)
            if good < sum(
                state.request_counts.completed for state in states.values() if state.request_counts
            ):
                raise Unanswered("a file of answers is cut")
            for work, slots in filter(None, self._source() if keys else ()):
                if (key := self._key(work, slots)) in keys:
                    keys.discard(key)  # another paper may have the same texts
                    handle.seek(places.get(key, end))
                    self._take(work, key, handle.readline())

    def _take(self, work: Work, key: int, line: bytes) -> None:
        """Judge one answer. What a run that was killed at this has journalled is neither judged nor
        counted again.
        """
        work.reasons = self.failed.get(work.paper.id, work.reasons)
        try:
            answer, rejected, slots = _read(line)
        except (Unanswered, RunError) as fault:
            reason = fault.reason if isinstance(fault, Unanswered) else fault.what
            self.faults[reason.partition(":")[0]] += 1
            work.reasons[reason] += 1
            self.refused[key] += (
                1 if isinstance(fault, Unanswered) and fault.again else self.flags.retries + 1
            )
        else:
            kept = {slot for slot in slots if work.keys[slot] in self.answers.offsets}
            # refused before the kill
            kept.update(slots[: self.answers.rejected[work.keys[slots[0]]] > rejected])
            self._judge(work, slots, answer, kept)
        if work.reasons:
            self.failed[work.paper.id] = work.reasons


def _read(line: bytes) -> tuple[Answer, int, list[int]]:
    """An answer, how many were rejected before it was asked for, and the slots that it is for;
    Unanswered or RunError if there is none.
    """
    try:
        row = json.loads(line or b"{}")
        if not row.get("response"):
            raise Unanswered(
                errors.without_secrets(str((row.get("error") or {}).get("code") or "no answer"))
            )
        if (status := row["response"]["status_code"]) != 200:
            raise meaning(status, None, row["response"].get("body"))
        _, rejected, slots = (int(part, 16) for part in row["custom_id"].split("-"))
        return (
            read_answer(json.dumps(row["response"]["body"]).encode()),
            rejected,
            [slot for slot in range(slots.bit_length()) if slots >> slot & 1],
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Unanswered("bad body") from None
