"""The semantic benchmark: title-abstract matching, abstract segments, query matching and
clustering, for any model; and the Perf score over several.

The protocol is written in README ("Benchmark protocol"): what the paper leaves open is our
definition there. Usage:
    python semantic_benchmark.py --model runs/quickstart-euclidean/model --model all-MiniLM-L6-v2
        --eval-file data/sample_test.jsonl
Other harnesses (mteb, SciRepEval) are in docs/other_harnesses.md.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semcse import command_line, files, run_folder
from semcse.errors import UserError
from semcse.near_duplicates import SeenPapers
from semcse.papers import Paper, read_papers
from semcse.types import Device, Metric, Pooling
from settings import Settings

if TYPE_CHECKING:
    from semcse.encoder import Embedded, Encoder
from semcse.bootstrap import Values, bootstrap_interval, paired_differences
from semcse.tables import TASKS, main_score, markdown, notes_on, paired_lines, table_lines

log = logging.getLogger(__name__)


def halves(abstract: str) -> tuple[str, str] | None:
    """Cut an abstract in two after a sentence end (`.`, `!` or `?` before white space), as close to
    half of its characters as possible.

    The earlier place wins a tie; the white space at the cut is dropped. None where there is no such
    place. The paper's own rule is unknown; this is ours.
    """
    text = abstract.strip()
    if not (places := [match.span() for match in re.finditer(r"(?<=[.!?])\s+", text)]):
        return None
    start, end = min(places, key=lambda place: abs(place[0] - len(text) / 2))
    return text[:start], text[end:]


NEIGHBOURS = 10  # k of the clustering task


@dataclass(frozen=True)
class Evaluation:
    """One model's scores: `report` is what benchmark.json holds, `per_paper` a rank or purity for
    each paper (NaN where the task left it out).
    """

    report: dict[str, Any]
    per_paper: dict[str, Values]
    abstracts: Any = None  # (n, d) tensor: the abstracts' vectors


def read_evaluation_papers(path: str, skip_invalid: bool = False) -> list[Paper]:
    """The papers of an evaluation file: all have title and abstract, and there are at least two.
    UserError: see `load_data.read_papers`.
    """
    papers = list(read_papers(path, ("title", "abstract"), skip_invalid))
    if len(papers) < 2:
        raise UserError(f"{path}: holds one paper only", "ranks need at least two")
    return papers


def evaluate(encoder: Encoder, papers: list[Paper], seed: int, label: str = "") -> Evaluation:
    """Score one model on the four tasks. Abstracts are embedded once and shared by three of them.

    Args:
        encoder: the model, used as its `usage` says.
        papers: with title and abstract; `query` and `field` where known.
        seed: of the bootstrap and of the order in which exactly equal neighbours are taken.
        label: name on the progress bars; empty for none.
    """
    usage = encoder.usage
    done: list[Embedded] = []

    def embed(texts: list[str], prompt: str, what: str) -> Any:
        done.append(encoder.embed(texts, prompt, f"{label}: {what}" if label else ""))
        return done[-1].vectors

    segments = [halves(paper.abstract) for paper in papers]
    whole = [i for i, pair in enumerate(segments) if pair]
    asked = [i for i, paper in enumerate(papers) if paper.query.strip()]
    started = time.perf_counter()
    abstracts = embed([paper.abstract for paper in papers], usage.document_prompt, "abstracts")
    titles = embed([paper.title for paper in papers], usage.query_prompt, "titles")
    first = embed([pair[0] for pair in segments if pair], usage.document_prompt, "first halves")
    second = embed([pair[1] for pair in segments if pair], usage.document_prompt, "second halves")
    queries = embed([papers[i].query for i in asked], usage.query_prompt, "queries")
    embedded = time.perf_counter()
    everything = list(range(len(papers)))
    results = {
        "title_abstract": _matching(
            titles, abstracts, everything, everything, usage.metric, len(papers)
        ),
        "abstract_segments": _matching(
            first, second, whole, list(range(len(whole))), usage.metric, len(papers)
        ),
        "query": _matching(queries, abstracts, asked, asked, usage.metric, len(papers)),
        "clustering": clustering(abstracts, [paper.field for paper in papers], usage.metric, seed),
    }
    tasks = {
        name: _with_interval(name, task, values, seed) for name, (task, values) in results.items()
    }
    tasks["abstract_segments"]["left_out"] = len(papers) - len(whole)
    seconds = {
        "embedding": round(embedded - started, 3),
        "tasks": round(time.perf_counter() - embedded, 3),
    }
    truncated = sum(one.cut for one in done) / sum(len(one.vectors) for one in done)
    report = {
        "tasks": tasks,
        "n_papers": len(papers),
        "truncated_share": round(truncated, 6),
        "seconds": seconds,
    }
    return Evaluation(report, {name: values for name, (_, values) in results.items()}, abstracts)


def _matching(
    queries: Any,
    candidates: Any,
    owners: list[int],
    positives: list[int],
    metric: Metric,
    papers: int,
) -> tuple[dict[str, Any], Values]:
    """A ranking task: its scores, and each paper's rank (NaN for papers that are not queries).
    owners: the paper of each query; positives: its candidate.
    """
    import torch

    from semcse.distances import ranks

    per_paper = np.full(papers, np.nan)
    pool = len(candidates)
    if not len(queries) or pool < 2:
        return {
            "reason": (
                "no paper has the text this task needs"
                if not len(queries)
                else "fewer than two candidates"
            )
        }, per_paper
    found = ranks(queries, candidates, metric, torch.tensor(positives)).numpy()
    per_paper[owners] = found
    scores = {
        "mean_rank": float(found.mean()),
        "normalised_rank": float((found.mean() - 1) / (pool - 1)),
        "median_rank": float(np.median(found)),
        "mrr": float((1 / found).mean()),
        "recall_at_1": float((found <= 1).mean()),
        "recall_at_10": float((found <= 10).mean()),
        "n": len(found),
        "pool": pool,
    }
    return scores, per_paper


def clustering(
    abstracts: Any, fields: list[str], metric: Metric, seed: int, k: int = NEIGHBOURS
) -> tuple[dict[str, Any], Values]:
    """Mean share of a paper's k nearest labelled papers that have its field.

    The papers are visited in a seeded random order, so that exactly equal distances (a collapsed
    model) bring chance, not the file's order.
    """
    import torch

    from semcse.distances import nearest

    per_paper = np.full(len(fields), np.nan)
    labelled = np.array([i for i, name in enumerate(fields) if name.strip()], dtype=np.int64)
    labelled = labelled[np.random.default_rng(seed).permutation(len(labelled))]
    sizes = Counter(fields[i] for i in labelled)
    query_places = [place for place, i in enumerate(labelled) if sizes[fields[i]] > k]
    if not query_places:
        return {"reason": f"no field has more than {k} papers"}, per_paper
    vectors, places = abstracts[torch.from_numpy(labelled)], torch.tensor(query_places)
    _, neighbours = nearest(vectors[places], vectors, k, metric, excluded=places)
    names = np.array([fields[i] for i in labelled])
    same = names[neighbours.numpy()] == names[query_places][:, None]
    per_paper[labelled[query_places]] = same.mean(axis=1)
    scores = {
        "purity": float(same.mean()),
        "k": k,
        "n": len(query_places),
        "left_out": len(labelled) - len(query_places),
        "pool": len(labelled),
    }
    return scores, per_paper


def _with_interval(name: str, task: dict[str, Any], values: Values, seed: int) -> dict[str, Any]:
    """A task's scores with the bootstrap 95% interval of its main score, or null scores with the
    reason.
    """
    if "reason" in task:
        return {main_score(name): None, "reason": task["reason"]}
    return task | {"ci95": list(bootstrap_interval(values[~np.isnan(values)], seed))}


def perf_scores(tables: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Perf of each model relative to the others: the mean over the four tasks of clip(1 - (x -
    best) / (2 (median - best)), 0, 1) [METHOD: inferred].

    Args:
        tables: model -> task -> main score (mean ranks, and purity for "clustering").

    Returns:
        model -> Perf in [0, 1]; None for every model if there are fewer than three, and for a model
            that lacks a task. Where the median equals the best,
        the best model gets 1 and the others 0.
    """
    if len(tables) < 3:
        return dict.fromkeys(tables, None)
    columns = {
        task: [x for table in tables.values() if (x := table.get(task)) is not None]
        for task in TASKS
    }
    perf: dict[str, float | None] = {}
    for model, table in tables.items():
        scores = [table.get(task) for task in TASKS]
        complete = [
            _perf_of_task(task, x, columns[task])
            for task, x in zip(TASKS, scores, strict=True)
            if x is not None
        ]
        perf[model] = statistics.fmean(complete) if len(complete) == len(TASKS) else None
    return perf


def _perf_of_task(task: str, x: float, column: list[float]) -> float:
    best = max(column) if task == "clustering" else min(column)
    median = statistics.median(column)
    if median == best:
        return float(x == best)
    return min(1.0, max(0.0, 1 - 0.5 * (x - best) / (median - best)))


def describe(encoder: Encoder, eval_file: str, evaluation: Evaluation, seed: int) -> dict[str, Any]:
    """The object of benchmark.json for one model (README, "Benchmark protocol")."""
    usage = dataclasses.asdict(encoder.usage)
    head = {
        "model": encoder.name,
        "metric": usage["metric"],
        "pooling": usage["pooling"],
        "eval_file": eval_file,
    }
    return (
        head
        | evaluation.report
        | {
            "settings": usage | {"read_from": dict(encoder.origins), "seed": seed},
            "versions": run_folder.versions(),
        }
    )


@dataclass(frozen=True)
class Command:
    """Score models on the four semantic tasks of an evaluation file."""

    model: tuple[str, ...] = ()  # recipe name, Hub id, or folder; may be repeated
    list_models: bool = False  # print the known recipes and stop
    pooling: Pooling | None = None  # overrides the model's own pooling
    metric: Metric | None = None  # overrides the model's own metric
    max_length: int | None = None  # overrides the tokens kept of a text
    # papers file with title and abstract; query and field where known
    eval_file: str = Settings.eval_file
    # papers file that one of the models was trained on: its papers are left out for all models; may
    # be repeated
    trained_on: tuple[str, ...] = ()
    output_dir: str = "runs/benchmark"  # where benchmark.json and benchmark.md are written
    skip_invalid: bool = False  # count and log bad lines instead of stopping at the first
    trust_remote_code: bool = False  # allow a model to bring and run its own Python code
    device: Device = "auto"  # auto: a CUDA GPU where there is one, else the CPU
    seed: int = 0  # of the bootstrap


def run(command: Command) -> None:
    """Evaluate every named model, print one table, write benchmark.json and benchmark.md."""
    if command.list_models:
        from semcse.models import list_of_models

        print(list_of_models())
        return
    _check(command)
    papers = read_evaluation_papers(command.eval_file, command.skip_invalid)
    _check_models(command)
    papers, dropped = _without_training_papers(papers, command)
    per_paper: dict[str, Mapping[str, Values]] = {}
    found = {name: _evaluate_named(name, command, papers, per_paper) for name in command.model}
    perf = perf_scores(
        {
            name: {task: report["tasks"][task][main_score(task)] for task in TASKS}
            for name, report in found.items()
        }
    )
    paired = paired_differences(per_paper, command.seed)
    whole = (
        next(iter(found.values()))
        if len(found) == 1
        else {"models": list(found.values()), "perf": perf, "paired": paired}
    )
    if command.trained_on:
        whole["left_out_as_training_papers"] = dropped
    table = table_lines(found, perf if len(found) > 2 else None) + paired_lines(paired)
    print("\n".join(table))
    output = Path(command.output_dir)
    notes = notes_on(next(iter(found.values()))) + [
        f"{count} papers left out: they stand in {path}." for path, count in dropped.items()
    ]
    files.write_json(output / "benchmark.json", whole)
    files.write_text(output / "benchmark.md", markdown("Semantic benchmark", table, notes))
    log.info("wrote %s and benchmark.md", output / "benchmark.json")


def _without_training_papers(
    papers: list[Paper], command: Command
) -> tuple[list[Paper], dict[str, int]]:
    """(papers that stand in none of the training files, training file -> how many of its papers
    were found). UserError: fewer than two papers are left.
    """
    dropped: dict[str, int] = {}
    kept = papers
    for path in command.trained_on:
        seen = SeenPapers(read_papers(path, (), command.skip_invalid))
        dropped[path] = sum(seen.reason(paper) is not None for paper in papers)
        kept = [paper for paper in kept if seen.reason(paper) is None]
        log.info(
            "%s: %d of %d papers of %s stand in it and are left out",
            path,
            dropped[path],
            len(papers),
            command.eval_file,
        )
    if len(kept) < 2:
        raise UserError(
            f"{command.eval_file}: {len(kept)} papers are left without those of --trained-on",
            "evaluate on papers that no model was trained on",
        )
    return kept, dropped


def _check(command: Command) -> None:
    """Refuse a command line that cannot work, before anything is read or loaded."""
    if not command.model:
        raise UserError("no model named", "give --model NAME_OR_ID_OR_DIR, or --list-models")
    if command.seed < 0:
        raise UserError(f"--seed {command.seed} is negative", "give 0 or more")
    if command.max_length is not None and command.max_length < 3:
        raise UserError(f"--max-length {command.max_length} leaves no text", "give 3 or more")
    run_folder.check_output_folder(Path(command.output_dir))


def _check_models(command: Command) -> None:
    """Refuse unknown, contradicted and repeated models before the first is evaluated."""
    from semcse.models import find_recipe, usage_of

    places: dict[str, str] = {}
    for name in command.model:
        usage_of(
            name,
            command.pooling,
            command.metric,
            command.max_length,
            trust_remote_code=command.trust_remote_code,
        )
        recipe = find_recipe(name)
        place = recipe.hub_id if recipe else str(Path(name))
        if place in places:
            raise UserError(
                f"--model {name} and --model {places[place]} are the same", "name each model once"
            )
        places[place] = name


def _evaluate_named(
    name: str, command: Command, papers: list[Paper], per_paper: dict[str, Mapping[str, Values]]
) -> dict[str, Any]:
    """One model's object of benchmark.json; its ranks and purities go into `per_paper`."""
    encoder = _load(name, command)
    evaluation = evaluate(encoder, papers, command.seed, name)
    per_paper[name] = evaluation.per_paper
    result = describe(encoder, command.eval_file, evaluation, command.seed)
    return result


def _load(name: str, command: Command) -> Encoder:
    """The model as the command line asks for it."""
    from semcse.models import load_model

    return load_model(
        name,
        command.pooling,
        command.metric,
        command.max_length,
        device=command.device,
        trust_remote_code=command.trust_remote_code,
    )


def main() -> None:
    """The script: parse, then run."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    run(command)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
