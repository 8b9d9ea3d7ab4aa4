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
import itertools
import logging
import math
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import files
from files import UserError
from load_data import Paper, SeenPapers, halves, read_papers
from settings import Device, Metric, Pooling, Settings

if TYPE_CHECKING:
    from encoder import Embedded, Encoder

log = logging.getLogger(__name__)

TASKS = ("title_abstract", "abstract_segments", "query", "clustering")
NEIGHBOURS = 10  # k of the clustering task
RESAMPLES = 1_000  # of the bootstrap
SWEPT_K = (1, 3, 5, 10, 20, 50, 100)  # of --sweep
Values = np.ndarray[Any, np.dtype[np.float64]]


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
        "clustering": _clustering(abstracts, [paper.field for paper in papers], usage.metric, seed),
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

    from similarity import ranks

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


def _clustering(
    abstracts: Any, fields: list[str], metric: Metric, seed: int, k: int = NEIGHBOURS
) -> tuple[dict[str, Any], Values]:
    """Mean share of a paper's k nearest labelled papers that have its field.

    The papers are visited in a seeded random order, so that exactly equal distances (a collapsed
    model) bring chance, not the file's order.
    """
    import torch

    from similarity import nearest

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


def main_score(task: str) -> str:
    """The score that tables show of a task: "purity" (higher is better) or "mean_rank" (lower is
    better).
    """
    return "purity" if task == "clustering" else "mean_rank"


def bootstrap_interval(values: Values, seed: int) -> tuple[float, float]:
    """Percentile 95% interval of the mean of `values` (n,), resampling them RESAMPLES times."""
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(one: Values, other: Values, seed: int) -> tuple[float, tuple[float, float]]:
    """Mean of `one` - `other` over the papers that both have a value for, and its percentile
    bootstrap 95% interval: the same papers are drawn for both.

    Raises:
        ValueError: no paper has both.
    """
    differences = (one - other)[~np.isnan(one - other)]
    if not len(differences):
        raise ValueError("no paper has both values")
    return float(differences.mean()), bootstrap_interval(differences, seed)


def paired_differences(
    per_paper: Mapping[str, Mapping[str, Values]], seed: int
) -> list[dict[str, Any]]:
    """For every two models and every task that both have: the mean of the first's values minus the
    second's, with its 95% interval.
    """
    rows = []
    for (one, first), (other, second) in itertools.combinations(per_paper.items(), 2):
        tasks = [task for task in TASKS if not np.isnan(first[task] - second[task]).all()]
        found = {task: paired_difference(first[task], second[task], seed) for task in tasks}
        rows.append(
            {
                "models": [one, other],
                "tasks": {
                    task: {"difference": mean, "ci95": list(interval)}
                    for task, (mean, interval) in found.items()
                },
            }
        )
    return rows


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


def describe(
    encoder: Encoder, eval_file: str, evaluation: Evaluation, origins: Mapping[str, str], seed: int
) -> dict[str, Any]:
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
            "settings": usage | {"read_from": dict(origins), "seed": seed},
            "versions": files.versions(),
        }
    )


def table_lines(
    named: Mapping[str, Mapping[str, Any]], perf: Mapping[str, float | None] | None = None
) -> list[str]:
    """A markdown table, one row a model: main scores with 95% intervals; the pools stand in the
    head.
    """
    some = next(iter(named.values()))["tasks"]
    heads = [_column_head(task, some[task]) for task in TASKS] + (["Perf"] if perf else [])
    rows = [["", *heads]]
    for name, result in named.items():
        perf_cell = [_number(perf.get(name), 3)] if perf else []
        rows.append([name, *(_cell(task, result["tasks"][task]) for task in TASKS), *perf_cell])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _paired_lines(paired: list[dict[str, Any]]) -> list[str]:
    """A markdown table of paired differences, headed; nothing for a single model."""
    if not paired:
        return []
    lines = [
        "",
        (
            "Paired differences: the first model's values minus the second's on the same papers; an"
            " interval without 0 is a difference."
        ),
        "",
    ]
    lines += [f"| | {' | '.join(TASKS)} |", "|---" * 5 + "|"]
    for row in paired:
        cells = [
            _difference_cell(task, row["tasks"][task]) if task in row["tasks"] else "no data"
            for task in TASKS
        ]
        lines.append(f"| {' - '.join(row['models'])} | {' | '.join(cells)} |")
    return lines


def _difference_cell(task: str, found: Mapping[str, Any]) -> str:
    digits = 3 if task == "clustering" else 2
    low, high = found["ci95"]
    return f"{found['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _column_head(task: str, result: Mapping[str, Any]) -> str:
    pool = (
        f" (pool {result['pool']}" + (f", k {result['k']})" if "k" in result else ")")
        if "pool" in result
        else ""
    )
    return f"{task}{pool} {'higher' if task == 'clustering' else 'lower'} is better"


def _cell(task: str, result: Mapping[str, Any]) -> str:
    score, digits = result[main_score(task)], 3 if task == "clustering" else 2
    if score is None:
        return "no data"
    return (
        f"{_number(score, digits)}"
        f" [{', '.join(_number(bound, digits) for bound in result['ci95'])}]"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def markdown(title: str, table: list[str], notes: list[str]) -> str:
    """The text of benchmark.md."""
    return "\n".join([f"# {title}", "", *table, "", *(f"- {note}" for note in notes), ""])


def notes_on(report: Mapping[str, Any]) -> list[str]:
    """What a reader of a table must know: data, sizes, left-out papers, missing tasks."""
    tasks = report["tasks"]
    notes = [
        f"{report['n_papers']} papers of {report['eval_file']}; mean ranks and purity with"
        f" bootstrap 95% intervals over papers ({RESAMPLES} resamples)."
    ]
    notes += [
        f"{name}: no data, {task['reason']}." for name, task in tasks.items() if "reason" in task
    ]
    notes += [
        f"{name}: {task['left_out']} papers left out."
        for name, task in tasks.items()
        if task.get("left_out")
    ]
    return notes


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
    # also say which pool sizes and k would bring one of the paper's models to its published figures
    sweep: bool = False
    # instead of scoring: write the one --model to this new folder as SciRepEval's own code loads it
    export_scirepeval: str = ""
    output_dir: str = "runs/benchmark"  # where benchmark.json and benchmark.md are written
    skip_invalid: bool = False  # count and log bad lines instead of stopping at the first
    trust_remote_code: bool = False  # allow a model to bring and run its own Python code
    device: Device = "auto"  # auto: a CUDA GPU where there is one, else the CPU
    seed: int = 0  # of the bootstrap


def run(command: Command) -> None:
    """Evaluate every named model, print one table, write benchmark.json and benchmark.md."""
    if command.list_models:
        from baseline_models import list_of_models

        print(list_of_models())
        return
    _check(command)
    if command.export_scirepeval:
        export_scirepeval(_load(command.model[0], command)[0], Path(command.export_scirepeval))
        return
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
    table = table_lines(found, perf if len(found) > 2 else None) + _paired_lines(paired)
    for name in found if command.sweep else ():
        table += _sweep_lines(name, found[name]["fit"], _published(name), len(papers))
    print("\n".join(table))
    output = Path(command.output_dir)
    notes = notes_on(next(iter(found.values()))) + [
        f"{count} papers left out: they stand in {path}." for path, count in dropped.items()
    ]
    files.write_json(output / "benchmark.json", whole)
    files.write_text(output / "benchmark.md", markdown("Semantic benchmark", table, notes))
    log.info("wrote %s and benchmark.md", output / "benchmark.json")


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
            k: _clustering(
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


def _sweep_lines(
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
    if command.export_scirepeval and len(command.model) > 1:
        raise UserError("--export-scirepeval writes one model", "give one --model")
    if command.export_scirepeval and Path(command.export_scirepeval).exists():
        raise UserError(
            f"--export-scirepeval {command.export_scirepeval}: exists", "name a new folder"
        )
    files.check_output_folder(Path(command.output_dir))


def _check_models(command: Command) -> None:
    """Refuse unknown, contradicted and repeated models before the first is evaluated."""
    from baseline_models import Wanted, find_recipe, usage_of

    places: dict[str, str] = {}
    for name in command.model:
        usage_of(
            name,
            Wanted(command.pooling, command.metric, command.max_length),
            Settings(trust_remote_code=command.trust_remote_code),
        )
        recipe = find_recipe(name)
        place = recipe.hub_id if recipe else str(Path(name))
        if command.sweep:
            _published(name)
        if place in places:
            raise UserError(
                f"--model {name} and --model {places[place]} are the same", "name each model once"
            )
        places[place] = name


def _evaluate_named(
    name: str, command: Command, papers: list[Paper], per_paper: dict[str, Mapping[str, Values]]
) -> dict[str, Any]:
    """One model's object of benchmark.json; its ranks and purities go into `per_paper`."""
    encoder, origins = _load(name, command)
    evaluation = evaluate(encoder, papers, command.seed, name)
    per_paper[name] = evaluation.per_paper
    result = describe(encoder, command.eval_file, evaluation, origins, command.seed)
    if command.sweep:
        result["fit"] = fit_protocol(encoder, papers, evaluation, _published(name), command.seed)
    return result


def _load(name: str, command: Command) -> tuple[Encoder, dict[str, str]]:
    """(the model as the command line asks for it, where each part of its usage was read)."""
    from baseline_models import Wanted, load_model

    settings = Settings(device=command.device, trust_remote_code=command.trust_remote_code)
    return load_model(name, Wanted(command.pooling, command.metric, command.max_length), settings)


def export_scirepeval(encoder: Encoder, folder: Path) -> None:
    """Write `folder`/model and `folder`/tokenizer, which SciRepEval's own code loads; it pools by
    CLS or mean and ranks by Euclidean distance.

    Raises:
        UserError: the model is used in a way that this code does not know, so that its scores there
            would not be the model's.
    """
    theirs = {
        "metric": "euclidean",
        "max_length": 512,
        "query_prompt": "",
        "document_prompt": "",
        "normalize": False,
    }
    other = [
        f"{key} is {value!r}"
        for key, value in dataclasses.asdict(encoder.usage).items()
        if theirs.get(key, value) != value
    ]
    other += [
        f"its tokenizer has no {token}"
        for token in ("sep_token", "pad_token")
        if getattr(encoder.tokenizer, token) is None
    ]
    if other:
        raise UserError(
            f"model {encoder.name} cannot be exported for SciRepEval: {other[0]}",
            "use the wrapper in docs/other_harnesses.md",
        )
    with files.atomic_path(folder) as partial:
        encoder.save(partial / "model", base=encoder.name)
        (partial / "tokenizer").mkdir()
        for file in (partial / "model").glob("*token*.json"):
            shutil.copy(file, partial / "tokenizer")
    log.info(
        "wrote %s; in SciRepEval's folder: python scirepeval.py -m %s --pooling-mode %s",
        folder,
        folder.resolve(),
        encoder.usage.pooling,
    )


def _published(name: str) -> dict[str, float]:
    """The paper's figures of one of its models, by task. UserError: the paper has none for it."""
    from baseline_models import RECIPES, find_recipe

    recipe = find_recipe(name)
    if recipe is None or recipe.published is None:
        known = ", ".join(key for key, one in RECIPES.items() if one.published)
        raise UserError(f"--sweep: {name} is not in the paper's table", f"sweep one of {known}")
    return dict(zip(TASKS, recipe.published, strict=True))


def main() -> None:
    """The script: parse, then run."""
    command = files.parse_command_line(Command, None, Command())
    files.log_to_stderr()
    run(command)


if __name__ == "__main__":
    sys.exit(files.run_command(main))
