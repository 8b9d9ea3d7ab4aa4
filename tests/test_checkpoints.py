"""checkpoints.py: what is written comes back bit by bit, every kind of damage is seen, and facts_of
tells changed data and encoders apart.
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
from test_training import assert_same_tensors, load, toy_papers

from semcse import checkpoints
from semcse.checkpoints import facts_of
from semcse.distributed import ALONE
from semcse.errors import RunError

TENSORS = {
    "model/a": torch.tensor([[1.5, -0.0], [float("nan"), 2.0**-140]]),
    "optimizer/0/step": torch.tensor(7.0),
    "random/cpu/0": torch.arange(9, dtype=torch.uint8),
    "half": torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "slanted": torch.arange(6.0).reshape(2, 3).T,
}
STATE = {"step": 3, "best_rank": float("inf"), "loss_ema": None}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_what_is_kept(tmp_path: Path) -> None:
    """Same bits, same state. The newest ones are kept; those of later steps, which only damage can
    have left behind, do not count and go.
    """
    for step in (1, 2, 30, 4):
        checkpoints.write(tmp_path, step, TENSORS, STATE | {"step": step}, keep=2)
    assert names(tmp_path) == ["step-00000002.safetensors", "step-00000004.safetensors"]
    found = checkpoints.newest(tmp_path)
    assert found
    tensors, state = found
    assert state == STATE | {"step": 4}
    assert_same_tensors(
        {name: torch.nan_to_num(one) for name, one in tensors.items()},
        {name: torch.nan_to_num(one) for name, one in TENSORS.items()},
    )
    assert (
        tensors["model/a"].view(torch.int32).tolist()
        == TENSORS["model/a"].view(torch.int32).tolist()
    )
    checkpoints.write(tmp_path, 5, TENSORS, STATE, keep=1)
    assert names(tmp_path) == ["step-00000005.safetensors"]
    assert checkpoints.newest(tmp_path / "absent") is None


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_or_cut_is_seen(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever byte is changed, wherever the file is cut, whatever stands in it: a clean error, or
    (in the header's blanks) the same content.
    """
    checkpoints.write(tmp_path, 1, TENSORS, STATE, keep=1)
    path = tmp_path / "step-00000001.safetensors"
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    way = data.draw(st.sampled_from(["flip", "cut", "noise"]))
    if way == "flip":
        whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(
        data.draw(st.binary(max_size=300))
        if way == "noise"
        else bytes(whole[:at])
        if way == "cut"
        else bytes(whole)
    )
    try:
        tensors, state = checkpoints.read(path)
    except RunError as error:
        named = str(path) in error.what
    else:
        named = True
        assert way == "flip"
        assert state == STATE
        assert {name: one.tolist() for name, one in tensors.items() if name != "model/a"} == {
            name: one.tolist() for name, one in TENSORS.items() if name != "model/a"
        }
    assert named


def test_foreign_files_are_no_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A safetensors file of another kind, one without a checksum and an empty one: all named, none
    used, nothing raised.
    """
    caplog.set_level(logging.INFO)
    save_file({"a": torch.ones(3)}, tmp_path / "step-00000001.safetensors")
    save_file(
        {"a": torch.ones(3)},
        tmp_path / "step-00000002.safetensors",
        metadata={"state": "{}", "sha256": "0"},
    )
    (tmp_path / "step-00000003.safetensors").touch()
    assert checkpoints.newest(tmp_path) is None
    assert len(caplog.messages) == 4
    assert "training starts over" in caplog.messages[-1]


def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(tmp_path: Path) -> None:
    """A fault of the disk or the permissions must not make the run start over: it ends with the
    system's error.
    """
    (tmp_path / "step-00000001.safetensors").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError, match="No such file"):
        checkpoints.newest(tmp_path)


def test_facts_tell_what_changed(tiny_bert: Path, lively_bert: Path, tmp_path: Path) -> None:
    """Same papers and encoder, loaded from elsewhere: the same sums. A changed summary, another
    order, other weights or words: that sum differs.
    """

    def inputs(
        encoder: Path = tiny_bert, papers: Any = None, evaluation: Any = None
    ) -> dict[str, Any]:
        found = facts_of(
            load(encoder),
            ALONE,
            papers or toy_papers(6),
            toy_papers(3, 50),
            evaluation or toy_papers(4, 90),
        )["inputs"]
        return {key.split(" ")[0]: value for key, value in found.items()}

    def changed(**changes: Any) -> set[str]:
        return {key for key, value in inputs(**changes).items() if value != plain[key]}

    plain = inputs()
    assert plain.keys() == {"train_file", "eval_file", "encoder", "processes"}
    shutil.copytree(tiny_bert, tmp_path / "moved")
    assert changed(encoder=tmp_path / "moved") == set()
    papers = toy_papers(6)
    other = dataclasses.replace(papers[3], summaries=(*papers[3].summaries[:-1], "another text"))
    assert changed(papers=[*papers[:3], other, *papers[4:]]) == {"train_file"}
    assert changed(papers=papers[::-1]) == {"train_file"}
    assert changed(evaluation=toy_papers(4, 91)) == {"eval_file"}
    assert changed(encoder=lively_bert) == {"encoder"}
    vocabulary = tmp_path / "moved/tokenizer.json"
    vocabulary.write_text(
        vocabulary.read_text(encoding="utf-8").replace('"soil"', '"clay"'), encoding="utf-8"
    )
    assert changed(encoder=tmp_path / "moved") == {"encoder"}
