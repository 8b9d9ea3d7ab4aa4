"""Checkpoints of a training run, and the facts that show whether a resumed run has the same inputs.

A checkpoint is one safetensors file, step-00000120.safetensors for example. Its header holds the
state of the run as JSON, and a checksum of the whole content.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from semcse import files, run_folder
from semcse.distributed import ProcessGroup
from semcse.encoder import Encoder
from semcse.errors import RunError, UserError
from semcse.papers import Paper

log = logging.getLogger(__name__)

PATTERN = "step-[0-9]*.safetensors"


def write(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> None:
    """Write the tensors and the JSON values of `state` as the checkpoint of `step`, atomically.

    All but the `keep` newest checkpoints are then deleted. Those of later steps are deleted too,
    because the resumed run found them damaged.
    """
    path, text = folder / f"step-{step:08d}.safetensors", json.dumps(state)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.atomic_path(path) as partial:
        save_file(stored, partial, metadata={"state": text, "sha256": _checksum(stored, text)})
    found = sorted(folder.glob(PATTERN))
    kept = [other for other in found if other <= path][-keep:]
    for other in set(found) - set(kept):
        other.unlink()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the state of a checkpoint. Raise a RunError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            header = stored.metadata() or {}
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path}: is not a complete checkpoint ({error})", "delete it") from None
    if header.get("sha256") != _checksum(tensors, header.get("state", "")):
        raise RunError(f"{path}: the checksum does not match the content", "delete it")
    return tensors, dict(json.loads(header["state"]))


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the newest checkpoint that is not damaged; None if there is none."""
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            return read(path)
        except RunError as error:
            log.warning("%s; using an older checkpoint, if there is one", error.what)
    return None


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """Return the SHA-256 of the text and of the name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_run(
    encoder: Encoder,
    group: ProcessGroup,
    train: list[Paper],
    held_out: list[Paper],
    evaluation: list[Paper],
) -> dict[str, Any]:
    """Return what settings.json records about a run apart from its settings.

    Its "inputs" must be the same in all processes, and the same again when the run is resumed. They
    hold checksums of the papers, not of the files, because a file may be compressed in between.
    """
    inputs = {
        "train_file (SHA-256 of its papers)": _papers_sum([*train, *held_out]),
        "eval_file (SHA-256 of its papers)": _papers_sum(evaluation),
        "encoder (SHA-256)": _encoder_sum(encoder),
        "processes": group.size,
    }
    if any(others != inputs for others in group.all_gather_object(inputs)):
        what = f"the processes read different data or encoders ({group.rank}: {inputs})"
        raise UserError(what, "give every machine the same files")
    return {
        "versions": run_folder.versions(),
        "device": str(encoder.device),
        "papers": {"train": len(train), "held_out": len(held_out), "eval": len(evaluation)},
        "inputs": inputs,
    }


def _papers_sum(papers: list[Paper]) -> str:
    sums = "".join(hashlib.sha256(repr(paper).encode()).hexdigest() for paper in papers)
    return hashlib.sha256(sums.encode()).hexdigest()[:16]


def _encoder_sum(encoder: Encoder) -> str:
    """Return a checksum of weights, configuration and tokenizer, wherever they were loaded from."""
    config: Any = encoder.model.config
    ignored = ("_name_or_path", "transformers_version")
    facts = {key: value for key, value in config.to_dict().items() if key not in ignored}
    text = json.dumps(facts, sort_keys=True, default=str)
    text += encoder.tokenizer.backend_tokenizer.to_str()
    return _checksum(encoder.model.state_dict(), text)[:16]
