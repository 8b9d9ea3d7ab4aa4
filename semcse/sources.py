"""TODO: say what this file is for: semcse.sources."""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import logging
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from semcse.errors import UserError
from semcse.papers import LONGEST_WORD

log = logging.getLogger(__name__)

FILE_KINDS = (".bib", ".csv", ".json", ".jsonl", ".parquet", ".tsv")
ACCENTS = dict(
    zip(
        "`'^\"~=.uvHckr",
        "\u0300\u0301\u0302\u0308\u0303\u0304\u0307\u0306\u030c\u030b\u0327\u0328\u030a",
        strict=True,
    )
)


@contextlib.contextmanager
def faults_as(kind: type[UserError], what: str, mend: str) -> Iterator[None]:
    """One line for whatever datasets, huggingface_hub, fsspec, pyarrow or pandas raise: many kinds,
    none of them a fault of ours.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise kind(
            f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})", mend
        ) from None


def open_split(name: str, config: str, split: str) -> Any:
    """One split of a data set as a stream, from a folder `name` (seen from here) if there is one,
    else from the Hub.

    Where a repository still has a loading script or does not describe its configs, the Hub's own
    parquet conversion (refs/convert/parquet) is read.
    """
    from datasets import load_dataset

    with faults_as(
        UserError,
        f"data set {name} {config} {split} cannot be opened",
        "check the name, --config, --split and the network",
    ):
        try:
            return load_dataset(name, config or None, split=split, streaming=True)
        except (ValueError, RuntimeError):
            with contextlib.suppress(Exception):
                if config:  # without it all configs would come mixed
                    return load_dataset(
                        name,
                        data_dir=config,
                        split=split,
                        revision="refs/convert/parquet",
                        streaming=True,
                    )
            raise


def open_file(path: Path, columns: list[str]) -> Any:
    from datasets import IterableDataset, load_dataset

    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind not in FILE_KINDS or not path.is_file():
        raise UserError(
            f"{path}: no such file, or not of a kind that can be read",
            f"give a file named {' '.join(FILE_KINDS)}, gzipped or not",
        )
    if kind in (".bib", ".jsonl"):
        return IterableDataset.from_generator(
            read_bibtex if kind == ".bib" else read_json_lines, gen_kwargs={"path": path}
        )
    options: dict[str, Any] = {}
    # the separator is found by itself; cells such as NA and 007 stay as they are
    if kind in (".csv", ".tsv"):
        options = {
            "engine": "python",
            "sep": None,
            "na_filter": False,
            "encoding": "utf-8-sig",
            "converters": dict.fromkeys(filter(None, columns), str),
        }
    with faults_as(UserError, f"{path}: cannot be read", "mend the file"):
        return load_dataset(
            kind[1:].replace("tsv", "csv"),
            data_files=glob.escape(str(path)),
            split="train",
            streaming=True,
            **options,
        )


def _open_text(path: Path) -> TextIO:
    return (
        gzip.open(path, "rt", encoding="utf-8-sig")
        if path.suffix.lower() == ".gz"
        else path.open(encoding="utf-8-sig")
    )


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file. (`datasets` refuses a key that first stands in a late line.)
    UserError: a line that is no JSON object; names it.
    """
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            with faults_as(
                UserError, f"{path}:{number}: is not a JSON object", "write one object a line"
            ):
                row = dict(json.loads(line)) if line.strip() else None
            if row is not None:
                yield row


def read_bibtex(path: Path) -> Iterator[dict[str, str]]:
    """The entries of a BibTeX file as rows: citation key as `id`, fields by lower-case name.
    UserError: an entry that cannot be read; names its line.
    """
    inside = "[^{}]*"
    for _ in range(6):  # braces may stand six deep
        inside = rf"[^{{}}]*(?:\{{{inside}\}}[^{{}}]*)*"
    entry = re.compile(rf"\s*([^\s,={{}}]*)\s*,({inside})\}}")
    field = re.compile(
        rf'([^\s,={{}}"#]+)\s*=\s*(?:\{{({inside})\}}|"((?:[^"{{}}]|\{{{inside}\}})*)")'
    )
    with _open_text(path) as handle:
        text = handle.read()
    for head in re.finditer(
        r"^[ \t]*@(?!comment|preamble|string)\w+\s*\{", text, re.MULTILINE | re.IGNORECASE
    ):
        if not (body := entry.match(text, head.end())):
            line = text.count("\n", 0, head.start()) + 1
            raise UserError(
                f"{path}:{line}: a BibTeX entry without a key or its closing brace",
                "mend the entry",
            )
        yield {"id": body[1]} | {
            name.lower(): plain_text(braced or quoted)
            for name, braced, quoted in field.findall(body[2])
        }


def plain_text(latex: str) -> str:
    r"""LaTeX accents become Unicode, braces and commands with an argument go and leave it, other
    commands leave their name (`\alpha`, `\ss`).
    """
    text = re.sub(
        r"\\([`'^\"~=.]|[uvHckr](?=[\s{\\]))\s*\{?\\?([A-Za-z])\}?",
        lambda found: unicodedata.normalize("NFC", found[2] + ACCENTS[found[1]]),
        latex,
    )
    text = re.sub(r"\\\\|(?<!\\)~", " ", text)
    return re.sub(r"\\[A-Za-z]+\*?(?=\{)|[{}\\]", "", text)


def objects_with(columns: tuple[str, ...], value: Any) -> Iterator[dict[str, Any]]:
    """Every object inside a row, at any depth, that has all `columns`: the row itself, or a query
    and its candidates, say.
    """
    if isinstance(value, dict) and all(column in value for column in columns):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from objects_with(columns, inner)


def text_of(value: Any) -> str:
    """A cell as text with single spaces: nothing is "", a list (an abstract kept as sentences) is
    joined, half a surrogate pair is "?", endless words end.
    """
    if isinstance(value, list):
        return " ".join(map(text_of, value))
    return (
        ""
        if value is None
        else " ".join(
            word[:LONGEST_WORD] for word in str(value).encode(errors="replace").decode().split()
        )
    )
