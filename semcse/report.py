"""Make report.html, one page about finished runs that works offline, and its plots as PNG files.

The page shows the scores, the training curves, and maps of the evaluation papers.

    python -m semcse.report runs/quickstart-euclidean
    python -m semcse.report runs/quickstart-euclidean runs/quickstart-cosine
"""

from __future__ import annotations

import base64
import logging
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tyro

from semcse import command_line, errors, files, run_folder
from semcse.errors import UserError
from semcse.papers import Paper
from semcse.run_folder import FREE_ON_RESUME
from semcse.tables import ROWS, TASKS, main_score, notes_on, table_lines
from semcse.types import Metric

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
TASK_NAMES = {
    "title_abstract": "Title to abstract",
    "abstract_segments": "First half to second half",
    "query": "Query to abstract",
    "clustering": "Clustering",
}
# Seven colors of Okabe and Ito that people with color blindness can tell apart.
BLUE, RED, GREY = "#0072B2", "#D55E00", "#6E6E6E"
COLORS = (BLUE, "#E69F00", "#009E73", RED, "#56B4E9", "#CC79A7", "#000000")
# Result file -> its label, color and marker in the plot of the scores.
RESULT_STYLES = {
    "before": ("before", GREY, "o"),
    "benchmark": ("after", BLUE, "s"),
    "recipe": ("authors' recipe", RED, "D"),
}
# Each field has its own color and marker on the maps; the smallest fields share the last one.
FIELD_STYLES = [(color, marker) for marker in "o^sD" for color in COLORS]
OTHER_FIELDS = ("#B5B5B5", "o")
MAP_PAPERS, FEWEST_ON_MAP, MAP_NEIGHBORS = 3_000, 5, 10
LONGEST_TITLE, LONGEST_FIELD = 300, 60  # characters that the map keeps
PLOT_STYLE: Any = {
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.edgecolor": "#A0A7AE",
    "lines.solid_capstyle": "butt",
}


@dataclass(frozen=True)
class Run:
    """What the page and the model card need of a finished run folder."""

    folder: Path
    name: str
    summary: str
    facts: dict[str, Any]  # settings.json
    results: dict[str, dict[str, Any]]  # before.json, benchmark.json and recipe.json
    cells: dict[str, list[str]]  # result file -> score and interval of each task as text
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl
    best: dict[str, Any]  # the validation row of the step whose weights were kept


def save_map(path: Path, papers: Sequence[Paper], vectors: Any, seed: int) -> None:
    """Save titles, fields and vectors of at most MAP_PAPERS papers, which the page's map shows.

    Papers without a field are left out, unless no paper has one.

    Args:
        path: before.npz, benchmark.npz or recipe.npz in the run folder.
        papers: the n evaluation papers.
        vectors: (n, d) tensor or array on the CPU, the embedded abstracts.
        seed: the same seed chooses the same papers for every model.
    """
    labelled = [i for i, paper in enumerate(papers) if paper.field.strip()]
    chosen = np.array(labelled or range(len(papers)))
    if len(chosen) > MAP_PAPERS:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MAP_PAPERS, replace=False))
    fields = [papers[i].field.strip()[:LONGEST_FIELD] or "no field" for i in chosen]
    with files.atomic_path(path) as partial, partial.open("wb") as handle:
        np.savez(
            handle,
            titles=[papers[i].title[:LONGEST_TITLE] for i in chosen],
            # Matplotlib prints characters that it cannot draw in a warning.
            fields=[errors.printable(field) for field in fields],
            vectors=np.asarray(vectors, dtype=np.float32)[chosen],
        )


def read_run(folder: Path, name: str) -> Run:
    """Read a finished run folder, which the page calls `name`.

    Raises:
        UserError: the folder is not a finished run, or has missing or damaged files.
    """
    if (folder / "UNFINISHED").exists() or not (folder / "settings.json").exists():
        fix = "name a run folder that main.py has finished"
        raise UserError(f"{folder} is not a finished run", fix)
    facts = files.read_json(folder / "settings.json")
    results = {stem: files.read_json(folder / f"{stem}.json") for stem in ROWS}
    try:
        metrics = files.Journal.rows(folder / "metrics.jsonl")
        best = [row for row in metrics if row.get("best")][-1]
        summary = (
            "{encoder}, {metric} distance, {pooling} pooling, {loss} loss, seed {seed}; "
            f"{facts['papers']['train']} training papers; weights of step {best['step']} kept"
        ).format_map(facts["settings"])
        rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table_lines(results)]
        cells = dict(zip(results, rows[2:], strict=True))
        return Run(folder, name, summary, facts, results, cells, metrics, best)
    except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
        what = f"{folder}: a file is missing or was not written by a run ({error!r})"
        raise UserError(what, "run main.py again") from None


def describe_score(task: str, result: Mapping[str, Any]) -> str:
    """A task's main score with what a reader needs to judge it: its pool and its direction."""
    sizes = [f"{word} {result[word]}" for word in ("k", "pool") if word in result]
    direction = "higher is better" if task == "clustering" else "lower is better"
    return ", ".join([main_score(task).replace("_", " "), *sizes, direction])


def draw_tasks(run: Run, figure: Any) -> None:
    """Draw one panel per task, with each result file's score and its 95% interval."""
    labels = [label for label, _, _ in RESULT_STYLES.values()]
    for number, (axes, task) in enumerate(zip(figure.subplots(len(TASKS), 1), TASKS, strict=True)):
        score = describe_score(task, run.results["benchmark"]["tasks"][task])
        axes.set_title(f"{TASK_NAMES[task]}: {score}", loc="left", x=-0.2)
        axes.set(ylim=(2.6, -0.6), yticks=range(3), yticklabels=labels)
        right = axes.get_yaxis_transform()
        for row, (stem, (_, color, marker)) in enumerate(RESULT_STYLES.items()):
            result = run.results[stem]["tasks"][task]
            axes.text(1.02, row, run.cells[stem][number], transform=right, va="center")
            if "ci95" in result:
                axes.plot(result["ci95"], [row, row], color=color, linewidth=2)
                axes.plot(result[main_score(task)], row, marker, color=color)
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.08)
        if not axes.lines:
            axes.set_xticks([])


def draw_curves(run: Run, figure: Any) -> None:
    """Draw the loss, the distances and the validation rank by step."""
    loss, distance, rank = figure.subplots(3, 1, sharex=True)
    metric, pool = run.facts["settings"]["metric"], run.best["validation_pool"]
    loss.set_title("Training loss", loc="left")
    distance.set_title(f"Mean {metric} distance from a summary to summaries of", loc="left")
    rank.set_title(f"Validation: mean rank, pool {pool}, lower is better", loc="left")
    rank.set_xlabel("step")

    def plot(axes: Any, key: str, **style: Any) -> None:
        rows = [row for row in run.metrics if row.get(key) is not None]
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], **style)

    plot(loss, "loss", label="each logged batch", color=GREY, linewidth=1)
    plot(loss, "loss_ema", label="exponential moving average", color=BLUE)
    negatives = "other papers (negatives)"
    plot(distance, "negative_distance", label=negatives, color=RED, linestyle="--")
    plot(distance, "positive_distance", label="the same paper (positive)", color=BLUE)
    plot(rank, "validation_rank", label="held-out papers", color=BLUE, marker="o", markersize=4)
    step, best = run.best["step"], run.best["validation_rank"]
    label = f"best: {best:.2f} at step {step}, kept"
    rank.plot(step, best, "D", color=RED, markersize=8, label=label)
    for axes in (loss, distance, rank):
        axes.legend(frameon=False)


def layout(vectors: Array, metric: Metric, seed: int) -> Array:
    """Place (n, d) vectors in the unit square with t-SNE: (n, 2), the longer side is 1.

    For the cosine metric the vectors are normalized first, because the squared Euclidean distances
    of unit vectors are twice their cosine distances.
    """
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    points = vectors.astype(np.float64)
    if metric == "cosine":
        points = normalize(points)
    # PCA fails when all vectors are equal.
    start = "pca" if points.std(axis=0).max() > 1e-9 else "random"
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init=start, random_state=seed % 2**32)
    places = np.asarray(tsne.fit_transform(points), dtype=np.float64)
    low, high = places.min(axis=0), places.max(axis=0)
    return np.asarray((places - (low + high) / 2) / ((high - low).max() or 1) + 0.5)


def map_data(run: Run) -> dict[str, Any]:
    """What the maps show: titles, fields and their styles, and for each result file the places,
    the nearest papers and their distances. Empty if there are too few papers for a map.

    Raises:
        UserError: an npz file of the run is damaged.
    """
    titles, field_of_paper, states = [], [], []
    try:
        for stem in ROWS:
            if (path := run.folder / f"{stem}.npz").exists():
                with np.load(path) as stored:
                    titles, field_of_paper = stored["titles"].tolist(), stored["fields"].tolist()
                    if len(titles) >= FEWEST_ON_MAP:
                        states.append(_map_state(run, stem, stored["vectors"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        fix = "delete it to leave out this map, or run main.py again"
        raise UserError(f"{path} is damaged", fix) from None
    if not states:
        return {}
    by_size = [field for field, _ in Counter(field_of_paper).most_common()]
    styled, others = by_size[: len(FIELD_STYLES)], by_size[len(FIELD_STYLES) :]
    fields = sorted(styled, key=str.casefold) + others
    number = {field: i for i, field in enumerate(fields)}
    return {
        "titles": titles,
        "field": [number[field] for field in field_of_paper],
        "fields": fields,
        "looks": FIELD_STYLES[: len(styled)] + [OTHER_FIELDS] * len(others),
        "named": len(FIELD_STYLES),
        "states": states,
    }


def _map_state(run: Run, stem: str, vectors: Array) -> dict[str, Any]:
    """The map of one result file: the papers' places, nearest papers and distances."""
    import torch

    from semcse.distances import nearest

    metric, points, n = run.results[stem]["metric"], torch.from_numpy(vectors), len(vectors)
    places = layout(vectors, metric, run.facts["settings"]["seed"])
    k, itself = min(MAP_NEIGHBORS, n - 1), torch.arange(n)
    distances, neighbors = nearest(points, points, k, metric, excluded=itself)
    return {
        "stem": stem,
        "name": ROWS[stem],
        "metric": metric,
        "xy": places.round(4).tolist(),
        "near": neighbors.tolist(),
        "distance": [[float(f"{value:.4g}") for value in row] for row in distances.tolist()],
    }


def draw_maps(run: Run, figure: Any, data: Mapping[str, Any]) -> None:
    """Draw the t-SNE maps side by side; the color and marker of a paper show its field."""
    field_of_paper, states = np.array(data["field"]), data["states"]
    size, edge = (6, 0.4) if len(field_of_paper) < 800 else (3, 0.15)
    style = {"markersize": size, "markeredgecolor": "white", "markeredgewidth": edge}
    for axes, state in zip(figure.subplots(1, len(states), squeeze=False)[0], states, strict=True):
        places = np.array(state["xy"])
        # The largest fields come first and are drawn last, on top.
        for field, (color, marker) in reversed(list(enumerate(data["looks"]))):
            axes.plot(*places[field_of_paper == field].T, marker, color=color, **style)
        axes.set(xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        usage = f"{run.results[state['stem']]['pooling']} pooling, {state['metric']} distance"
        axes.set_title(f"{state['name']}\n{usage}")
    # A label that begins with an underscore would not be shown.
    names = [f" {name if len(name) < 30 else name[:28] + '…'}" for name in data["fields"]]
    if len(names) > data["named"]:
        names[data["named"] :] = [f" {len(names) - data['named']} other fields"]
    dots, columns = figure.axes[0].lines[::-1][: len(names)], 2 * len(states)
    figure.set_size_inches(2.1 * columns, 4.7 + 0.2 * (len(names) // columns + 1))
    look = {"frameon": False, "handletextpad": 0, "markerscale": 6 / size}
    figure.legend(dots, names, loc="outside lower center", ncols=columns, **look)


def draw(run: Run, data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the plots into `folder`, maps.png only if there is `data`; return them as data URLs."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PLOT_STYLE):
        names = ("tasks", "curves", "maps") if data else ("tasks", "curves")
        figures = {name: Figure(figsize=(4.9, 6.2), layout="constrained") for name in names}
        draw_tasks(run, figures["tasks"])
        draw_curves(run, figures["curves"])
        if data:
            draw_maps(run, figures["maps"], data)
        urls = {}
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            with files.atomic_path(path) as partial:
                figure.savefig(partial, format="png", dpi=160, bbox_inches="tight")
            image = base64.b64encode(path.read_bytes()).decode()
            urls[name] = f"data:image/png;base64,{image}"
    return urls


def make(*folders: Path, output: Path | None = None) -> Path:
    """Write report.html and plots/*.png of finished runs and return the path of the page.

    Args:
        folders: the run folders.
        output: where to write; None means the run folder, or runs/report for several runs.

    Raises:
        UserError: see `read_run`.
    """
    if not folders or len({folder.resolve() for folder in folders}) < len(folders):
        what = "no run folder is named, or one is named twice"
        raise UserError(what, "name each run folder once")
    output = output or (folders[0] if len(folders) == 1 else Path("runs/report"))
    run_folder.check_output_folder(output)
    names = [folder.resolve().name for folder in folders]
    runs = [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
    maps, sections = [map_data(run) for run in runs], []
    for number, (run, data) in enumerate(zip(runs, maps, strict=True), start=1):
        plots = output / "plots" / (str(number) if len(runs) > 1 else "")
        sections.append((run, data, draw(run, data, plots)))
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined)
    known = {"rows": ROWS, "task_names": TASK_NAMES, "free_on_resume": FREE_ON_RESUME}
    functions = {"describe_score": describe_score, "notes_on": notes_on}
    text = page.render(known | functions, runs=runs, sections=sections)
    files.write_text(output / "report.html", text)
    log.info("wrote %s", output / "report.html")
    return output / "report.html"


@dataclass(frozen=True)
class Command:
    """Make report.html and plots/*.png of one or several finished runs."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders that main.py has finished
    output_dir: str = ""  # where to write; empty: the run folder, or runs/report for several runs


def main() -> None:
    """Parse the command line and make the page."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    print(make(*command.folders, output=Path(command.output_dir) if command.output_dir else None))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
