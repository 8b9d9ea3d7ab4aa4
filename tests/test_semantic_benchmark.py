"""The semantic benchmark: Perf against the published table, the four tasks against scores computed
by hand, the tables of results, and the command.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import WORDS, make_paper, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import semantic_benchmark
from semantic_benchmark import Command, Evaluation, clustering, describe, evaluate, perf_scores
from semcse import command_line
from semcse.bootstrap import bootstrap_interval
from semcse.encoder import Embedded, Encoder, Usage
from semcse.errors import UserError
from semcse.model_folder import BUNDLED, load_encoder, save_model
from semcse.models import RECIPES, list_of_models
from semcse.papers import Paper, read_papers
from semcse.tables import TASKS, main_score, notes_on, table_lines
from semcse.types import Metric

# Perf

# Facts of the published table (arXiv 2507.13105, README of its repository): model, title_abstract,
# abstract_segments, query, clustering, Perf.
PUBLISHED = [
    ("SciBERT", 807.74, 214.37, 213.45, 0.569, 0.000),
    ("SciDeBERTa", 1479.09, 861.55, 2465.26, 0.460, 0.000),
    ("SPECTER", 10.25, 12.23, 2.18, 0.692, 0.119),
    ("SciNCL", 5.68, 7.35, 2.29, 0.702, 0.357),
    ("SPECTER2_base", 4.52, 5.10, 1.17, 0.666, 0.553),
    ("SPECTER2_proximity", 5.34, 5.80, 1.46, 0.666, 0.395),
    ("all-MiniLM-L6-v2", 3.09, 8.19, 1.11, 0.730, 0.771),
    ("Jina-v2", 3.29, 8.77, 1.29, 0.703, 0.600),
    ("Jina-v3", 3.45, 6.96, 1.01, 0.719, 0.783),
    ("SimCSE", 23.71, 44.24, 8.92, 0.696, 0.116),
    ("NV-Embed-v2", 3.38, 3.84, 1.02, 0.721, 0.866),
    ("SemCSE", 2.47, 2.68, 1.23, 0.739, 0.925),
]


def row(*values: float | None) -> dict[str, float | None]:
    """One model's main scores, in the order of TASKS."""
    return dict(zip(TASKS, values, strict=True))


def test_perf_gives_the_published_column_in_any_order_of_the_models() -> None:
    rows = list(PUBLISHED)
    published = {name: perf for name, *_, perf in PUBLISHED}
    for seed in range(3):
        perf = perf_scores({name: row(*values) for name, *values, _ in rows})
        assert perf == pytest.approx(published, abs=0.0006)
        random.Random(seed).shuffle(rows)


def test_the_recipes_hold_the_published_scores() -> None:
    found = {name: one.published for name, one in RECIPES.items() if one.published}
    assert found == {name: tuple(values) for name, *values, _ in PUBLISHED}


def test_perf_by_hand_where_models_share_the_best_score() -> None:
    # title: best 1, median 2. segments: best 2, median 4. query: the median is the best, so 1 or 0.
    # clustering: best 0.9, median 0.8.
    tables = {"a": row(1, 4, 1, 0.8), "b": row(2, 2, 1, 0.9), "c": row(2.5, 8, 7, 0.75)}
    a, b, c = (1 + 0.5 + 1 + 0.5) / 4, (0.5 + 1 + 1 + 1) / 4, (0.25 + 0 + 0 + 0.25) / 4
    assert perf_scores(tables) == pytest.approx({"a": a, "b": b, "c": c})


def test_perf_is_undefined_for_fewer_than_three_models() -> None:
    one, two, three = {"a": row(1, 1, 1, 1)}, {"b": row(2, 2, 2, 0.5)}, {"c": row(3, 3, 3, 0)}
    assert perf_scores({}) == {}
    assert perf_scores(one) == {"a": None}
    assert perf_scores(one | two) == {"a": None, "b": None}
    assert perf_scores(one | two | three) == {"a": 1.0, "b": 0.5, "c": 0.0}


@pytest.mark.parametrize("missing", [{"query": None}, {}])
def test_a_model_without_a_task_has_no_perf(missing: dict[str, float | None]) -> None:
    lacking = {"title_abstract": 1.0, "abstract_segments": 1.0, "clustering": 1.0} | missing
    tables = {
        "lacking": lacking,
        "a": row(1, 3, 1, 1),
        "b": row(2, 2, 2, 0.5),
        "c": row(3, 1, 3, 0),
    }
    # title: 1, 1, 2, 3 (best 1, median 1.5). segments: 1, 3, 2, 1 (the same). query: 1, 2, 3
    # (median 2). clustering: 1, 1, 0.5, 0 (best 1, median 0.75).
    a, b, c = (1 + 0 + 1 + 1) / 4, (0 + 0 + 0.5 + 0) / 4, (0 + 1 + 0 + 0) / 4
    assert perf_scores(tables) == {"lacking": None, "a": a, "b": b, "c": c}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(*[st.integers(0, 50)] * 4), min_size=3, max_size=8),
    st.integers(1, 9),
    st.integers(-9, 9),
)
def test_perf_does_not_depend_on_scale_or_offset_and_lies_between_best_and_worst(
    rows: list[tuple[int, int, int, int]], scale: int, offset: int
) -> None:
    tables = {str(i): row(*values) for i, values in enumerate(rows)}
    perf = perf_scores(tables)
    moved = {str(i): row(*(scale * x + offset for x in values)) for i, values in enumerate(rows)}
    assert perf_scores(moved) == pytest.approx(perf)
    # purity counts as a mean rank does, upside down
    swapped = {str(i): row(-d, b, c, -a) for i, (a, b, c, d) in enumerate(rows)}
    assert perf_scores(swapped) == pytest.approx(perf)
    extremes = {"best": row(-1, -1, -1, 51), "worst": row(10**9, 10**9, 10**9, -(10**9))}
    extended = perf_scores(tables | extremes)
    assert (extended["best"], extended["worst"]) == (1, 0)
    values = [value for value in (*perf.values(), *extended.values()) if value is not None]
    assert len(values) == 2 * len(rows) + 2
    assert min(values) >= 0
    assert max(values) <= 1


# The four tasks, by hand


class FakeEncoder:
    """Gives every text the vector that it was told, and records what it embeds. Texts that start
    with "Long" count as truncated.
    """

    name = "fake"
    origins: Mapping[str, str] = {}

    def __init__(
        self, vectors: Mapping[str, Sequence[float]], metric: Metric = "euclidean"
    ) -> None:
        self.vectors = vectors
        self.usage = Usage("cls", metric, 512, query_prompt="find: ", document_prompt="store: ")
        self.calls: list[tuple[str, list[str]]] = []

    def embed(self, texts: Sequence[str], prompt: str = "", label: str = "") -> Embedded:
        self.calls.append((prompt, list(texts)))
        rows = [list(self.vectors[text]) for text in texts]
        vectors = torch.tensor(rows, dtype=torch.float32) if rows else torch.empty(0, 0)
        return Embedded(vectors, sum(text.startswith("Long") for text in texts))


class Everywhere(dict[str, Sequence[float]]):
    """The vectors of a collapsed model: the same one for every text."""

    def __init__(self, vector: Sequence[float]) -> None:
        super().__init__()
        self.vector = vector

    def __missing__(self, text: str) -> Sequence[float]:
        return self.vector


def evaluated(fake: FakeEncoder, papers: list[Paper], seed: int = 0) -> Evaluation:
    return evaluate(cast(Encoder, fake), papers, seed)


def described(fake: FakeEncoder, papers: list[Paper]) -> dict[str, Any]:
    return describe(cast(Encoder, fake), "papers.jsonl", evaluated(fake, papers), 0)


def on_a_line() -> tuple[list[Paper], FakeEncoder]:
    """Twelve papers with vectors of one dimension. Whatever is a candidate of paper i is at 10 i.

    Papers 5 and 8 have no halves; papers 0, 3 and 9 have a query; none has a field.
    """
    titles = [1, 16, 25, -5, 40, 50, -1, 70, 80, 200, -1, -1]
    first_halves = {6: 71, 9: 75}
    queries = {0: 12, 3: 30, 9: -1}
    papers: list[Paper] = []
    places: dict[str, float] = {}
    for i in range(12):
        cut = i not in (5, 8)
        abstract = f"Left {i}. Right {i}." if cut else f"Whole {i}."
        query = f"query {i}" if i in queries else " "
        papers.append(Paper(f"p{i}", f"Title {i}", abstract, query=query))
        places |= {f"Title {i}": titles[i], abstract: 10 * i}
        places |= {f"Left {i}.": first_halves.get(i, 10 * i), f"Right {i}.": 10 * i} if cut else {}
        places |= {query: queries[i]} if i in queries else {}
    return papers, FakeEncoder({text: [float(place)] for text, place in places.items()})


@pytest.mark.parametrize(
    ("task", "ranks", "scores"),
    [
        (
            # title 1 at 16: abstract 20 is nearer than 10. title 2 at 25: 20 and 30 tie. title 9 at
            # 200: 110 and 100 come before 90.
            "title_abstract",
            dict(enumerate([1, 2, 1.5, 4, 1, 1, 7, 1, 1, 3, 11, 12])),
            {
                "mean_rank": 45.5 / 12,
                "normalised_rank": (45.5 / 12 - 1) / 11,
                "median_rank": (1.5 + 2) / 2,
                "mrr": (5 + 1 / 2 + 2 / 3 + 1 / 4 + 1 / 7 + 1 / 3 + 1 / 11 + 1 / 12) / 12,
                "recall_at_1": 5 / 12,
                "recall_at_10": 10 / 12,
                "n": 12,
                "pool": 12,
            },
        ),
        (
            # The abstracts of papers without a query are candidates too. query 0 at 12: 10 (2) and
            # 20 (8) before 0 (12). query 9 at -1: the abstracts at 0, 10, ... 80 before 90.
            "query",
            {0: 3, 3: 1, 9: 10},
            {
                "mean_rank": 14 / 3,
                "normalised_rank": 1 / 3,
                "median_rank": 3,
                "mrr": (1 / 3 + 1 + 1 / 10) / 3,
                "recall_at_1": 1 / 3,
                "recall_at_10": 1,
                "n": 3,
                "pool": 12,
            },
        ),
        (
            # half 6 at 71: only 70 is nearer than 60, because 80 is no candidate. half 9 at 75: 70
            # is nearer than 90, and 60 is as near.
            "abstract_segments",
            {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 6: 2, 7: 1, 9: 2.5, 10: 1, 11: 1},
            {
                "mean_rank": 1.25,
                "normalised_rank": 0.25 / 9,
                "median_rank": 1,
                "mrr": (8 + 1 / 2 + 1 / 2.5) / 10,
                "recall_at_1": 0.8,
                "recall_at_10": 1,
                "n": 10,
                "pool": 10,
                "left_out": 2,
            },
        ),
    ],
)
def test_ranking_tasks_by_hand(
    task: str, ranks: dict[int, float], scores: dict[str, float]
) -> None:
    papers, fake = on_a_line()
    for seed in (0, 7):
        evaluation = evaluated(fake, papers, seed)
        found = evaluation.per_paper[task].tolist()
        assert {i: rank for i, rank in enumerate(found) if rank == rank} == ranks
        result = evaluation.report["tasks"][task]
        interval = bootstrap_interval(np.array([*ranks.values()], dtype=float), seed)
        assert result.pop("ci95") == list(interval)
        assert result == pytest.approx(scores)


@pytest.mark.parametrize(("metric", "mean_rank"), [("euclidean", 1.5), ("cosine", 1.0)])
def test_the_usage_decides_the_distance(metric: Metric, mean_rank: float) -> None:
    # title 0 points exactly where abstract 0 points, but its end is nearer to that of abstract 1
    vectors = {"Title 0": (9, 0), "Title 1": (10, 2), "Abstract 0": (1, 0), "Abstract 1": (10, 2)}
    papers = [Paper(str(i), f"Title {i}", f"Abstract {i}") for i in range(2)]
    tasks = evaluated(FakeEncoder(vectors, metric), papers).report["tasks"]
    assert tasks["title_abstract"]["mean_rank"] == mean_rank


def in_fields() -> tuple[list[Paper], FakeEncoder]:
    """Papers on a line, shuffled: field A at 0..10, C at 11.1, 12.1, 13.1, B at 100..110, D (10
    papers) at 1000..1009, and two without a field among A.
    """
    places: dict[str, Sequence[float]] = {
        "A": range(11),
        "B": range(100, 111),
        "C": [11.1, 12.1, 13.1],
        "D": range(1000, 1010),
        " ": [0.5, 9.5],
    }
    rows = [(field, place) for field, group in places.items() for place in group]
    random.Random(5).shuffle(rows)
    papers = [Paper(f"p{x}", f"Title {x}", f"Abstract {x}", field=field) for field, x in rows]
    return papers, FakeEncoder({f"{kind} {x}": [x] for _, x in rows for kind in TEXTS})


TEXTS = ("Title", "Abstract")


def test_clustering_by_hand() -> None:
    papers, fake = in_fields()
    # The papers of A at 0..5 have ten neighbours of A. From 6 on, papers of C are among them: one
    # at 6, two at 7, three at 8, 9 and 10. D has 9 other papers for each, C has 2: no queries.
    shares = [1.0] * 6 + [0.9, 0.8, 0.7, 0.7, 0.7]
    by_hand = {f"p{place}": share for place, share in enumerate(shares)}
    by_hand |= {f"p{place}": 1.0 for place in range(100, 111)}
    for seed in (0, 1):  # without ties the seed changes only the interval
        evaluation = evaluated(fake, papers, seed)
        values = evaluation.per_paper["clustering"]
        ids = [paper.id for paper in papers]
        found = {one: x for one, x in zip(ids, values.tolist(), strict=True) if x == x}
        assert found == pytest.approx(by_hand)
        task = evaluation.report["tasks"]["clustering"]
        assert task.pop("ci95") == list(bootstrap_interval(values[~np.isnan(values)], seed))
        expected = {"purity": 20.8 / 22, "k": 10, "n": 22, "left_out": 13, "pool": 35}
        assert task == pytest.approx(expected)


def collapsible_papers() -> list[Paper]:
    """60 papers in the order of their field (12 small, 48 large); 20 have a query, 50 halves."""
    papers = []
    for i in range(60):
        abstract = f"Left {i}. Right {i}." if i % 6 else f"Whole {i}."
        query, field = f"query {i}" if i % 3 == 0 else "", "small" if i < 12 else "large"
        papers.append(Paper(str(i), f"Title {i}", abstract, query=query, field=field))
    return papers


@pytest.mark.parametrize(
    ("metric", "vector"), [("euclidean", (3, 4)), ("cosine", (3, 4)), ("cosine", (0, 0))]
)
def test_a_collapsed_model_has_the_middle_rank(metric: Metric, vector: Sequence[float]) -> None:
    tasks = evaluated(FakeEncoder(Everywhere(vector), metric), collapsible_papers()).report["tasks"]
    for name, pool in (("title_abstract", 60), ("abstract_segments", 50), ("query", 60)):
        task, middle = tasks[name], (pool + 1) / 2
        assert (task["pool"], task["mean_rank"], task["normalised_rank"]) == (pool, middle, 0.5)
        assert task["ci95"] == [middle, middle]
        assert task["recall_at_1"] == task["recall_at_10"] == 0


def test_a_collapsed_model_clusters_by_chance_not_by_the_order_of_the_file() -> None:
    vectors, fields = torch.ones(60, 2), [paper.field for paper in collapsible_papers()]
    scores = [clustering(vectors, fields, "euclidean", seed)[0]["purity"] for seed in range(25)]
    chance = (48 * 47 + 12 * 11) / (60 * 59)  # 0.675; neighbours in the order of the file give 0.2
    assert np.mean(scores) == pytest.approx(chance, abs=0.06)


def test_every_text_is_embedded_once_with_the_prompt_of_its_role() -> None:
    papers, fake = on_a_line()
    evaluated(fake, papers)
    embedded = Counter((prompt, text) for prompt, texts in fake.calls for text in texts)
    cut = [i for i in range(12) if i not in (5, 8)]
    documents = [paper.abstract for paper in papers]
    documents += [f"{side} {i}." for side in ("Left", "Right") for i in cut]
    questions = [paper.title for paper in papers] + ["query 0", "query 3", "query 9"]
    expected = [("store: ", text) for text in documents] + [("find: ", text) for text in questions]
    assert embedded == Counter(expected)


def test_the_truncated_share_is_over_all_texts_of_all_tasks() -> None:
    papers = [
        Paper("0", "Long title", "Long one. Two.", query="q"),
        Paper("1", "Title", "Whole"),
        Paper("2", "Other", "Three. Long four."),
    ]
    report = evaluated(FakeEncoder(Everywhere((1, 0))), papers).report
    # truncated: a title, an abstract, a first half, a second half; embedded: 3 titles, 3 abstracts,
    # 2 + 2 halves, 1 query
    assert report["truncated_share"] == pytest.approx(4 / 11, abs=1e-6)
    assert report["n_papers"] == 3


# Tables


def cells_of(lines: Sequence[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_tasks_without_data_are_null_with_the_reason() -> None:
    # only one abstract has halves, so its second half is the only candidate
    papers = [
        Paper("0", "Title 0", "Left. Right.", field="A"),
        Paper("1", "Title 1", "Whole", field="A"),
        Paper("2", "Title 2", "Other"),
    ]
    report = described(FakeEncoder(Everywhere((1, 0))), papers)
    tasks = report["tasks"]
    missing = "too few papers have the text this task needs"
    assert tasks["query"] == {"mean_rank": None, "reason": missing}
    assert tasks["abstract_segments"] == {"mean_rank": None, "reason": missing, "left_out": 2}
    assert tasks["clustering"] == {"purity": None, "reason": "no field has more than 10 papers"}
    assert tasks["title_abstract"]["mean_rank"] == 2
    lines = table_lines({"x": report}, {"x": None})
    assert cells_of(lines)[2] == ["x", "2.00 [2.00, 2.00]", *["no data"] * 3, "-"]
    assert f"query: no data, {missing}." in notes_on(report)


def test_the_table_shows_scores_intervals_and_pools() -> None:
    papers, fake = on_a_line()
    fields, in_fields_fake = in_fields()
    report = described(fake, papers)
    report["tasks"]["clustering"] = described(in_fields_fake, fields)["tasks"]["clustering"]
    named = {"ours": report, "a much longer name": report}
    lines = table_lines(named, {"ours": 0.12345, "a much longer name": None})
    head, _, *rows = cells_of(lines)
    assert head == [
        "",
        "title_abstract (pool 12) lower is better",
        "abstract_segments (pool 10) lower is better",
        "query (pool 12) lower is better",
        "clustering (pool 35, k 10) higher is better",
        "Perf",
    ]
    shown = []
    for task, score in zip(TASKS, ("3.79", "1.25", "4.67", "0.945"), strict=True):
        digits = 3 if task == "clustering" else 2
        low, high = report["tasks"][task]["ci95"]
        shown.append(f"{score} [{low:.{digits}f}, {high:.{digits}f}]")
    assert rows == [["ours", *shown, "0.123"], ["a much longer name", *shown, "-"]]
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"|", "-"}
    left_out = {"abstract_segments: 2 papers left out.", "clustering: 13 papers left out."}
    assert left_out < set(notes_on(report))


# The command

REPORT_KEYS = (
    "model metric pooling eval_file tasks n_papers truncated_share seconds settings versions"
)
RANKING_KEYS = "mean_rank normalised_rank median_rank mrr recall_at_1 recall_at_10 n pool ci95"
TASK_KEYS = {
    "title_abstract": RANKING_KEYS,
    "abstract_segments": f"{RANKING_KEYS} left_out",
    "query": RANKING_KEYS,
    "clustering": "purity k n left_out pool ci95",
}
# Words in the two sentences of the first papers' abstracts. tiny_bert reads a word or full stop as
# one token and keeps 64 with its two special ones, so that abstracts 0, 2 and 3 are truncated,
# abstract 1 just fits, and of the halves only the first one of paper 2 is truncated.
SENTENCE_WORDS = {0: (31, 30), 1: (30, 30), 2: (62, 4), 3: (61, 5)}


def words_of(number: int, count: int) -> str:
    return " ".join(WORDS[(7 * number + i * (number % 9 + 1)) % len(WORDS)] for i in range(count))


def rows_of_counted_words(papers: int = 24) -> list[dict[str, Any]]:
    """Papers whose tokens can be counted by hand: titles of 3 words, queries of 2, abstracts of two
    sentences (of 5 words each, if SENTENCE_WORDS does not say otherwise).
    """
    rows = []
    for n in range(papers):
        first, second = SENTENCE_WORDS.get(n, (5, 5))
        abstract = f"{words_of(n, first)}. {words_of(n + 13, second)}."
        title, query = words_of(n + 5, 3), words_of(n + 9, 2)
        rows.append(make_paper(n, title=title, query=query, abstract=abstract))
    return rows


def run_here(*words: str | Path) -> None:
    """Parse a command line and run the command in this process."""
    args = [str(word) for word in words]
    semantic_benchmark.run(command_line.parse_command_line(Command, args, Command()))


def refusal(*words: str | Path) -> str:
    """The error line of a command that is refused."""
    with pytest.raises(UserError) as caught:
        run_here(*words)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_report(folder: Path) -> Any:
    return json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))


@pytest.fixture
def files_of(papers_file: Callable[..., Path], tmp_path: Path) -> tuple[str | Path, ...]:
    """The flags that name an evaluation file of 24 papers and the output folder `tmp_path`/out."""
    eval_file = papers_file(rows_of_counted_words())
    return ("--eval-file", eval_file, "--output-dir", tmp_path / "out")


def test_list_models_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    run_here("--list-models")
    printed = capsys.readouterr().out
    assert printed.strip() == list_of_models()
    found = [line.split()[:2] for line in printed.splitlines()[1:]]
    assert found == [[name, recipe.hub_id] for name, recipe in RECIPES.items()]


def test_one_model_gives_one_object_and_the_table(
    tiny_bert: Path, files_of: tuple[str | Path, ...], tmp_path: Path
) -> None:
    words = ("--model", tiny_bert, *files_of, "--seed", "3", "--device", "cpu")
    done = run_script("semantic_benchmark.py", *words)
    assert done.returncode == 0, done.stderr
    report, eval_file = read_report(tmp_path / "out"), files_of[1]
    assert " ".join(report) == REPORT_KEYS
    assert {name: " ".join(task) for name, task in report["tasks"].items()} == TASK_KEYS
    assert (report["model"], report["eval_file"]) == (str(tiny_bert), str(eval_file))
    assert (report["metric"], report["pooling"], report["n_papers"]) == ("euclidean", "cls", 24)
    used = report["settings"]
    assert (used["metric"], used["pooling"], used["max_length"]) == ("euclidean", "cls", 64)
    assert (used["seed"], set(used["read_from"].values())) == (3, {"settings"})
    assert set(report["versions"]) >= {"commit", "python", "torch", "transformers", "numpy"}
    assert set(report["seconds"]) == {"embedding", "tasks"}
    # 3 abstracts and one half, of 24 titles, abstracts, first halves, second halves and queries
    assert report["truncated_share"] == pytest.approx(4 / 120, abs=1e-6)
    # the functions give the same in this process
    encoder = load_encoder(str(tiny_bert), Usage("cls", "euclidean", 64), "cpu")
    again = evaluate(encoder, list(read_papers(str(eval_file))), 3).report["tasks"]
    scores = {name: report["tasks"][name][main_score(name)] for name in TASKS}
    assert scores == pytest.approx({name: again[name][main_score(name)] for name in TASKS})

    written = (tmp_path / "out/benchmark.md").read_text(encoding="utf-8")
    table = "\n".join(table_lines({str(tiny_bert): report}))
    assert done.stdout == table + "\n"
    assert f"\n{table}\n" in written
    assert f"24 papers of {eval_file}" in written
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["benchmark.json", "benchmark.md"]


def test_three_models_give_a_list_and_their_perf(
    tiny_bert: Path,
    files_of: tuple[str | Path, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours = tmp_path / "ours"
    save_model(load_encoder(str(tiny_bert), Usage("mean", "cosine", 48)), ours, "tiny")
    names = [str(ours), BUNDLED, str(tiny_bert)]
    run_here(*(word for name in names for word in ("--model", name)), *files_of)
    found = read_report(tmp_path / "out")
    assert list(found) == ["models", "perf", "paired"]
    models = found["models"]
    assert [report["model"] for report in models] == names
    assert all(" ".join(report) == REPORT_KEYS for report in models)
    keys = ("metric", "pooling", "max_length")
    used = [[report["settings"][key] for key in keys] for report in models]
    assert used == [["cosine", "mean", 48], ["cosine", "mean", 256], ["euclidean", "cls", 64]]
    sources = [set(report["settings"]["read_from"].values()) for report in models]
    assert sources == [{"semcse.json"}, {"recipe"}, {"settings"}]
    scores = {
        report["model"]: {task: report["tasks"][task][main_score(task)] for task in TASKS}
        for report in models
    }
    assert found["perf"] == perf_scores(scores)

    printed = capsys.readouterr().out
    rows = cells_of(printed.splitlines())
    perf = [(name, f"{found['perf'][name]:.3f}") for name in names]
    assert [(cells[0], cells[-1]) for cells in rows[2:5]] == perf
    pairs = [pair["models"] for pair in found["paired"]]
    assert pairs == [names[:2], names[::2], names[1:]]
    assert [cells[0] for cells in rows[-3:]] == [" - ".join(pair) for pair in pairs]
    for (one, other), pair in zip(pairs, found["paired"], strict=True):
        for task, values in pair["tasks"].items():
            difference = scores[one][task] - scores[other][task]
            assert values["difference"] == pytest.approx(difference)
            assert values["ci95"][0] <= difference <= values["ci95"][1]
    assert printed in (tmp_path / "out/benchmark.md").read_text(encoding="utf-8")


def test_papers_of_named_training_files_are_left_out_for_all_models(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = rows_of_counted_words(8)
    by_id = papers_file([{"id": rows[1]["id"], "summaries": ["One.", "Two."]}], "by_id.jsonl")
    titled = {"id": "other", "title": f" {rows[2]['title'].upper()}."}
    same_text = {"id": "more", "abstract": rows[3]["abstract"]}
    by_text = papers_file([titled, same_text], "by_text.jsonl")
    words = ("--model", tiny_bert, "--eval-file", papers_file(rows), "--output-dir")
    run_here(*words, tmp_path / "out", "--trained-on", by_id, "--trained-on", by_text)
    found = read_report(tmp_path / "out")
    assert found["n_papers"] == 5
    assert found["left_out_as_training_papers"] == {str(by_id): 1, str(by_text): 2}
    written = (tmp_path / "out/benchmark.md").read_text(encoding="utf-8")
    assert f"- 2 papers were left out: they are in {by_text}." in written
    everything = papers_file(rows[1:], "everything.jsonl")
    line = refusal(*words, tmp_path / "none", "--trained-on", everything)
    assert "all papers but 1 are in a file of --trained-on" in line
    assert not (tmp_path / "none").exists()


def test_flags_change_the_usage_of_a_foreign_model_and_are_recorded(
    tiny_bert: Path, files_of: tuple[str | Path, ...], tmp_path: Path
) -> None:
    flags = ("--metric", "cosine", "--pooling", "mean", "--max-length", "9")
    run_here("--model", tiny_bert, *flags, *files_of)
    report = read_report(tmp_path / "out")
    assert (report["metric"], report["pooling"]) == ("cosine", "mean")
    assert set(report["settings"]["read_from"].values()) == {"flag"}
    # all abstracts (14 tokens or more), and the six halves of more than 6 words
    assert report["truncated_share"] == pytest.approx((24 + 6) / 120, abs=1e-6)
    encoder = load_encoder(str(tiny_bert), Usage("mean", "cosine", 9))
    expected = evaluate(encoder, list(read_papers(str(files_of[1]))), 0)
    assert report["tasks"] == expected.report["tasks"]


def test_a_flag_that_contradicts_the_model_is_refused(
    tiny_bert: Path, files_of: tuple[str | Path, ...], tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    save_model(load_encoder(str(tiny_bert), Usage("mean", "cosine", 48)), ours, "tiny")
    words = ("--model", ours, "--metric", "euclidean", *files_of)
    assert refusal(*words).startswith("--metric euclidean contradicts")
    assert not (tmp_path / "out").exists()


def test_bad_usage_is_refused_and_writes_nothing(
    tiny_bert: Path, files_of: tuple[str | Path, ...], tmp_path: Path
) -> None:
    line = refusal(*files_of)
    assert line == "no model is named; give --model NAME_OR_ID_OR_DIR, or --list-models"
    twice = ("--model", BUNDLED, "--model", RECIPES[BUNDLED].hub_id)
    assert refusal(*twice, *files_of).endswith("name the same model; name each model once")
    # the first model's scores are not written either
    assert "no such folder" in refusal("--model", tiny_bert, "--model", "./nowhere", *files_of)
    assert "config.json" in refusal("--model", tmp_path, *files_of)
    file = files_of[1]
    words = ("--model", tiny_bert, "--eval-file", file, "--output-dir", file)
    assert "is a file" in refusal(*words)
    # A length below 3 would leave nothing but special tokens.
    for flag, value in (("--max-length", "2"), ("--max-length", "-5"), ("--seed", "-1")):
        assert flag in refusal("--model", tiny_bert, flag, value, *files_of)
    assert not (tmp_path / "out").exists()


GOOD = json.dumps(make_paper(1)).encode()
BLANK = json.dumps(make_paper(2, abstract=" \n")).encode()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, ": no such file; "),
        (GOOD + b"\n", ": holds one paper only; "),
        (GOOD + b"\n" + BLANK, ':2: key "abstract" is blank; '),
    ],
)
def test_bad_evaluation_files_are_refused_and_nothing_is_written(
    tiny_bert: Path, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    eval_file, output = tmp_path / "papers.jsonl", tmp_path / "out"
    if content is not None:
        eval_file.write_bytes(content)
    words = ("--model", tiny_bert, "--eval-file", eval_file, "--output-dir", output)
    assert refusal(*words).startswith(f"{eval_file}{complaint}")
    assert not output.exists()


def test_skip_invalid_scores_the_good_lines(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    eval_file = papers_file([make_paper(0), make_paper(1, abstract=""), make_paper(2)])
    output = tmp_path / "out"
    words = ("--eval-file", eval_file, "--output-dir", output, "--skip-invalid")
    run_here("--model", tiny_bert, *words)
    report = read_report(output)
    assert (report["n_papers"], report["tasks"]["title_abstract"]["pool"]) == (2, 2)
