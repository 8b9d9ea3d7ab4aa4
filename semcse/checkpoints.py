"""Checkpoints of a training run, each with a checksum of its content, and the facts by which a
resumed run knows its data and encoder again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from semcse import files, run_folder
from semcse.distributed import Group
from semcse.encoder import Encoder
from semcse.errors import RunError, UserError
from semcse.papers import Paper

log = logging.getLogger(__name__)

NAMES = "step-[0-9]*.safetensors"


def write(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> None:
    """Write the checkpoint of `step`, whole or not at all; then delete all but the `keep` newest up
    to it, and those of later steps: a resumed run passed over them as damaged. OSError: a full
    disk, say; the earlier ones stay.
    """
    path = folder / f"step-{step:08d}.safetensors"
    stored, text = (
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        json.dumps(state),
    )
    with files.atomic_path(path) as partial:
        save_file(stored, partial, metadata={"state": text, "sha256": _checksum(stored, text)})
    found = sorted(folder.glob(NAMES))
    for old in set(found) - set([one for one in found if one <= path][-keep:]):
        old.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint. RunError: it is not what `write` wrote. OSError: it is
    missing, or may not be read.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            names = list(stored.keys())
            tensors = {name: stored.get_tensor(name) for name in names}
            header = stored.metadata() or {}
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path}: is no whole checkpoint ({error})", "delete it") from None
    text = header.get("state", "")
    if header.get("sha256") != _checksum(tensors, text):
        raise RunError(f"{path}: its content is not what was written (checksum)", "delete it")
    return tensors, dict(json.loads(text))


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint; damaged ones are named in the log and passed over. None if there
    is none.
    """
    found = sorted(folder.glob(NAMES), reverse=True)
    for path in found:
        try:
            return read(path)
        except RunError as error:
            log.warning("%s; the one before is used", error.what)
    if found:
        log.warning("%s: no whole checkpoint is left; training starts over", folder)
    return None


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over the text and every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _papers_sum(papers: list[Paper]) -> str:
    return hashlib.sha256(
        "".join(hashlib.sha256(repr(paper).encode()).hexdigest() for paper in papers).encode()
    ).hexdigest()[:16]


def facts_of(
    encoder: Encoder,
    group: Group,
    train: list[Paper],
    held_out: list[Paper],
    evaluation: list[Paper],
) -> dict[str, Any]:
    """What a run is made with, as settings.json records it; `inputs` must be the same on all
    processes, and again when the run is resumed.

    Its sums (the first 16 digits of SHA-256) are of the papers as they were read, so that a file
    may be compressed in between, and of the encoder as loaded.
    """
    config: Any = encoder.model.config
    facts = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    text = (
        json.dumps(facts, sort_keys=True, default=str)
        + encoder.tokenizer.backend_tokenizer.to_str()
    )
    inputs = {
        "train_file (SHA-256 of its papers)": _papers_sum([*train, *held_out]),
        "eval_file (SHA-256 of its papers)": _papers_sum(evaluation),
        "encoder (SHA-256)": _checksum(encoder.model.state_dict(), text)[:16],
        "processes": group.size,
    }
    for rank, others in enumerate(group.each(inputs)):
        if others != inputs:
            raise UserError(
                f"processes {group.rank} and {rank} read other data or encoders ({others})",
                "give every machine the same files",
            )
    counts = {"train": len(train), "held_out": len(held_out), "eval": len(evaluation)}
    return {
        "versions": run_folder.versions(),
        "device": str(encoder.device),
        "papers": counts,
        "inputs": inputs,
    }
