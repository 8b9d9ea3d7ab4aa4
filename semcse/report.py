"""Make an offline page of finished runs, report.html: scores, training curves and maps.

python -m semcse.report runs/quickstart-euclidean
python -m semcse.report runs/quickstart-euclidean runs/quickstart-cosine
"""

import base64
import functools
import logging
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tyro

from semcse import command_line, files
from semcse.errors import UserError, printable
from semcse.papers import Paper
from semcse.run_folder import FREE_ON_RESUME, check_output_folder
from semcse.tables import ROWS, TASKS, main_score, notes_on, table_lines
from semcse.types import Metric

log = logging.getLogger(__name__)

TASK_NAMES = {
    "title_abstract": "Title to abstract",
    "abstract_segments": "First half to second half",
    "query": "Query to abstract",
    "clustering": "Clustering",
}
# Seven colours of Okabe and Ito that people with colour blindness can tell apart.
BLUE, RED, GREY = "#0072B2", "#D55E00", "#6E6E6E"
COLOURS = (BLUE, "#E69F00", "#009E73", RED, "#56B4E9", "#CC79A7", "#000000")
# Result file -> its label, colour and marker in the plot of the scores.
RESULT_STYLES = {
    "before": ("before", GREY, "o"),
    "benchmark": ("after", BLUE, "s"),
    "recipe": ("authors' recipe", RED, "D"),
}
# Each field has its own colour and marker on the maps; the smallest fields share the last one.
FIELD_STYLES = [(colour, marker) for marker in "o^sD" for colour in COLOURS]
OTHER_FIELDS = ("#B5B5B5", "o")
MAP_PAPERS, FEWEST_ON_MAP, MAP_NEIGHBOURS = 3_000, 5, 10
LONGEST_TITLE, LONGEST_FIELD = 300, 60  # characters that the map keeps
STYLE: Any = {"text.parse_math": False, "font.size": 8.5, "axes.grid": True, "grid.color": "0.9"}


@dataclass(frozen=True)
class Run:
    """The content of a finished run folder that the page and the model card need."""

    folder: Path  # absolute
    facts: dict[str, Any]  # settings.json
    results: dict[str, dict[str, Any]]  # before.json, benchmark.json and recipe.json
    cells: dict[str, list[str]]  # result file -> score and interval of each task as text
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl
    best: dict[str, Any]  # the validation row of the step whose weights were kept


def save_map(path: Path, papers: Sequence[Paper], vectors: Any, seed: int) -> None:
    """Save the titles, fields and vectors of at most MAP_PAPERS papers for a map on the page.

    Papers without a field are left out, unless no paper has one. The same seed chooses the same
    papers for every model. `vectors` are the (n, d) embeddings of the abstracts, on the CPU.
    """
    labelled = [i for i, paper in enumerate(papers) if paper.field.strip()]
    chosen = np.array(labelled or range(len(papers)))
    if len(chosen) > MAP_PAPERS:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MAP_PAPERS, replace=False))
    titles = [papers[i].title[:LONGEST_TITLE] for i in chosen]
    # Matplotlib prints characters that it cannot draw in a warning.
    fields = [printable(papers[i].field.strip()[:LONGEST_FIELD]) or "no field" for i in chosen]
    vectors = np.asarray(vectors, dtype=np.float32)[chosen]
    with files.atomic_path(path) as partial, partial.open("wb") as handle:
        np.savez(handle, titles=titles, fields=fields, vectors=vectors)


def read_run(folder: Path) -> Run:
    """Read a run folder. Raise a UserError if it is unfinished, or a file is missing or damaged."""
    folder = folder.resolve()
    if (folder / "UNFINISHED").exists() or not (folder / "settings.json").exists():
        raise UserError(f"{folder} is not a finished run", "name a finished run of main.py")
    facts = files.read_json(folder / "settings.json")
    results = {stem: files.read_json(folder / f"{stem}.json") for stem in ROWS}
    try:
        metrics = files.Journal.rows(folder / "metrics.jsonl")
        best = [row for row in metrics if row.get("best")][-1]
        rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table_lines(results)]
        cells = dict(zip(results, rows[2:], strict=True))
    except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{folder}: missing or bad file ({error!r})", "run main.py again") from None
    return Run(folder, facts, results, cells, metrics, best)


def describe_score(task: str, result: Mapping[str, Any]) -> str:
    """Return the name of a task's main score with its k, its pool size and its direction."""
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
        for row, (stem, (_, colour, marker)) in enumerate(RESULT_STYLES.items()):
            result = run.results[stem]["tasks"][task]
            axes.text(1.02, row, run.cells[stem][number], transform=right, va="center")
            if "ci95" in result:
                axes.plot(result["ci95"], [row, row], color=colour, linewidth=2)
                axes.plot(result[main_score(task)], row, marker, color=colour)
        axes.locator_params(axis="x", nbins=5)
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
    plot(distance, "negative_distance", label="other papers (negatives)", color=RED, ls="--")
    plot(distance, "positive_distance", label="the same paper (positive)", color=BLUE)
    plot(rank, "validation_rank", label="held-out papers", color=BLUE, marker="o", markersize=4)
    step, best = run.best["step"], run.best["validation_rank"]
    rank.plot(step, best, "D", color=RED, ms=8, label=f"best: {best:.2f} at step {step}, kept")
    for axes in (loss, distance, rank):
        axes.legend(frameon=False)


def layout(vectors: np.ndarray, metric: Metric, seed: int) -> np.ndarray:
    """Place (n, d) vectors in the unit square with t-SNE, and return their (n, 2) coordinates."""
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    points = vectors.astype(np.float64)
    if metric == "cosine":
        # The squared Euclidean distances of unit vectors are twice their cosine distances.
        points = normalize(points)
    # PCA fails when all vectors are equal.
    start = "pca" if points.std(axis=0).max() > 1e-9 else "random"
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init=start, random_state=seed % 2**32)
    places = np.asarray(tsne.fit_transform(points), dtype=np.float64)
    low, high = places.min(axis=0), places.max(axis=0)
    return np.asarray((places - (low + high) / 2) / ((high - low).max() or 1) + 0.5)


def map_data(run: Run) -> dict[str, Any]:
    """Return what the page's script needs to draw the maps, or {} if there are fewer than
    FEWEST_ON_MAP papers. Raise a UserError if an npz file of the run is damaged.
    """
    titles, field_of_paper, states = [], [], []
    for path in filter(Path.exists, (run.folder / f"{stem}.npz" for stem in ROWS)):
        try:
            with np.load(path) as stored:
                titles, field_of_paper = stored["titles"].tolist(), stored["fields"].tolist()
                if len(titles) >= FEWEST_ON_MAP:
                    states.append(_map_state(run, path.stem, stored["vectors"]))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            raise UserError(f"{path} is damaged", "delete it or run main.py again") from None
    if not states:
        return {}
    by_size = [field for field, _ in Counter(field_of_paper).most_common()]
    named = len(FIELD_STYLES)
    fields = sorted(by_size[:named], key=str.casefold) + by_size[named:]
    return {
        "titles": titles,
        "field": [fields.index(field) for field in field_of_paper],
        "fields": fields,
        "looks": (FIELD_STYLES + [OTHER_FIELDS] * len(fields))[: len(fields)],
        "named": named,
        "states": states,
    }


def _map_state(run: Run, stem: str, vectors: np.ndarray) -> dict[str, Any]:
    """Return the map of one result file: the papers' places, nearest papers and distances."""
    import torch

    from semcse.distances import nearest

    metric, points, n = run.results[stem]["metric"], torch.from_numpy(vectors), len(vectors)
    k, itself = min(MAP_NEIGHBOURS, n - 1), torch.arange(n)
    distances, neighbours = nearest(points, points, k, metric, excluded=itself)
    return {
        "stem": stem,
        "name": ROWS[stem],
        "metric": metric,
        "xy": layout(vectors, metric, run.facts["settings"]["seed"]).round(4).tolist(),
        "near": neighbours.tolist(),
        "distance": [[float(f"{value:.4g}") for value in row] for row in distances.tolist()],
    }


def draw_maps(run: Run, figure: Any, data: Mapping[str, Any]) -> None:
    """Draw the t-SNE maps side by side; the colour and marker of a paper show its field."""
    field_of_paper, states = np.array(data["field"]), data["states"]
    figure.set_size_inches(4.2 * len(states), 4.7)
    size = 6 if len(field_of_paper) < 800 else 3
    style = {"markersize": size, "markeredgecolor": "white", "markeredgewidth": size / 15}
    for axes, state in zip(figure.subplots(1, len(states), squeeze=False)[0], states, strict=True):
        places = np.array(state["xy"])
        for field, (colour, marker) in reversed(list(enumerate(data["looks"]))):
            axes.plot(*places[field_of_paper == field].T, marker, color=colour, **style)
        axes.set(xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        usage = f"{run.results[state['stem']]['pooling']} pooling, {state['metric']} distance"
        axes.set_title(f"{state['name']}\n{usage}")
    # Matplotlib does not show a label that begins with an underscore.
    names = [f" {name[:30]}" for name in data["fields"]]
    if len(names) > data["named"]:
        names[data["named"] :] = [f" {len(names) - data['named']} other fields"]
    dots = figure.axes[0].lines[::-1][: len(names)]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": 2 * len(states)}
    figure.legend(dots, names, frameon=False, handletextpad=0, markerscale=6 / size, **below)


def draw(run: Run, data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the plots into `folder`, maps.png only if there is `data`; return them in base64."""
    import matplotlib
    from matplotlib.figure import Figure

    drawings: dict[str, Callable[[Run, Any], None]] = {"tasks": draw_tasks, "curves": draw_curves}
    if data:
        drawings["maps"] = functools.partial(draw_maps, data=data)
    images = {}
    with matplotlib.rc_context(STYLE):
        for name, draw_on in drawings.items():
            figure = Figure(figsize=(4.9, 6.2), layout="constrained")
            draw_on(run, figure)
            path = folder / f"{name}.png"
            with files.atomic_path(path) as partial:
                figure.savefig(partial, format="png", dpi=160, bbox_inches="tight")
            images[name] = base64.b64encode(path.read_bytes()).decode()
    return images


def make(*folders: Path, output: Path | None = None) -> Path:
    """Write report.html and plots/*.png of finished runs and return the path of the page.

    The default of `output` is the run folder, or runs/report for several runs.
    """
    if not folders:
        raise UserError("no run folder is named", "name one or several finished runs of main.py")
    output = output or (folders[0] if len(folders) == 1 else Path("runs/report"))
    check_output_folder(output)
    runs = [read_run(folder) for folder in folders]
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
    output_dir: Path | None = None  # where to write; None: the run folder, or runs/report


def main() -> None:
    """Parse the command line and make the page."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    print(make(*command.folders, output=command.output_dir))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
