"""Shared fixtures: tiny models made in a temporary folder (never downloaded), papers files, and a
way to run the scripts as a user would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
WORDS = (
    "soil river cell market school theory metal protein voter climate graph poem court engine reef"
    " tax virus bridge memory crystal grain harbour neuron ritual lattice pollen ledger glacier"
    " vowel turbine enzyme parish comet budget tissue syntax monsoon alloy census larva"
).split()


def run_script(
    *words: str | Path, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT ...` in the repository, offline, and return its exit code and output."""
    command = [sys.executable, *map(str, words)]
    env = (
        os.environ
        | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        | environment
    )
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def sentence(*numbers: int) -> str:
    """A made-up sentence of the words with these numbers."""
    return " ".join(WORDS[number % len(WORDS)] for number in numbers) + "."


def make_paper(number: int, **changes: Any) -> dict[str, Any]:
    """A small valid paper; every text differs from other numbers' texts."""
    n = number
    paper = {
        "id": f"paper-{n}",
        "title": f"{sentence(n, n + 1, 3 * n)[:-1]} number {n}",
        "abstract": (
            f"First {n} {sentence(n, 5 * n + 1, n + 2)} Second {sentence(n + 3, 7 * n, n)} Third"
            f" {sentence(2 * n, n + 9)} Last {sentence(n, n + 4)}"
        ),
        "summaries": [
            f"{kind} {n} {sentence(n + i, 2 * n + i, 3 * n)}"
            for i, kind in enumerate(("problem", "method", "finding", "use"))
        ],
        "query": f"{WORDS[n % len(WORDS)]} {WORDS[(5 * n) % len(WORDS)]} {n}",
        "field": f"field {n % 2}",
        "topic": f"topic {n // 4}",
    }
    return paper | changes


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may ask the Hub, whatever the environment says."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run side by side on few cores: torch's threads would wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def papers_file(tmp_path: Path) -> Callable[..., Path]:
    """A function (rows, name="papers.jsonl") -> path of a papers file with these rows."""

    def write(rows: list[dict[str, Any]], name: str = "papers.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_tiny_bert`."""
    return write_tiny_bert(tmp_path_factory.mktemp("tiny_bert"))


def write_tiny_bert(folder: Path) -> Path:
    """A folder with a random two-layer BERT of 32 dimensions and a word-level tokenizer over WORDS,
    as a Hub repository would lay it out.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz0123456789.,",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"),
    ]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    tokenizer: Any = BertTokenizer
    tokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lively_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with matrices eight times as large: a freshly drawn one gives nearly the same
    CLS vector for every text and learns slowly.
    """
    import torch
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("lively") / "model"
    shutil.copytree(tiny_bert, folder)
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as SciDeBERTa ships: config.json, fp16 pytorch_model.bin, spm.model
    (nmt_nfkc), and nothing else.
    """
    import sentencepiece
    import torch
    from transformers import DebertaV2Config, DebertaV2Model

    folder = tmp_path_factory.mktemp("tiny_deberta")
    corpus = folder / "corpus.txt"
    corpus.write_text(
        "\n".join(sentence(i, 3 * i, 5 * i, i + 7) for i in range(400))
        + "\nfind office flow 5\n" * 20,
        encoding="utf-8",
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spm"),
        vocab_size=150,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    corpus.unlink()
    (folder / "spm.vocab").unlink()
    torch.manual_seed(0)
    config_class: Any = DebertaV2Config  # its fields are not typed
    config = config_class(
        vocab_size=160,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=-1,
        position_biased_input=False,
        max_position_embeddings=512,
        type_vocab_size=0,
        pad_token_id=0,
    )
    model = cast(torch.nn.Module, DebertaV2Model(config)).to(torch.float16)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    return folder
