"""Make a papers file from SciRepEval, SciDocs, any other Hub data set, or your own CSV, JSON,
parquet or BibTeX file. The same command resumes a run that was interrupted.

    python collect_papers.py --source scidocs --output data/scidocs_papers.jsonl.gz
    python collect_papers.py --input library.csv --id DOI --title Title --output papers.jsonl
"""

import dataclasses
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from semcse import command_line, files
from semcse.errors import RunError, UserError
from semcse.near_duplicates import SeenPapers
from semcse.papers import LONGEST_ID, Paper, normalise, read_papers
from semcse.sources import FILE_KINDS, library_errors, objects_with, open_file, open_split, text_of

log = logging.getLogger(__name__)

# SciRepEval's four largest training tasks. Every open data set takes memory, so not all are read.
TRAINING_CONFIGS = ("fos", "mesh_descriptors", "cite_prediction", "search")
# The first of these columns that a row has is its id. `corpus_id` is the same in all tasks.
ID_COLUMNS = {"scirepeval": ("corpus_id", "doc_id", "sha"), "scidocs": ("doc_id",)}
# The top fields of the Microsoft Academic Graph, in the order of the labels of SciDocs.
MAG_FIELDS = (
    "Art,Biology,Business,Chemistry,Computer science,Economics,Engineering,Environmental science,"
    "Geography,Geology,History,Materials science,Mathematics,Medicine,Philosophy,Physics,"
    "Political science,Psychology,Sociology"
).split(",")
TITLE_WORDS = 4  # a shorter title may occur in its abstract by chance (our choice)
CHECKPOINT_ROWS = 2_000  # number of rows between two checkpoints


@dataclasses.dataclass(frozen=True)
class Command:
    """Make a papers file: stream titles and abstracts, leave out unusable papers and duplicates."""

    output: str = ""  # papers file to write; gzipped if the name ends in .gz
    # a known data set: training papers, or labelled evaluation papers (which are not filtered)
    source: Literal["scirepeval", "scidocs"] | None = None
    # instead of --source: a file (.csv .tsv .json .jsonl .parquet .bib, also gzipped), a data set
    # folder, or a Hub id
    input: str = ""
    # config of the data set; several are mixed evenly. Default: SciRepEval's largest training
    # tasks, or the default config of any other data set
    config: tuple[str, ...] = ()
    split: str = "train"  # split of the data set
    id: str = "id"  # column of the ids; a paper without one gets a hash of title and abstract
    title: str = "title"  # column of the titles
    abstract: str = "abstract"  # column of the abstracts; both columns may be nested
    field: str = ""  # column of the fields of study, if any
    query: str = ""  # column of search queries, if any
    summaries: str = ""  # column of summaries (a text or a list of texts), if any
    exclude: tuple[str, ...] = ()  # papers file whose papers are left out
    min_words: int = 40  # abstracts with fewer words are left out
    limit: int = 0  # stop after this many papers; 0 means no limit


def open_streams(command: Command) -> dict[str, Any]:
    """Return name -> `datasets.IterableDataset` for the data sets that a command names."""
    path, name, split = Path(command.input), command.input, command.split
    configs = command.config or ("",)
    if command.source == "scidocs":
        return {"scidocs": open_split("allenai/scirepeval", "scidocs_mag_mesh", "evaluation")}
    if command.source == "scirepeval":
        name, configs = "allenai/scirepeval", command.config or TRAINING_CONFIGS
    elif path.is_file() or path.name.lower().endswith((*FILE_KINDS, ".gz")):
        texts = [command.id, command.title, command.abstract, command.field, command.query]
        return {path.name: open_file(path, [*texts, command.summaries])}
    return {f"{name} {config}".rstrip(): open_split(name, config, split) for config in configs}


def scidocs_fields() -> dict[str, str]:
    """Return the fields of study of the SciDocs MAG task (both splits) by paper id."""
    rows = open_split("allenai/scirepeval_test", "scidocs_mag", "train+test")
    return {row["paper_id"]: MAG_FIELDS[row["label"]] for row in rows}


def paper_of(row: dict[str, Any], command: Command, stream: str, fields: dict[str, str]) -> Paper:
    """Make a Paper from an object in a row. `fields` holds known fields of study by paper id."""
    names = ("title", "abstract", "field", "query")
    texts: dict[str, Any] = {name: text_of(row.get(getattr(command, name))) for name in names}
    columns = ID_COLUMNS.get(command.source or "", (command.id,))
    ids = [text_of(row.get(column)) for column in columns]
    # A paper whose id is missing or too long gets a hash.
    content = f"{texts['title']}\n{texts['abstract']}".encode()
    ids.append(hashlib.blake2b(content, digest_size=8).hexdigest())
    texts["id"] = next(one for one in ids if 0 < len(one) <= LONGEST_ID)
    texts["field"] = fields.get(texts["id"], texts["field"])
    summaries = row.get(command.summaries)
    summaries = map(text_of, summaries if isinstance(summaries, list) else [summaries])
    return Paper(summaries=tuple(filter(None, summaries)), source=stream, **texts)


def repeats_title(paper: Paper) -> bool:
    """Return whether the abstract contains a title of at least TITLE_WORDS words."""
    title, abstract = (re.findall(r"\w+", normalise(t)) for t in (paper.title, paper.abstract))
    return len(title) >= TITLE_WORDS and f" {' '.join(title)} " in f" {' '.join(abstract)} "


class CollectedPapers:
    """The streams, the papers kept so far, and the counts. A run that was interrupted resumes from
    two hidden files next to the output: .NAME.partial (papers) and .NAME.state.json.
    """

    def __init__(self, command: Command) -> None:
        """Start a run, or resume an unfinished one, which must have had the same flags."""
        self.command, self.output = command, Path(command.output)
        self.partial = self.output.with_name(f".{self.output.name}.partial")
        self.state_file = self.output.with_name(f".{self.output.name}.state.json")
        self.request = json.loads(json.dumps(dataclasses.asdict(command)))
        state: dict[str, Any] = {"places": {}, "looked": {}, "dropped": {}}
        if self.state_file.exists() and self.partial.exists():
            state = files.read_json(self.state_file)
            if changed := [k for k, v in self.request.items() if state["request"].get(k) != v]:
                what = f"{self.output}: its unfinished run had another {', '.join(changed)}"
                fix = f"give the same flags, or delete {self.state_file} to start over"
                raise UserError(what, fix)
            os.truncate(self.partial, state["bytes"])
        else:
            self.partial.unlink(missing_ok=True)
        self.read = Counter[str](state["looked"])  # stream -> number of papers read
        self.dropped = Counter[str](state["dropped"])  # reason -> number of papers left out
        self.kept = self.read.total() - self.dropped.total()
        self.unsaved: list[str] = []  # lines of kept papers that are not in the file yet
        self.excluded = SeenPapers(paper for path in command.exclude for paper in read_papers(path))
        self.seen = SeenPapers(read_papers(self.partial) if self.kept else ())
        self.streams = open_streams(command)
        for name, place in state["places"].items():
            self.streams[name].load_state_dict(place)

    def mixed_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (stream, row), always from the stream with the fewest papers read, so that the
        streams mix evenly, however many papers their rows hold.
        """
        kind = UserError if Path(self.command.input).is_file() else RunError
        rows = {name: iter(stream) for name, stream in self.streams.items()}
        while rows:
            name = min(rows, key=lambda one: self.read[one])
            fix = "fix this and give the same command again to continue"
            with library_errors(kind, f"{name}: reading stopped", fix):
                row = next(rows[name], None)
            if row is None:
                del rows[name]
            else:
                yield name, row

    def rejection_reason(self, paper: Paper) -> str | None:
        """Return why a paper is left out, or None to keep it. SciDocs is not filtered, because the
        papers that models are compared on must not depend on our filters.
        """
        is_scidocs = self.command.source == "scidocs"
        if is_scidocs and not paper.field:
            return "no label"
        if not paper.abstract:
            return "no abstract"
        if not paper.title:
            return "no title"
        if is_scidocs:
            return "collected already (same id)" if paper.id in self.seen.ids else None
        if len(paper.abstract.split()) < self.command.min_words:
            return "short abstract"
        if repeats_title(paper):
            return "abstract repeats the title"
        if same := self.excluded.reason(paper):
            return f"in an excluded file (same {same})"
        same = self.seen.reason(paper)
        return f"collected already (same {same})" if same else None

    def offer(self, paper: Paper) -> None:
        """Keep a paper, or count the reason why it is left out."""
        if reason := self.rejection_reason(paper):
            self.dropped[reason] += 1
        else:
            self.kept += 1
            self.seen.add(paper)
            self.unsaved.append(json.dumps(paper.as_row(), ensure_ascii=False) + "\n")
        self.read[paper.source] += 1

    def save(self) -> None:
        """Write the kept papers to the disk, and then the state of the run."""
        with self.partial.open("ab") as handle:
            handle.write("".join(self.unsaved).encode())
            handle.flush()
            os.fsync(handle.fileno())
            size = handle.tell()
        places = {name: stream.state_dict() for name, stream in self.streams.items()}
        state = {"request": self.request, "bytes": size, "places": places}
        files.write_json(self.state_file, state | {"looked": self.read, "dropped": self.dropped})
        self.unsaved.clear()

    def finish(self) -> None:
        """Write the output from the saved papers, and delete the two hidden files."""
        with files.atomic_path(self.output) as target, target.open("wb") as plain:
            # Without name and time in the gzip header, equal papers give equal files.
            is_gzip = self.output.suffix == ".gz"
            out: Any = gzip.GzipFile("", "wb", 6, plain, mtime=0) if is_gzip else plain
            with self.partial.open("rb") as papers, out:
                shutil.copyfileobj(papers, out)
        self.state_file.unlink()
        self.partial.unlink()


def collect(command: Command) -> None:
    """Read the streams, write the papers that pass, and log how many were left out and why."""
    papers = CollectedPapers(command)
    fields = scidocs_fields() if command.source == "scidocs" else {}
    row: dict[str, Any] = {}
    limit = command.limit or sys.maxsize
    bar = tqdm(total=command.limit or None, initial=papers.kept, desc="collecting", unit="paper")
    with command_line.StopSignal() as stop, bar:
        for number, (name, row) in enumerate(papers.mixed_rows(), start=1):
            for found in objects_with((command.title, command.abstract), row):
                if papers.kept < limit:
                    papers.offer(paper_of(found, command, name, fields))
            bar.update(papers.kept - bar.n)
            if papers.kept and (stop.received or number % CHECKPOINT_ROWS == 0):
                papers.save()
            stop.raise_received()
            # If this many rows hold no paper, the column names are wrong.
            if papers.kept >= limit or (number == CHECKPOINT_ROWS and not papers.read):
                break
    reasons = ", ".join(f"{count} {reason}" for reason, count in papers.dropped.most_common())
    summary = f"kept {papers.kept} of {papers.read.total()} papers; left out: {reasons or 'none'}"
    if not papers.kept:
        fix = "check --title, --abstract and --min-words"
        raise UserError(f"{summary} (columns: {', '.join(row)})", fix)
    papers.save()
    papers.finish()
    read = ", ".join(f"{count} of {name}" for name, count in papers.read.items())
    log.info("%s: %s; papers read: %s", command.output, summary, read)


def main() -> None:
    """Parse and check the command line, and collect the papers."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    for noisy in ("datasets.packaged_modules", "huggingface_hub.utils", "pylatexenc"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # our error line repeats their message
    output = Path(command.output)
    if not command.output or output.is_dir():
        raise UserError("--output does not name a file", "name the papers file to write")
    if bool(command.source) == bool(command.input):
        raise UserError("--source and --input are both given or both missing", "give one of them")
    with files.lock(output.with_name(f".{output.name}.lock")):
        collect(command)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
