"""Tests of semcse.report: the numbers and neighbours on the page, the lines in the plots, what is
refused, and, where Chromium and selenium are installed, the page in a browser.
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
from matplotlib.figure import Figure
from matplotlib.image import imread

from semcse import files, report
from semcse.errors import UserError
from semcse.papers import Paper
from semcse.tables import ROWS, TASKS, main_score
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
    """n vectors in four groups; paper i is in group i % 4."""
    draw = np.random.default_rng(seed)
    groups = 4 * draw.normal(size=(4, d))
    return (groups[np.arange(n) % 4] + draw.normal(size=(n, d))).astype(np.float32)


def papers_of(n: int = 40) -> list[Paper]:
    titles = [*HOSTILE, *(f"Title {i} of the soil" for i in range(len(HOSTILE), n))][:n]
    return [Paper(f"p{i}", title=title, field=f"field {i % 4}") for i, title in enumerate(titles)]


def result_of(stem: str, metric: Metric, eval_file: str) -> dict[str, Any]:
    """A result file in which every score is different."""
    shift = {"before": 0.7, "benchmark": 0.2, "recipe": 0.1}[stem] + (metric == "cosine") / 16
    tasks: dict[str, Any] = {}
    for i, task in enumerate(TASKS):
        value = shift + i / 32 + (task != "clustering")
        sizes = {"n": 40, "pool": 40} | ({"k": 10, "left_out": 3} if task == "clustering" else {})
        tasks[task] = {main_score(task): value, "ci95": [value - 0.125, value + 0.25], **sizes}
    usage = {"metric": metric, "pooling": "cls"}
    return usage | {"eval_file": eval_file, "tasks": tasks, "n_papers": 40}


def training_row(step: int, loss: float, ema: float, positive: float, negative: float) -> Any:
    distances = {"positive_distance": positive, "negative_distance": negative}
    return {"step": step, "loss": loss, "loss_ema": ema, **distances}


METRICS = [
    {"step": 0, "validation_rank": 9.5, "validation_pool": 20, "best": True},
    training_row(5, 0.5, 0.6, 1.0, 2.0),
    training_row(10, 0.25, 0.5, 1.25, 3.0),
    {"step": 10, "validation_rank": 4.25, "validation_pool": 20, "best": True},
    training_row(15, 0.125, 0.4, 1.5, 4.0),
    {"step": 20, "validation_rank": 5.0, "validation_pool": 20, "best": False},
]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function (name, metric, eval_file, whether there are maps) -> a finished run folder."""

    def make(
        name: str = "one",
        metric: Metric = "euclidean",
        eval_file: str = "eval.jsonl",
        maps: bool = True,
    ) -> Path:
        folder = tmp_path / name
        settings = dataclasses.asdict(complete(Settings(metric=metric, eval_file=eval_file)))
        facts = {"settings": settings, "versions": {"torch": "2"}, "papers": {"train": 77}}
        files.write_json(folder / "settings.json", facts)
        for seed, stem in enumerate(ROWS):
            result = result_of(stem, "cosine" if stem == "recipe" else metric, eval_file)
            files.write_json(folder / f"{stem}.json", result)
            if maps:
                report.save_map(folder / f"{stem}.npz", papers_of(), vectors_of(seed), 0)
        text = "".join(json.dumps(row) + "\n" for row in METRICS)
        files.write_text(folder / "metrics.jsonl", text)
        return folder

    return make


class Page(HTMLParser):
    """What a browser would read from a page: its elements, the cells of its tables (without small
    print), the texts of its scripts, its other text, and every address it names.
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
        named = ("src", "href", "srcset", "action", "data", "poster")
        self.addresses += [value or "" for name, value in attrs if name in named]
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


def score_rows(run: Path, *stems: str) -> list[list[str]]:
    """The cells that a table must show of these result files."""
    rows = []
    for stem in stems:
        tasks = json.loads((run / f"{stem}.json").read_text())["tasks"]
        values = [(tasks[task][main_score(task)], *tasks[task]["ci95"]) for task in TASKS]
        texts = [[f"{value:.2f}" for value in three] for three in values[:3]]
        texts.append([f"{value:.3f}" for value in values[3]])
        rows.append([f"{score} [{low}, {high}]" for score, low, high in texts])
    return rows


def test_a_map_file_holds_a_seeded_sample_of_the_papers_with_a_field(tmp_path: Path) -> None:
    n = 4_000
    fields = ["" if i % 8 == 0 else f"f{i % 3}" for i in range(n)]
    papers = [Paper(str(i), title=str(i), field=field) for i, field in enumerate(fields)]
    stored = []
    for factor, seed in ((1, 5), (2, 5), (1, 6)):
        vectors = factor * np.arange(n)[:, None] * np.ones((1, 3))
        report.save_map(tmp_path / "before.npz", papers, vectors, seed)
        with np.load(tmp_path / "before.npz") as found:
            stored.append(dict(found))
    chosen = stored[0]["titles"].astype(int)
    assert len(set(chosen)) == len(chosen) == report.MAP_PAPERS
    assert (chosen % 8 != 0).all()
    np.testing.assert_array_equal(stored[0]["fields"], [fields[i] for i in chosen])
    np.testing.assert_array_equal(stored[0]["vectors"][:, 2], chosen)
    np.testing.assert_array_equal(stored[1]["vectors"], 2 * stored[0]["vectors"])
    assert set(stored[2]["titles"]) != set(stored[0]["titles"])


def test_a_map_file_without_fields_holds_all_papers_and_cuts_long_titles(tmp_path: Path) -> None:
    papers = [Paper("a", title="x" * 10**6), Paper("b", title="y")]
    report.save_map(tmp_path / "before.npz", papers, np.eye(2), 0)
    with np.load(tmp_path / "before.npz") as stored:
        assert [len(title) for title in stored["titles"]] == [report.LONGEST_TITLE, 1]
        assert stored["fields"].tolist() == ["no field", "no field"]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_page_shows_the_scores_and_the_nearest_papers(
    make_run: Callable[..., Path], metric: Metric
) -> None:
    folder = make_run(metric=metric)
    page = Page(report.make(folder))
    assert [row[1:] for row in page.tables[0][1:]] == score_rows(folder, *ROWS)
    assert "pool 40, lower is better" in page.text
    assert "weights of step 10 kept" in page.text
    [shown] = page.maps
    states = shown["states"]
    metrics = {"before": metric, "benchmark": metric, "recipe": "cosine"}
    assert {state["stem"]: state["metric"] for state in states} == metrics
    for seed, state in enumerate(states):
        vectors = vectors_of(seed).astype(np.float64)
        distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
        if state["metric"] == "cosine":
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            distances = 1 - unit @ unit.T
        np.fill_diagonal(distances, np.inf)
        order = np.argsort(distances, axis=1)[:, :10]
        np.testing.assert_array_equal(state["near"], order)
        expected = np.take_along_axis(distances, order, axis=1)
        np.testing.assert_allclose(state["distance"], expected, rtol=6e-4)


def test_the_page_shows_hostile_texts_as_text_and_names_no_address(
    make_run: Callable[..., Path],
) -> None:
    folder = make_run(name="<img src=x onerror=alert(3)>", eval_file="<b>{{ 7 * 7 }}</b>")
    page = Page(report.make(folder))
    assert page.maps[0]["titles"] == [paper.title for paper in papers_of()]
    assert (page.tags.count("script"), page.tags.count("img")) == (2, 3)
    assert "b" not in page.tags[page.tags.index("body") :]
    assert "<b>{{ 7 * 7 }}</b>" in page.text
    assert "<img src=x onerror=alert(3)>" in page.text
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text


def test_several_runs_are_compared_in_one_table_per_evaluation_file(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_run("three", eval_file="other.jsonl", maps=False)
    runs = [make_run("one"), make_run("two", "cosine", maps=False), other]
    page = Page(report.make(*runs, output=tmp_path / "all"))
    compared = [[row[0] for row in table[1:]] for table in page.tables[:2]]
    assert compared == [["one", "two"], ["three"]]
    scores = [row for run in runs for row in score_rows(run, "benchmark")]
    assert [row[1:] for table in page.tables[:2] for row in table[1:]] == scores
    assert "metric cosine, margin 0.1, temperature 0.07" in " ".join(page.text.split())
    assert len(page.tables) == 2 + 3
    assert len(page.maps) == 1
    assert "No map:" in page.text
    plots = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    drawn = {f"all/plots/{i}/{name}.png" for i in (1, 2, 3) for name in ("tasks", "curves")}
    assert plots == drawn | {"all/plots/1/maps.png"}


def test_a_page_with_too_few_papers_for_a_map(make_run: Callable[..., Path]) -> None:
    folder = make_run(maps=False)
    report.save_map(folder / "before.npz", papers_of(4), vectors_of(0, 4), 0)
    page = Page(report.make(folder))
    assert "No map:" in page.text
    assert page.maps == []
    assert not (folder / "plots" / "maps.png").exists()


def test_a_task_without_data(make_run: Callable[..., Path]) -> None:
    folder = make_run(maps=False)
    reason = "no paper has the text this task needs"
    for stem in ROWS:
        result = json.loads((folder / f"{stem}.json").read_text())
        result["tasks"]["query"] = {"mean_rank": None, "reason": reason}
        files.write_json(folder / f"{stem}.json", result)
    figure = Figure()
    report.draw_tasks(report.read_run(folder), figure)
    assert [text.get_text() for text in figure.axes[2].texts] == ["no data"] * 3
    assert [len(axes.get_xticks()) > 0 for axes in figure.axes] == [True, True, False, True]
    page = Page(report.make(folder))
    assert [row[3] for row in page.tables[0][1:]] == ["no data"] * 3
    assert f"query: no data, {reason}." in page.text


def test_the_panels_of_the_tasks_show_each_score_and_interval(
    make_run: Callable[..., Path],
) -> None:
    run, figure = report.read_run(make_run(maps=False)), Figure()
    report.draw_tasks(run, figure)
    for axes, task in zip(figure.axes, TASKS, strict=True):
        direction = "higher" if task == "clustering" else "lower"
        assert axes.get_title(loc="left").endswith(f"pool 40, {direction} is better")
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["before", "after", "authors' recipe"]
        lines = cast(Any, axes.lines)
        for i, stem in enumerate(("before", "benchmark", "recipe")):
            result = run.results[stem]["tasks"][task]
            assert list(lines[2 * i].get_xdata()) == result["ci95"]
            assert list(lines[2 * i + 1].get_xdata()) == [result[main_score(task)]]
            assert list(lines[2 * i + 1].get_ydata()) == [i]


def test_the_training_curves_show_the_metrics_and_the_kept_step(
    make_run: Callable[..., Path],
) -> None:
    figure = Figure()
    report.draw_curves(report.read_run(make_run(maps=False)), figure)
    lines = cast(Any, [line for axes in figure.axes for line in axes.lines])
    drawn = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in lines}
    assert drawn == {
        "each logged batch": [(5, 0.5), (10, 0.25), (15, 0.125)],
        "exponential moving average": [(5, 0.6), (10, 0.5), (15, 0.4)],
        "the same paper (positive)": [(5, 1.0), (10, 1.25), (15, 1.5)],
        "other papers (negatives)": [(5, 2.0), (10, 3.0), (15, 4.0)],
        "held-out papers": [(0, 9.5), (10, 4.25), (20, 5.0)],
        "best: 4.25 at step 10, kept": [(10, 4.25)],
    }


def test_layout_keeps_groups_together_and_is_repeatable() -> None:
    for metric in ("euclidean", "cosine"):
        places = report.layout(vectors_of(3, 80), metric, 2**40)
        distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(80)
        assert (distances.argmin(axis=1) % 4 == np.arange(80) % 4).mean() > 0.95
        assert np.ptp(places, axis=0).max() == pytest.approx(1)
        assert places.min() >= -1e-9
        assert places.max() <= 1 + 1e-9
    np.testing.assert_array_equal(places, report.layout(vectors_of(3, 80), "cosine", 2**40))


def test_only_the_euclidean_layout_depends_on_lengths() -> None:
    vectors = vectors_of(4)
    scaled = vectors * 2.0 ** (np.arange(40) % 5)[:, None].astype(np.float32)
    moved = {
        metric: np.abs(report.layout(scaled, metric, 0) - report.layout(vectors, metric, 0)).max()
        for metric in ("euclidean", "cosine")
    }
    assert moved["euclidean"] > 0.1
    assert moved["cosine"] < 1e-3


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equal_vectors_have_a_finite_map(metric: Metric) -> None:
    for vectors in (np.ones((20, 4)), np.zeros((5, 4))):
        assert np.isfinite(report.layout(vectors.astype(np.float32), metric, 0)).all()


def test_fields_have_different_styles_and_the_smallest_share_one(
    make_run: Callable[..., Path],
) -> None:
    folder, n = make_run(maps=False), 200
    # The fields _0 to _9 are large, and _10 to _39 have one paper each.
    papers = [Paper(str(i), title=str(i), field=f"_{i if i < 40 else i % 10}") for i in range(n)]
    report.save_map(folder / "before.npz", papers, vectors_of(0, n), 0)
    run, figure = report.read_run(folder), Figure()
    data = report.map_data(run)
    assert [data["fields"][i] for i in data["field"]] == [paper.field for paper in papers]
    looks = dict(zip(data["fields"], data["looks"], strict=True))
    assert len(looks) == 40
    styled = [look for look in looks.values() if look != report.OTHER_FIELDS]
    assert len(styled) == len(set(styled)) == len(report.FIELD_STYLES)
    assert all(looks[f"_{i}"] in styled for i in range(10))
    report.draw_maps(run, figure, data)
    labels = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert labels == [*data["fields"][: len(styled)], "12 other fields"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "is not a finished run": lambda run: (run / "settings.json").unlink(),
    "is not a finished run;": lambda run: (run / "UNFINISHED").touch(),
    "benchmark.json: no such file": lambda run: (run / "benchmark.json").unlink(),
    "missing or bad .*FileNotFound": lambda run: (run / "metrics.jsonl").unlink(),
    "not readable as JSON": lambda run: (run / "recipe.json").write_text('{"tasks": '),
    "missing or bad": lambda run: (run / "recipe.json").write_text("[]"),
    "missing or bad .*IndexError": lambda run: (run / "metrics.jsonl").write_text(""),
    "before.npz is damaged": lambda run: (run / "before.npz").write_bytes(b"PK\3\4 torn"),
    "recipe.npz is damaged": lambda run: report.save_map(
        run / "recipe.npz", papers_of(), np.full((40, 2), np.nan), 0
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_unfinished_and_damaged_runs_are_refused_in_one_line(
    make_run: Callable[..., Path], message: str
) -> None:
    good, bad = make_run("good", maps=False), make_run("bad")
    DAMAGE[message](bad)
    with pytest.raises(UserError, match=message) as raised:
        report.make(good, bad, output=good.parent / "page")
    assert "bad" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (good.parent / "page").exists()


def test_the_command_writes_the_page_and_complete_plots(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = run_script("-m", "semcse.report", make_run(), "--output-dir", output)
    assert (done.returncode, done.stdout) == (0, f"{output}/report.html\n"), done.stderr
    assert (output / "report.html").stat().st_size > 100_000
    plots = sorted((output / "plots").iterdir())
    assert [path.name for path in plots] == ["curves.png", "maps.png", "tasks.png"]
    for path in plots:
        pixels = imread(path)[:, :, :3]
        assert min(pixels.shape[:2]) > 700
        assert (pixels[[0, -1]] == 1).all(), "the drawing reaches over the edge of the image"


def test_no_folder_is_refused() -> None:
    with pytest.raises(UserError, match="no run folder is named"):
        report.make()


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --force-prefers-reduced-motion"
).split()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless Chromium, which records every request."""
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
    """Open the page in a window of this size and return its canvas, in view."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    canvas = browser.find_element("css selector", "canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    return canvas


def texts_of(browser: Any, selector: str) -> list[str]:
    return [item.text for item in browser.find_elements("css selector", selector)]


def ink(browser: Any) -> int:
    """Number of pixels of the map that are strongly coloured."""
    return int(
        browser.execute_script(
            "const c = document.querySelector('canvas'); let n = 0;"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "for (let i = 0; i < d.length; i += 4) n += d[i + 3] > 200; return n;"
        )
    )


def check_neighbours(browser: Any, data: dict[str, Any], state: int, paper: int) -> None:
    """The list next to the map is that of this paper under this state."""
    near, distances = (data["states"][state][key][paper] for key in ("near", "distance"))
    shown = texts_of(browser, ".near li")
    for text, other, distance in zip(shown, near, distances, strict=True):
        assert " ".join(data["titles"][other].split()) in text
        assert data["fields"][data["field"][other]] in text
        assert text.endswith(f"distance {distance}")
    assert data["titles"][paper] in texts_of(browser, ".near h4")[0]


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_the_map_answers_to_pointer_search_and_keys(
    make_run: Callable[..., Path], browser: Any, size: tuple[int, int]
) -> None:
    page = report.make(make_run())
    [data] = Page(page).maps
    canvas = open_page(browser, page, *size)
    everything = ink(browser)
    assert everything > 1_000
    paper = 1  # its title would end the script element and load an image
    side = min(canvas.size["width"], canvas.size["height"]) - 36
    x, y = data["states"][1]["xy"][paper]
    offset = round((x - 0.5) * side), round((0.5 - y) * side)
    browser.chain().move_to_element_with_offset(canvas, *offset).perform()
    tip = browser.find_element("css selector", ".tip")
    assert data["titles"][paper] in tip.text
    browser.chain().click().perform()
    check_neighbours(browser, data, 1, paper)
    assert not tip.is_displayed()
    browser.find_element("css selector", "input[value=before]").click()
    time.sleep(0.2)
    check_neighbours(browser, data, 0, paper)
    search = browser.find_element("css selector", "input[type=search]")
    search.send_keys("ALERT(1)")
    assert "1 found" in texts_of(browser, "output")[0]
    assert texts_of(browser, ".matches li")[0].split("\n")[0] == data["titles"][0]
    assert ink(browser) < everything / 2
    search.clear()
    canvas.send_keys(browser.keys.ESCAPE)
    assert texts_of(browser, ".near li") == []
    canvas.send_keys(browser.keys.ARROW_RIGHT)
    reached = tip.text.split("\n")[0]
    canvas.send_keys(browser.keys.ENTER)
    check_neighbours(browser, data, 0, data["titles"].index(reached))
    browser.find_element("css selector", ".in").click()  # zooms in around the selected paper
    browser.chain().move_to_element(canvas).perform()
    assert reached in tip.text
    browser.find_element("css selector", ".out").click()
    browser.find_elements("css selector", ".legend button")[1].click()
    assert ink(browser) < 0.6 * everything
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0], "the page scrolls sideways"


def test_the_page_makes_no_request_and_has_no_errors(
    make_run: Callable[..., Path], browser: Any, tmp_path: Path
) -> None:
    page = report.make(make_run("one"), make_run("two", "cosine"), output=tmp_path / "several")
    browser.get("about:blank")
    time.sleep(0.5)
    browser.get_log("performance")  # the requests of the browser's first page
    open_page(browser, page, 1280, 900)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [one["params"] for one in events if one["method"] == "Network.requestWillBeSent"]
    addresses = {one["request"]["url"] for one in requests}
    assert {url for url in addresses if not url.startswith("data:")} == {page.as_uri()}
    assert browser.get_log("browser") == []
    assert len(browser.find_elements("css selector", "canvas")) == 2
