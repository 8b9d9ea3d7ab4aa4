"""Read data sets of the Hub and files of many kinds as rows, for collect_papers.py. `datasets`
parses CSV, JSON and parquet, `pybtex` BibTeX, and `pylatexenc` LaTeX.
"""

import contextlib
import functools
import glob
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from semcse.errors import UserError
from semcse.papers import LONGEST_WORD, raw_lines

FILE_KINDS = (".bib", ".csv", ".json", ".jsonl", ".parquet", ".tsv")


@contextlib.contextmanager
def library_errors(kind: type[UserError], what: str, fix: str) -> Iterator[None]:
    """Turn every error of the libraries in the block into a one-line error of this `kind`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise kind(f"{what} ({type(error).__name__}: {message})", fix) from None


def open_split(name: str, config: str, split: str) -> Any:
    """Open one split of a data set on the Hub, or in a folder, as a `datasets.IterableDataset`. If
    a repository still has a loading script, or does not describe its configs, the Hub's parquet
    conversion (revision refs/convert/parquet) is read.
    """
    from datasets import load_dataset

    what = f"data set {name} {config} {split} cannot be opened"
    with library_errors(UserError, what, "check the name, --config, --split and the network"):
        load = functools.partial(load_dataset, name, split=split, streaming=True)
        try:
            return load(config or None)
        except (ValueError, RuntimeError):
            with contextlib.suppress(Exception):
                if config:  # without one, the conversion would mix all configs
                    return load(data_dir=config, revision="refs/convert/parquet")
            raise


def open_file(path: Path, columns: list[str]) -> Any:
    """Open a file of one of the FILE_KINDS, gzipped or not, as a `datasets.IterableDataset`. The
    `columns` of a CSV or TSV table are read as text, even if they look like numbers.
    """
    from datasets import IterableDataset, load_dataset

    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind not in FILE_KINDS or not path.is_file():
        what = f"{path}: no such file, or not of a kind that can be read"
        raise UserError(what, f"give a file named {' '.join(FILE_KINDS)}, gzipped or not")
    if kind in (".bib", ".jsonl"):
        reader = read_bibtex if kind == ".bib" else read_json_lines
        return IterableDataset.from_generator(reader, gen_kwargs={"path": path})
    options: dict[str, Any] = {}
    if kind in (".csv", ".tsv"):
        # sep=None detects the separator. The other options keep cells such as NA and 007 as text.
        options = {"engine": "python", "sep": None, "na_filter": False, "encoding": "utf-8-sig"}
        options["converters"] = dict.fromkeys(filter(None, columns), str)
        kind = ".csv"
    with library_errors(UserError, f"{path}: cannot be read", "fix the file"):
        files = glob.escape(str(path))
        return load_dataset(kind[1:], data_files=files, split="train", streaming=True, **options)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a JSONL file. (`datasets` refuses keys that appear in late lines only.)"""
    for number, line in raw_lines(path):
        what = f"{path}:{number}: is not a JSON object"
        with library_errors(UserError, what, "write one object per line"):
            row = dict(json.loads(line))
        yield row


def read_bibtex(path: Path) -> Iterator[dict[str, str]]:
    """Read the entries of a BibTeX file as rows of plain text: the citation key as `id`, and the
    fields by their lower-case names. A UserError names the first line of an entry that is broken.
    """
    from pybtex.database.input import bibtex
    from pybtex.utils import CaseInsensitiveDict

    open_text = gzip.open if path.suffix.lower() == ".gz" else open
    with open_text(path, "rt", encoding="utf-8-sig") as handle:
        text = handle.read()

    def handle_error(error: Exception) -> None:
        # An undefined @string becomes an empty text. Any other @ outside of entries, such as in an
        # e-mail address, belongs to a comment.
        start = parser.command_start
        is_entry = re.compile(r"@\w+\s*[{(]").match(text, start)
        if is_entry and not isinstance(error, bibtex.UndefinedMacro):
            line = text.count("\n", 0, start) + 1
            what = f"{path}:{line}: a BibTeX entry cannot be read ({error})"
            raise UserError(what, "fix the entry") from None

    macros = CaseInsensitiveDict(bibtex.month_names)
    parser = bibtex.LowLevelParser(text, macros=macros, handle_error=handle_error)
    for kind, content in parser:
        if kind.lower() not in ("string", "preamble"):
            key, fields = content
            yield {"id": key} | {name.lower(): latex_to_text("".join(v)) for name, v in fields}


def latex_to_text(latex: str) -> str:
    """Return LaTeX as plain text: accents and symbols become Unicode, commands become
    their content, and mathematics between dollar signs stays.
    """
    try:
        # An unescaped percent sign would start a comment.
        return str(_latex_converter().latex_to_text(re.sub(r"(?<!\\)%", r"\\%", latex)))
    except Exception:  # pylatexenc fails in many ways if a command lacks its argument
        return latex


@functools.cache
def _latex_converter() -> Any:
    from pylatexenc import latex2text

    context = latex2text.get_default_latex_context_db()
    # Zotero writes < and > as commands. \- is a place to hyphenate. pylatexenc fails on \href.
    texts = {"textless": "<", "textgreater": ">", "-": "", "href": ""}
    macros = [latex2text.MacroTextSpec(name, text) for name, text in texts.items()]
    specials = [latex2text.SpecialsTextSpec("&", "&")]
    context.add_context_category("semcse", macros, specials=specials, prepend=True)
    return latex2text.LatexNodes2Text(latex_context=context, math_mode="verbatim")


def objects_with(columns: tuple[str, ...], value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object inside a row, at any depth, that has all `columns`: the row itself, for
    example, or a query and its candidates.
    """
    if isinstance(value, dict) and all(column in value for column in columns):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from objects_with(columns, inner)


def text_of(value: Any) -> str:
    """Return a cell as text with single spaces. None gives "", the items of a list (an abstract
    stored as sentences) are joined, and words are cut to LONGEST_WORD characters.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(text_of, value))
    text = str(value).encode(errors="replace").decode()  # half a surrogate pair becomes "?"
    return " ".join(word[:LONGEST_WORD] for word in text.split())
