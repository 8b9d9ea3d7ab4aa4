"""Training on several processes, one for each GPU, started by torchrun or accelerate
(docs/scaling.md).

Each process embeds its share of a batch. The vectors of all shares are gathered, and every process
computes the same loss, whose negatives come from the whole batch. To process r, the vectors of the
others are constants, so its backward pass gives (dv_r/dw)' dL/dv_r, where v_r are its vectors and w
the weights. By the chain rule, the sum of this over all processes is dL/dw: the gradient that one
process with the whole batch would compute. Gradients are therefore summed, not averaged.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from semcse.errors import RunError, UserError

# How long to wait for a process that hangs: within a step, and while rank 0 validates or runs the
# benchmark. A process that ends is noticed at once.
STEP_TIMEOUT, WAIT_TIMEOUT = timedelta(minutes=10), timedelta(days=1)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together. All of them must call the same methods in the same order.
    In a group of one, every method returns what it was given.
    """

    rank: int = 0  # only rank 0 validates, writes, logs and shows progress bars
    size: int = 1
    control: Any = None  # gloo group for Python objects; vectors and gradients use the default one

    def local_share(self, texts: Sequence[list[int]]) -> Sequence[list[int]]:
        """Return the texts that this process embeds: every `size`-th. If none is left for it, it
        gets one whose vector `gather` leaves out.
        """
        return texts[self.rank :: self.size] or texts[:1]

    def gather(self, vectors: Tensor, total: int) -> Tensor:
        """Gather the vectors (m, d) of each process's share of the texts. Return the vectors
        (total, d) of all texts, in their order; gradients flow to this process's `vectors` only.
        """
        if self.size == 1:
            return vectors
        rows = torch.arange(self.rank, total, self.size, device=vectors.device)
        gathered = vectors.new_zeros(total, vectors.shape[1])
        gathered[rows] = vectors.detach()[: len(rows)]
        with self._lost_contact_named():
            dist.all_reduce(gathered)  # each row is zero in all processes but one, so this is exact
        return gathered.index_copy(0, rows, vectors[: len(rows)])

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over the processes."""
        gradients = [one.grad for one in parameters if self.size > 1 and one.grad is not None]
        with self._lost_contact_named():
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            with self._lost_contact_named():
                dist.all_gather_object(values, value, self.control)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Return the value of rank 0. The other processes may have to wait for it for hours."""
        values = [value]
        if self.size > 1:
            with self._lost_contact_named():
                dist.broadcast_object_list(values, 0, self.control)
        return values[0]

    def leave(self) -> None:
        """Wait for all processes, then end the group. Only rank 0 has work to do after that."""
        if self.size > 1:
            # A process that has finished waiting may end before its message reaches the others.
            with contextlib.suppress(RunError):
                self.all_gather_object(None)
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _lost_contact_named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo, NCCL and the store raise many kinds
            reason = str(error)[:150]
            what = f"process {self.rank} of {self.size} lost contact with another ({reason})"
            fix = "find out why it ended, and continue with --resume and as many processes"
            raise RunError(what, fix) from None


SINGLE_PROCESS = ProcessGroup()


def join(device: str) -> ProcessGroup:
    """Join the processes that torchrun or accelerate started together with this one, on the
    `device` of the settings. Without such a launcher, return SINGLE_PROCESS.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return SINGLE_PROCESS
    if not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        what = "WORLD_SIZE is set without RANK and LOCAL_RANK"
        raise UserError(what, "start with torchrun or accelerate launch, or unset WORLD_SIZE")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        if local_rank >= gpus:
            raise UserError(f"this machine has only {gpus} GPUs", "start one process for each GPU")
        torch.cuda.set_device(local_rank)
        # With this, the death of a process raises an error in the others instead of aborting them.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    logging.getLogger().setLevel(logging.WARNING if rank else logging.INFO)
    with ProcessGroup(rank, size)._lost_contact_named():
        dist.init_process_group("nccl" if gpus else "gloo", timeout=STEP_TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    return ProcessGroup(rank, size, control)
