"""Checkpoints come back bit by bit, every kind of damage is noticed, and describe_run tells changed
papers and encoders apart.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from toy_training import load, toy_papers

from semcse import checkpoints
from semcse.checkpoints import describe_run
from semcse.distributed import SINGLE_PROCESS
from semcse.errors import RunError

TENSORS = {
    "model/a": torch.tensor([[1.5, -0.0], [float("nan"), 2.0**-140]]),
    "optimizer/0/step": torch.tensor(7.0),
    "random/cpu/0": torch.arange(9, dtype=torch.uint8),
    "half": torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}
STATE = {"step": 3, "best_rank": float("inf"), "loss_ema": None}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_bits(found: dict[str, Tensor]) -> bool:
    """Whether these are TENSORS bit by bit. NaN equals NaN, and -0.0 differs from 0.0."""
    return (
        found.keys() == TENSORS.keys()
        and all(
            (found[name].dtype, found[name].shape) == (one.dtype, one.shape)
            and found[name].contiguous().numpy(force=True).tobytes()
            == one.contiguous().numpy().tobytes()
            for name, one in TENSORS.items()
            if one.dtype != torch.bfloat16  # unknown to numpy
        )
        and torch.equal(found["half"], TENSORS["half"])
    )


def test_round_trip_and_what_is_kept(tmp_path: Path) -> None:
    """The newest checkpoints are kept. Those of later steps do not count and are deleted: only
    damage can have left them behind.
    """
    for step in (1, 2, 30, 4):
        checkpoints.write(tmp_path, step, TENSORS, STATE | {"step": step}, keep=2)
    assert names(tmp_path) == ["step-00000002.safetensors", "step-00000004.safetensors"]
    found = checkpoints.newest(tmp_path)
    assert found
    assert same_bits(found[0])
    assert found[1] == STATE | {"step": 4}
    checkpoints.write(tmp_path, 5, TENSORS, STATE, keep=1)
    assert names(tmp_path) == ["step-00000005.safetensors"]
    assert checkpoints.newest(tmp_path / "absent") is None


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    damage=st.sampled_from(["flip", "cut", "replace"]),
    where=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
    noise=st.binary(max_size=300),
)
def test_every_damage_is_noticed(
    tmp_path: Path, damage: str, where: float, mask: int, noise: bytes
) -> None:
    """A changed byte, a truncated file or another content ends in an error that names the file, or
    (in the white space of the header) in the same content.
    """
    checkpoints.write(tmp_path, 1, TENSORS, STATE, keep=1)
    path = tmp_path / "step-00000001.safetensors"
    content = path.read_bytes()
    place = int(where * len(content))
    flipped = content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]
    damaged: dict[str, bytes] = {"flip": flipped, "cut": content[:place], "replace": noise}
    path.write_bytes(damaged[damage])
    try:
        tensors, state = checkpoints.read(path)
    except RunError as error:
        file_is_named = str(path) in error.what
        assert file_is_named
    else:
        assert damage == "flip"
        assert same_bits(tensors)
        assert state == STATE


def test_foreign_files_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A safetensors file without a header, one with a wrong checksum, and an empty file."""
    caplog.set_level(logging.INFO)
    first, second, third = (tmp_path / f"step-0000000{n}.safetensors" for n in (1, 2, 3))
    save_file({"a": torch.ones(3)}, first)
    save_file({"a": torch.ones(3)}, second, metadata={"state": "{}", "sha256": "0"})
    third.touch()
    assert checkpoints.newest(tmp_path) is None
    for path, line in zip((third, second, first), caplog.messages, strict=True):
        assert str(path) in line


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    """A failing disk or wrong permissions must not make the run start over."""
    (tmp_path / "step-00000001.safetensors").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError, match="No such file"):
        checkpoints.newest(tmp_path)


def test_sums_show_what_changed(tiny_bert: Path, lively_bert: Path, tmp_path: Path) -> None:
    def inputs(
        encoder: Path = tiny_bert, papers: Any = None, evaluation: Any = None
    ) -> dict[str, Any]:
        papers, evaluation = papers or toy_papers(6), evaluation or toy_papers(4, 90)
        described = describe_run(
            load(encoder), SINGLE_PROCESS, papers, toy_papers(3, 50), evaluation
        )
        return {key.split(" ")[0]: value for key, value in described["inputs"].items()}

    def changed(**changes: Any) -> set[str]:
        return {key for key, value in inputs(**changes).items() if value != original[key]}

    original = inputs()
    assert original.keys() == {"train_file", "eval_file", "encoder", "processes"}
    moved = shutil.copytree(tiny_bert, tmp_path / "moved")
    assert changed(encoder=moved) == set()
    papers = toy_papers(6)
    other = dataclasses.replace(papers[3], summaries=(*papers[3].summaries[:-1], "another text"))
    assert changed(papers=[*papers[:3], other, *papers[4:]]) == {"train_file"}
    assert changed(papers=papers[::-1]) == {"train_file"}
    assert changed(evaluation=toy_papers(4, 91)) == {"eval_file"}
    assert changed(encoder=lively_bert) == {"encoder"}
    vocabulary = moved / "tokenizer.json"
    text = vocabulary.read_text(encoding="utf-8").replace('"soil"', '"clay"')
    vocabulary.write_text(text, encoding="utf-8")
    assert changed(encoder=moved) == {"encoder"}
