"""TODO: say what this file is for: tools.protocol_sweep."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from semcse.errors import UserError
from semcse.papers import Paper

if TYPE_CHECKING:
    from semcse.encoder import Encoder
from semantic_benchmark import Evaluation, clustering, evaluate, read_evaluation_papers
from semcse import command_line, files
from semcse.tables import TASKS
from semcse.types import Device
from settings import Settings

SWEPT_K = (1, 3, 5, 10, 20, 50, 100)  # of --sweep


def fit_protocol(
    encoder: Encoder,
    papers: list[Paper],
    evaluation: Evaluation,
    published: Mapping[str, float],
    seed: int,
) -> dict[str, Any]:
    """What the unknowns of the paper's protocol would have to be for `encoder` to reach its
    published figures on these papers [ours].

    A random pool of n of the N candidates has the expected mean rank 1 + (mean rank - 1)(n - 1) /
    (N - 1), so a published mean rank implies a pool size. The ranking tasks share their pool: the
    closer their implied sizes, the likelier data and halving rule are the paper's. Clustering is
    scored for several k. Both are done for abstracts, and for title and abstract together where a
    text stands for the paper (query and clustering).

    Args:
        encoder: the published checkpoint.
        papers: the evaluation papers.
        evaluation: of `encoder` on them.
        published: task -> published main score.
        seed: as `evaluate`.

    Returns:
        text form -> {"implied_pool": {task: candidates}, "purity": {k: purity}, "nearest_k": the k
            whose purity is closest to the published one}.
    """
    joined = [
        dataclasses.replace(paper, abstract=f"{paper.title} {paper.abstract}") for paper in papers
    ]
    forms = {
        "abstract": (evaluation, TASKS[:3]),
        "title + abstract": (evaluate(encoder, joined, seed, "title + abstract"), ("query",)),
    }
    found: dict[str, Any] = {}
    for form, (scored, tasks) in forms.items():
        have = {
            task: scored.report["tasks"][task]
            for task in tasks
            if scored.report["tasks"][task]["mean_rank"] is not None
        }
        pools = {
            task: implied_pool(one["mean_rank"], one["pool"], published[task])
            for task, one in have.items()
        }
        swept = {
            k: clustering(
                scored.abstracts, [paper.field for paper in papers], encoder.usage.metric, seed, k
            )[0]
            for k in SWEPT_K
        }
        purities = {k: float(one["purity"]) for k, one in swept.items() if "purity" in one}
        gaps = {k: abs(purity - published["clustering"]) for k, purity in purities.items()}
        found[form] = {
            "implied_pool": pools,
            "purity": purities,
            "nearest_k": min(gaps, key=lambda k: gaps[k], default=None),
        }
    return found


def implied_pool(mean_rank: float, pool: int, published: float) -> float | None:
    """Candidates among which a model with this mean rank in `pool` is expected to have the
    published one; None for a perfect model, which has it in no pool.
    """
    return 1 + (published - 1) * (pool - 1) / (mean_rank - 1) if mean_rank > 1 else None


def sweep_lines(
    name: str, fits: Mapping[str, Any], published: Mapping[str, float], papers: int
) -> list[str]:
    """The findings of `fit_protocol` in words."""
    row = ", ".join(f"{task} {score}" for task, score in published.items())
    lines = [
        "",
        (
            f"{name}: pool sizes and k that would bring it to its published figures ({row});"
            f" {papers} papers here."
        ),
        "",
    ]
    for form, fit in fits.items():
        pools = ", ".join(
            f"{task} {'any' if pool is None else round(pool)}"
            for task, pool in fit["implied_pool"].items()
        )
        purities = ", ".join(f"{k}: {purity:.3f}" for k, purity in fit["purity"].items())
        lines.append(
            f"- {form}: implied pool: {pools or 'no data'}; purity by k: {purities or 'no data'};"
            f" closest to the published: k {fit['nearest_k']}."
        )
    return lines


def published_figures(name: str) -> dict[str, float]:
    """The paper's figures of one of its models, by task. UserError: the paper has none for it."""
    from semcse.models import RECIPES, find_recipe

    recipe = find_recipe(name)
    if recipe is None or recipe.published is None:
        known = ", ".join(key for key, one in RECIPES.items() if one.published)
        raise UserError(f"--sweep: {name} is not in the paper's table", f"sweep one of {known}")
    return dict(zip(TASKS, recipe.published, strict=True))


@dataclasses.dataclass(frozen=True)
class Command:
    """Find the pool sizes and k that would bring a published model to its published figures."""

    model: tuple[str, ...] = ()  # recipe name of a model in the authors' table; may be repeated
    eval_file: str = Settings.eval_file  # papers file to score the models on
    output: str = "runs/protocol_sweep.json"  # where the findings are written
    device: Device = "auto"  # auto: a CUDA GPU where there is one, else the CPU
    seed: int = 0  # seed of the bootstrap


def main() -> None:
    """Parse the command line, score each model and print what was found."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    from semcse.models import load_model

    published = {name: published_figures(name) for name in command.model}
    if not published:
        raise UserError("no model named", "give --model NAME")
    papers = read_evaluation_papers(command.eval_file)
    found = {}
    for name, figures in published.items():
        encoder = load_model(name, device=command.device)
        evaluation = evaluate(encoder, papers, command.seed, name)
        found[name] = fit_protocol(encoder, papers, evaluation, figures, command.seed)
        print("\n".join(sweep_lines(name, found[name], figures, len(papers))))
    files.write_json(Path(command.output), found)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
