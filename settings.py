"""Every hyperparameter of the project, one documented line each.

To switch the whole project between Euclidean distance and cosine, edit the line `metric`. A flag on
the command line wins over the profile's block below, which wins over the default line. No profile
sets `metric`. Nothing reads a global setting: functions receive a `Settings` or plain values.

The mark in brackets says what a default rests on: [S] the SemCSE authors' README, model card or
main.py; [A] other published code of the same group; [ours] our choice, because none of these
sources says it (README, "Deviations and unknowns").
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from semcse import command_line
from semcse.errors import UserError
from semcse.types import Device, Metric, Pooling, Precision

Loss = Literal["triplet", "infonce"]
Profile = Literal["quickstart", "paper"]


@dataclass(frozen=True)
class Settings:
    """Train an encoder on pairs of summaries and evaluate it on the four semantic tasks."""

    metric: Metric = "euclidean"  # distance of loss, validation, benchmark and saved model [S]
    profile: Profile = "quickstart"  # quickstart: sample papers, CPU; paper: full data, GPU

    # Data
    train_file: str = "data/sample_train.jsonl"  # papers file with summaries to train on
    eval_file: str = "data/sample_test.jsonl"  # papers file to evaluate on, never trained on
    output_dir: str = ""  # folder of the run; empty: runs/<profile>-<metric>
    skip_invalid: bool = False  # count and log bad lines instead of stopping at the first one
    validation_share: float = 0.1  # share of the training papers held out for validation [ours]
    validation_papers: int = 150  # largest number of papers held out for validation [A]

    # Encoder
    encoder: str = "all-MiniLM-L6-v2"  # encoder to start from: recipe name, Hub id or folder
    pooling: Pooling = "cls"  # vector of a text: the first token's state, or the mean of all [S]
    max_length: int = 512  # longer texts are cut to this many tokens; saved with the model [ours]
    trust_remote_code: bool = False  # allow Python code that comes with a model to run

    # Contrastive training
    loss: Loss = "triplet"  # triplet hinge [S] or InfoNCE, which ranks real papers better [ours]
    margin: float | None = None  # triplet margin; default: 1.0 euclidean [A], 0.1 cosine [ours]
    temperature: float | None = None  # for InfoNCE; default: 0.25 euclidean [ours], 0.07 cosine [A]
    batch_size: int = 32  # papers in a batch, with one pair of summaries each [A]
    texts_at_once: int = 0  # texts whose activations are in memory at once; 0: all [ours]
    joined_share: float = 0.0  # share of pairs whose positive is all other summaries, joined [ours]
    max_steps: int = 40_000  # largest number of optimizer steps: 40 epochs of 1,000 batches [A]
    learning_rate: float = 2e-5  # highest learning rate of AdamW [A]
    weight_decay: float = 1e-4  # weight decay of AdamW [A]
    warmup_steps: int = 0  # steps in which the learning rate rises linearly [A]
    decay: bool = False  # lower the learning rate linearly to 0 at max_steps [A]
    clip_norm: float = 0.0  # largest gradient norm; 0: no clipping [A]
    start_share: float = 0.0  # share of the starting weights in the final average [ours]
    train_max_length: int = 128  # longer summaries are cut to this many tokens in training [A]

    # Running
    validate_every: int = 1_000  # steps between validations; the best weights are kept [A]
    patience: int = 7  # validations without a better result before training stops early [A]
    checkpoint_every: int = 1_000  # steps between checkpoints, where --resume continues [ours]
    keep_checkpoints: int = 2  # checkpoints kept; an older one is used if the newest is bad [ours]
    log_every: int = 50  # steps between rows of metrics.jsonl [ours]
    seed: int = 0  # seed of batches, choice of summaries, dropout and bootstrap
    device: Device = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    precision: Precision = "auto"  # used in training; auto: bf16 autocast if the hardware has it
    resume: bool = False  # continue the unfinished run in the output folder
    overwrite: bool = False  # replace the run in the output folder


PROFILES: dict[Profile, dict[str, Any]] = {
    # Takes a few minutes on two CPU cores, with data and encoder that need no download. The loss
    # stays the authors' triplet loss (docs/experiments.md, "The quickstart with InfoNCE").
    "quickstart": {
        "batch_size": 64,  # out of 112 papers, so that papers of one topic meet in a batch
        "max_steps": 60,
        "validation_share": 0.25,
        "validate_every": 10,
        "checkpoint_every": 20,
        "log_every": 5,
    },
    # The published model's encoder and data size. It needs a GPU, and the files that the
    # commands in the README's section "The paper's setting" make.
    "paper": {
        "encoder": "KISTI-AI/Scideberta-full",
        "train_file": "data/train_summaries.jsonl.gz",
        "eval_file": "data/scidocs.jsonl.gz",
    },
}

MARGINS: dict[Metric, float] = {"euclidean": 1.0, "cosine": 0.1}
# 0.25 was better than 0.5 on raw MiniLM vectors (docs/experiments.md). Euclidean distances grow
# with the length of the vectors, so another encoder may need another temperature.
TEMPERATURES: dict[Metric, float] = {"euclidean": 0.25, "cosine": 0.07}

# Setting -> its smallest value. All of them must also be finite.
AT_LEAST = {
    **dict.fromkeys(("batch_size", "validation_papers"), 2),
    **dict.fromkeys(("max_length", "train_max_length"), 3),
    **dict.fromkeys(("max_steps", "validate_every", "patience", "checkpoint_every"), 1),
    **dict.fromkeys(("keep_checkpoints", "log_every"), 1),
    **dict.fromkeys(("warmup_steps", "weight_decay", "clip_norm", "margin"), 0),
    **dict.fromkeys(("seed", "texts_at_once"), 0),
}


def default_settings(profile: Profile) -> Settings:
    """Return the default settings of a profile."""
    return dataclasses.replace(Settings(profile=profile), **PROFILES[profile])


def parse_settings(args: Sequence[str] | None = None) -> Settings:
    """Read the settings from the command line, and complete them.

    Args:
        args: The words after the script's name; None takes them from `sys.argv`.
    """
    words = list(sys.argv[1:] if args is None else args)
    default = default_settings(_find_profile(words))
    return complete(command_line.parse_command_line(Settings, words, default))


def _find_profile(words: list[str]) -> Profile:
    """Find the profile that a command line names, which sets the defaults of all other flags."""
    found = Settings().profile
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--profile":
            value = value if equals else " ".join(words[place + 1 : place + 2])
            found = next((profile for profile in PROFILES if profile == value), found)
    return found


def complete(settings: Settings) -> Settings:
    """Fill in the settings that depend on others (margin, temperature, output folder).

    Raises:
        UserError: A value is out of range.
    """
    choices: dict[str, Any] = {"metric": Metric, "profile": Profile, "pooling": Pooling}
    choices |= {"loss": Loss, "device": Device, "precision": Precision}
    for name, choice in choices.items():
        allowed = get_args(choice)
        _check(name, getattr(settings, name) in allowed, f"one of {', '.join(allowed)}")
    margin, temperature = settings.margin, settings.temperature
    settings = dataclasses.replace(
        settings,
        margin=MARGINS[settings.metric] if margin is None else margin,
        temperature=TEMPERATURES[settings.metric] if temperature is None else temperature,
        output_dir=settings.output_dir or f"runs/{settings.profile}-{settings.metric}",
    )
    for name, least in AT_LEAST.items():
        value = getattr(settings, name)
        _check(name, least <= value < float("inf"), f"at least {least} and finite")
    _check("seed", settings.seed < 2**63, "below 2^63")
    for name in ("learning_rate", "temperature"):
        _check(name, 0 < getattr(settings, name) < float("inf"), "positive and finite")
    _check("joined_share", 0 <= settings.joined_share <= 1, "between 0 and 1")
    _check("start_share", 0 <= settings.start_share < 1, "at least 0 and below 1")
    _check("validation_share", 0 < settings.validation_share < 1, "between 0 and 1")
    return settings


def _check(name: str, valid: bool, requirement: str) -> None:
    if not valid:
        flag = f"--{name.replace('_', '-')}"
        raise UserError(f"setting {flag} is out of range", f"give a value that is {requirement}")


def require_files(settings: Settings) -> None:
    """Raise a UserError that names the scripts to run if a file of the paper profile is missing."""
    for key in ("train_file", "eval_file"):
        path = getattr(settings, key)
        if path == PROFILES["paper"][key] and not Path(path).exists():
            scripts = "collect_papers.py, generate_search_queries.py, generate_train_summaries.py"
            fix = f"make the data with {scripts} (README, The paper's setting)"
            raise UserError(f"{path}: no such file", fix)
