"""The semantic benchmark: four tasks that measure how well a model's embeddings capture what
scientific papers are about, and Perf, which summarizes the scores of several models.

    python semantic_benchmark.py --model runs/quickstart-euclidean/model --model all-MiniLM-L6-v2

Every text is embedded alone. d(a, b) is the distance that the model is used with: the Euclidean
distance of the raw vectors, or 1 - cosine similarity. Three tasks rank candidates by their distance
to a query q, which has one positive p among them:

    task               query                              candidates (the pool)    positive
    title_abstract     the title of a paper               all abstracts            its abstract
    abstract_segments  the first half of an abstract      all second halves        its second half
    query              a search query made for a paper    all abstracts            its abstract

    rank(q)          1 + number of candidates c with d(q, c) < d(q, p)
                       + half the number of other candidates with d(q, c) = d(q, p),
                       so that a model that maps all texts to one vector ranks (pool + 1) / 2
    mean_rank        mean of rank(q) over all queries; 1 is best (median_rank: their median)
    normalised_rank  (mean_rank - 1) / (pool - 1); 0 is best, 0.5 is chance
    mrr              mean reciprocal rank: mean of 1 / rank(q); 1 is best
    recall_at_k      share of the queries with rank(q) <= k, for k = 1 and 10; 1 is best

The task "clustering" looks for the k = 10 nearest neighbours of an abstract among the abstracts of
all other papers with a field, such as "Physics". Its score "purity" is the mean over all queries
of the share of the k neighbours that have the query's field; 1 is best. Papers whose field has at
most k papers are not queries.

These definitions, the split into halves and k are our choices, because the authors' README, model
card and main.py do not contain them. `semcse/distances.py` computes exact ranks and neighbours
block by block.
"""

import logging
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semcse import command_line, files, run_folder
from semcse.bootstrap import Values, bootstrap_interval, paired_differences
from semcse.errors import UserError
from semcse.near_duplicates import SeenPapers
from semcse.papers import Paper, read_papers
from semcse.tables import TASKS, main_score, markdown, notes_on, paired_lines, table_lines
from semcse.types import Device, Metric, Pooling
from settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from semcse.encoder import Encoder

# Ranking task -> its queries, its candidates. The positive comes from the same paper as the query.
RANKING_TASKS = {
    "title_abstract": ("titles", "abstracts"),
    "abstract_segments": ("first halves", "second halves"),
    "query": ("queries", "abstracts"),
}


def halves(abstract: str) -> tuple[str, str] | None:
    """Split an abstract in two at the sentence end closest to half of its characters.

    A sentence end is `.`, `!` or `?` followed by white space, which is dropped. Of two equally
    close ends, the earlier is taken. Returns None if there is no sentence end inside the abstract.
    """
    text = abstract.strip()
    spaces = [match.span() for match in re.finditer(r"(?<=[.!?])\s+", text)]
    if not spaces:
        return None
    start, end = min(spaces, key=lambda space: abs(space[0] - len(text) / 2))
    return text[:start], text[end:]


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on a list of papers."""

    report: dict[str, Any]  # the measured part of benchmark.json
    per_paper: dict[str, Values]  # task -> (papers,) rank or purity; NaN: not a query
    abstracts: "Tensor"  # (papers, d) vectors of the abstracts


def evaluate(encoder: "Encoder", papers: list[Paper], seed: int, label: str = "") -> Evaluation:
    """Score one model on the four tasks.

    Args:
        encoder: The model; its `usage` gives the distance and the prompts.
        papers: At least two, with title and abstract; `query` and `field` may be empty.
        seed: Seed of the bootstrap, and of the order of neighbours at exactly the same distance.
        label: Name on the progress bars; no bars if empty.
    """
    started = time.perf_counter()
    texts, usage, vectors, truncated = _texts(papers), encoder.usage, {}, 0
    for kind, by_paper in texts.items():
        prompt = usage.query_prompt if kind in ("titles", "queries") else usage.document_prompt
        bar = f"{label}: {kind}" if label else ""
        embedded = encoder.embed(list(by_paper.values()), prompt, bar)
        vectors[kind] = embedded.vectors
        truncated += embedded.cut
    middle = time.perf_counter()
    tasks, per_paper, metric = {}, {}, usage.metric
    for task, (queries, candidates) in RANKING_TASKS.items():
        row = {paper: i for i, paper in enumerate(texts[candidates])}
        positives = [row[paper] for paper in texts[queries]]
        tasks[task], found = ranking(vectors[queries], vectors[candidates], positives, metric, seed)
        per_paper[task] = np.full(len(papers), np.nan)
        per_paper[task][list(texts[queries])] = found
    tasks["abstract_segments"]["left_out"] = len(papers) - len(texts["first halves"])
    abstracts, fields = vectors["abstracts"], [paper.field for paper in papers]
    tasks["clustering"], per_paper["clustering"] = clustering(abstracts, fields, metric, seed)
    done = time.perf_counter()
    report = {
        "tasks": tasks,
        "n_papers": len(papers),
        "truncated_share": round(truncated / sum(map(len, texts.values())), 6),
        "seconds": {"embedding": round(middle - started, 3), "tasks": round(done - middle, 3)},
    }
    return Evaluation(report, per_paper, abstracts)


def _texts(papers: list[Paper]) -> dict[str, dict[int, str]]:
    """Return kind of text -> number of the paper -> text. Papers without that text are left out."""
    segments = {i: pair for i, paper in enumerate(papers) if (pair := halves(paper.abstract))}
    return {
        "abstracts": {i: paper.abstract for i, paper in enumerate(papers)},
        "titles": {i: paper.title for i, paper in enumerate(papers)},
        "first halves": {i: first for i, (first, _) in segments.items()},
        "second halves": {i: second for i, (_, second) in segments.items()},
        "queries": {i: paper.query for i, paper in enumerate(papers) if paper.query.strip()},
    }


def ranking(
    queries: "Tensor", candidates: "Tensor", positives: list[int], metric: Metric, seed: int
) -> tuple[dict[str, Any], Values]:
    """Return the scores of a ranking task, or why there are none, and the (n,) ranks of queries.

    Args:
        queries: (n, d) float32 vectors.
        candidates: (pool, d) float32 vectors.
        positives: (n,) row of each query's positive in `candidates`.
    """
    import torch

    from semcse.distances import ranks

    pool = len(candidates)
    if not positives or pool < 2:
        reason = "too few papers have the text this task needs"
        return {"mean_rank": None, "reason": reason}, np.full(len(positives), np.nan)
    found: Values = ranks(queries, candidates, metric, torch.tensor(positives)).numpy()
    scores = {
        "mean_rank": float(found.mean()),
        "normalised_rank": float((found.mean() - 1) / (pool - 1)),
        "median_rank": float(np.median(found)),
        "mrr": float((1 / found).mean()),
        "recall_at_1": float((found <= 1).mean()),
        "recall_at_10": float((found <= 10).mean()),
        "n": len(found),
        "pool": pool,
        "ci95": list(bootstrap_interval(found, seed)),
    }
    return scores, found


def clustering(
    abstracts: "Tensor", fields: list[str], metric: Metric, seed: int, k: int = 10
) -> tuple[dict[str, Any], Values]:
    """Return the scores of the clustering task, or why there are none, and the purity of each
    paper, (papers,), which is NaN if the paper is not a query.

    Args:
        abstracts: (papers, d) float32 vectors.
        fields: (papers,) names of fields. Papers with a blank name are left out.
    """
    import torch

    from semcse.distances import nearest

    purity = np.full(len(fields), np.nan)
    labelled = np.array([i for i, field in enumerate(fields) if field.strip()], dtype=np.int64)
    labelled = labelled[np.random.default_rng(seed).permutation(len(labelled))]
    names = [fields[i] for i in labelled]
    _, field, sizes = np.unique(names, return_inverse=True, return_counts=True)
    queries = np.flatnonzero(sizes[field] > k)
    if not len(queries):
        return {"purity": None, "reason": f"no field has more than {k} papers"}, purity
    vectors, rows = abstracts[torch.from_numpy(labelled)], torch.from_numpy(queries)
    _, neighbours = nearest(vectors[rows], vectors, k, metric, excluded=rows)
    same_field = field[neighbours.numpy()] == field[queries][:, None]  # (queries, k)
    purity[labelled[queries]] = same_field.mean(axis=1)
    scores = {
        "purity": float(same_field.mean()),
        "k": k,
        "n": len(queries),
        "left_out": len(labelled) - len(queries),
        "pool": len(labelled),
        "ci95": list(bootstrap_interval(purity[~np.isnan(purity)], seed)),
    }
    return scores, purity


def perf_scores(tables: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the Perf of each model: the mean over the four tasks of

        clip(1 - (x - best) / (2 * (median - best)), 0, 1)

    where x is the model's main score, and best and median are taken over all models. If the median
    equals the best score, the best models get 1 and the others 0. We inferred the formula from the
    table in the authors' README: it reproduces all twelve Perf values there. Perf is None for a
    model without data for a task, and for all models if there are fewer than three.

    `tables` holds model -> task -> main score, or None without data.
    """
    scores = np.array([[row.get(task) for task in TASKS] for row in tables.values()], dtype=float)
    if len(tables) < 3 or np.isnan(scores).all(axis=0).any():
        return dict.fromkeys(tables)
    scores[:, TASKS.index("clustering")] *= -1  # now a lower score is better in every task
    best, median = np.nanmin(scores, axis=0), np.nanmedian(scores, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = 1 - (scores - best) / (median - best) / 2
    perf = np.where(scores == best, 1, shares).clip(0, 1).mean(axis=1)
    return {model: None if np.isnan(x) else float(x) for model, x in zip(tables, perf, strict=True)}


def describe(
    encoder: "Encoder", eval_file: str, evaluation: Evaluation, seed: int
) -> dict[str, Any]:
    """Return the object of benchmark.json for one model (README, "Benchmark protocol")."""
    usage = asdict(encoder.usage)
    return {
        "model": encoder.name,
        "metric": usage["metric"],
        "pooling": usage["pooling"],
        "eval_file": eval_file,
        **evaluation.report,
        "settings": {**usage, "read_from": dict(encoder.origins), "seed": seed},
        "versions": run_folder.versions(),
    }


def read_evaluation_papers(path: str, skip_invalid: bool = False) -> list[Paper]:
    """Read an evaluation file, which must hold at least two papers with title and abstract."""
    papers = list(read_papers(path, ("title", "abstract"), skip_invalid))
    if len(papers) < 2:
        raise UserError(f"{path}: holds one paper only", "give a file with at least two papers")
    return papers


@dataclass(frozen=True)
class Command:
    """Score models on the four semantic tasks of an evaluation file."""

    model: tuple[str, ...] = ()  # recipe name, Hub id, or folder; may be repeated
    list_models: bool = False  # print the known recipes and stop
    pooling: Pooling | None = None  # overrides the model's own pooling
    metric: Metric | None = None  # overrides the model's own distance
    max_length: int | None = None  # overrides the model's maximum number of tokens
    eval_file: str = Settings.eval_file  # papers file; `query` and `field` are optional
    trained_on: tuple[str, ...] = ()  # training file whose papers are left out; may be repeated
    output_dir: str = "runs/benchmark"  # folder for benchmark.json and benchmark.md
    skip_invalid: bool = False  # count and log invalid lines instead of stopping at the first
    trust_remote_code: bool = False  # allow Python code that comes with a model to run
    device: Device = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    seed: int = 0  # seed of the bootstrap


def run(command: Command) -> None:
    """Score every named model, print one table, and write benchmark.json and benchmark.md."""
    from semcse.models import list_of_models, load_model

    if command.list_models:
        print(list_of_models())
        return
    usage = (command.pooling, command.metric, command.max_length)
    trusted = command.trust_remote_code
    _check(command)
    papers, left_out = _without_training_papers(command)
    results, per_paper, scores = {}, {}, {}
    for name in command.model:
        encoder = load_model(name, *usage, device=command.device, trust_remote_code=trusted)
        evaluation = evaluate(encoder, papers, command.seed, name)
        results[name] = describe(encoder, command.eval_file, evaluation, command.seed)
        per_paper[name] = evaluation.per_paper
        scores[name] = {task: results[name]["tasks"][task][main_score(task)] for task in TASKS}
    perf, paired = perf_scores(scores), paired_differences(per_paper, command.seed)
    table = table_lines(results, perf if len(results) > 2 else None) + paired_lines(paired)
    print("\n".join(table))
    first, *others = results.values()
    whole = {"models": [first, *others], "perf": perf, "paired": paired} if others else first
    if command.trained_on:
        whole["left_out_as_training_papers"] = left_out
    notes = notes_on(first)
    notes += [f"{n} papers were left out: they are in {path}." for path, n in left_out.items()]
    output = Path(command.output_dir)
    files.write_json(output / "benchmark.json", whole)
    files.write_text(output / "benchmark.md", markdown("Semantic benchmark", table, notes))
    logging.info("wrote %s and benchmark.md", output / "benchmark.json")


def _check(command: Command) -> None:
    """Refuse a command that cannot work before any paper is read or any model is loaded."""
    from semcse.models import find_recipe, usage_of

    if not command.model:
        raise UserError("no model is named", "give --model NAME_OR_ID_OR_DIR, or --list-models")
    sources = [one.hub_id if (one := find_recipe(x)) else str(Path(x)) for x in command.model]
    if len(set(sources)) < len(sources):
        raise UserError("two --model flags name the same model", "name each model once")
    if command.seed < 0:
        raise UserError(f"--seed {command.seed} is negative", "give 0 or more")
    if command.max_length is not None and command.max_length < 3:
        raise UserError(f"--max-length {command.max_length} leaves no text", "give 3 or more")
    run_folder.check_output_folder(Path(command.output_dir))
    usage = (command.pooling, command.metric, command.max_length)
    for name in command.model:
        usage_of(name, *usage, trust_remote_code=command.trust_remote_code)


def _without_training_papers(command: Command) -> tuple[list[Paper], dict[str, int]]:
    """Return the evaluation papers in no file of --trained-on, and how many are in each file."""
    papers = read_evaluation_papers(command.eval_file, command.skip_invalid)
    kept, left_out = papers, {}
    for path in command.trained_on:
        seen = SeenPapers(read_papers(path, (), command.skip_invalid))
        found = {paper.id for paper in papers if seen.reason(paper)}
        kept = [paper for paper in kept if paper.id not in found]
        left_out[path] = len(found)
    if len(kept) < 2:
        what = f"{command.eval_file}: all papers but {len(kept)} are in a file of --trained-on"
        raise UserError(what, "evaluate on papers that no model was trained on")
    return kept, left_out


def main() -> None:
    """Parse the command line and run the benchmark."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    run(command)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
