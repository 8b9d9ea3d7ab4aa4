"""Compare a published model with its row in the authors' table: which pool sizes, which k, and
which text of a paper would bring its scores here to the published ones?

    python tools/protocol_sweep.py --model SemCSE --eval-file data/scidocs.jsonl.gz

The authors' README, model card and main.py give the scores, but not the pool sizes and the k. If
the three ranking tasks imply similar pool sizes, it is likely that the evaluation papers and the
halving rule are those of the authors. The method is our choice.
"""

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from semantic_benchmark import clustering, evaluate, read_evaluation_papers
from semcse import command_line, files
from semcse.errors import UserError
from semcse.papers import Paper
from semcse.tables import TASKS
from semcse.types import Device
from settings import Settings

if TYPE_CHECKING:
    from semcse.encoder import Encoder

SWEPT_K = (1, 3, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Command:
    """Find the pool sizes and k that would bring a published model to its published scores."""

    model: tuple[str, ...] = ()  # recipe name of a model in the authors' table; may be repeated
    eval_file: str = Settings.eval_file  # papers file to score the models on
    output: str = "runs/protocol_sweep.json"  # file for the findings
    device: Device = "auto"  # auto: a CUDA GPU if there is one, else the CPU


def published_scores(name: str) -> dict[str, float]:
    """Return task -> published main score of a recipe. Raise a UserError if it has none."""
    from semcse.models import RECIPES, find_recipe

    recipe = find_recipe(name)
    if recipe is None or recipe.published is None:
        known = ", ".join(key for key, one in RECIPES.items() if one.published)
        raise UserError(f"{name} is not in the authors' table", f"name one of {known}")
    return dict(zip(TASKS, recipe.published, strict=True))


def implied_pool(mean_rank: float, pool: int, published: float) -> float | None:
    """Return the pool size at which a model is expected to have its published mean rank.

    In a random part of n of the N candidates of a pool, the expected mean rank is
    1 + (mean rank - 1) * (n - 1) / (N - 1), which is solved for n here. The result is None for
    the mean rank 1, which stays 1 in every pool.
    """
    return 1 + (published - 1) * (pool - 1) / (mean_rank - 1) if mean_rank > 1 else None


def sweep(
    encoder: "Encoder", papers: list[Paper], published: Mapping[str, float], tasks: Collection[str]
) -> dict[str, Any]:
    """Compare a model with its published scores (task -> main score).

    Returns:
        The implied pool sizes of the ranking tasks in `tasks`, the purity for each k, and the k
        whose purity is closest to the published one.
    """
    evaluation = evaluate(encoder, papers, 0, encoder.name)
    fields, metric, pools, purity = [paper.field for paper in papers], encoder.usage.metric, {}, {}
    for task in tasks:
        scores = evaluation.report["tasks"][task]
        if scores["mean_rank"] is not None:
            pools[task] = implied_pool(scores["mean_rank"], scores["pool"], published[task])
    for k in SWEPT_K:
        found, _ = clustering(evaluation.abstracts, fields, metric, 0, k)
        if found["purity"] is not None:
            purity[k] = found["purity"]
    nearest_k = min(purity, key=lambda k: abs(purity[k] - published["clustering"]), default=None)
    return {"implied_pool": pools, "purity": purity, "nearest_k": nearest_k}


def main() -> None:
    """Score each model, print the findings and write them to a file."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    if not command.model:
        raise UserError("no model is named", "give --model NAME")
    from semcse.models import load_model

    published = {name: published_scores(name) for name in command.model}
    papers = read_evaluation_papers(command.eval_file)
    joined = [replace(paper, abstract=f"{paper.title} {paper.abstract}") for paper in papers]
    found = {}
    for name, scores in published.items():
        encoder = load_model(name, device=command.device)
        found[name] = {
            "published": scores,
            "abstract": sweep(encoder, papers, scores, TASKS[:3]),
            # The joined text contains the title, so only this task makes sense.
            "title + abstract": sweep(encoder, joined, scores, ["query"]),
        }
    print(json.dumps(found, indent=2))
    files.write_json(Path(command.output), found)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
