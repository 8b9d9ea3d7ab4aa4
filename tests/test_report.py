"""The report: its numbers and neighbours against the files and brute force, its pictures by what
they draw, its page as a parser and as Chromium see it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import run_script
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from semcse import files, report, tables
from semcse.errors import UserError
from semcse.papers import Paper
from semcse.tables import TASKS, main_score
from semcse.types import Metric
from settings import Settings, complete

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "{{ 7 * 7 }} & \"quotes\" 'here' $x^2$",
    "Łódź — 東京",
    "<!-- <script>",
)


def vectors_of(seed: int, n: int = 40, d: int = 8) -> Any:
    """n vectors in four groups, paper i in group i % 4."""
    draw = np.random.default_rng(seed)
    return (4 * draw.normal(size=(4, d))[np.arange(n) % 4] + draw.normal(size=(n, d))).astype(
        np.float32
    )


def papers_of(n: int = 40) -> list[Paper]:
    return [
        Paper(
            f"p{i}",
            title=HOSTILE[i] if i < len(HOSTILE) else f"Title {i} of the soil",
            field=f"field {i % 4}",
        )
        for i in range(n)
    ]


def result_of(
    stem: str, metric: Metric, eval_file: str = "eval.jsonl", n: int = 40
) -> dict[str, Any]:
    """A result file whose every score differs from the others'."""
    shift = {"before": 0.7, "benchmark": 0.2, "recipe": 0.1}[stem] + (metric == "cosine") / 16
    tasks: dict[str, Any] = {}
    for i, task in enumerate(TASKS):
        value = shift + i / 32 + (task != "clustering")
        sizes = {"n": n, "pool": n} | ({"k": 10, "left_out": 3} if task == "clustering" else {})
        tasks[task] = {main_score(task): value, "ci95": [value - 0.125, value + 0.25], **sizes}
    return {
        "model": "tiny",
        "metric": metric,
        "pooling": "cls",
        "eval_file": eval_file,
        "tasks": tasks,
        "n_papers": n,
    }


Rows = list[dict[str, Any]]
METRICS: Rows = [
    {"step": 0, "validation_rank": 9.5, "validation_pool": 20, "best": True},
    {"step": 5, "loss": 0.5, "loss_ema": 0.6, "positive_distance": 1.0, "negative_distance": 2.0},
    {
        "step": 10,
        "loss": 0.25,
        "loss_ema": 0.5,
        "positive_distance": 1.25,
        "negative_distance": 3.0,
    },
    {"step": 10, "validation_rank": 4.25, "validation_pool": 20, "best": True},
    {
        "step": 15,
        "loss": 0.125,
        "loss_ema": 0.4,
        "positive_distance": 1.5,
        "negative_distance": 4.0,
    },
    {"step": 20, "validation_rank": 5.0, "validation_pool": 20, "best": False},
]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function (name, metric, eval_file, stems with a map) -> a finished run folder."""

    def make(
        name: str = "one",
        metric: Metric = "euclidean",
        eval_file: str = "eval.jsonl",
        maps: tuple[str, ...] = tuple(tables.ROWS),
    ) -> Path:
        folder = tmp_path / name
        settings = dataclasses.asdict(complete(Settings(metric=metric, eval_file=eval_file)))
        facts = {"settings": settings, "versions": {"torch": "2"}, "papers": {"train": 77}}
        files.write_json(folder / "settings.json", facts)
        for seed, stem in enumerate(tables.ROWS):
            files.write_json(
                folder / f"{stem}.json",
                result_of(stem, "cosine" if stem == "recipe" else metric, eval_file),
            )
            if stem in maps:
                report.save_map(folder / f"{stem}.npz", papers_of(), vectors_of(seed), 0)
        files.write_text(
            folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in METRICS)
        )
        return folder

    return make


class Page(HTMLParser):
    """What a browser would make of a page: elements, cells of tables (without small print), texts
    of scripts, other text, and every address it names.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "action", "data", "poster")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.inside not in ("script", "style"):
            self.text += data

    @property
    def maps(self) -> list[dict[str, Any]]:
        return [json.loads(script) for script in self.scripts[:-1]]


def score_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The cells that a table must show of these results, formed here from the JSON."""
    rows: list[list[str]] = []
    for result in results:
        rows.append([])
        for task in TASKS:
            digits, (low, high) = 3 if task == "clustering" else 2, result["tasks"][task]["ci95"]
            rows[-1].append(
                f"{result['tasks'][task][main_score(task)]:.{digits}f} [{low:.{digits}f},"
                f" {high:.{digits}f}]"
            )
    return rows


# -- the file of vectors
# -------------------------------------------------------------------------------------------------------------------------------------


def test_map_file_holds_a_seeded_sample_of_the_labelled_papers(tmp_path: Path) -> None:
    n = 4_000
    papers = [
        Paper(str(i), title=str(i), field="" if i % 8 == 0 else f"f{i % 3}") for i in range(n)
    ]
    stored = []
    for name, factor, seed in (("before", 1, 5), ("benchmark", 2, 5), ("recipe", 1, 6)):
        report.save_map(
            tmp_path / f"{name}.npz", papers, factor * np.arange(n)[:, None] * np.ones((1, 3)), seed
        )
        stored.append(np.load(tmp_path / f"{name}.npz"))
    chosen = stored[0]["titles"].astype(int)
    assert len(set(chosen)) == len(chosen) == report.MAP_PAPERS
    assert (chosen % 8 != 0).all()
    np.testing.assert_array_equal(stored[0]["fields"], [papers[i].field for i in chosen])
    np.testing.assert_array_equal(stored[0]["vectors"][:, 2], chosen)
    np.testing.assert_array_equal(stored[1]["vectors"], 2 * stored[0]["vectors"])
    assert set(stored[2]["titles"]) != set(stored[0]["titles"])


def test_map_file_of_unlabelled_papers_holds_all_and_cuts_giant_titles(tmp_path: Path) -> None:
    report.save_map(
        tmp_path / "before.npz",
        [Paper("a", title="x" * 10**6), Paper("b", title="y")],
        np.eye(2),
        0,
    )
    stored = np.load(tmp_path / "before.npz")
    assert [len(title) for title in stored["titles"]] == [report.LONGEST_TITLE, 1]
    assert stored["fields"].tolist() == ["no field", "no field"]


# -- the page
# ------------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_page_has_the_files_numbers_and_brute_force_neighbours(
    make_run: Callable[..., Path], metric: Metric
) -> None:
    folder = make_run(metric=metric)
    page = Page(report.make(folder))
    results = [json.loads((folder / f"{stem}.json").read_text()) for stem in tables.ROWS]
    assert [row[1:] for row in page.tables[0][1:]] == score_rows(results)
    assert "pool 40, lower is better" in page.text
    assert "weights of step 10 kept" in page.text
    [shown] = page.maps
    assert [(state["stem"], state["metric"]) for state in shown["states"]] == [
        ("before", metric),
        ("benchmark", metric),
        ("recipe", "cosine"),
    ]
    for seed, state in enumerate(shown["states"]):
        vectors = vectors_of(seed).astype(np.float64)
        away = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
        if state["metric"] == "cosine":
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            away = 1 - unit @ unit.T
        np.fill_diagonal(away, np.inf)
        order = np.argsort(away, axis=1)[:, :10]
        np.testing.assert_array_equal(state["near"], order)
        np.testing.assert_allclose(
            state["distance"], np.take_along_axis(away, order, axis=1), rtol=6e-4
        )


def test_page_shows_hostile_texts_as_text_and_names_no_address(
    make_run: Callable[..., Path],
) -> None:
    folder = make_run(name="<img src=x onerror=alert(3)>", eval_file="<b>{{ 7 * 7 }}</b>")
    page = Page(report.make(folder))
    assert page.maps[0]["titles"] == [paper.title for paper in papers_of()]
    assert page.tags.count("script") == 2
    assert "b" not in page.tags[page.tags.index("body") :]
    assert "<b>{{ 7 * 7 }}</b>" in page.text
    assert "<img src=x onerror=alert(3)>" in page.text
    assert page.tags.count("img") == 3
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text


def test_several_runs_stand_in_one_table_for_each_evaluation_file(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [
        make_run("one"),
        make_run("two", "cosine"),
        make_run("three", eval_file="other.jsonl", maps=()),
    ]
    output = tmp_path / "both"
    page = Page(report.make(*runs, output=output))
    trained = [json.loads((run / "benchmark.json").read_text()) for run in runs]
    assert [[row[0] for row in table[1:]] for table in page.tables[:2]] == [
        ["one", "two"],
        ["three"],
    ]
    assert [row[1:] for row in page.tables[0][1:]] == score_rows(trained[:2])
    assert [row[1:] for row in page.tables[1][1:]] == score_rows(trained[2:])
    assert "metric cosine, margin 0.1, temperature 0.07" in " ".join(page.text.split())
    assert len(page.tables) == 2 + 3
    assert len(page.maps) == 2
    assert "No map:" in page.text
    assert {str(path.relative_to(output)) for path in output.rglob("*.png")} == {
        *(f"plots/{i}/{name}.png" for i in (1, 2, 3) for name in ("tasks", "curves")),
        "plots/1/maps.png",
        "plots/2/maps.png",
    }
    assert not (runs[0] / "plots").exists()


def test_page_without_vectors_or_with_few_papers_says_so(make_run: Callable[..., Path]) -> None:
    folder = make_run(maps=())
    for few in (False, True):
        if few:
            report.save_map(folder / "before.npz", papers_of(4), vectors_of(0, 4), 0)
        page = Page(report.make(folder))
        assert "No map:" in page.text
        assert page.maps == []
        assert not (folder / "plots" / "maps.png").exists()


def test_a_task_without_data_is_named_on_page_and_picture(make_run: Callable[..., Path]) -> None:
    folder = make_run(maps=())
    for stem in tables.ROWS:
        result = json.loads((folder / f"{stem}.json").read_text())
        result["tasks"]["query"] = {
            "mean_rank": None,
            "reason": "no paper has the text this task needs",
        }
        files.write_json(folder / f"{stem}.json", result)
    figure = Figure()
    report.draw_tasks(report.read_run(folder, "one"), figure, {})
    assert [text.get_text() for text in figure.axes[2].texts] == ["no data"] * 3
    assert [len(axes.get_xticks()) > 0 for axes in figure.axes] == [True, True, False, True]
    page = Page(report.make(folder))
    assert [row[3] for row in page.tables[0][1:]] == ["no data"] * 3
    assert "query: no data, no paper has the text this task needs." in page.text


# -- the pictures
# --------------------------------------------------------------------------------------------------------------------------------------------


def test_task_panels_draw_each_score_and_interval(make_run: Callable[..., Path]) -> None:
    run, figure = report.read_run(make_run(), "one"), Figure()
    report.draw_tasks(run, figure, {})
    for axes, task in zip(figure.axes, TASKS, strict=True):
        assert ("higher" if task == "clustering" else "lower") + " is better" in axes.get_title(
            loc="left"
        )
        assert "pool 40" in axes.get_title(loc="left")
        names = [label.get_text() for label in axes.get_yticklabels()]
        for i, stem in enumerate(("before", "benchmark", "recipe")):
            result = run.results[stem]["tasks"][task]
            assert (
                names[i]
                == {"before": "before", "benchmark": "after", "recipe": "authors' recipe"}[stem]
            )
            assert list(cast(Any, axes.lines[2 * i].get_xdata())) == result["ci95"]
            assert [
                *cast(Any, axes.lines[2 * i + 1].get_xdata()),
                *cast(Any, axes.lines[2 * i + 1].get_ydata()),
            ] == [result[main_score(task)], i]


def test_training_panels_draw_the_metrics_and_mark_the_kept_step(
    make_run: Callable[..., Path],
) -> None:
    figure = Figure()
    report.draw_curves(report.read_run(make_run(), "one"), figure, {})
    drawn = {
        line.get_label(): list(zip(*cast(Any, line.get_data()), strict=True))
        for axes in figure.axes
        for line in axes.lines
    }
    assert drawn["each logged batch"] == [(5, 0.5), (10, 0.25), (15, 0.125)]
    assert drawn["exponential moving average"] == [(5, 0.6), (10, 0.5), (15, 0.4)]
    assert drawn["the same paper (positive)"] == [(5, 1.0), (10, 1.25), (15, 1.5)]
    assert drawn["other papers (negatives)"] == [(5, 2.0), (10, 3.0), (15, 4.0)]
    assert drawn["held-out papers"] == [(0, 9.5), (10, 4.25), (20, 5.0)]
    assert drawn["best: 4.25 at step 10, kept"] == [(10, 4.25)]


def test_pictures_are_written_with_their_colours(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    report.make(folder)
    wanted = {
        "tasks": [look[1] for look in report.LOOKS.values()],
        "curves": [report.BLUE, report.RED],
        "maps": [colour for colour, _ in report.STYLES[:4]],
    }
    for name, colours in wanted.items():
        pixels = imread(folder / "plots" / f"{name}.png")[:, :, :3]
        assert min(pixels.shape[:2]) > 700
        assert (pixels[[0, -1]] == 1).all(), "something reaches over the picture's edge"
        for colour in colours:
            assert (np.abs(pixels - to_rgb(colour)).max(axis=2) < 0.02).sum() > 100, (
                f"{name}: no {colour}"
            )


def test_layout_keeps_groups_together_and_is_repeatable() -> None:
    vectors = vectors_of(3, 80)
    for metric in ("euclidean", "cosine"):
        places = report.layout(vectors, metric, 2**40)
        away = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(80)
        assert (away.argmin(axis=1) % 4 == np.arange(80) % 4).mean() > 0.95
        assert np.ptp(places, axis=0).max() == pytest.approx(1)
        assert places.min() >= -1e-9
        assert places.max() <= 1 + 1e-9
        np.testing.assert_array_equal(places, report.layout(vectors, metric, 2**40))


def test_layout_by_cosine_sees_no_lengths_and_by_euclidean_does() -> None:
    vectors = vectors_of(4)
    scaled = vectors * 2.0 ** (np.arange(40) % 5)[:, None].astype(np.float32)
    np.testing.assert_allclose(
        report.layout(scaled, "cosine", 0), report.layout(vectors, "cosine", 0), atol=1e-3
    )
    assert (
        np.abs(report.layout(scaled, "euclidean", 0) - report.layout(vectors, "euclidean", 0)).max()
        > 0.1
    )


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_collapsed_vectors_still_have_a_finite_map(metric: Metric) -> None:
    for vectors in (np.ones((20, 4)), np.zeros((5, 4))):
        assert np.isfinite(report.layout(vectors.astype(np.float32), metric, 0)).all()


def test_fields_differ_by_colour_or_shape_and_the_smallest_share_one(
    make_run: Callable[..., Path],
) -> None:
    folder, n = make_run(maps=()), 200
    # _0 to _9 are large, _10 to _39 have one paper each
    papers = [Paper(str(i), title=str(i), field=f"_{i if i < 40 else i % 10}") for i in range(n)]
    report.save_map(folder / "before.npz", papers, vectors_of(0, n), 0)
    data = report.map_data(report.read_run(folder, "many"))
    looks = dict(zip(data["fields"], data["looks"], strict=True))
    assert len(looks) == 40
    assert [data["fields"][i] for i in data["field"]] == [paper.field for paper in papers]
    own = [look for look in looks.values() if look != report.OTHER]
    assert len(own) == len(set(own)) == len(report.STYLES)
    assert all(looks[f"_{i}"] != report.OTHER for i in range(10))
    figure = Figure()
    report.draw_maps(report.read_run(folder, "many"), figure, data)
    labels = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert labels == [*data["fields"][: len(report.STYLES)], "12 other fields"]


# -- what is refused
# -----------------------------------------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no settings.json": lambda run: (run / "settings.json").unlink(),
    "marked UNFINISHED": lambda run: (run / "UNFINISHED").touch(),
    "no benchmark.json": lambda run: (run / "benchmark.json").unlink(),
    "no metrics.jsonl": lambda run: (run / "metrics.jsonl").unlink(),
    "not readable as JSON": lambda run: (run / "recipe.json").write_text('{"tasks": '),
    "JSON files are not a run's": lambda run: (run / "recipe.json").write_text("[]"),
    "files are not a run's": lambda run: (run / "metrics.jsonl").write_text(""),
    "before.npz: is damaged": (
        lambda run: (run / "before.npz").write_bytes((run / "before.npz").read_bytes()[:-300])
    ),
    "recipe.npz: is damaged": lambda run: report.save_map(
        run / "recipe.npz", papers_of(), np.full((40, 2), np.nan), 0
    ),
    "of different papers": lambda run: report.save_map(
        run / "recipe.npz", papers_of(39), vectors_of(0), 0
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_incomplete_and_damaged_runs_are_refused_in_one_line(
    make_run: Callable[..., Path], message: str
) -> None:
    good, bad = make_run("good"), make_run("bad")
    DAMAGE[message](bad)
    with pytest.raises(UserError, match=message) as raised:
        report.make(good, bad, output=good.parent / "page")
    assert "bad" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (good.parent / "page").exists()


def test_command(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run()
    done = run_script("report.py", folder, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000
    assert sorted(path.name for path in (tmp_path / "out" / "plots").iterdir()) == [
        "curves.png",
        "maps.png",
        "tasks.png",
    ]
    for words, message in (
        ([], "no run folder"),
        ([folder, folder], "named twice"),
        ([tmp_path / "none"], "no finished run"),
        (["--what"], "--what"),
    ):
        done = run_script("report.py", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr


# -- in a browser
# --------------------------------------------------------------------------------------------------------------------------------------------

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --force-prefers-reduced-motion"
).split()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless Chromium through selenium, which records every request."""
    webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.chain = lambda: webdriver.ActionChains(driver, duration=20)
    driver.keys = webdriver.Keys
    yield driver
    driver.quit()


def open_page(browser: Any, page: Path, width: int, height: int) -> Any:
    """Open the page at this size and return its canvas, in view."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get(page.as_uri())
    canvas = browser.find_element("css selector", "canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    return canvas


def point_at(canvas: Any, place: list[float]) -> tuple[int, int]:
    """Offset of a paper from the canvas's middle, in pixels."""
    side = min(canvas.size["width"], canvas.size["height"]) - 36
    return round((place[0] - 0.5) * side), round((0.5 - place[1]) * side)


def text_of(browser: Any, selector: str) -> str:
    return str(browser.find_element("css selector", selector).text)


def ink(browser: Any) -> int:
    """Number of pixels of the map that are strongly coloured."""
    count = (
        "const c = document.querySelector('canvas'), d = c.getContext('2d').getImageData(0, 0,"
        " c.width, c.height).data; let n = 0;"
    )
    loop = "for (let i = 0; i < d.length; i += 4) n += d[i + 3] > 200; return n;"
    return int(browser.execute_script(count + loop))


def check_neighbours(browser: Any, data: dict[str, Any], state: int, paper: int) -> None:
    """The list beside the map is that of this paper under this state."""
    shown = [item.text for item in browser.find_elements("css selector", ".near li")]
    near, away = data["states"][state]["near"][paper], data["states"][state]["distance"][paper]
    assert len(shown) == 10
    for item, other, distance in zip(shown, near, away, strict=True):
        assert " ".join(data["titles"][other].split()) in item
        assert data["fields"][data["field"][other]] in item
        assert item.endswith(f"distance {distance}")
    assert data["titles"][paper] in text_of(browser, ".near h4")


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_map_answers_to_pointer_search_and_keys(
    make_run: Callable[..., Path], browser: Any, size: tuple[int, int]
) -> None:
    page = report.make(make_run())
    [data] = Page(page).maps
    canvas = open_page(browser, page, *size)
    # a title that would end the script element and load a picture
    after, paper = data["states"][1], 1
    assert ink(browser) > 1_000

    browser.chain().move_to_element_with_offset(
        canvas, *point_at(canvas, after["xy"][paper])
    ).perform()
    tip = browser.find_element("css selector", ".tip")
    assert tip.is_displayed()
    assert data["titles"][paper] in tip.text
    assert data["fields"][data["field"][paper]] in tip.text
    browser.chain().click().perform()
    check_neighbours(browser, data, 1, paper)
    assert not tip.is_displayed()

    browser.find_element("css selector", "input[value=before]").click()
    time.sleep(0.2)
    check_neighbours(browser, data, 0, paper)
    browser.find_elements("css selector", ".near li button")[2].click()
    chosen = data["states"][0]["near"][paper][2]
    check_neighbours(browser, data, 0, chosen)

    everything = ink(browser)
    search = browser.find_element("css selector", "input[type=search]")
    search.send_keys("ALERT(1)")
    assert "1 found" in text_of(browser, "output")
    assert [
        item.text.split("\n")[0] for item in browser.find_elements("css selector", ".matches li")
    ] == [data["titles"][0]]
    assert ink(browser) < everything / 2, (
        "papers that were not searched for stay as strong as those that were"
    )
    # over the two zoom buttons to the map
    search.send_keys(browser.keys.TAB, browser.keys.TAB, browser.keys.TAB)
    assert browser.switch_to.active_element == canvas
    search.clear()
    canvas.send_keys(browser.keys.ESCAPE)
    assert browser.find_elements("css selector", ".near li") == []
    canvas.send_keys(browser.keys.ARROW_RIGHT)
    reached = tip.text.split("\n")[0]
    canvas.send_keys(browser.keys.ENTER)
    assert reached
    check_neighbours(browser, data, 0, data["titles"].index(reached))

    browser.find_element("css selector", ".in").click()  # zooms in around the chosen paper
    browser.chain().move_to_element(canvas).perform()
    assert reached in tip.text
    browser.chain().click_and_hold().move_by_offset(60, -40).release().move_by_offset(
        0, 30
    ).move_by_offset(0, -30).perform()
    assert reached in tip.text
    browser.find_element("css selector", ".out").click()

    browser.find_elements("css selector", ".legend button")[1].click()
    assert ink(browser) < 0.6 * everything
    assert [
        button.get_attribute("aria-pressed")
        for button in browser.find_elements("css selector", ".legend button")
    ] == ["false", "true", "false", "false"]
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0], "the page scrolls sideways"


def test_page_makes_no_request_and_no_complaint(
    make_run: Callable[..., Path], browser: Any, tmp_path: Path
) -> None:
    page = report.make(make_run("one"), make_run("two", "cosine"), output=tmp_path / "several")
    browser.get("about:blank")
    time.sleep(0.5)
    browser.get_log("performance")  # the requests of the browser's own first page
    open_page(browser, page, 1280, 900)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert page.as_uri() in asked
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert browser.get_log("browser") == []
    assert len(browser.find_elements("css selector", "canvas")) == 2
    assert browser.execute_script(
        "return [...document.images].every((image) => image.complete && image.naturalWidth > 500)"
    )
