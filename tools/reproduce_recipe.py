"""Train the two recipes of docs/experiments.md with several seeds and measure them on the 1,100
development papers for reporting.

    python tools/development_split.py    once: writes the development papers
    python tools/reproduce_recipe.py     writes runs/recipe/table_a.md, table_b.md, and one run
                                         folder for each recipe and seed

Recipe (a) trains with CLS pooling and the Euclidean distance, as the authors do, and is compared
with the encoder before training, used in the same way. Recipe (b) trains with mean pooling and the
cosine distance, and is compared with the encoder as its authors use it. All differences are paired:
the same papers are resampled for both models. A stopped run continues where it was.
"""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from load_data import read_training_papers
from semantic_benchmark import Evaluation, evaluate, read_evaluation_papers
from semcse import command_line, files
from semcse.bootstrap import paired_difference
from semcse.errors import UserError
from semcse.tables import TASKS, main_score
from settings import Settings, complete, default_settings

if TYPE_CHECKING:
    from semcse.encoder import Encoder

# Recipe -> its differences from the quickstart's settings; those of "shared" are in every recipe.
RECIPES: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8")
)
SHARED = RECIPES.pop("shared")


@dataclass(frozen=True)
class Command:
    """Train both recipes with several seeds and write their tables of paired differences."""

    data: str = "runs/development"  # folder that tools/development_split.py wrote
    output_dir: str = "runs/recipe"  # folder for the models and tables
    seeds: int = 3  # runs of each recipe
    recipe: tuple[str, ...] = ()  # "a" or "b"; may be repeated; both if none is named


def main() -> None:
    """Train and score the recipes, and write their tables."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    if command.seeds < 2 or not set(command.recipe) <= set(RECIPES):
        raise UserError(
            "--seeds is below 2, or --recipe is unknown",
            f"give two seeds or more, and recipes of {', '.join(RECIPES)}",
        )
    for name in command.recipe or RECIPES:
        table = "\n".join(recipe_lines(name, command)) + "\n"
        files.write_text(Path(command.output_dir) / f"table_{name}.md", table)
        print(table)


def recipe_lines(name: str, command: Command) -> list[str]:
    """The lines of a recipe's table: its reference, seeds, differences, mean and deviation."""
    runs = [recipe_settings(name, command, seed) for seed in range(command.seeds)]
    papers = read_evaluation_papers(runs[0].eval_file)
    reference = evaluate(reference_encoder(name, runs[0]), papers, 0, f"{name}, reference")
    trained = {
        f"seed {run.seed}": evaluate(trained_encoder(run), papers, 0, f"{name}, seed {run.seed}")
        for run in runs
    }
    rows = {"reference": [f"{_score(reference, task):.3f}" for task in TASKS]}
    for seed, one in trained.items():
        rows[seed] = [f"{_score(one, task):.3f}" for task in TASKS]
    for seed, one in trained.items():
        rows[f"{seed} - reference"] = [_difference(one, reference, task) for task in TASKS]
    columns = [np.array([_score(one, task) for one in trained.values()]) for task in TASKS]
    rows["mean and standard deviation over seeds"] = [
        f"{column.mean():.3f} ± {column.std(ddof=1):.3f}" for column in columns
    ]
    rows["fall of the normalised rank"] = [
        ""
        if task == "clustering"
        else f"{1 - (column.mean() - 1) / (_score(reference, task) - 1):.0%}"
        for task, column in zip(TASKS, columns, strict=True)
    ]
    pools = [f"{task} (pool {reference.report['tasks'][task]['pool']})" for task in TASKS]
    table = [f"| {head} | {' | '.join(cells)} |" for head, cells in rows.items()]
    return [f"## ({name})", "", f"| | {' | '.join(pools)} |", "|---" * 5 + "|", *table, ""]


def _score(evaluation: Evaluation, task: str) -> float:
    return float(evaluation.report["tasks"][task][main_score(task)])


def _difference(one: Evaluation, other: Evaluation, task: str) -> str:
    mean, (low, high) = paired_difference(one.per_paper[task], other.per_paper[task], 0)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def recipe_settings(name: str, command: Command, seed: int) -> Settings:
    """The quickstart's settings with the recipe's differences."""
    paths = {
        "train_file": str(Path(command.data) / "train.jsonl"),
        "eval_file": str(Path(command.data) / "evaluation.jsonl"),
        "output_dir": str(Path(command.output_dir) / f"{name}-{seed}"),
    }
    changes = {**SHARED, **RECIPES[name], **paths, "seed": seed}
    return complete(dataclasses.replace(default_settings("quickstart"), **changes))


def starting_encoder(settings: Settings) -> Encoder:
    """The encoder that training starts from, used as the settings say."""
    from semcse.encoder import Usage
    from semcse.models import load_for_training

    usage = Usage(settings.pooling, settings.metric, settings.max_length)
    return load_for_training(settings.encoder, usage, settings.device)


def reference_encoder(name: str, settings: Settings) -> Encoder:
    """The encoder that a recipe is compared with (see the top of this file)."""
    from semcse.models import load_model

    return starting_encoder(settings) if name == "a" else load_model(settings.encoder)


def trained_encoder(settings: Settings) -> Encoder:
    """Train an encoder, or load it if an earlier call trained it.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    from semcse.model_folder import save_model
    from semcse.models import load_model
    from train_embedding_model import train

    folder = Path(settings.output_dir)
    record = folder / "settings.json"
    if record.exists() and files.read_json(record) != dataclasses.asdict(settings):
        raise UserError(
            f"{folder}: holds a run with other settings", "delete it, or name another --output-dir"
        )
    files.write_json(record, dataclasses.asdict(settings))
    if not (folder / "model" / "semcse.json").exists():
        evaluation = read_evaluation_papers(settings.eval_file)
        papers, held_out = read_training_papers(settings, evaluation)
        encoder = starting_encoder(settings)
        train(encoder, papers, held_out, settings, folder)
        save_model(encoder, folder / "model", base=settings.encoder)
    return load_model(str(folder / "model"))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
