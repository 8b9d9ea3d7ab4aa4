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
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import (
    assert_same_tensors,
    before_step,
    checkpoint,
    comparable,
    load,
    make_settings,
    rows_of,
    toy_papers,
    without_dropout,
)
from torch import Tensor

from semcse import distributed
from semcse.checkpoints import describe_run
from semcse.distributed import SINGLE_PROCESS, ProcessGroup, join
from semcse.errors import UserError
from semcse.papers import Paper
from settings import Settings
from train_embedding_model import train

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
fork = multiprocessing.get_context("fork")


def together(
    size: int, action: Callable[[ProcessGroup], Any], lost: int | None = None
) -> list[Any]:
    """What `action` returns, or the name and text of what it raises, in each of `size` processes as
    torchrun starts them; None of `lost`, which hangs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]

    def child(rank: int) -> None:
        for other, (receiver, sender) in enumerate(pipes):
            receiver.close()
            if other != rank:
                sender.close()  # or that child's death would not be seen
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        try:
            result = action(join("cpu"))
        except BaseException as error:
            result = type(error).__name__, str(error)
        pipes[rank][1].send(result)

    children = [fork.Process(target=child, args=(rank,), daemon=True) for rank in range(size)]
    for one in children:
        one.start()
    for _, sender in pipes:
        sender.close()
    deadline = time.monotonic() + 200
    try:
        return [
            _received(receiver, deadline) if rank != lost else None
            for rank, (receiver, _) in enumerate(pipes)
        ]
    finally:
        for one in children:
            one.kill()
            one.join()


def _received(receiver: Any, deadline: float) -> Any:
    try:
        return receiver.recv() if receiver.poll(max(0.0, deadline - time.monotonic())) else None
    except EOFError:
        return None


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Gets the gradients of every step, as the optimizer will use them."""
    found: list[list[Tensor]] = []
    plain = ProcessGroup.sum_gradients

    def recording(self: ProcessGroup, parameters: Any) -> None:
        parameters = list(parameters)
        plain(self, parameters)
        found.append(
            [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        )

    monkeypatch.setattr(ProcessGroup, "sum_gradients", recording)
    return found


@pytest.mark.parametrize(
    "size, changes",
    [
        (2, {"batch_size": 6}),
        # ten texts: shares of four, three and three
        (
            3,
            {
                "batch_size": 5,
                "loss": "infonce",
                "metric": "cosine",
                "clip_norm": 0.01,
                "texts_at_once": 3,
            },
        ),
        (5, {"batch_size": 2, "pooling": "mean"}),  # four texts: nothing is left for the fifth
    ],
)
def test_several_processes_equal_one(
    lively_bert: Path,
    tmp_path: Path,
    gradients: list[list[Tensor]],
    size: int,
    changes: dict[str, Any],
) -> None:
    """Losses, gradients and every logged number to 1e-5; the gradients of all processes are the
    same bits; only the first one writes.
    """
    # A low learning rate: AdamW blows rounding up into steps of that size where the gradient is 0.
    shared_settings = make_settings(max_steps=3, learning_rate=1e-6, **changes)
    papers, held_out = toy_papers(12), toy_papers(4, 50)

    def run(group: ProcessGroup) -> Any:
        settings = (
            shared_settings
            if group.size > 1
            else dataclasses.replace(shared_settings, texts_at_once=0)
        )
        encoder = load(lively_bert, settings.metric, settings.pooling)
        without_dropout(encoder)
        train(encoder, papers, held_out, settings, tmp_path / f"{group.size}-{group.rank}", group)
        return [[one.numpy() for one in step] for step in gradients]

    plain = run(SINGLE_PROCESS)
    gradients.clear()
    shared = together(size, run)
    assert sorted(os.listdir(tmp_path)) == ["1-0", f"{size}-0"]
    for found in shared:
        assert len(found) == len(plain) == 3
        for step, of_first, expected in zip(found, shared[0], plain, strict=True):
            assert all((a == b).all() for a, b in zip(step, of_first, strict=True))
            largest = max(abs(one).max() for one in expected)
            assert (
                max(abs(a - b).max() for a, b in zip(step, expected, strict=True)) < 1e-5 * largest
            )
    (steps, validations), (plain_steps, plain_validations) = (
        rows_of(tmp_path / f"{size}-0"),
        rows_of(tmp_path / "1-0"),
    )
    for row, expected_row in zip(steps + validations, plain_steps + plain_validations, strict=True):
        kept = {
            key: value
            for key, value in expected_row.items()
            if key not in ("pairs_per_second", "tokens_per_second", "peak_memory_mib")
        }
        assert {key: row[key] for key in kept} == pytest.approx(kept, rel=1e-5)


def run_of(encoder: Path, folder: Path, settings: Settings) -> Callable[[ProcessGroup], Any]:
    return lambda group: dataclasses.asdict(
        train(load(encoder), toy_papers(40), toy_papers(8, 50), settings, folder, group)
    )


def test_a_signal_to_one_process_stops_all_at_one_step_and_resume_equals_the_whole_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with dropout, each with its own; terminated through the second one alone
    (twice, as schedulers do), then continued.
    """
    whole = together(2, run_of(tiny_bert, tmp_path / "whole", make_settings()))
    assert whole[0] == whole[1]

    def twice_terminated() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    def stopped(group: ProcessGroup) -> Any:
        if group.rank == 1:
            before_step(monkeypatch, 5, twice_terminated)
        return run_of(tiny_bert, tmp_path / "stopped", make_settings())(group)

    assert together(2, stopped) == [("Terminated", ""), ("Terminated", "")]
    assert checkpoint(tmp_path / "stopped", 6)[1]["step"] == 6
    assert together(2, run_of(tiny_bert, tmp_path / "stopped", make_settings())) == whole
    assert comparable(tmp_path / "stopped/metrics.jsonl") == comparable(
        tmp_path / "whole/metrics.jsonl"
    )
    (tensors, state), (expected, expected_state) = (
        checkpoint(tmp_path / "stopped", 12),
        checkpoint(tmp_path / "whole", 12),
    )
    assert state == expected_state
    assert_same_tensors(tensors, expected)
    assert not torch.equal(tensors["random/cpu/0"], tensors["random/cpu/1"])


@pytest.mark.parametrize("rank, way", [(1, "dies"), (0, "dies"), (1, "hangs")])
def test_a_dead_or_hanging_process_ends_the_others_with_one_line(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, way: str
) -> None:
    """The others do not wait for ever: a dead process is seen at once, a hanging one after
    STEP_MINUTES.
    """
    if way == "hangs":
        monkeypatch.setattr(distributed, "STEP_TIMEOUT", timedelta(seconds=12))

    def faulty(group: ProcessGroup) -> Any:
        if group.rank == rank:
            before_step(monkeypatch, 5, lambda: os._exit(9) if way == "dies" else time.sleep(1000))
        return run_of(tiny_bert, tmp_path, make_settings())(group)

    kind, text = together(2, faulty, lost=rank)[1 - rank]
    assert kind == "RunError"
    assert re.fullmatch(
        rf"process {1 - rank} of 2 lost contact with another \(.*\); .*--resume.*", text
    )
    assert (tmp_path / "checkpoints/step-00000004.safetensors").exists()


def test_processes_with_other_data_are_refused(tiny_bert: Path) -> None:
    def facts(group: ProcessGroup) -> Any:
        return describe_run(
            load(tiny_bert),
            group,
            toy_papers(4 + group.rank),
            toy_papers(2, 50),
            [Paper("e", "t", "a")],
        )

    for kind, text in together(2, facts):
        assert kind == "UserError"
        assert "read other data" in text


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
