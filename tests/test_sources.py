"""semcse/sources.py: rows of files of every kind, BibTeX and LaTeX, and papers inside rows."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from semcse.errors import UserError
from semcse.papers import LONGEST_WORD
from semcse.sources import latex_to_text, objects_with, open_file, read_bibtex, text_of

COLUMNS = ("key", "name", "text")
HARD = [  # cells that spreadsheets, quoting and type detection often spoil
    ("007", "NA", "Plain text"),
    ("1e5", 'A "quoted", comma; and tab', "5 < 6, {x} Zażółć\u00a0naïve"),
    ("ok", "null", "First line\nSecond line"),
]
DELIMITERS = {"a.csv": ";", "a.tsv": "\t"}


def write_hard(path: Path) -> None:
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in HARD]
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return
    with path.open("w", encoding="utf-8", newline="") as handle:
        if kind in ("csv", "tsv"):
            handle.write("\ufeff")  # as spreadsheets write it
            table = csv.DictWriter(handle, COLUMNS, delimiter=DELIMITERS.get(path.name, ","))
            table.writeheader()
            table.writerows(rows)
        elif kind == "bib":
            for key, name, text in HARD:
                handle.write(f"@article{{{key},\n key = {{{key}}}, name = {{{{{name}}}}},\n")
                handle.write(f" text = {{{text}}},\n year = 2020\n}}\n")
        elif kind == "json":
            json.dump(rows, handle, indent=1)
        else:
            handle.write("\n".join(map(json.dumps, rows)) + "\n\n")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    "name", "a.csv b.csv a.tsv b.csv.gz a.json a.jsonl a.jsonl.gz a.parquet a.bib a[1].CSV".split()
)
def test_every_kind_of_file_gives_the_same_cells(tmp_path: Path, name: str) -> None:
    write_hard(tmp_path / name)
    rows = open_file(tmp_path / name, list(COLUMNS))
    found = [tuple(text_of(row[column]) for column in COLUMNS) for row in rows]
    expected = [(key, title, " ".join(text.split())) for key, title, text in HARD]
    if name == "a.bib":  # where braces are markup
        expected[1] = (*expected[1][:2], expected[1][2].replace("{x}", "x"))
    assert found == expected


def test_json_lines_may_change_their_keys_and_types(tmp_path: Path) -> None:
    rows = [{"year": 2000}, {"year": "n.d.", "late": [1]}, {"year": None, "late": {"a": "\ud83d"}}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(open_file(path, [])) == rows


@pytest.mark.parametrize(
    "cell, text",
    [
        (None, ""),
        (7, "7"),
        (" two \n words\u00a0", "two words"),
        (["One.", None, " Two  words. "], "One.  Two words."),
        ("half \ud83d", "half ?"),
        ("x" * 2 * LONGEST_WORD + " y", "x" * LONGEST_WORD + " y"),
    ],
)
def test_a_cell_becomes_text(cell: Any, text: str) -> None:
    assert text_of(cell) == text


BIBTEX = r"""Made by a reference manager. mail@example.org
@Comment{jabref-meta: {x}}
@STRING{river = "Rivers of "}
@preamble{"\newcommand{\x}{y}"}
@article{first2020,
  author = {M{\"u}ller, J. and {\L}uka, O.},
  Title = {{The} {DNA} of {\'E}lan \& caf\'e: a na\"{\i}ve {\v{S}}koda, \textit{Homo sapiens}},
  abstract = {Grew by 50\% of $\alpha_1$ in CO\textsubscript{2}, 3~mm.
     See "this" {nested {deeper {still}}} = {a}. 40% cost \$5
@ home},
  month = jan # "~1", year = 2020, journal = undefined
}
@inproceedings{ second:x/1 , title = "A {"}quoted{"} title", abstract="{braces}, and = signs" ,}
@ARTICLE{WOS:0,Title={{Upper}},Abstract={{}},Unique-ID={{WOS:0}}} @misc(d, title = RIVER # {Asia})
"""


def test_bibtex_as_reference_managers_write_it(tmp_path: Path) -> None:
    path = tmp_path / "library.bib"
    path.write_text(BIBTEX, encoding="utf-8")
    rows = [{name: text_of(value) for name, value in row.items()} for row in read_bibtex(path)]
    assert rows == [
        {
            "id": "first2020",
            "author": "Müller, J. and Łuka, O.",
            "title": "The DNA of Élan & café: a naïve Škoda, Homo sapiens",
            "abstract": r"Grew by 50% of $\alpha_1$ in CO2, 3 mm."
            ' See "this" nested deeper still = a. 40% cost $5 @ home',
            "month": "January 1",
            "year": "2020",
            "journal": "",
        },
        {"id": "second:x/1", "title": 'A "quoted" title', "abstract": "braces, and = signs"},
        {"id": "WOS:0", "title": "Upper", "abstract": "", "unique-id": "WOS:0"},
        {"id": "d", "title": "Rivers of Asia"},
    ]


@pytest.mark.parametrize(
    "entry",
    [
        "@article{a,\n title = {One {two},\n year = {1}\n}",
        "@article{a,\n title {One}\n}",
        "@article{a, title = {A stray} brace}}",
        "@article{a,\n title = {One",
    ],
)
def test_a_broken_bibtex_entry_is_named_by_its_line(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "broken.bib"
    good = "@article{b,\n title = {Three}\n}\n"
    path.write_text(f"@misc{{z, title={{Zero}}}}\n{entry}\n{good}", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.bib:2: a BibTeX entry cannot be read \(.*; fix"):
        list(read_bibtex(path))


@pytest.mark.parametrize(
    "latex, text",
    [
        (r"\'e \`{a} \^{\i} {\~n} \=o \.z", "é à î ñ ō ż"),
        (r"\c{c} \v s \u{g} \H{o} \r{A} \k{a}", "ç š ğ ő Å ą"),
        (r"\O{}rsted, \oe{}uvre, B{\o}rge {\ss}", "Ørsted, œuvre, Børge ß"),
        (r"\emph{Escherichia} \textbf{\textit{x}} {\bf y}", "Escherichia x y"),
        (r"\& \% \$ \# \_ \{a\}\\b", "& % $ # _ {a} b"),
        (r"\alpha-pinene, $10^{-3}$ and $x < y$", "\u03b1-pinene, $10^{-3}$ and $x < y$"),
        (r"{\textless}i{\textgreater}, 5{\textdegree}C{\textemdash}an", "<i>, 5°C—an"),
        (r"photo\-synthesis of 10\,000, 3~mm", "photosynthesis of 10 000, 3 mm"),
        ("50% of A & B_1 [x] 'quoted' \"too\"", "50% of A & B_1 [x] 'quoted' \"too\""),
    ],
)
def test_latex_becomes_text(latex: str, text: str) -> None:
    assert text_of(latex_to_text(latex)) == text


@settings(deadline=None, max_examples=100)
@example([r"\verb"])
@example([r"\frac", r"\href"])
@given(st.lists(st.sampled_from(["\\", "{", "}", "$", "%", "&", "a", " ", r"\frac", r"\begin{a}"])))
def test_any_latex_becomes_text(parts: list[str]) -> None:
    assert isinstance(latex_to_text("".join(parts)), str)


BALANCED = st.recursive(
    st.text("abé ,=#@\n", max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "x".join(parts) + "}"),
    max_leaves=6,
)


@settings(deadline=None, max_examples=100)
@example(values=["{" * 30 + "deep" + "}" * 30, ""], quoted=False)
@given(values=st.lists(BALANCED, min_size=1, max_size=4), quoted=st.booleans())
def test_bibtex_values_come_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], quoted: bool
) -> None:
    """Values with balanced braces, in braces or in quotation marks, come back without them."""
    start, end = '""' if quoted else "{}"
    path = tmp_path_factory.mktemp("bib") / "made.bib"
    fields = ",\n".join(f"name{i} = {start}{value}{end}" for i, value in enumerate(values))
    path.write_text(f"@article{{key,\nfirst = 1,\n{fields},\nlast = {{z}}\n}}\n", encoding="utf-8")
    [row] = read_bibtex(path)
    expected = {
        f"name{i}": value.replace("{", "").replace("}", "") for i, value in enumerate(values)
    }
    assert {name: text_of(value) for name, value in row.items()} == {
        "id": "key",
        "first": "1",
        **{name: text_of(value) for name, value in expected.items()},
        "last": "z",
    }


LEAVES = st.integers(0, 9).map(
    lambda n: {"title": f"{n}", "abstract": "x", "other": ["title", {"title": "alone"}]}
)
NESTS = st.recursive(
    st.one_of(LEAVES, st.none(), st.text(max_size=3), st.just({"title": "alone"})),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["query", "pos", "title"]), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(row=NESTS)
def test_every_object_with_the_columns_is_found_once_and_in_order(row: Any) -> None:
    """Compares with the row's JSON text, in which only a leaf has the key "abstract"."""
    found = [one["title"] for one in objects_with(("title", "abstract"), row)]
    marks = json.dumps(row).split(', "abstract": "x"')[:-1]
    assert found == [mark[-2] for mark in marks]
