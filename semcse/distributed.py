"""Training on several processes, one for each GPU, as torchrun or accelerate start them
(docs/scaling.md).

The mathematics: process r embeds its share of a batch's texts, v_r = f(texts_r; w). The vectors of
all shares are gathered, and every process computes the same loss L(v_1, ..., v_N), whose negatives
are those of the whole batch. The others' vectors are constants to it, so its backward pass gives
(dv_r/dw)' dL/dv_r, and the sum of these over all processes is dL/dw by the chain rule: the gradient
of one process with the whole batch. So gradients are summed and nothing is scaled.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from semcse.errors import RunError, UserError

# Longest waits for a process that hangs, in minutes: within a step, and for the first one while it
# validates and benchmarks. One that ends is noticed at once.
STEP_MINUTES, WAIT_MINUTES = 10.0, 24 * 60.0


@dataclass(frozen=True)
class Group:
    """This process among those that train together; alone, every method gives back what it was
    given. All processes must call the same methods in turn.
    """

    rank: int = 0  # the first, 0, alone validates, writes, logs and draws bars
    size: int = 1
    control: Any = None  # gloo group for all but vectors and gradients

    def own(self, texts: Sequence[list[int]]) -> Sequence[list[int]]:
        """The texts that this process embeds: every size-th; where there is none left for it, one
        whose vector `gather` leaves out.
        """
        return texts[self.rank :: self.size] or texts[:1]

    def gather(self, vectors: Tensor, total: int) -> Tensor:
        """(m, d) vectors of `own` texts -> (total, d) vectors of all texts, in order; gradients
        flow to the own ones.
        """
        if self.size == 1:
            return vectors
        places = torch.arange(self.rank, total, self.size, device=vectors.device)
        everything = (
            vectors.detach()
            .new_zeros(total, vectors.shape[1])
            .index_copy(0, places, vectors.detach()[: len(places)])
        )
        with self._contact():
            dist.all_reduce(everything)  # adds zeros: exact
        return everything.index_copy(0, places, vectors[: len(places)])

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over the processes."""
        with self._contact():
            for sent in [
                dist.all_reduce(one.grad, async_op=True)
                for one in parameters
                if self.size > 1 and one.grad is not None
            ]:
                sent.wait()

    def each(self, value: Any, first_only: bool = False) -> list[Any]:
        """The values of all processes, by rank, or only the first one's, which may be long in
        coming.
        """
        found = [value] * (1 if first_only else self.size)
        with self._contact():
            if self.size > 1:
                (
                    dist.broadcast_object_list(found, 0, self.control)
                    if first_only
                    else dist.all_gather_object(found, value, self.control)
                )
        return found

    def leave(self) -> None:
        """Part when all are here: what follows is the first process's alone."""
        if self.size > 1:
            # one that is through may be gone before another has heard of it
            with contextlib.suppress(RunError):
                self.each(None)
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's, NCCL's and the store's many kinds
            what = (
                f"process {self.rank} of {self.size} lost contact with another ({str(error)[:150]})"
            )
            raise RunError(
                what, "see why that one ended, then --resume with as many processes"
            ) from None


ALONE = Group()


def join(device: str) -> Group:
    """The processes that torchrun or accelerate started with this one; ALONE where WORLD_SIZE is
    unset or 1. UserError: not started so, or too few GPUs.
    """
    size, rank, local = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", 1), ("RANK", -1), ("LOCAL_RANK", -1))
    )
    if size == 1:
        return ALONE
    if min(rank, local) < 0:
        raise UserError(
            "WORLD_SIZE is set without RANK and LOCAL_RANK",
            "start with torchrun or accelerate launch, or unset it",
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine finds only {torch.cuda.device_count()} GPUs",
            "start as many processes as GPUs",
        )
    if cuda:
        torch.cuda.set_device(local)
        # a dead process is then an error here, not an abort
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    logging.getLogger().setLevel(logging.WARNING if rank else logging.INFO)
    with Group(rank, size)._contact():
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=STEP_MINUTES)
        )
        return Group(
            rank,
            size,
            dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=WAIT_MINUTES)),
        )
