"""The semantic benchmark: Perf against the published column, the four tasks against hand-computed
scores and an independent computation, and the command.
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
from conftest import ROOT, WORDS, make_paper, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import semantic_benchmark
from semantic_benchmark import Command, Evaluation, describe, evaluate, perf_scores
from semcse import command_line, errors
from semcse.bootstrap import Values, bootstrap_interval, paired_difference
from semcse.encoder import Embedded, Encoder, Usage
from semcse.model_folder import BUNDLED, find_model, load_encoder
from semcse.models import RECIPES, Wanted, list_of_models, load_model, usage_of
from semcse.papers import Paper, read_papers
from semcse.tables import TASKS, main_score, notes_on, table_lines
from semcse.types import Metric, Pooling
from settings import Settings
from tools.protocol_sweep import implied_pool

# -- Perf
# ----------------------------------------------------------------------------------------------------------------------------------------------------

# Facts of the published table (arXiv 2507.13105, README of its repository): model, title_abstract,
# abstract_segments, query, clustering, Perf.
PUBLISHED = [
    ("SciBERT", 807.74, 214.37, 213.45, 0.569, 0.000),
    ("SciDeBERTa", 1479.09, 861.55, 2465.26, 0.460, 0.000),
    ("SPECTER", 10.25, 12.23, 2.18, 0.692, 0.119),
    ("SciNCL", 5.68, 7.35, 2.29, 0.702, 0.357),
    ("SPECTER2 (base)", 4.52, 5.10, 1.17, 0.666, 0.553),
    ("SPECTER2 (proximity)", 5.34, 5.80, 1.46, 0.666, 0.395),
    ("all-MiniLM-L6-v2", 3.09, 8.19, 1.11, 0.730, 0.771),
    ("Jina-v2", 3.29, 8.77, 1.29, 0.703, 0.600),
    ("Jina-v3", 3.45, 6.96, 1.01, 0.719, 0.783),
    ("RoBERTa SimCSE", 23.71, 44.24, 8.92, 0.696, 0.116),
    ("NvEmbed-V2", 3.38, 3.84, 1.02, 0.721, 0.866),
    ("SemCSE", 2.47, 2.68, 1.23, 0.739, 0.925),
]


def scores(*values: float | None) -> dict[str, float | None]:
    """One row of a table of scores, in the order of TASKS."""
    return dict(zip(TASKS, values, strict=True))


def test_perf_gives_the_published_column_whatever_the_order_of_models() -> None:
    rows = list(PUBLISHED)
    for seed in range(3):
        perf = perf_scores({name: scores(*values) for name, *values, _ in rows})
        assert perf == pytest.approx(
            {name: published for name, *_, published in PUBLISHED}, abs=0.0006
        )
        random.Random(seed).shuffle(rows)


def test_perf_by_hand_where_models_share_the_best_score() -> None:
    # title: best 1, median 2. segments: best 2, median 4. query: the median is the best, so 1 or 0.
    # clustering: best 0.9, median 0.8.
    tables = {"a": scores(1, 4, 1, 0.8), "b": scores(2, 2, 1, 0.9), "c": scores(2.5, 8, 7, 0.75)}
    a, b, c = (1 + 0.5 + 1 + 0.5) / 4, (0.5 + 1 + 1 + 1) / 4, (0.25 + 0 + 0 + 0.25) / 4
    assert perf_scores(tables) == pytest.approx({"a": a, "b": b, "c": c})


def test_perf_is_undefined_for_fewer_than_three_models() -> None:
    one, two, three = (
        {"a": scores(1, 1, 1, 1)},
        {"b": scores(2, 2, 2, 0.5)},
        {"c": scores(3, 3, 3, 0)},
    )
    assert perf_scores({}) == {}
    assert perf_scores(one) == {"a": None}
    assert perf_scores(one | two) == {"a": None, "b": None}
    assert perf_scores(one | two | three) == {"a": 1.0, "b": 0.5, "c": 0.0}


@pytest.mark.parametrize(
    "lacking",
    [scores(1, 1, None, 1), {"title_abstract": 1.0, "abstract_segments": 1.0, "clustering": 1.0}],
)
def test_no_perf_is_formed_over_the_tasks_that_a_model_happens_to_have(
    lacking: dict[str, float | None],
) -> None:
    tables = {
        "lacking": lacking,
        "a": scores(1, 3, 1, 1),
        "b": scores(2, 2, 2, 0.5),
        "c": scores(3, 1, 3, 0),
    }
    perf = perf_scores(tables)
    assert perf["lacking"] is None
    # title: 1, 1, 2, 3 (best 1, median 1.5). segments: 1, 3, 2, 1 (the same). query: 1, 2, 3
    # (median 2). clustering: 1, 1, 0.5, 0 (best 1, median 0.75).
    assert perf["a"] == pytest.approx((1 + 0 + 1 + 1) / 4)
    assert perf["b"] == pytest.approx((0 + 0 + 0.5 + 0) / 4)
    assert perf["c"] == pytest.approx((0 + 1 + 0 + 0) / 4)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(*[st.integers(0, 50)] * 4), min_size=3, max_size=8),
    st.randoms(),
    st.integers(1, 9),
    st.integers(-9, 9),
)
def test_perf_does_not_depend_on_order_scale_or_offset(
    rows: list[tuple[int, int, int, int]], chance: random.Random, scale: int, offset: int
) -> None:
    perf = perf_scores({str(i): scores(*row) for i, row in enumerate(rows)})
    order = list(range(len(rows)))
    chance.shuffle(order)
    assert perf_scores(
        {str(i): scores(*(scale * x + offset for x in rows[i])) for i in order}
    ) == pytest.approx(perf)
    # purity counts as a rank does, upside down
    assert perf_scores(
        {str(i): scores(-row[3], row[1], row[2], -row[0]) for i, row in enumerate(rows)}
    ) == pytest.approx(perf)
    best_everywhere, worst_everywhere = (
        scores(-1, -1, -1, 51),
        scores(10**9, 10**9, 10**9, -(10**9)),
    )
    extended = perf_scores(
        {str(i): scores(*row) for i, row in enumerate(rows)}
        | {"best": best_everywhere, "worst": worst_everywhere}
    )
    assert extended["best"] == 1
    assert extended["worst"] == 0
    assert all(
        value is not None and 0 <= value <= 1 for value in [*perf.values(), *extended.values()]
    )


# -- The four tasks, by hand
# ---------------------------------------------------------------------------------------------------------------------------------


class FakeEncoder:
    """Gives every text the vector that it was told, and keeps what it was asked to embed. Texts
    that start with "Long" count as cut.
    """

    name = "fake"

    def __init__(
        self, vectors: Mapping[str, Sequence[float]], metric: Metric = "euclidean"
    ) -> None:
        self.vectors = vectors
        self.usage = Usage("cls", metric, 512, query_prompt="find: ", document_prompt="store: ")
        self.calls: list[tuple[str, list[str]]] = []

    def embed(self, texts: Sequence[str], prompt: str = "", label: str = "") -> Embedded:
        self.calls.append((prompt, list(texts)))
        vectors = (
            torch.tensor([self.vectors[text] for text in texts], dtype=torch.float32)
            if texts
            else torch.empty(0, 0)
        )
        return Embedded(vectors, sum(text.startswith("Long") for text in texts))


class Everywhere(dict[str, Sequence[float]]):
    """The vectors of a collapsed model: the same for every text."""

    def __init__(self, vector: Sequence[float]) -> None:
        super().__init__()
        self.vector = vector

    def __missing__(self, text: str) -> Sequence[float]:
        return self.vector


def evaluated(fake: FakeEncoder, papers: list[Paper], seed: int = 0) -> Evaluation:
    return evaluate(cast(Encoder, fake), papers, seed)


def described(fake: FakeEncoder, papers: list[Paper]) -> dict[str, Any]:
    return describe(cast(Encoder, fake), "papers.jsonl", evaluated(fake, papers), {}, 0)


def on_a_line() -> tuple[list[Paper], FakeEncoder]:
    """Twelve papers; the vectors have one dimension, and all that stands for paper i on the
    candidates' side is at 10 i.

    Papers 5 and 8 cannot be cut in halves; papers 0, 3 and 9 have a query; none has a field.
    """
    titles = [1, 16, 25, -5, 40, 50, -1, 70, 80, 200, -1, -1]
    first_halves = {6: 71, 9: 75}
    queries = {0: 12, 3: 30, 9: -1}
    papers: list[Paper] = []
    places: dict[str, float] = {}
    for i in range(12):
        cut = i not in (5, 8)
        abstract = f"Left {i}. Right {i}." if cut else f"Whole {i}."
        papers.append(
            Paper(f"p{i}", f"Title {i}", abstract, query=f"query {i}" if i in queries else " ")
        )
        places |= {f"Title {i}": titles[i], abstract: 10 * i}
        places |= {f"Left {i}.": first_halves.get(i, 10 * i), f"Right {i}.": 10 * i} if cut else {}
        places |= {f"query {i}": queries[i]} if i in queries else {}
    return papers, FakeEncoder({text: [float(place)] for text, place in places.items()})


def test_titles_are_ranked_against_all_abstracts() -> None:
    papers, fake = on_a_line()
    evaluation = evaluated(fake, papers)
    # title 1 at 16: abstract 20 is nearer than 10. title 2 at 25: 20 and 30 tie. title 9 at 200:
    # 110 and 100 come before 90.
    by_hand = [1, 2, 1.5, 4, 1, 1, 7, 1, 1, 3, 11, 12]
    assert evaluation.per_paper["title_abstract"].tolist() == by_hand
    task = evaluation.report["tasks"]["title_abstract"]
    del task["ci95"]
    assert task == pytest.approx(
        {
            "mean_rank": 45.5 / 12,
            "normalised_rank": (45.5 / 12 - 1) / 11,
            "median_rank": (1.5 + 2) / 2,
            "mrr": (5 + 1 / 2 + 2 / 3 + 1 / 4 + 1 / 7 + 1 / 3 + 1 / 11 + 1 / 12) / 12,
            "recall_at_1": 5 / 12,
            "recall_at_10": 10 / 12,
            "n": 12,
            "pool": 12,
        }
    )


def test_queries_are_ranked_against_the_abstracts_of_all_papers_not_only_of_those_with_a_query() -> (
    None
):
    papers, fake = on_a_line()
    evaluation = evaluated(fake, papers)
    # query 0 at 12: 10 (2) and 20 (8) before 0 (12). query 9 at -1: the abstracts at 0, 10, ... 80
    # before 90.
    assert {
        i: rank for i, rank in enumerate(evaluation.per_paper["query"].tolist()) if rank == rank
    } == {0: 3, 3: 1, 9: 10}
    task = evaluation.report["tasks"]["query"]
    del task["ci95"]
    assert task == pytest.approx(
        {
            "mean_rank": 14 / 3,
            "normalised_rank": 1 / 3,
            "median_rank": 3,
            "mrr": (1 / 3 + 1 + 1 / 10) / 3,
            "recall_at_1": 1 / 3,
            "recall_at_10": 1,
            "n": 3,
            "pool": 12,
        }
    )


def test_abstracts_without_a_cut_are_left_out_of_the_segments_and_counted() -> None:
    papers, fake = on_a_line()
    evaluation = evaluated(fake, papers)
    # half 6 at 71: only 70 is nearer than 60, for 80 is no candidate. half 9 at 75: 70 is nearer
    # than 90, 60 is as near.
    by_hand = {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 6: 2, 7: 1, 9: 2.5, 10: 1, 11: 1}
    assert {
        i: rank
        for i, rank in enumerate(evaluation.per_paper["abstract_segments"].tolist())
        if rank == rank
    } == by_hand
    task = evaluation.report["tasks"]["abstract_segments"]
    del task["ci95"]
    assert task == pytest.approx(
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
        }
    )


@pytest.mark.parametrize(("metric", "mean_rank"), [("euclidean", 1.5), ("cosine", 1.0)])
def test_the_usage_says_which_distance_is_meant(metric: Metric, mean_rank: float) -> None:
    # title 0 points exactly where abstract 0 points, but its end is nearer to that of abstract 1
    vectors = {"Title 0": (9, 0), "Title 1": (10, 2), "Abstract 0": (1, 0), "Abstract 1": (10, 2)}
    papers = [Paper(str(i), f"Title {i}", f"Abstract {i}") for i in range(2)]
    assert (
        evaluated(FakeEncoder(vectors, metric), papers).report["tasks"]["title_abstract"][
            "mean_rank"
        ]
        == mean_rank
    )


def in_fields() -> tuple[list[Paper], FakeEncoder]:
    """Papers on a line, in no order: field A at 0..10, C at 11.1, 12.1, 13.1, B at 100..110, D (10
    papers) at 1000..1009, two without a field amid A.
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
    papers = [
        Paper(f"p{place}", f"Title {place}", f"Abstract {place}", field=field)
        for field, place in rows
    ]
    return papers, FakeEncoder(
        {text: [place] for _, place in rows for text in (f"Title {place}", f"Abstract {place}")}
    )


def test_clustering_by_hand() -> None:
    papers, fake = in_fields()
    # A's papers at 0..5 have ten nearest of A only; from 6 on C's come in: at 6 one, at 7 two, at
    # 8, 9 and 10 three. D has 9 others a paper, C 2: no queries.
    by_hand = {
        f"p{place}": share
        for place, share in zip(range(11), [1.0] * 6 + [0.9, 0.8, 0.7, 0.7, 0.7], strict=True)
    } | {f"p{place}": 1.0 for place in range(100, 111)}
    for seed in (0, 1):  # there are no ties, so the seed does not matter
        evaluation = evaluated(fake, papers, seed)
        found = {
            paper.id: share
            for paper, share in zip(
                papers, evaluation.per_paper["clustering"].tolist(), strict=True
            )
            if share == share
        }
        assert found == pytest.approx(by_hand)
        task = evaluation.report["tasks"]["clustering"]
        del task["ci95"]
        assert task == pytest.approx(
            {"purity": 20.8 / 22, "k": 10, "n": 22, "left_out": 13, "pool": 35}
        )


def collapsible_papers() -> list[Paper]:
    """60 papers in file order of their field (12 small, 48 large); 20 have a query, 50 can be cut."""
    papers = []
    for i in range(60):
        abstract = f"Left {i}. Right {i}." if i % 6 else f"Whole {i}."
        papers.append(
            Paper(
                str(i),
                f"Title {i}",
                abstract,
                query=f"query {i}" if i % 3 == 0 else "",
                field="small" if i < 12 else "large",
            )
        )
    return papers


@pytest.mark.parametrize(
    ("metric", "vector"), [("euclidean", (3, 4)), ("cosine", (3, 4)), ("cosine", (0, 0))]
)
def test_a_collapsed_model_has_the_middle_rank(metric: Metric, vector: Sequence[float]) -> None:
    tasks = evaluated(FakeEncoder(Everywhere(vector), metric), collapsible_papers()).report["tasks"]
    for name, pool in (("title_abstract", 60), ("abstract_segments", 50), ("query", 60)):
        middle = (pool + 1) / 2
        assert (
            tasks[name]["pool"],
            tasks[name]["mean_rank"],
            tasks[name]["normalised_rank"],
            tasks[name]["ci95"],
        ) == (pool, middle, 0.5, [middle, middle])
        assert tasks[name]["recall_at_1"] == tasks[name]["recall_at_10"] == 0


def test_a_collapsed_model_clusters_by_chance_not_by_file_order() -> None:
    fake, papers = FakeEncoder(Everywhere((3, 4))), collapsible_papers()
    purities = [
        evaluated(fake, papers, seed).report["tasks"]["clustering"]["purity"] for seed in range(25)
    ]
    chance = (48 * 47 + 12 * 11) / (60 * 59)  # 0.675; taking the neighbours in file order gives 0.2
    assert np.mean(purities) == pytest.approx(chance, abs=0.06)


def test_what_is_embedded_how_often_and_in_which_role() -> None:
    papers, fake = on_a_line()
    evaluated(fake, papers)
    embedded = Counter((prompt, text) for prompt, texts in fake.calls for text in texts)
    cut = [i for i in range(12) if i not in (5, 8)]
    documents = [paper.abstract for paper in papers] + [
        f"{side} {i}." for side in ("Left", "Right") for i in cut
    ]
    questions = [paper.title for paper in papers] + ["query 0", "query 3", "query 9"]
    assert embedded == Counter(
        {
            **{("store: ", text): 1 for text in documents},
            **{("find: ", text): 1 for text in questions},
        }
    )


def test_truncated_share_is_over_all_texts_of_all_tasks() -> None:
    papers = [
        Paper("0", "Long title", "Long one. Two.", query="q"),
        Paper("1", "Title", "Whole"),
        Paper("2", "Other", "Three. Long four."),
    ]
    report = evaluated(FakeEncoder(Everywhere((1, 0))), papers).report
    # cut: a title, an abstract, a first half, a second half; embedded: 3 titles, 3 abstracts, 2 + 2
    # halves, 1 query
    assert report["truncated_share"] == pytest.approx(4 / 11, abs=1e-6)
    assert report["n_papers"] == 3


def test_tasks_without_data_are_null_with_the_reason_and_no_mean_is_formed() -> None:
    # one abstract only can be cut, so that its second half has no other candidate
    papers = [
        Paper("0", "Title 0", "Left. Right.", field="A"),
        Paper("1", "Title 1", "Whole", field="A"),
        Paper("2", "Title 2", "Other"),
    ]
    reports = {name: described(FakeEncoder(Everywhere((1, 0))), papers) for name in ("x", "y", "z")}
    tasks = reports["x"]["tasks"]
    assert tasks["query"] == {"mean_rank": None, "reason": "no paper has the text this task needs"}
    assert tasks["abstract_segments"] == {
        "mean_rank": None,
        "reason": "fewer than two candidates",
        "left_out": 2,
    }
    assert tasks["clustering"] == {"purity": None, "reason": "no field has more than 10 papers"}
    assert tasks["title_abstract"]["mean_rank"] == 2
    perf = perf_scores(
        {
            name: {task: report["tasks"][task][main_score(task)] for task in TASKS}
            for name, report in reports.items()
        }
    )
    assert perf == {"x": None, "y": None, "z": None}
    lines = table_lines(reports, perf)
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "x",
        "2.00 [2.00, 2.00]",
        "no data",
        "no data",
        "no data",
        "-",
    ]
    assert "query: no data, no paper has the text this task needs." in notes_on(reports["x"])


def test_the_table_shows_scores_intervals_and_pools() -> None:
    papers, fake = on_a_line()
    fields, in_fields_fake = in_fields()
    report = described(fake, papers)
    report["tasks"]["clustering"] = described(in_fields_fake, fields)["tasks"]["clustering"]
    lines = table_lines(
        {"ours": report, "a much longer name": report},
        {"ours": 0.12345, "a much longer name": None},
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == [
        "",
        "title_abstract (pool 12) lower is better",
        "abstract_segments (pool 10) lower is better",
        "query (pool 12) lower is better",
        "clustering (pool 35, k 10) higher is better",
        "Perf",
    ]
    interval = {
        name: [f"{bound:.{3 if name == 'clustering' else 2}f}" for bound in task["ci95"]]
        for name, task in report["tasks"].items()
    }
    shown = dict(zip(TASKS, ("3.79", "1.25", "4.67", "0.945"), strict=True))
    row = [f"{shown[name]} [{interval[name][0]}, {interval[name][1]}]" for name in TASKS]
    assert cells[2:] == [["ours", *row, "0.123"], ["a much longer name", *row, "-"]]
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"|", "-"}
    assert {"abstract_segments: 2 papers left out.", "clustering: 13 papers left out."} < set(
        notes_on(report)
    )


# -- Bootstrap
# -----------------------------------------------------------------------------------------------------------------------------------------------


def plain_bootstrap(values: Values, seed: int) -> list[float]:
    """The percentile interval of 1,000 resamples drawn as one matrix."""
    picks = np.random.default_rng(seed).integers(0, len(values), (1000, len(values)))
    return [float(bound) for bound in np.quantile(values[picks].mean(axis=1), [0.025, 0.975])]


def test_every_interval_is_the_bootstrap_over_the_papers_that_were_queries() -> None:
    for papers, fake in (on_a_line(), in_fields()):
        for seed in (0, 7):
            evaluation = evaluated(fake, papers, seed)
            with_scores = {
                name: task
                for name, task in evaluation.report["tasks"].items()
                if "reason" not in task
            }
            assert len(with_scores) >= 2
            for name, task in with_scores.items():
                values = evaluation.per_paper[name][~np.isnan(evaluation.per_paper[name])]
                assert task["n"] == len(values)
                assert task["ci95"] == pytest.approx(plain_bootstrap(values, seed))
                low, high = task["ci95"]
                assert low <= values.mean() <= high
                assert (low < high) == (len(set(values)) > 1)


def test_the_seed_fixes_the_interval_and_changes_nothing_else() -> None:
    papers, fake = on_a_line()
    first, again, other = (
        evaluated(fake, papers, seed).report["tasks"]["title_abstract"] for seed in (0, 0, 1)
    )
    assert first == again
    assert first["ci95"] != other["ci95"]
    assert {**first, "ci95": None} == {**other, "ci95": None}


def test_the_interval_has_the_width_that_theory_gives_and_halves_with_four_times_the_papers() -> (
    None
):
    draw = np.random.default_rng(3)
    for papers in (400, 1600):
        values = draw.exponential(5.0, papers)
        low, high = bootstrap_interval(values, 0)
        assert high - low == pytest.approx(2 * 1.96 * values.std() / papers**0.5, rel=0.1)


# -- The bundled encoder against an independent computation
# ---------------------------------------------------------------------------------------------------

# 12 sample papers each; the first four hold abstracts of more than 256 tokens
SIXTY = ("Materials science", "Physics", "Chemistry", "Medicine", "Art")


@pytest.fixture(scope="module")
def sixty() -> list[Paper]:
    return [
        paper
        for paper in read_papers(ROOT / "data/sample_test.jsonl", ("title", "abstract"))
        if paper.field in SIXTY
    ]


Texts = dict[str, Values]


@pytest.fixture(scope="module")
def by_sentence_transformers(sixty: list[Paper]) -> dict[Pooling, Texts]:
    """Vectors of the 60 papers' texts by sentence-transformers: as the package's own files say
    (mean, length 1), and the plain first token's.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(find_model(BUNDLED)), device="cpu")
    cut = [plain_halves(paper.abstract) for paper in sixty]
    texts = {
        "titles": [paper.title for paper in sixty],
        "abstracts": [paper.abstract for paper in sixty],
        "first": [first for first, _ in cut],
        "second": [second for _, second in cut],
        "queries": [paper.query for paper in sixty],
    }
    found: dict[Pooling, Texts] = {"mean": {}, "cls": {}}
    for kind, group in texts.items():
        outputs: Any = model.encode(group, output_value=None, show_progress_bar=False)
        found["mean"][kind] = np.array(
            [output["sentence_embedding"].double().numpy() for output in outputs]
        )
        found["cls"][kind] = np.array(
            [output["token_embeddings"][0].double().numpy() for output in outputs]
        )
    return found


def plain_halves(abstract: str) -> tuple[str, str]:
    """The halving rule read letter by letter: after a sentence mark before white space, nearest to
    the middle, the earlier on a tie.
    """
    ends = [
        i + 1
        for i in range(len(abstract) - 1)
        if abstract[i] in ".!?" and abstract[i + 1].isspace()
    ]
    middle = len(abstract) / 2
    end = sorted(ends, key=lambda end: (abs(end - middle), end))[0]
    return abstract[:end], abstract[end:].lstrip()


def plain_distances(a: Values, b: Values, metric: Metric) -> Values:
    if metric == "cosine":
        a, b = (vectors / np.linalg.norm(vectors, axis=1)[:, None] for vectors in (a, b))
        return np.asarray(1 - a @ b.T)
    return np.asarray(np.linalg.norm(a[:, None, :] - b[None, :, :], axis=2))


def plain_ranks(a: Values, b: Values, metric: Metric) -> list[float]:
    table = plain_distances(a, b, metric)
    return [
        1 + float(sum(row < row[i])) + (float(sum(row == row[i])) - 1) / 2
        for i, row in enumerate(table)
    ]


def plain_purity(abstracts: Values, fields: list[str], metric: Metric) -> list[float]:
    table = plain_distances(abstracts, abstracts, metric)
    np.fill_diagonal(table, np.inf)
    return [
        sum(fields[j] == field for j in np.argsort(row)[:10]) / 10
        for row, field in zip(table, fields, strict=True)
    ]


# The second case: the recipe's `normalize` must not outlive `--metric euclidean`. Euclidean is the
# distance of raw vectors (README, "Benchmark protocol"), and main.py's row before training, which
# asks the same of the same encoder, takes them raw.
@pytest.mark.parametrize(
    ("wanted", "pooling", "metric"),
    [(Wanted(), "mean", "cosine"), (Wanted("cls", "euclidean"), "cls", "euclidean")],
)
def test_the_bundled_encoder_scores_as_an_independent_computation_says(
    sixty: list[Paper],
    by_sentence_transformers: dict[Pooling, Texts],
    wanted: Wanted,
    pooling: Pooling,
    metric: Metric,
) -> None:
    encoder, _ = load_model(BUNDLED, wanted, Settings(device="cpu"))
    evaluation = evaluate(encoder, sixty, 0)
    vectors = by_sentence_transformers[pooling]
    plain = {
        "title_abstract": plain_ranks(vectors["titles"], vectors["abstracts"], metric),
        "abstract_segments": plain_ranks(vectors["first"], vectors["second"], metric),
        "query": plain_ranks(vectors["queries"], vectors["abstracts"], metric),
        "clustering": plain_purity(vectors["abstracts"], [paper.field for paper in sixty], metric),
    }
    assert {name: values.tolist() for name, values in evaluation.per_paper.items()} == plain
    assert evaluation.report["truncated_share"] > 0  # so that the cut at 256 tokens is compared too
    tasks = evaluation.report["tasks"]
    assert {name: tasks[name][main_score(name)] for name in TASKS} == pytest.approx(
        {name: np.mean(values) for name, values in plain.items()}
    )


# Both flags together must not drop what a folder's sentence-transformers files say besides (256
# tokens, vectors of length 1).
@pytest.mark.parametrize(
    "wanted", [Wanted(metric="cosine"), Wanted("cls", "euclidean"), Wanted("mean", "cosine")]
)
def test_the_bundled_encoder_is_used_alike_by_name_and_by_folder(wanted: Wanted) -> None:
    assert (
        usage_of(str(find_model(BUNDLED)), wanted, Settings())[0]
        == usage_of(BUNDLED, wanted, Settings())[0]
    )


# -- The command
# ---------------------------------------------------------------------------------------------------------------------------------------------

RANKING_KEYS = {
    "mean_rank",
    "normalised_rank",
    "median_rank",
    "mrr",
    "recall_at_1",
    "recall_at_10",
    "ci95",
    "n",
    "pool",
}
TASK_KEYS = {
    "title_abstract": RANKING_KEYS,
    "abstract_segments": RANKING_KEYS | {"left_out"},
    "query": RANKING_KEYS,
    "clustering": {"purity", "k", "ci95", "n", "left_out", "pool"},
}
REPORT_KEYS = {
    "model",
    "metric",
    "pooling",
    "eval_file",
    "n_papers",
    "tasks",
    "settings",
    "versions",
    "seconds",
    "truncated_share",
}
# Words in the two sentences of the first papers' abstracts. tiny_bert reads a word or full stop as
# one token and keeps 64 with its two special ones, so that abstracts 0, 2 and 3 are cut, abstract 1
# just fits, and of the halves only the first of paper 2 is cut.
SENTENCE_WORDS = {0: (31, 30), 1: (30, 30), 2: (62, 4), 3: (61, 5)}


def rows_of_counted_words(papers: int = 24) -> list[dict[str, Any]]:
    """Papers whose tokens can be counted by hand: titles of 3 words, queries of 2, abstracts of two
    sentences (5 words each, but see SENTENCE_WORDS).
    """

    def words(number: int, count: int) -> str:
        return " ".join(
            WORDS[(7 * number + i * (number % 9 + 1)) % len(WORDS)] for i in range(count)
        )

    def abstract(number: int) -> str:
        first, second = SENTENCE_WORDS.get(number, (5, 5))
        return f"{words(number, first)}. {words(number + 13, second)}."

    return [
        make_paper(n, title=words(n + 5, 3), query=words(n + 9, 2), abstract=abstract(n))
        for n in range(papers)
    ]


def refusal(*words: str | Path) -> str:
    """The one-line error of the command, which must be one of bad usage or input."""
    with pytest.raises(errors.UserError) as caught:
        run_here(*words)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_here(*words: str | Path) -> None:
    """The command in this process: parse and run."""
    semantic_benchmark.run(
        command_line.parse_command_line(Command, [str(word) for word in words], Command())
    )


def saved_model(tiny_bert: Path, folder: Path, metric: Metric, pooling: Pooling) -> Path:
    """A folder with semcse.json, as training saves it."""
    load_encoder(str(tiny_bert), Usage(pooling, metric, 48)).save(folder, "tiny")
    return folder


def test_list_models_names_every_recipe_with_its_use() -> None:
    done = run_script("semantic_benchmark.py", "--list-models")
    assert done.returncode == 0
    assert done.stdout.strip() == list_of_models()
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        [name, recipe.hub_id] for name, recipe in RECIPES.items()
    ]


def test_one_model_gives_the_single_object_and_the_table(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    eval_file, output = papers_file(rows_of_counted_words()), tmp_path / "out"
    done = run_script(
        "semantic_benchmark.py",
        "--model",
        tiny_bert,
        "--eval-file",
        eval_file,
        "--output-dir",
        output,
        "--seed",
        "3",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    assert set(report) == REPORT_KEYS
    assert {name: set(task) for name, task in report["tasks"].items()} == TASK_KEYS
    assert [report[key] for key in ("model", "metric", "pooling", "eval_file", "n_papers")] == [
        str(tiny_bert),
        "euclidean",
        "cls",
        str(eval_file),
        24,
    ]
    assert {
        key: report["settings"][key] for key in ("metric", "pooling", "max_length", "seed")
    } == {"metric": "euclidean", "pooling": "cls", "max_length": 64, "seed": 3}
    assert report["settings"]["read_from"] == {
        "pooling": "settings",
        "metric": "settings",
        "max_length": "settings",
    }
    assert set(report["versions"]) >= {"commit", "python", "torch", "transformers", "numpy"}
    assert set(report["seconds"]) == {"embedding", "tasks"}
    assert report["truncated_share"] == pytest.approx(
        4 / 120, abs=1e-6
    )  # 3 abstracts and a half, of 24 titles, abstracts, first and second halves, and queries
    # the same as the functions give in this process
    encoder = load_encoder(str(tiny_bert), Usage("cls", "euclidean", 64), "cpu")
    again = evaluate(encoder, list(read_papers(eval_file)), 3).report["tasks"]
    assert {name: report["tasks"][name][main_score(name)] for name in TASKS} == pytest.approx(
        {name: again[name][main_score(name)] for name in TASKS}
    )

    written = (output / "benchmark.md").read_text(encoding="utf-8")
    table = "\n".join(table_lines({str(tiny_bert): report}))
    for head in (
        "title_abstract (pool 24)",
        "abstract_segments (pool 24)",
        "query (pool 24)",
        "clustering (pool 24, k 10)",
    ):
        assert head in table.splitlines()[0]
    assert done.stdout == table + "\n"
    assert f"\n{table}\n" in written
    assert f"24 papers of {eval_file}" in written
    assert sorted(path.name for path in output.iterdir()) == ["benchmark.json", "benchmark.md"]


def test_max_length_is_a_flag_and_changes_what_is_cut(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    eval_file = papers_file(rows_of_counted_words())
    run_here(
        "--model",
        tiny_bert,
        "--max-length",
        "9",
        "--eval-file",
        eval_file,
        "--output-dir",
        tmp_path / "out",
    )
    report = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))
    assert (report["settings"]["max_length"], report["settings"]["read_from"]["max_length"]) == (
        9,
        "flag",
    )
    # all abstracts (14 tokens or more) and the six halves of more than 6 words
    assert report["truncated_share"] == pytest.approx((24 + 6) / 120, abs=1e-6)


def test_three_models_give_a_list_and_their_perf(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    eval_file, output = papers_file(rows_of_counted_words()), tmp_path / "out"
    ours = saved_model(tiny_bert, tmp_path / "ours", "cosine", "mean")
    names = [str(ours), BUNDLED, str(tiny_bert)]
    models = [word for name in names for word in ("--model", name)]
    done = run_script(
        "semantic_benchmark.py", *models, "--eval-file", eval_file, "--output-dir", output
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    assert set(found) == {"models", "perf", "paired"}
    assert [report["model"] for report in found["models"]] == names
    assert all(set(report) == REPORT_KEYS for report in found["models"])
    used = [
        [report["settings"][key] for key in ("metric", "pooling", "max_length")]
        for report in found["models"]
    ]
    assert used == [["cosine", "mean", 48], ["cosine", "mean", 256], ["euclidean", "cls", 64]]
    assert [set(report["settings"]["read_from"].values()) for report in found["models"]] == [
        {"semcse.json"},
        {"recipe"},
        {"settings"},
    ]

    by_task = [
        [
            report["tasks"][task][main_score(task)] * (-1 if task == "clustering" else 1)
            for task in TASKS
        ]
        for report in found["models"]
    ]
    shares = []
    for column in zip(*by_task, strict=True):
        best, middle, _ = sorted(column)
        shares.append(
            [
                (
                    float(x == best)
                    if middle == best
                    else max(0.0, 1 - (x - best) / (middle - best) / 2)
                )
                for x in column
            ]
        )
    assert found["perf"] == pytest.approx(dict(zip(names, np.mean(shares, axis=0), strict=True)))

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert [(row[0], row[-1]) for row in rows[2:5]] == [
        (name, f"{found['perf'][name]:.3f}") for name in names
    ]
    assert [pair["models"] for pair in found["paired"]] == [names[:2], names[::2], names[1:]]
    assert [row[0] for row in rows[-3:]] == [" - ".join(pair["models"]) for pair in found["paired"]]
    for one, other, pair in ((0, 1, found["paired"][0]), (1, 2, found["paired"][2])):
        for task, values in pair["tasks"].items():
            scores = [found["models"][i]["tasks"][task][main_score(task)] for i in (one, other)]
            assert values["difference"] == pytest.approx(scores[0] - scores[1])
            assert values["ci95"][0] <= values["difference"] <= values["ci95"][1]
    assert done.stdout in (output / "benchmark.md").read_text(encoding="utf-8")


def test_a_paired_difference_is_over_the_papers_that_both_have_and_draws_the_same_ones() -> None:
    nan = float("nan")
    one, other = np.array([1.0, 5.0, nan, 3.0, 90.0]), np.array([2.0, 6.0, 7.0, 4.0, nan])
    # apart by 1 on each paper, however far the papers are from each other
    assert paired_difference(one, other, 0) == (-1.0, (-1.0, -1.0))
    with pytest.raises(ValueError, match="no paper"):
        paired_difference(one[2:3], other[2:3], 0)
    draw = np.random.default_rng(5)
    noise = draw.normal(0.3, 1.0, size=400)
    mean, (low, high) = paired_difference(100 * np.ones(400) + noise, 100 * np.ones(400), 1)
    error = noise.std() / 20  # of the mean of 400 values
    assert mean == pytest.approx(noise.mean())
    assert (low, high) == pytest.approx(
        (mean - 1.96 * error, mean + 1.96 * error), abs=0.25 * error
    )


def test_the_published_rows_of_the_recipes_are_the_papers() -> None:
    names = {
        "SPECTER2 (base)": "SPECTER2_base",
        "SPECTER2 (proximity)": "SPECTER2_proximity",
        "RoBERTa SimCSE": "SimCSE",
        "NvEmbed-V2": "NV-Embed-v2",
    }
    assert {name: one.published for name, one in RECIPES.items() if one.published} == {
        names.get(name, name): tuple(row[:4]) for name, *row in PUBLISHED
    }


def test_the_implied_pool_is_where_random_pools_have_the_published_mean_rank() -> None:
    """Pools of 41 drawn from 401 candidates: each of the others stands in one with chance 40/400,
    so a mean rank of 21 becomes 3.
    """
    assert implied_pool(21.0, 401, 3.0) == pytest.approx(41)
    assert implied_pool(21.0, 401, 21.0) == pytest.approx(401)
    assert implied_pool(1.0, 401, 3.0) is None
    draw = np.random.default_rng(0)
    better = draw.integers(0, 41, size=20_000)  # candidates ahead of the positive, 20 on average
    within_pool = 1 + draw.hypergeometric(better, 400 - better, 40)
    assert implied_pool(1 + better.mean(), 401, within_pool.mean()) == pytest.approx(41, rel=0.02)


def test_a_sweep_says_what_the_papers_protocol_would_have_to_be(
    papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The bundled encoder stands in for a published checkpoint."""
    eval_file, output = papers_file(rows_of_counted_words()), tmp_path / "out"
    run_here("--model", BUNDLED, "--eval-file", eval_file, "--output-dir", output, "--sweep")
    report = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    tasks, fit = report["tasks"], report["fit"]
    assert set(fit) == {"abstract", "title + abstract"}
    for task, published in zip(TASKS[:3], (3.09, 8.19, 1.11), strict=True):
        mean = tasks[task]["mean_rank"]
        assert fit["abstract"]["implied_pool"][task] == pytest.approx(
            1 + (published - 1) * (tasks[task]["pool"] - 1) / (mean - 1)
        )
    assert set(fit["title + abstract"]["implied_pool"]) <= {"query"}
    assert fit["abstract"]["purity"]["10"] == tasks["clustering"]["purity"]
    assert fit["title + abstract"]["purity"]["10"] != tasks["clustering"]["purity"]
    for one in fit.values():
        assert abs(one["purity"][str(one["nearest_k"])] - 0.730) == min(
            abs(purity - 0.730) for purity in one["purity"].values()
        )
    assert "- title + abstract: implied pool: query" in (output / "benchmark.md").read_text(
        encoding="utf-8"
    )
    assert "is not in the paper's table; sweep one of SemCSE, SciBERT" in refusal(
        "--model", "SemCSE_cosine", "--eval-file", eval_file, "--sweep"
    )


def test_papers_of_named_training_files_are_left_out_for_all_models(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    rows = rows_of_counted_words(8)
    eval_file, output = papers_file(rows), tmp_path / "out"
    by_id = papers_file([{"id": rows[1]["id"], "summaries": ["One.", "Two."]}], "by_id.jsonl")
    by_text = papers_file(
        [
            {"id": "other", "title": f" {rows[2]['title'].upper()}."},
            {"id": "more", "abstract": rows[3]["abstract"]},
        ],
        "by_text.jsonl",
    )
    run_here(
        "--model",
        tiny_bert,
        "--eval-file",
        eval_file,
        "--output-dir",
        output,
        "--trained-on",
        by_id,
        "--trained-on",
        by_text,
    )
    found = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    assert (found["n_papers"], found["left_out_as_training_papers"]) == (
        5,
        {str(by_id): 1, str(by_text): 2},
    )
    assert f"- 2 papers left out: they stand in {by_text}." in (output / "benchmark.md").read_text(
        encoding="utf-8"
    )
    everything = papers_file(rows[1:], "everything.jsonl")
    words = (
        "--model",
        tiny_bert,
        "--eval-file",
        eval_file,
        "--output-dir",
        tmp_path / "none",
        "--trained-on",
        everything,
    )
    assert "1 papers are left without those of --trained-on" in refusal(*words)


def test_missing_tasks_are_null_in_the_file_and_no_data_in_the_table(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    eval_file = papers_file([make_paper(n, query="", field="") for n in range(4)])
    run_here("--model", tiny_bert, "--eval-file", eval_file, "--output-dir", tmp_path / "out")
    tasks = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))["tasks"]
    assert (tasks["query"]["mean_rank"], tasks["clustering"]["purity"]) == (None, None)
    written = (tmp_path / "out/benchmark.md").read_text(encoding="utf-8")
    row = next(line for line in written.splitlines() if line.startswith(f"| {tiny_bert}"))
    assert [cell.strip() == "no data" for cell in row.split("|")[2:-1]] == [
        False,
        False,
        True,
        True,
    ]
    for name in ("query", "clustering"):
        assert f"- {name}: no data, {tasks[name]['reason']}." in written


@pytest.mark.parametrize(
    ("flag", "value", "trained"),
    [("--metric", "euclidean", "cosine"), ("--pooling", "cls", "mean")],
)
def test_a_flag_that_contradicts_the_model_is_refused(
    tiny_bert: Path,
    papers_file: Callable[..., Path],
    tmp_path: Path,
    flag: str,
    value: str,
    trained: str,
) -> None:
    ours, output = saved_model(tiny_bert, tmp_path / "ours", "cosine", "mean"), tmp_path / "out"
    words = (
        "--model",
        ours,
        flag,
        value,
        "--eval-file",
        papers_file(rows_of_counted_words(4)),
        "--output-dir",
        output,
    )
    line = (
        f"{flag} {value} contradicts {ours}, which was trained with {flag[2:]} {trained} (its"
        f" semcse.json); leave {flag} out"
    )
    if flag == "--metric":
        done = run_script("semantic_benchmark.py", *words)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")
    else:
        assert refusal(*words) == line
    assert not output.exists()


def test_a_flag_on_a_foreign_model_is_followed_and_recorded(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    eval_file, output = papers_file(rows_of_counted_words(6)), tmp_path / "out"
    run_here(
        "--model",
        tiny_bert,
        "--metric",
        "cosine",
        "--pooling",
        "mean",
        "--eval-file",
        eval_file,
        "--output-dir",
        output,
    )
    report = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    assert (report["metric"], report["pooling"]) == ("cosine", "mean")
    assert report["settings"]["read_from"] == {
        "pooling": "flag",
        "metric": "flag",
        "max_length": "settings",
    }
    expected = evaluate(
        load_encoder(str(tiny_bert), Usage("mean", "cosine", 64)), list(read_papers(eval_file)), 0
    ).report["tasks"]
    assert report["tasks"] == expected


def test_bad_usage_is_refused_and_writes_nothing(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    output, eval_file = tmp_path / "out", papers_file(rows_of_counted_words(4))
    rest = ("--eval-file", eval_file, "--output-dir", output)
    assert refusal(*rest) == "no model named; give --model NAME_OR_ID_OR_DIR, or --list-models"
    assert refusal("--model", tiny_bert, "--model", BUNDLED, "--model", tiny_bert, *rest).endswith(
        "are the same; name each model once"
    )
    # the first model's scores are not written either
    assert "no such folder" in refusal("--model", tiny_bert, "--model", "./nowhere", *rest)
    assert "config.json" in refusal("--model", tmp_path, *rest)
    assert "is a file" in refusal(
        "--model", tiny_bert, "--eval-file", eval_file, "--output-dir", eval_file
    )
    assert not output.exists()


def test_an_unknown_hub_id_is_refused_in_one_line(
    papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    done = run_script(
        "semantic_benchmark.py",
        "--model",
        "nobody/nothing",
        "--eval-file",
        papers_file(rows_of_counted_words(4)),
        "--output-dir",
        tmp_path / "out",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model nobody/nothing ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# A length below 3 would be taken as "no cut" or leave the special tokens only.
@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max-length", "-5"), ("--max-length", "0"), ("--max-length", "2"), ("--seed", "-1")],
)
def test_numbers_out_of_range_are_refused(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path, flag: str, value: str
) -> None:
    eval_file = papers_file(rows_of_counted_words(4))
    assert flag in refusal(
        "--model",
        tiny_bert,
        flag,
        value,
        "--eval-file",
        eval_file,
        "--output-dir",
        tmp_path / "out",
    )
    assert not (tmp_path / "out").exists()


GOOD = json.dumps(make_paper(1)).encode()


def changed(**changes: Any) -> bytes:
    return json.dumps(make_paper(2, **changes)).encode()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, ": no such file; "),
        (b"", ": holds no papers; "),
        (GOOD + b"\n", ": holds one paper only; "),
        (GOOD + b"\n{\n", ":2: is not JSON"),
        (
            GOOD + b"\n" + json.dumps({"id": "x", "abstract": "Text."}).encode(),
            ':2: key "title" is missing; ',
        ),
        (GOOD + b"\n" + changed(abstract=" \n"), ':2: key "abstract" is blank; '),
        (GOOD + b"\n" + changed(field=3), ':2: key "field" is a number; '),
        (GOOD + b"\n" + changed(id="paper-1"), ':2: id "paper-1" stands on an earlier line too; '),
        (b"\x1f\x8b\x08\x00cut", ": damaged gzip file"),
    ],
)
def test_bad_evaluation_files_are_refused_and_nothing_is_written(
    tiny_bert: Path, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    eval_file, output = tmp_path / "papers.jsonl", tmp_path / "out"
    if content is not None:
        eval_file.write_bytes(content)
    assert refusal(
        "--model", tiny_bert, "--eval-file", eval_file, "--output-dir", output
    ).startswith(f"{eval_file}{complaint}")
    assert not output.exists()


def test_skip_invalid_scores_the_good_lines(
    tiny_bert: Path, papers_file: Callable[..., Path], tmp_path: Path
) -> None:
    eval_file = papers_file([make_paper(0), make_paper(1, abstract=""), make_paper(2)])
    run_here(
        "--model",
        tiny_bert,
        "--eval-file",
        eval_file,
        "--output-dir",
        tmp_path / "out",
        "--skip-invalid",
    )
    report = json.loads((tmp_path / "out/benchmark.json").read_text(encoding="utf-8"))
    assert (report["n_papers"], report["tasks"]["title_abstract"]["pool"]) == (2, 2)
