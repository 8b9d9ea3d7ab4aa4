"""Pictures and one self-contained page (report.html, works offline) of finished runs: scores,
training curves, and maps of the evaluation papers.

python report.py runs/quickstart-euclidean
python report.py runs/quickstart-euclidean runs/quickstart-cosine --output-dir runs/report
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
BLUE, RED, GREY = "#0072B2", "#D55E00", "#6E6E6E"
LOOKS = {
    "before": ("before", GREY, "o"),
    "benchmark": ("after", BLUE, "s"),
    "recipe": ("authors' recipe", RED, "D"),
}
TASK_NAMES = {
    "title_abstract": "Title to abstract",
    "abstract_segments": "First half to second half",
    "query": "Query to abstract",
    "clustering": "Clustering",
}
# Fields are told apart by colour and shape together: seven colours of Okabe and Ito, safe for
# colour-blind eyes; the fields left over share a grey dot.
STYLES = [
    (colour, shape)
    for shape in "o^sD"
    for colour in (BLUE, "#E69F00", "#009E73", RED, "#56B4E9", "#CC79A7", "#000000")
]
OTHER = ("#B5B5B5", "o")
MAP_PAPERS, FEWEST_ON_MAP, MAP_NEIGHBOURS = 3_000, 5, 10
LONGEST_TITLE, LONGEST_FIELD = 300, 60  # characters kept for the map
PLOT_STYLE: Any = {
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.edgecolor": "#A0A7AE",
}
TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass(frozen=True)
class Run:
    """What is read of a run folder. `maps` holds titles (m,), fields (m,) and vectors (m, d) for
    each result file that has such an npz file beside it.
    """

    name: str
    summary: str
    facts: dict[str, Any]  # settings.json
    results: dict[str, dict[str, Any]]
    # of each result and task: score and interval, as benchmark.md has them
    cells: dict[str, dict[str, str]]
    metrics: list[dict[str, Any]]
    # the validation whose weights were kept: the last one better than all before it
    best: dict[str, Any]
    maps: dict[str, dict[str, Array]]


def save_map(path: Path, papers: Sequence[Paper], vectors: Any, seed: int) -> None:
    """Write `path` (before.npz, benchmark.npz or recipe.npz) for the page's map: a seeded sample of
    at most MAP_PAPERS labelled papers (of all, if none is).

    papers: the n evaluation papers; the same papers and seed give the same sample for every model.
    vectors: (n, d) of their abstracts, on the CPU.
    """
    chosen = np.array(
        [i for i, paper in enumerate(papers) if paper.field.strip()] or range(len(papers))
    )
    if len(chosen) > MAP_PAPERS:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MAP_PAPERS, replace=False))
    titles, fields = (
        [papers[i].title[:LONGEST_TITLE] for i in chosen],
        [papers[i].field.strip()[:LONGEST_FIELD] or "no field" for i in chosen],
    )
    # matplotlib names characters that it cannot draw in a warning
    fields = [errors.printable(field) for field in fields]
    with files.atomic_path(path) as partial, partial.open("wb") as handle:
        np.savez(
            handle,
            titles=titles,
            fields=fields,
            vectors=np.asarray(vectors, dtype=np.float32)[chosen],
        )


def read_run(folder: Path, name: str) -> Run:
    """Read a finished run folder. UserError: no run, an unfinished one, or one with missing or
    damaged files.
    """
    missing = [
        file
        for file in ("settings.json", *(f"{stem}.json" for stem in ROWS), "metrics.jsonl")
        if not (folder / file).is_file()
    ]
    if missing or (folder / "UNFINISHED").exists():
        why = f"it has no {missing[0]}" if missing else "it is marked UNFINISHED"
        raise UserError(
            f"{folder}: is no finished run: {why}", "name a folder that main.py made and finished"
        )
    facts, metrics = (
        files.read_json(folder / "settings.json"),
        files.Journal.rows(folder / "metrics.jsonl"),
    )
    results = {stem: files.read_json(folder / f"{stem}.json") for stem in ROWS}
    maps = {
        stem: _read_map(folder / f"{stem}.npz")
        for stem in ROWS
        if (folder / f"{stem}.npz").exists()
    }
    if len({tuple(one["titles"]) for one in maps.values()}) > 1:
        raise UserError(f"{folder}: its npz files are of different papers", "run main.py again")
    try:
        lines = [
            [cell.strip() for cell in line.split("|")[2:-1]] for line in table_lines(results)[2:]
        ]
        cells = {
            stem: dict(zip(TASKS, line, strict=True))
            for stem, line in zip(results, lines, strict=True)
        }
        best = [row for row in metrics if row.get("best")][-1]
        summary = (
            "{encoder}, {metric} distance, {pooling} pooling, {loss} loss, seed {seed}".format_map(
                facts["settings"]
            )
        )
        summary += (
            f"; {facts['papers']['train']} training papers; weights of step {best['step']} kept"
        )
        return Run(name, summary, facts, results, cells, metrics, best, maps)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder}: its JSON files are not a run's", "run main.py again") from None


def _read_map(path: Path) -> dict[str, Array]:
    try:
        with np.load(path) as stored:
            found = {key: np.asarray(stored[key]) for key in ("titles", "fields", "vectors")}
        if (
            len({len(column) for column in found.values()}) == 1
            and np.isfinite(found["vectors"]).all()
        ):
            return found
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        pass
    raise UserError(
        f"{path}: is damaged", "delete it (the page then lacks this map), or run main.py again"
    )


def terms(task: str, result: Mapping[str, Any]) -> str:
    """What a reader must know of a task's score: its name, its pool, its direction."""
    sizes = [f"{word} {result[word]}" for word in ("k", "pool") if word in result]
    return ", ".join(
        [
            main_score(task).replace("_", " "),
            *sizes,
            "higher is better" if task == "clustering" else "lower is better",
        ]
    )


def draw_tasks(run: Run, figure: Any, _: object) -> None:
    """A panel with its own axis for each task, in it each result's score with its 95% interval."""
    for axes, task in zip(figure.subplots(len(TASKS), 1), TASKS, strict=True):
        axes.set_title(
            f"{TASK_NAMES[task]}: {terms(task, run.results['benchmark']['tasks'][task])}",
            loc="left",
            x=-0.2,
        )
        axes.set(
            ylim=(len(LOOKS) - 0.4, -0.6),
            yticks=range(len(LOOKS)),
            yticklabels=[name for name, _, _ in LOOKS.values()],
        )
        for place, (stem, (_, colour, marker)) in enumerate(LOOKS.items()):
            result = run.results[stem]["tasks"][task]
            axes.text(
                1.02,
                place,
                run.cells[stem][task],
                transform=axes.get_yaxis_transform(),
                va="center",
            )
            if "ci95" in result:
                axes.plot(
                    result["ci95"], [place, place], color=colour, linewidth=2, solid_capstyle="butt"
                )
                axes.plot(result[main_score(task)], place, marker, color=colour)
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.08)
        if not axes.lines:
            axes.set_xticks([])


def draw_curves(run: Run, figure: Any, _: object) -> None:
    """Loss, distances and validation rank by step."""
    loss, distance, rank = figure.subplots(3, 1, sharex=True)
    loss.set_title("Training loss", loc="left")
    distance.set_title(
        f"Mean {run.facts['settings']['metric']} distance from a summary to summaries of",
        loc="left",
    )
    rank.set_title(
        f"Validation: mean rank, pool {run.best['validation_pool']}, lower is better", loc="left"
    )
    rank.set_xlabel("step")
    for axes, key, label, look in (
        (loss, "loss", "each logged batch", {"color": GREY, "linewidth": 1}),
        (loss, "loss_ema", "exponential moving average", {"color": BLUE}),
        (
            distance,
            "negative_distance",
            "other papers (negatives)",
            {"color": RED, "linestyle": "--"},
        ),
        (distance, "positive_distance", "the same paper (positive)", {"color": BLUE}),
        (
            rank,
            "validation_rank",
            "held-out papers",
            {"color": BLUE, "marker": "o", "markersize": 4},
        ),
    ):
        rows = [row for row in run.metrics if row.get(key) is not None]
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], label=label, **look)
    best = f"best: {run.best['validation_rank']:.2f} at step {run.best['step']}, kept"
    rank.plot(
        run.best["step"], run.best["validation_rank"], "D", color=RED, markersize=8, label=best
    )
    for axes in (loss, distance, rank):
        axes.legend(frameon=False)


def layout(vectors: Array, metric: Metric, seed: int) -> Array:
    """t-SNE by the metric's distance: (n, d) -> (n, 2) in the unit square, the longer side filling
    it.

    Squared Euclidean distances of unit vectors are twice the cosine distances, so cosine is the
    Euclidean map of the unit vectors.
    """
    from sklearn.manifold import TSNE

    points = vectors.astype(np.float64)
    if metric == "cosine":
        points /= np.maximum(
            np.linalg.norm(points, axis=1, keepdims=True), np.finfo(np.float64).tiny
        )
    # all vectors equal: no principal axes
    start = "pca" if points.std(axis=0).max() > 1e-9 else "random"
    tsne = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init=start, random_state=seed % 2**32)
    places = np.asarray(tsne.fit_transform(points), dtype=np.float64)
    low, high = places.min(axis=0), places.max(axis=0)
    return np.asarray((places - (low + high) / 2) / ((high - low).max() or 1) + 0.5)


def map_data(run: Run) -> dict[str, Any]:
    """What the maps show: titles, fields, their looks, and for each result file places, nearest
    papers and their distances. Empty: no map.
    """
    import torch

    from semcse.distances import nearest

    some: dict[str, Array] = next(iter(run.maps.values()), {"titles": np.array([])})
    n = len(some["titles"])
    if n < FEWEST_ON_MAP:
        return {}
    by_size = [name for name, _ in Counter(some["fields"].tolist()).most_common()]
    fields = sorted(by_size[: len(STYLES)], key=str.casefold) + by_size[len(STYLES) :]
    states = []
    for stem, stored in run.maps.items():
        vectors, metric = torch.from_numpy(stored["vectors"]), run.results[stem]["metric"]
        distance, near = nearest(
            vectors, vectors, min(MAP_NEIGHBOURS, n - 1), metric, excluded=torch.arange(n)
        )
        rounded = [[float(f"{value:.4g}") for value in row] for row in distance.tolist()]
        places = layout(stored["vectors"], metric, run.facts["settings"]["seed"]).round(4).tolist()
        states.append(
            {
                "stem": stem,
                "name": ROWS[stem],
                "metric": metric,
                "xy": places,
                "near": near.tolist(),
                "distance": rounded,
            }
        )
    looks = [*STYLES, *[OTHER] * len(fields)][: len(fields)]
    number = {name: i for i, name in enumerate(fields)}
    owners = [number[name] for name in some["fields"].tolist()]
    return {
        "titles": some["titles"].tolist(),
        "field": owners,
        "fields": fields,
        "looks": looks,
        "named": len(STYLES),
        "states": states,
    }


def draw_maps(run: Run, figure: Any, data: Mapping[str, Any]) -> None:
    """The t-SNE maps side by side: a point is a paper, its colour and shape its field."""
    owners, names = (
        np.array(data["field"]),
        [name if len(name) < 30 else f"{name[:28]}…" for name in data["fields"]],
    )
    names[len(STYLES) :] = [f"{len(names) - len(STYLES)} other fields"] * (len(names) > len(STYLES))
    size, edge = (6, 0.4) if len(owners) < 800 else (3, 0.15)
    for axes, state in zip(
        figure.subplots(1, len(data["states"]), squeeze=False)[0], data["states"], strict=True
    ):
        for field, (colour, marker) in reversed(list(enumerate(data["looks"]))):
            axes.plot(
                *np.array(state["xy"])[owners == field].T,
                marker,
                color=colour,
                markersize=size,
                markeredgecolor="white",
                markeredgewidth=edge,
            )
        axes.set(xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        axes.set_title(
            f"{state['name']}\n{run.results[state['stem']]['pooling']} pooling, {state['metric']}"
            " distance"
        )
    dots, columns = figure.axes[0].lines[::-1][: len(names)], 2 * len(data["states"])
    figure.set_size_inches(2.1 * columns, 4.7 + 0.2 * (len(names) // columns + 1))
    figure.legend(
        dots,
        [f" {name}" for name in names],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handletextpad=0,
        markerscale=6 / size,
    )


def draw(run: Run, data: Mapping[str, Any], plots: Path) -> dict[str, str]:
    """Write the pictures as PNG and return each as a data URL: "tasks", "curves", and "maps" where
    there is `data` for it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    urls = {}
    with matplotlib.rc_context(PLOT_STYLE):
        for name in ("tasks", "curves", "maps")[: 3 if data else 2]:
            figure = Figure(figsize=(4.9, 6.2), layout="constrained")
            {"tasks": draw_tasks, "curves": draw_curves, "maps": draw_maps}[name](run, figure, data)
            with files.atomic_path(plots / f"{name}.png") as partial:
                figure.savefig(partial, format="png", dpi=160, bbox_inches="tight")
            urls[name] = (
                "data:image/png;base64,"
                + base64.b64encode((plots / f"{name}.png").read_bytes()).decode()
            )
    return urls


def make(*folders: Path, output: Path | None = None) -> Path:
    """Write plots/*.png and report.html of finished runs into `output` (None: the run folder, or
    runs/report for several); UserError as `read_run`.
    """
    if len({folder.resolve() for folder in folders}) < max(1, len(folders)):
        raise UserError(
            "a run folder is named twice" if folders else "no run folder is named",
            "name each run folder once",
        )
    output = output or (folders[0] if len(folders) == 1 else Path("runs/report"))
    run_folder.check_output_folder(output)
    names = [folder.resolve().name for folder in folders]
    runs = [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
    plots = [output / "plots" / (str(i) if len(runs) > 1 else "") for i in range(1, len(runs) + 1)]
    maps = [map_data(run) for run in runs]
    pictures = [draw(*each) for each in zip(runs, maps, plots, strict=True)]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    known = {
        "rows": ROWS,
        "task_names": TASK_NAMES,
        "terms": terms,
        "notes_on": notes_on,
        "free": FREE_ON_RESUME,
    }
    files.write_text(
        output / "report.html",
        page.render(known, runs=runs, sections=list(zip(runs, maps, pictures, strict=True))),
    )
    log.info("wrote %s", output / "report.html")
    return output / "report.html"


@dataclass(frozen=True)
class Command:
    """Make plots/*.png and report.html of one or several finished runs."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders that main.py made
    output_dir: str = ""  # where to write; empty: the run folder, or runs/report for several runs


def main() -> None:
    """The script: parse, then make the page."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    print(make(*command.folders, output=Path(command.output_dir) if command.output_dir else None))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
