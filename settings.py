"""Every hyperparameter of the project, one line each. To switch the whole project between Euclidean
distance and cosine, edit the line `metric`.

Order of precedence: command-line flag > the chosen profile's block below > the default line. No
profile sets `metric`. Functions elsewhere receive a `Settings` or plain values; nothing reads a
global. [S] stated by the authors, [A] taken from the same group's other published code, [ours] our
choice where the paper is silent (README, "Deviations and unknowns").
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from semcse import command_line, errors
from semcse.types import Device, Metric, Pooling, Precision

Loss = Literal["triplet", "infonce"]
Profile = Literal["quickstart", "paper"]


@dataclass(frozen=True)
class Settings:
    """Train an encoder on pairs of summaries and evaluate it on the four semantic tasks."""

    # distance of loss, validation, benchmark and saved model [S: both are published]
    metric: Metric = "euclidean"
    # which block of differences below applies: quickstart (sample papers, CPU) or paper (full data,
    # GPU)
    profile: Profile = "quickstart"
    # data
    train_file: str = "data/sample_train.jsonl"  # papers file with summaries to train on
    # papers file to evaluate on; its papers are never trained on
    eval_file: str = "data/sample_test.jsonl"
    output_dir: str = ""  # run folder; empty: runs/<profile>-<metric>
    # count and log bad lines of a papers file instead of stopping at the first
    skip_invalid: bool = False
    # share of the training papers held out, whole topics where papers have one, to choose the
    # checkpoint [ours]
    validation_share: float = 0.1
    validation_papers: int = 150  # at most so many papers are held out [A: 150 abstracts]
    # encoder
    encoder: str = "all-MiniLM-L6-v2"  # encoder to start from: recipe name, Hub id or folder
    # text vector: first position's last hidden state, or the mean over real tokens [S: cls]
    pooling: Pooling = "cls"
    max_length: int = 512  # tokens kept of a text when embedding; saved with the model [ours]
    trust_remote_code: bool = False  # allow a model to bring and run its own Python code
    # contrastive training
    # triplet hinge over all in-batch negatives, or InfoNCE, better on real papers
    # (docs/experiments.md) [S: triplet]
    loss: Loss = "triplet"
    # triplet margin in units of the distance; None: 1.0 euclidean [A], 0.1 cosine [ours]
    margin: float | None = None
    # InfoNCE temperature in units of the distance; None: 0.25 euclidean [ours], 0.07 cosine [A]
    temperature: float | None = None
    batch_size: int = 32  # papers in a batch, one pair of summaries each [A]
    # texts (two a pair) whose activations a step keeps in memory; 0: all; a quarter of them takes
    # 1.4 x the time, same gradients [ours]
    texts_at_once: int = 0
    # share of the pairs whose positive is all other summaries of the paper in one text, as long as
    # abstracts are; 0: none [A: none]
    joined_share: float = 0.0
    max_steps: int = 40_000  # optimizer steps at most [A: 40 epochs of 1,000 batches]
    learning_rate: float = 2e-5  # AdamW's peak learning rate [A]
    weight_decay: float = 1e-4  # AdamW's weight decay [A]
    warmup_steps: int = 0  # steps of linear learning-rate warm-up [A: none]
    # let the learning rate fall linearly to 0 at max_steps; otherwise it is constant after the
    # warm-up [A: constant]
    decay: bool = False
    clip_norm: float = 0.0  # gradient norm is cut to this; 0: no clipping [A: none]
    # share of the starting weights averaged into the trained ones at the end; 0: none [A: none]
    start_share: float = 0.0
    train_max_length: int = 128  # tokens kept of a summary in training [A]
    # running
    validate_every: int = 1_000  # steps between validations; the best checkpoint is kept [A]
    patience: int = 7  # validations without a better result before training stops early [A]
    checkpoint_every: int = 1_000  # steps between checkpoints that --resume continues from [ours]
    # checkpoints kept, the newest; a damaged one is passed over for the one before [ours]
    keep_checkpoints: int = 2
    log_every: int = 50  # steps between rows of metrics.jsonl [ours]
    seed: int = 0  # seed of batches, summary choice, dropout and bootstrap
    device: Device = "auto"  # auto: a CUDA GPU where there is one, else the CPU
    # training arithmetic; auto: bf16 autocast where the hardware has it natively, else float32
    precision: Precision = "auto"
    resume: bool = False  # continue the unfinished run in the output folder


PROFILES: dict[Profile, dict[str, Any]] = {
    # Two minutes on two CPU cores, with what the repository brings. The loss stays the authors':
    # InfoNCE ranks better here under the Euclidean distance, but worse under cosine at its default
    # temperature, and one line must switch the distance (docs/experiments.md, "The quickstart with
    # InfoNCE").
    "quickstart": {
        # of 112 papers: several of the four neighbours of a topic meet in a batch
        "batch_size": 64,
        "max_steps": 60,
        "validation_share": 0.25,
        "validate_every": 10,
        "checkpoint_every": 20,
        "log_every": 5,
    },
    # The published model's encoder and data size; needs a GPU, and the files that the README's
    # stages make.
    "paper": {
        "encoder": "KISTI-AI/Scideberta-full",
        "train_file": "data/train_summaries.jsonl.gz",
        "eval_file": "data/scidocs.jsonl.gz",
    },
}

MARGINS: dict[Metric, float] = {"euclidean": 1.0, "cosine": 0.1}
# Euclidean: 0.25 did better than 0.5 on raw MiniLM vectors (docs/experiments.md); vectors of
# another length want another.
TEMPERATURES: dict[Metric, float] = {"euclidean": 0.25, "cosine": 0.07}

# How the files of the paper profile come to be: said where one of them is missing.
PAPER_DATA = (
    "make the paper profile's data with: python collect_papers.py (papers and SciDocs), python"
    " generate_search_queries.py (queries), python generate_train_summaries.py (summaries); see"
    " README, Reproduce"
)


def default_settings(profile: Profile) -> Settings:
    """The default lines with a profile's block applied."""
    return dataclasses.replace(Settings(profile=profile), **PROFILES[profile])


def parse_settings(args: Sequence[str] | None = None) -> Settings:
    """Command line -> Settings with every open choice filled in. files.UserError: an unknown flag
    or a value out of range.
    """
    words = list(sys.argv[1:] if args is None else args)
    base = default_settings(_named_profile(words))
    return complete(command_line.parse_command_line(Settings, words, base))


def _named_profile(words: list[str]) -> Profile:
    """The profile a command line names: its block must be applied before the flags are."""
    named = Settings().profile
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag == "--profile":
            value = value or " ".join(words[i + 1 : i + 2])
            named = next((profile for profile in PROFILES if profile == value), named)
    return named


def complete(settings: Settings) -> Settings:
    """Fill in what depends on other settings (margin, temperature, output folder) and check every
    range.

    Raises:
        files.UserError: a value out of range.
    """
    for name, choices in {
        "metric": Metric,
        "profile": Profile,
        "pooling": Pooling,
        "loss": Loss,
        "device": Device,
        "precision": Precision,
    }.items():
        _check(
            name,
            getattr(settings, name) in get_args(choices),
            f"one of {', '.join(get_args(choices))}",
        )
    settings = dataclasses.replace(
        settings,
        margin=MARGINS[settings.metric] if settings.margin is None else settings.margin,
        temperature=(
            TEMPERATURES[settings.metric] if settings.temperature is None else settings.temperature
        ),
        output_dir=settings.output_dir or f"runs/{settings.profile}-{settings.metric}",
    )
    at_least = {
        "batch_size": 2,
        "max_steps": 1,
        "max_length": 3,
        "train_max_length": 3,
        "validate_every": 1,
        "patience": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": 1,
        "log_every": 1,
        "validation_papers": 2,
        "warmup_steps": 0,
        "weight_decay": 0,
        "clip_norm": 0,
        "margin": 0,
        "seed": 0,
        "texts_at_once": 0,
    }
    for name, least in at_least.items():
        _check(
            name, least <= getattr(settings, name) < float("inf"), f"at least {least} and finite"
        )
    _check("seed", settings.seed < 2**63, "below 2^63")
    for name in ("learning_rate", "temperature"):
        _check(name, 0 < getattr(settings, name) < float("inf"), "positive")
    _check("joined_share", 0 <= settings.joined_share <= 1, "between 0 and 1")
    _check("start_share", 0 <= settings.start_share < 1, "at least 0 and below 1")
    _check("validation_share", 0 < settings.validation_share < 1, "between 0 and 1")
    return settings


def _check(name: str, good: bool, need: str) -> None:
    if not good:
        raise errors.UserError(
            f"setting --{name.replace('_', '-')} is out of range", f"give a value that is {need}"
        )
