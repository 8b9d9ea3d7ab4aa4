"""Makes a papers file from SciRepEval or SciDocs on the Hub, any other Hub data set, or your own CSV, JSON, parquet or BibTeX file.

python collect_papers.py --source scidocs --output data/scidocs.jsonl.gz
python collect_papers.py --source scirepeval --exclude data/scidocs.jsonl.gz --limit 350000 --output data/train_papers.jsonl.gz
python collect_papers.py --input library.csv --id DOI --title Title --abstract Abstract --output papers.jsonl

Rows are streamed; papers without a usable abstract, repeated ones and those of `--exclude` files are left out and counted. An interrupted run goes on where it
stood when the same command is given again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TextIO

import files
from files import RunError, UserError
from load_data import Paper, SeenPapers, normalise, read_papers

log = logging.getLogger(__name__)

# Training tasks of allenai/scirepeval: flat rows, or a query with candidates, or triplets.
TRAINING_CONFIGS = ("fos", "mesh_descriptors", "cite_prediction", "search", "high_influence_cite", "same_author", "cite_count", "pub_year")
SCIREPEVAL_IDS = ("corpus_id", "doc_id", "sha")  # the first that a row has: the same paper has the same corpus_id in every config
# Classes 0 to 18 of the SciDocs MAG labels: Microsoft Academic Graph's top fields [SciDocs README].
MAG_FIELDS = (
    "Art", "Biology", "Business", "Chemistry", "Computer science", "Economics", "Engineering", "Environmental science", "Geography", "Geology", "History",
    "Materials science", "Mathematics", "Medicine", "Philosophy", "Physics", "Political science", "Psychology", "Sociology",
)  # fmt: skip
FILE_KINDS = (".bib", ".csv", ".json", ".jsonl", ".parquet", ".tsv")
TITLE_WORDS = 4  # a shorter title may well stand in its abstract by chance [ours]
CHECKPOINT_ROWS = 2_000  # rows read between two records of where a run stands


@dataclass(frozen=True)
class Command:
    """Make a papers file: stream titles and abstracts, leave out the unusable and the repeated, write the rest."""

    output: str = ""  # papers file to write; gzipped where its name ends in .gz
    source: Literal["scirepeval", "scidocs"] | None = None  # a known data set: papers to train on, or the labelled evaluation papers (taken whole)
    input: str = ""  # instead of a source: a file (.csv .tsv .json .jsonl .parquet .bib, gzipped or not), a data-set folder, or a Hub id
    config: tuple[str, ...] = ()  # configs of the data set, mixed evenly; may be repeated; scirepeval: all its training tasks
    split: str = "train"  # split of the data set
    id: str = "id"  # column of the ids; papers without one get a hash of title and abstract
    title: str = "title"  # column of the titles
    abstract: str = "abstract"  # column of the abstracts; it may stand deeper in the rows (in lists of candidates, say)
    field: str = ""  # column of the fields of study, if any
    query: str = ""  # column of search queries, if any
    summaries: str = ""  # column of summaries (a text or a list of texts), if any
    exclude: tuple[str, ...] = ()  # papers file whose papers are left out; may be repeated
    min_words: int = 40  # abstracts of fewer words are left out
    limit: int = 0  # stop at so many papers; 0: take all
    hub_folder: str = ""  # folder with downloaded Hub data sets as OWNER/NAME; empty: the Hub itself


def open_streams(command: Command) -> dict[str, Any]:
    """The data sets to read, as streaming `datasets.IterableDataset`s by name.

    Raises:
        UserError: not there, not readable, or no such config or split.
    """
    if command.source == "scidocs":
        return {"scidocs": open_split("allenai/scirepeval", "scidocs_mag_mesh", "evaluation", command.hub_folder)}
    if command.source == "scirepeval":
        configs = command.config or TRAINING_CONFIGS
        return {f"scirepeval/{config}": open_split("allenai/scirepeval", config, command.split, command.hub_folder) for config in configs}
    path = Path(command.input)
    if path.is_file():
        return {path.name: _open_file(path, command)}
    if _kind_of(path) in FILE_KINDS and not path.is_dir():
        raise UserError(f"{path}: no such file", "check the path")
    return {f"{command.input}/{config}".rstrip("/"): open_split(command.input, config, command.split, command.hub_folder) for config in command.config or ("",)}


def open_split(name: str, config: str, split: str, hub_folder: str = "") -> Any:
    """One split of a data set of the Hub, or of a folder of its layout, as a stream.

    Where a repository still has a loading script or does not describe its configs, the Hub's own parquet conversion is read (branch refs/convert/parquet).

    Raises:
        UserError: it cannot be opened.
    """
    from datasets import load_dataset

    where = str(Path(hub_folder) / name)
    try:
        try:
            return load_dataset(where, config or None, split=split, streaming=True)
        except (ValueError, RuntimeError):
            if not config:
                raise
            with contextlib.suppress(Exception):
                return load_dataset(where, data_dir=config, split=split, revision="refs/convert/parquet", streaming=True)
            raise
    except Exception as error:  # datasets, huggingface_hub, fsspec and pyarrow raise many kinds, none of which is a fault of ours
        raise UserError(f"data set {where} {config} {split} cannot be opened ({_brief(error)})", "check name, --config, --split and the network") from None


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _kind_of(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _open_file(path: Path, command: Command) -> Any:
    """A file as a stream, by its name's end. JSON lines are read here because `datasets` refuses keys that first stand in late lines."""
    from datasets import IterableDataset, load_dataset

    kind = _kind_of(path)
    if kind not in FILE_KINDS:
        raise UserError(f"{path}: not a kind of file that can be read", f"give one of {' '.join(FILE_KINDS)}")
    if kind in (".bib", ".jsonl"):
        return IterableDataset.from_generator(read_bibtex if kind == ".bib" else _read_lines, gen_kwargs={"path": path})
    texts = (command.id, command.title, command.abstract, command.field, command.query, command.summaries)
    # Column separator found by itself; "NA" and "007" stay as they are.
    table = {"engine": "python", "sep": None, "na_filter": False, "encoding": "utf-8-sig", "converters": dict.fromkeys(filter(None, texts), str)}
    try:
        options = table if kind in (".csv", ".tsv") else {}
        return load_dataset(kind[1:].replace("tsv", "csv"), data_files=glob.escape(str(path)), split="train", streaming=True, **options)
    except Exception as error:  # pyarrow, pandas and json raise many kinds for a bad file
        raise UserError(f"{path}: cannot be read ({_brief(error)})", "mend the file") from None


def _open_text(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def _read_lines(path: Path) -> Iterator[Any]:
    with _open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                raise UserError(f"{path}:{number}: is not JSON ({error})", "write one JSON object a line") from None
            yield row


def read_bibtex(path: Path) -> Iterator[dict[str, str]]:
    """The entries of a BibTeX file as rows: `id` is the citation key, the other columns are the fields (lower-case names, LaTeX mark-up taken off).

    Reads what reference managers write: values in braces or quotation marks, @string names, `#`.

    Raises:
        UserError: an entry is not closed; names its line.
    """
    with _open_text(path) as handle:
        text = handle.read()
    names: dict[str, str] = {}
    for head in re.finditer(r"^[ \t]*@(\w+)\s*\{", text, re.MULTILINE):
        try:
            body = text[head.end() : _end(text, head.end(), "}")]
            if head[1].lower() == "string":
                names |= _fields(body, names)
            elif head[1].lower() not in ("comment", "preamble"):
                key, _, rest = body.partition(",")
                yield {"id": key.strip()} | {name: plain_text(value) for name, value in _fields(rest, names).items()}
        except ValueError as error:
            raise UserError(f"{path}:{text.count(chr(10), 0, head.start()) + 1}: {error} in this BibTeX entry", "mend the entry") from None


def _end(text: str, start: int, closer: str) -> int:
    """Where the `closer` ("}" or '"') of what opened before `start` stands; braces in between pair up. ValueError if there is none."""
    depth = 0
    for mark in re.compile(r'[{}"]').finditer(text, start):
        if mark[0] == closer and depth == 0:
            return mark.start()
        depth += {"{": 1, "}": -1, '"': 0}[mark[0]]
    raise ValueError(f"{closer} is missing")


def _fields(body: str, names: Mapping[str, str]) -> dict[str, str]:
    """`name = value, ...` -> raw values by lower-case name. ValueError at anything else."""
    found: dict[str, str] = {}
    at = 0
    while head := re.compile(r"[\s,]*([^\s,={}\"#]+)\s*(?==)").match(body, at):
        value, at = "", head.end()
        while joint := re.compile(r"\s*[=#]\s*").match(body, at):
            part, at = _value_part(body, joint.end(), names)
            value += part
        found[head[1].lower()] = value
    if body[at:].strip(" ,\t\r\n"):
        raise ValueError(f"{body[at:].strip()[:30]!r} is not understood")
    return found


def _value_part(body: str, start: int, names: Mapping[str, str]) -> tuple[str, int]:
    """(text in braces or quotation marks, bare number or @string name at `start`, where it ends)."""
    closer = {"{": "}", '"': '"'}.get(body[start : start + 1])
    if closer:
        end = _end(body, start + 1, closer)
        return body[start + 1 : end], end + 1
    word = re.split(r"[\s,#]", body[start:], maxsplit=1)[0]
    return names.get(word.lower(), word), start + len(word)


ACCENTS = dict(zip("`'^\"~=.uvHckr", "\u0300\u0301\u0302\u0308\u0303\u0304\u0307\u0306\u030c\u030b\u0327\u0328\u030a", strict=True))
LETTERS = {"ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "aa": "å", "AA": "Å", "o": "ø", "O": "Ø", "l": "ł", "L": "Ł", "i": "ı"}


def plain_text(latex: str) -> str:
    """A BibTeX value without its mark-up: accents and letters become Unicode, commands and braces go, their contents stay; `$...$` is left as it is."""
    parts = re.split(r"((?<!\\)\$(?:\\.|[^$\\])*\$)", latex)
    parts[::2] = map(_without_commands, parts[::2])
    return "".join(parts)


def _without_commands(latex: str) -> str:
    text = re.sub(r"\\([`'^\"~=.]|[uvHckr](?=[\s{\\]))\s*\{?\\?([A-Za-z])\}?", lambda m: unicodedata.normalize("NFC", m[2] + ACCENTS[m[1]]), latex)
    text = re.sub(rf"\\({'|'.join(LETTERS)})(?![A-Za-z])\s*", lambda m: LETTERS[m[1]], text)
    text = re.sub(r"\\\\|(?<!\\)~", " ", text)
    text = re.sub(r"\\[A-Za-z]+\*?\s*|(?<!\\)[{}]", "", text)
    return re.sub(r"\\([^A-Za-z])", r"\1", text).replace("---", "—").replace("--", "–").replace("``", '"').replace("''", '"')


def objects_with(columns: tuple[str, ...], value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object inside a row, at any depth, that has all `columns`; an object of equally long lists (one way to store a list of objects) is taken apart."""
    if isinstance(value, Mapping):
        if not all(column in value for column in columns):
            for inner in value.values():
                yield from objects_with(columns, inner)
        elif all(isinstance(inner, list) for inner in value.values()):
            yield from (dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True))
        else:
            yield value
    elif isinstance(value, list):
        for inner in value:
            yield from objects_with(columns, inner)


def text_of(value: Any) -> str:
    """A cell as text with single spaces: nothing is "", a list (an abstract kept as sentences) is joined."""
    if isinstance(value, list):
        return " ".join(map(text_of, value))
    return "" if value is None else " ".join(str(value).split())


def paper_of(row: Mapping[str, Any], command: Command, stream: str) -> Paper:
    """One object of a row -> Paper; `stream` becomes its `source`. Without an id it gets a hash of title and abstract."""
    title, abstract = text_of(row[command.title]), text_of(row[command.abstract])
    columns = SCIREPEVAL_IDS if command.source == "scirepeval" else ("doc_id",) if command.source == "scidocs" else (command.id,)
    given = next(filter(None, (text_of(row.get(column)) for column in columns)), "")
    summaries = row.get(command.summaries) or []
    return Paper(
        id=given or hashlib.blake2b(f"{title}\n{abstract}".encode(), digest_size=8).hexdigest(),
        title=title,
        abstract=abstract,
        summaries=tuple(filter(None, map(text_of, summaries if isinstance(summaries, list) else [summaries]))),
        query=text_of(row.get(command.query)),
        field=text_of(row.get(command.field)),
        source=stream,
    )


def scidocs_fields(hub_folder: str) -> dict[str, str]:
    """The 19 fields of study of the SciDocs MAG task, by paper id."""
    labels = {str(row["paper_id"]): int(row["label"]) for row in open_split("allenai/scirepeval_test", "scidocs_mag", "train+test", hub_folder)}
    if not set(labels.values()) <= set(range(len(MAG_FIELDS))):
        raise UserError(f"SciDocs labels are not 0 to {len(MAG_FIELDS) - 1} ({sorted(set(labels.values()))[:40]})", "check the data set's revision")
    return {paper: MAG_FIELDS[label] for paper, label in labels.items()}


def repeats_title(paper: Paper) -> bool:
    """Whether the title, if it has TITLE_WORDS words or more, stands word for word in the abstract."""
    title, abstract = (" ".join(re.findall(r"\w+", normalise(text))) for text in (paper.title, paper.abstract))
    return title.count(" ") >= TITLE_WORDS - 1 and f" {title} " in f" {abstract} "


class Screen:
    """Says why a paper is left out. SciDocs is taken whole, because what models are compared on must not depend on our filters."""

    def __init__(self, command: Command, seen: SeenPapers) -> None:
        self.command, self.seen = command, seen
        self.excluded = SeenPapers(paper for path in command.exclude for paper in read_papers(path))

    def reason(self, paper: Paper) -> str | None:
        """The reason in words, None to keep the paper."""
        whole = self.command.source == "scidocs"
        if whole and not paper.field:
            return "no label"
        if not paper.abstract or not paper.title:
            return "no title" if paper.abstract else "no abstract"
        if not whole and len(paper.abstract.split()) < self.command.min_words:
            return "short abstract"
        if not whole and repeats_title(paper):
            return "abstract repeats the title"
        if same := self.excluded.reason(paper):
            return f"in an excluded file (same {same})"
        same = self.seen.reason(paper)
        return f"collected already (same {same})" if same and (same == "id" or not whole) else None


class Unfinished:
    """A run's papers and place until it is done, in two hidden files beside its output; a run that was stopped goes on from them.

    `state` holds the request, the length of the papers' file, where each stream stands, and three counts: papers looked at and kept by stream, left out by reason.
    """

    def __init__(self, output: Path, request: dict[str, Any]) -> None:
        self.output, self.papers = output, output.with_name(f".{output.name}.partial")
        self.record = output.with_name(f".{output.name}.state.json")
        self.state: dict[str, Any] = {"request": request, "bytes": 0, "streams": {}, "looked": {}, "kept": {}, "dropped": {}}
        if self.record.exists() and self.papers.exists():
            self.state = files.read_json(self.record)
            changed = [key for key, value in request.items() if self.state["request"].get(key) != value]
            if changed:
                raise UserError(f"{output}: an unfinished run had another {', '.join(changed)}", f"give the same flags, or delete {self.record} to start over")
        self.looked, self.kept, self.dropped = (Counter[str](self.state[name]) for name in ("looked", "kept", "dropped"))

    def __enter__(self) -> IO[bytes]:
        self.handle = self.papers.open("ab")
        self.handle.truncate(self.state["bytes"])
        return self.handle

    def save(self, streams: Mapping[str, Any]) -> None:
        """Record where the run stands; the papers written so far are on disk first."""
        self.handle.flush()
        os.fsync(self.handle.fileno())
        counts = {"looked": self.looked, "kept": self.kept, "dropped": self.dropped}
        self.state |= counts | {"bytes": self.handle.tell(), "streams": {name: stream.state_dict() for name, stream in streams.items()}}
        files.write_json(self.record, self.state)

    def __exit__(self, *exception: object) -> None:
        self.handle.close()
        if not self.record.exists():
            self.papers.unlink()

    def finish(self) -> None:
        """Put the papers where the output shall be and remove the two files."""
        with files.atomic_path(self.output) as target, self.papers.open("rb") as source, target.open("wb") as raw:
            if self.output.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as zipped:
                    shutil.copyfileobj(source, zipped)
            else:
                shutil.copyfileobj(source, raw)
