"""Train the recipes of docs/experiments.md with three seeds each and measure them on the 1,100
development papers for reporting.

    python tools/development_split.py        once: cuts the development papers
    python tools/reproduce_recipe.py         writes runs/recipe/table_a.md, table_b.md and one run
        folder for each recipe and seed

(a) CLS pooling and Euclidean distance, as the paper, against the encoder before training; (b) mean
pooling and cosine distance against the same encoder as its authors use it. Every difference is
paired: the same papers, resampled together. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from load_data import read_training_papers
from semantic_benchmark import Evaluation, evaluate, read_evaluation_papers
from semcse import command_line, errors, files
from semcse.bootstrap import paired_difference
from semcse.encoder import Encoder, Usage
from semcse.models import load_for_training, load_model
from semcse.tables import TASKS, main_score
from settings import Settings, complete, default_settings
from train_embedding_model import train

log = logging.getLogger(__name__)

SHARED = {
    "loss": "infonce",
    "batch_size": 32,
    "checkpoint_every": 40,
    "log_every": 20,
    "validation_share": 0.1,
}
# Recipe -> its differences from the quickstart's settings. Chosen on the validation papers:
# docs/experiments.md.
RECIPES: dict[str, dict[str, Any]] = {
    "a": {
        **SHARED,
        "pooling": "cls",
        "metric": "euclidean",
        "temperature": 0.2,
        "learning_rate": 1e-4,
        "decay": True,
        "joined_share": 0.5,
        "max_steps": 260,
        "validate_every": 260,
        "start_share": 0.15,
    },
    "b": {
        **SHARED,
        "pooling": "mean",
        "metric": "cosine",
        "temperature": 0.05,
        "learning_rate": 2e-5,
        "decay": True,
        "joined_share": 0.25,
        "max_steps": 150,
        "validate_every": 75,
        "start_share": 0.6,
        "max_length": 256,
    },
}


@dataclass(frozen=True)
class Command:
    """Train both recipes with several seeds and write the table of paired differences."""

    data: str = "runs/development"  # what tools/development_split.py wrote
    output_dir: str = "runs/recipe"  # models and table
    seeds: int = 3  # runs of each recipe
    recipe: tuple[str, ...] = ()  # "a" or "b"; both if none is named


def main() -> None:
    """Train, score, write the tables."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    if command.seeds < 2 or not set(command.recipe) <= set(RECIPES):
        raise errors.UserError(
            "--seeds is below 2, or --recipe is unknown",
            f"give two seeds or more, and recipes of {', '.join(RECIPES)}",
        )
    for name in command.recipe or RECIPES:
        table = "\n".join(recipe_lines(name, command)) + "\n"
        files.write_text(Path(command.output_dir) / f"table_{name}.md", table)
        print(table)


def recipe_lines(name: str, command: Command) -> list[str]:
    """One recipe's part of the table: reference, seeds, mean and spread, paired differences."""
    settings = recipe_settings(name, command, 0)
    papers = read_evaluation_papers(settings.eval_file)
    reference = evaluate(reference_encoder(name, settings), papers, 0, f"{name}, reference")
    trained = []
    for seed in range(command.seeds):
        encoder = trained_encoder(recipe_settings(name, command, seed))
        trained.append(evaluate(encoder, papers, 0, f"{name}, seed {seed}"))
    lines = [
        f"## ({name})",
        "",
        "| | " + " | ".join(f"{task} (pool {pool(reference, task)})" for task in TASKS) + " |",
        "|---" * 5 + "|",
    ]
    lines.append(row("reference", [number(score(reference, task)) for task in TASKS]))
    lines += [
        row(f"seed {seed}", [number(score(one, task)) for task in TASKS])
        for seed, one in enumerate(trained)
    ]
    lines += [
        row(f"seed {seed} - reference", [difference(one, reference, task) for task in TASKS])
        for seed, one in enumerate(trained)
    ]
    columns = {task: np.array([score(one, task) for one in trained]) for task in TASKS}
    lines.append(
        row(
            "mean and standard deviation over seeds",
            [
                f"{number(column.mean())} ± {number(column.std(ddof=1))}"
                for column in columns.values()
            ],
        )
    )
    lines.append(
        row("fall of the normalised rank", [fall(columns[task], reference, task) for task in TASKS])
    )
    return [*lines, ""]


def recipe_settings(name: str, command: Command, seed: int) -> Settings:
    """The quickstart's settings with the recipe's differences."""
    data, folder = Path(command.data), Path(command.output_dir) / f"{name}-{seed}"
    places = {
        "train_file": str(data / "train.jsonl"),
        "eval_file": str(data / "evaluation.jsonl"),
        "output_dir": str(folder),
        "seed": seed,
    }
    return complete(dataclasses.replace(default_settings("quickstart"), **(RECIPES[name] | places)))


def starting_encoder(settings: Settings) -> Encoder:
    """The encoder that training starts from, used as the settings say."""
    usage = Usage(settings.pooling, settings.metric, settings.max_length)
    return load_for_training(settings.encoder, usage, settings.device)


def reference_encoder(name: str, settings: Settings) -> Any:
    """What a recipe is compared with: the encoder before training in the recipe's own use (a), or
    as its authors use it (b).
    """
    return starting_encoder(settings) if name == "a" else load_model(settings.encoder)


def trained_encoder(settings: Settings) -> Any:
    """Train, or load what an earlier call trained.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    folder = Path(settings.output_dir)
    wanted = folder / "settings.json"
    if wanted.exists() and files.read_json(wanted) != dataclasses.asdict(settings):
        raise errors.UserError(
            f"{folder}: holds a run with other settings", "delete it, or name another --output-dir"
        )
    files.write_json(wanted, dataclasses.asdict(settings))
    if not (folder / "model" / "semcse.json").exists():
        papers, held_out = read_training_papers(
            settings, read_evaluation_papers(settings.eval_file)
        )
        encoder = starting_encoder(settings)
        train(encoder, papers, held_out, settings, folder)
        encoder.save(folder / "model", base=settings.encoder)
    return load_model(str(folder / "model"))


def score(evaluation: Evaluation, task: str) -> float:
    """Main score of a task."""
    return float(evaluation.report["tasks"][task][main_score(task)])


def pool(evaluation: Evaluation, task: str) -> int:
    """Candidates of a task."""
    return int(evaluation.report["tasks"][task]["pool"])


def difference(one: Evaluation, other: Evaluation, task: str) -> str:
    """Paired difference with its 95% interval."""
    mean, (low, high) = paired_difference(one.per_paper[task], other.per_paper[task], 0)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def fall(column: Any, reference: Evaluation, task: str) -> str:
    """By how much the normalised rank fell, seeds averaged; nothing for clustering."""
    return (
        ""
        if task == "clustering"
        else f"{1 - (column.mean() - 1) / (score(reference, task) - 1):.0%}"
    )


def number(value: float) -> str:
    """A mean rank or purity."""
    return f"{value:.3f}"


def row(head: str, cells: list[str]) -> str:
    """One line of a markdown table."""
    return f"| {head} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
