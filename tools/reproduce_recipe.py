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

import dataclasses
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from load_data import read_training_papers
from semantic_benchmark import Evaluation, evaluate, read_evaluation_papers
from semcse import command_line, files
from semcse.bootstrap import Values, paired_difference
from semcse.errors import UserError
from semcse.tables import TASKS, markdown_table
from settings import Settings, complete, default_settings

if TYPE_CHECKING:
    from semcse.encoder import Encoder

# Recipe -> its differences from the quickstart's settings; those of "shared" are in every recipe.
RECIPES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text())
SHARED = RECIPES.pop("shared")


@dataclass(frozen=True)
class Command:
    """Train both recipes with several seeds and write their tables of paired differences."""

    data: str = "runs/development"  # folder that tools/development_split.py wrote
    output_dir: str = "runs/recipe"  # folder for the models and tables
    seeds: int = 3  # runs of each recipe
    recipe: tuple[Literal["a", "b"], ...] = ()  # may be repeated; both if none is named


def main() -> None:
    """Train and score the recipes, and write their tables."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    if command.seeds < 2:
        raise UserError(f"--seeds {command.seeds} gives no deviation", "give 2 or more")
    for name in command.recipe or RECIPES:
        table = "\n".join(recipe_lines(name, command)) + "\n"
        files.write_text(Path(command.output_dir) / f"table_{name}.md", table)
        print(table)


def recipe_lines(name: str, command: Command) -> list[str]:
    """Return the table of a recipe: its reference, seeds, differences, mean and deviation."""
    from semcse.models import load_model

    runs = [recipe_settings(name, command, seed) for seed in range(command.seeds)]
    papers = read_evaluation_papers(runs[0].eval_file)
    before = starting_encoder(runs[0]) if name == "a" else load_model(runs[0].encoder)
    reference = evaluate(before, papers, 0, f"{name}, reference")
    trained = [evaluate(trained_encoder(one), papers, 0, one.output_dir) for one in runs]
    pools = [f"{task} (pool {reference.report['tasks'][task]['pool']})" for task in TASKS]
    start, ends = main_scores(reference), np.array([main_scores(one) for one in trained])
    rows = [["", *pools], ["reference", *(f"{score:.3f}" for score in start)]]
    for seed, scores in enumerate(ends):
        rows.append([f"seed {seed}", *(f"{score:.3f}" for score in scores)])
    for seed, one in enumerate(trained):
        cells = []
        for task in TASKS:
            mean, (low, high) = paired_difference(one.per_paper[task], reference.per_paper[task], 0)
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append([f"seed {seed} - reference", *cells])
    means, deviations = ends.mean(axis=0), ends.std(axis=0, ddof=1)
    cells = [f"{mean:.3f} ± {sigma:.3f}" for mean, sigma in zip(means, deviations, strict=True)]
    rows.append(["mean and standard deviation over seeds", *cells])
    falls = 1 - (means[:3] - 1) / (start[:3] - 1)
    rows.append(["fall of the normalised rank", *(f"{fall:.0%}" for fall in falls), ""])
    return [f"## ({name})", "", *markdown_table(rows), ""]


def main_scores(evaluation: Evaluation) -> Values:
    """Return the mean ranks of the three ranking tasks and the purity, (4,)."""
    return np.array([np.nanmean(evaluation.per_paper[task]) for task in TASKS])


def recipe_settings(name: str, command: Command, seed: int) -> Settings:
    """Return the quickstart's settings with the recipe's differences."""
    paths = {
        "train_file": str(Path(command.data) / "train.jsonl"),
        "eval_file": str(Path(command.data) / "evaluation.jsonl"),
        "output_dir": str(Path(command.output_dir) / f"{name}-{seed}"),
    }
    changes = {**SHARED, **RECIPES[name], **paths, "seed": seed}
    return complete(dataclasses.replace(default_settings("quickstart"), **changes))


def starting_encoder(settings: Settings) -> "Encoder":
    """Load the encoder that training starts from, with the usage in the settings."""
    from semcse.encoder import Usage
    from semcse.models import load_for_training

    usage = Usage(settings.pooling, settings.metric, settings.max_length)
    return load_for_training(settings.encoder, usage, settings.device)


def trained_encoder(settings: Settings) -> "Encoder":
    """Train an encoder, or load it if an earlier call trained it with the same settings."""
    from semcse.model_folder import save_model
    from semcse.models import load_model
    from train_embedding_model import train

    folder, chosen = Path(settings.output_dir), dataclasses.asdict(settings)
    record = folder / "settings.json"
    if record.exists() and files.read_json(record) != chosen:
        raise UserError(f"{folder}: holds a run with other settings", "name another --output-dir")
    files.write_json(record, chosen)
    if not (folder / "model" / "semcse.json").exists():
        evaluation = read_evaluation_papers(settings.eval_file)
        papers, held_out = read_training_papers(settings, evaluation)
        encoder = starting_encoder(settings)
        train(encoder, papers, held_out, settings, folder)
        save_model(encoder, folder / "model", base=settings.encoder)
    return load_model(str(folder / "model"))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
