"""Training on several processes (gloo, CPU) gives the losses and gradients of one process. A signal
stops all of them, and none waits for ever if another dies or hangs.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_training import (
    assert_same_tensors,
    before_step,
    checkpoint,
    comparable,
    load,
    make_settings,
    toy_papers,
    without_dropout,
)

from semcse import distributed
from semcse.checkpoints import describe_run
from semcse.distributed import SINGLE_PROCESS, ProcessGroup, join
from semcse.errors import UserError
from train_embedding_model import train

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
fork = multiprocessing.get_context("fork")


def together(size: int, action: Callable[[ProcessGroup], Any], lost: int = -1) -> list[Any]:
    """Run `action` in `size` processes that are started as torchrun starts them.

    Returns:
        For each process what the action returns, or the name and text of the exception that it
        raises; None for the process `lost`, which dies or hangs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]

    def child(rank: int) -> None:
        for other, (receiver, sender) in enumerate(pipes):
            receiver.close()
            if other != rank:
                sender.close()  # otherwise nobody would notice the death of that process
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        try:
            result = action(join("cpu"))
        except BaseException as error:
            result = type(error).__name__, str(error)
        pipes[rank][1].send(result)

    children = [fork.Process(target=child, args=(rank,), daemon=True) for rank in range(size)]
    for process in children:
        process.start()
    for _, sender in pipes:
        sender.close()
    deadline = time.monotonic() + 200
    try:
        return [
            received(receiver, deadline) if rank != lost else None
            for rank, (receiver, _) in enumerate(pipes)
        ]
    finally:
        for process in children:
            process.kill()
            process.join()


def received(receiver: Any, deadline: float) -> Any:
    try:
        return receiver.recv() if receiver.poll(max(0.0, deadline - time.monotonic())) else None
    except EOFError:
        return None


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The gradients of every step, as the optimizer will use them."""
    found: list[list[Tensor]] = []
    sum_gradients = ProcessGroup.sum_gradients

    def recording(self: ProcessGroup, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        sum_gradients(self, parameters)
        found.append([one.grad.clone() for one in parameters if one.grad is not None])

    monkeypatch.setattr(ProcessGroup, "sum_gradients", recording)
    return found


# Ten texts on three processes are shares of four, three and three texts. Four texts leave nothing
# for the fifth process.
INFONCE = {"loss": "infonce", "metric": "cosine", "clip_norm": 0.01, "texts_at_once": 3}


@pytest.mark.parametrize(
    "size, changes",
    [
        (2, {"batch_size": 6}),
        (3, {"batch_size": 5, **INFONCE}),
        (5, {"batch_size": 2, "pooling": "mean"}),
    ],
)
def test_several_processes_equal_one(
    lively_bert: Path,
    tmp_path: Path,
    gradients: list[list[Tensor]],
    size: int,
    changes: dict[str, Any],
) -> None:
    """Gradients and logged numbers are equal to 1e-5. All processes have the same gradients, bit by
    bit. Only rank 0 writes.
    """
    # AdamW turns rounding errors of zero gradients into steps of the size of the learning rate.
    settings = make_settings(max_steps=3, learning_rate=1e-6, **changes)
    papers, held_out = toy_papers(12), toy_papers(4, 50)

    def run(group: ProcessGroup) -> list[Any]:
        encoder = load(lively_bert, settings.metric, settings.pooling)
        without_dropout(encoder)
        texts_at_once = settings.texts_at_once if group.size > 1 else 0
        changed = dataclasses.replace(settings, texts_at_once=texts_at_once)
        train(encoder, papers, held_out, changed, tmp_path / f"{group.size}-{group.rank}", group)
        return [[one.numpy() for one in step] for step in gradients]

    alone = run(SINGLE_PROCESS)
    gradients.clear()
    shared = together(size, run)
    assert sorted(os.listdir(tmp_path)) == ["1-0", f"{size}-0"]
    for found in shared:
        assert len(found) == len(alone) == 3
        for step, of_rank_0, expected in zip(found, shared[0], alone, strict=True):
            assert all((a == b).all() for a, b in zip(step, of_rank_0, strict=True))
            largest = max(abs(one).max() for one in expected)
            worst = max(abs(a - b).max() for a, b in zip(step, expected, strict=True))
            assert worst < 1e-5 * largest
    rows, expected_rows = (
        comparable(tmp_path / name / "metrics.jsonl") for name in (f"{size}-0", "1-0")
    )
    assert len(rows) == len(expected_rows) > 3
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5)


def run_of(encoder: Path, folder: Path) -> Callable[[ProcessGroup], Any]:
    return lambda group: dataclasses.asdict(
        train(load(encoder), toy_papers(40), toy_papers(8, 50), make_settings(), folder, group)
    )


def test_a_signal_stops_all_processes_and_resume_equals_a_whole_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, each with its own dropout. Only the second is terminated, twice, as schedulers
    do; then the run is resumed.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = together(2, run_of(tiny_bert, whole))
    assert expected[0] == expected[1]

    def twice_terminated() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    def run(group: ProcessGroup) -> Any:
        if group.rank == 1:
            before_step(monkeypatch, 5, twice_terminated)
        return run_of(tiny_bert, stopped)(group)

    assert together(2, run) == [("Terminated", ""), ("Terminated", "")]
    assert checkpoint(stopped, 6)[1]["step"] == 6
    assert together(2, run_of(tiny_bert, stopped)) == expected
    assert comparable(stopped / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
    tensors, state = checkpoint(stopped, 12)
    expected_tensors, expected_state = checkpoint(whole, 12)
    assert state == expected_state
    assert_same_tensors(tensors, expected_tensors)
    assert not torch.equal(tensors["random/cpu/0"], tensors["random/cpu/1"])


@pytest.mark.parametrize("rank, way", [(1, "dies"), (0, "dies"), (1, "hangs")])
def test_a_dead_or_hanging_process_ends_the_others_with_one_line(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, way: str
) -> None:
    """A dead process is noticed at once, a hanging one after STEP_TIMEOUT."""
    if way == "hangs":
        monkeypatch.setattr(distributed, "STEP_TIMEOUT", timedelta(seconds=6))

    def faulty(group: ProcessGroup) -> Any:
        if group.rank == rank:
            before_step(monkeypatch, 5, lambda: os._exit(9) if way == "dies" else time.sleep(1000))
        return run_of(tiny_bert, tmp_path)(group)

    kind, text = together(2, faulty, lost=rank)[1 - rank]
    assert kind == "RunError"
    message = rf"process {1 - rank} of 2 lost contact with another \(.*\); .*--resume.*"
    assert re.fullmatch(message, text)
    assert (tmp_path / "checkpoints/step-00000004.safetensors").exists()


def test_processes_with_other_papers_are_refused(tiny_bert: Path) -> None:
    def describe(group: ProcessGroup) -> Any:
        papers = toy_papers(4 + group.rank)
        return describe_run(load(tiny_bert), group, papers, toy_papers(2, 50), toy_papers(1, 90))

    for kind, text in together(2, describe):
        assert kind == "UserError"
        assert "read different data" in text


def test_without_a_launcher_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") is SINGLE_PROCESS
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("cpu") is SINGLE_PROCESS
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        join("cpu")
