"""Saved folders opened by other versions of transformers and sentence-transformers: another Python,
named by SEMCSE_OLD_PYTHON, must give our vectors.

docs/other_harnesses.md says how to make such an environment, and what was found with which
versions. Without the variable these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, sentence
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import RobertaConfig, RobertaModel

from semcse.encoder import Usage
from semcse.model_folder import load_encoder
from semcse.types import Metric, Pooling

OLD_PYTHON = os.environ.get("SEMCSE_OLD_PYTHON", "")
# What a stranger types, in words that old and new versions know. Prints versions, vectors by both
# ways, and the similarity of the first two texts.
STRANGER = """
import json, sys
import torch, transformers, sentence_transformers, tokenizers
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
folder, pooling = sys.argv[1:]
texts = json.load(sys.stdin)
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
plain = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
theirs = SentenceTransformer(folder, device="cpu")
vectors = theirs.encode(texts, show_progress_bar=False, convert_to_tensor=True)
similarity = theirs.similarity(vectors[:1], vectors[1:2]).item() if hasattr(theirs, "similarity") else None
versions = {one.__name__: one.__version__ for one in (transformers, tokenizers, sentence_transformers, torch)}
print("RESULT" + json.dumps({"versions": versions, "plain": plain.tolist(), "sentence": vectors.tolist(), "similarity": similarity}))
"""
TEXTS = [
    sentence(*range(12)),
    "Soil, RIVER.",
    f"ﬁnd oﬀice ⑤ {WORDS[3]}\u200b\uff54wo",
    sentence(*range(40)) * 40,
    "a",
]


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer RoBERTa with a byte-level BPE tokenizer, laid out as the Hub's:
    vocab.json, merges.txt, safetensors.
    """
    folder = tmp_path_factory.mktemp("tiny_roberta")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        [sentence(*range(40))],
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer.model.save(str(folder))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.1,
    }
    RobertaModel(
        RobertaConfig(
            vocab_size=340, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, **sizes
        )
    ).save_pretrained(folder)
    return folder


@pytest.mark.skipif(
    not OLD_PYTHON,
    reason="SEMCSE_OLD_PYTHON names no Python with other versions (docs/other_harnesses.md)",
)
@pytest.mark.parametrize("architecture", ["tiny_bert", "tiny_deberta", "tiny_roberta"])
@pytest.mark.parametrize(("pooling", "metric"), [("cls", "euclidean"), ("mean", "cosine")])
def test_a_saved_folder_gives_the_same_vectors_elsewhere(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    architecture: str,
    pooling: Pooling,
    metric: Metric,
) -> None:
    encoder = load_encoder(
        str(request.getfixturevalue(architecture)), Usage(pooling, metric, 512), "cpu"
    )
    encoder.save(tmp_path / "model", base=architecture)
    ours = encoder.embed(TEXTS)
    assert ours.cut > 0  # so that the maximum length is compared too
    # the texts are told apart
    assert torch.cdist(ours.vectors, ours.vectors).fill_diagonal_(9).min() > 1e-3
    done = subprocess.run(
        [OLD_PYTHON, "-c", STRANGER, str(tmp_path / "model"), pooling],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.partition("RESULT")[2])
    worst = {
        way: (torch.tensor(theirs[way]) - ours.vectors).abs().max().item()
        for way in ("plain", "sentence")
    }
    record_property("found", {"versions": theirs["versions"], "worst": worst})
    print(architecture, pooling, theirs["versions"], worst)
    assert max(worst.values()) < 1e-5
    if theirs["similarity"] is not None:
        a, b = ours.vectors[:2]
        expected = (
            -torch.dist(a, b) if metric == "euclidean" else torch.cosine_similarity(a, b, dim=0)
        )
        assert theirs["similarity"] == pytest.approx(expected.item(), abs=1e-4)
