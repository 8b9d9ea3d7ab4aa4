"""Makes a papers file from SciRepEval or SciDocs, any other Hub data set, or your own CSV, JSON,
parquet or BibTeX file.

python collect_papers.py --source scidocs --output data/scidocs.jsonl.gz
python collect_papers.py --source scirepeval --exclude data/scidocs.jsonl.gz --limit 350000 --output
data/train_papers.jsonl.gz
python collect_papers.py --input library.csv --id DOI --title Title --abstract Abstract --output
papers.jsonl

Rows are streamed; what is left out is counted by reason. A run that was stopped goes on where it
stood when the same command is given again.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from semcse import command_line, files
from semcse.errors import RunError, UserError
from semcse.near_duplicates import SeenPapers
from semcse.papers import LONGEST_ID, Paper, normalise, read_papers
from semcse.sources import FILE_KINDS, faults_as, objects_with, open_file, open_split, text_of

log = logging.getLogger(__name__)


# SciRepEval's four largest training tasks: rows that are papers, triplets, queries with candidates.
# Every data set that is open takes memory.
TRAINING_CONFIGS = ("fos", "mesh_descriptors", "cite_prediction", "search")
# the first that a row has; corpus_id is one in all tasks
ID_COLUMNS = {"scirepeval": ("corpus_id", "doc_id", "sha"), "scidocs": ("doc_id",)}
MAG_FIELDS = (  # Microsoft Academic Graph's top fields in the order of the SciDocs labels, 0 to 18
    "Art",
    "Biology",
    "Business",
    "Chemistry",
    "Computer science",
    "Economics",
    "Engineering",
    "Environmental science",
    "Geography",
    "Geology",
    "History",
    "Materials science",
    "Mathematics",
    "Medicine",
    "Philosophy",
    "Physics",
    "Political science",
    "Psychology",
    "Sociology",
)
# what may be read of a row; flags of these names say where it stands
COLUMNS = ("id", "title", "abstract", "field", "query", "summaries")
TITLE_WORDS = 4  # a shorter title may well stand in its abstract by chance [ours]
CHECKPOINT_ROWS = 2_000  # rows between two records of where a run stands


@dataclasses.dataclass(frozen=True)
class Command:
    """Make a papers file: stream titles and abstracts, leave out the unusable and the repeated,
    write the rest.
    """

    output: str = ""  # papers file to write; gzipped where its name ends in .gz
    # a known data set: papers to train on, or the labelled evaluation papers (taken whole)
    source: Literal["scirepeval", "scidocs"] | None = None
    # instead of a source: a file (.csv .tsv .json .jsonl .parquet .bib; gzipped ones too), a
    # data-set folder, or a Hub id
    input: str = ""
    # configs of the data set, mixed evenly; may be repeated; none: the default one, of scirepeval
    # its largest training tasks
    config: tuple[str, ...] = ()
    split: str = "train"  # split of the data set
    id: str = "id"  # column of the ids; papers without one get a hash of title and abstract
    title: str = "title"  # column of the titles
    # column of the abstracts; title and abstract may stand deeper in the rows (in lists of
    # candidates, say)
    abstract: str = "abstract"
    field: str = ""  # column of the fields of study, if any
    query: str = ""  # column of search queries, if any
    summaries: str = ""  # column of summaries (a text or a list of texts), if any
    exclude: tuple[str, ...] = ()  # papers file whose papers are left out; may be repeated
    min_words: int = 40  # abstracts of fewer words are left out
    limit: int = 0  # stop at so many papers; 0: take all


def open_streams(command: Command) -> dict[str, Any]:
    """The data sets to read by name, each a `datasets.IterableDataset`. UserError: no such file,
    data set, config or split, or not readable.
    """
    path, name, configs = Path(command.input), command.input, command.config or ("",)
    if command.source == "scidocs":
        return {"scidocs": open_split("allenai/scirepeval", "scidocs_mag_mesh", "evaluation")}
    if command.source == "scirepeval":
        name, configs = "allenai/scirepeval", command.config or TRAINING_CONFIGS
    elif path.is_file() or path.name.lower().endswith((*FILE_KINDS, ".gz")):
        return {path.name: open_file(path, [getattr(command, key) for key in COLUMNS])}
    return {
        f"{name} {config}".rstrip(): open_split(name, config, command.split) for config in configs
    }


def scidocs_fields() -> dict[str, str]:
    """The fields of study of the SciDocs MAG task (train and test split), by paper id."""
    labels = {
        row["paper_id"]: row["label"]
        for row in open_split("allenai/scirepeval_test", "scidocs_mag", "train+test")
    }
    if wrong := set(labels.values()) - set(range(len(MAG_FIELDS))):
        raise UserError(
            f"SciDocs labels other than 0 to {len(MAG_FIELDS) - 1}: {wrong}",
            "check the data set's version",
        )
    return {paper: MAG_FIELDS[label] for paper, label in labels.items()}


def paper_of(
    row: dict[str, Any], command: Command, stream: str, fields: Mapping[str, str]
) -> Paper:
    """One object of a row -> Paper, with `stream` as its `source`; `fields`: known fields by id. No
    id, or an endless one: a hash of title and abstract.
    """
    texts: dict[str, Any] = {
        key: text_of(row.get(getattr(command, key)))
        for key in ("title", "abstract", "field", "query")
    }
    ids = (
        text_of(row.get(column)) for column in ID_COLUMNS.get(command.source or "", (command.id,))
    )
    paper_id = next((one for one in ids if 0 < len(one) <= LONGEST_ID), "")
    paper_id = (
        paper_id
        or hashlib.blake2b(
            f"{texts['title']}\n{texts['abstract']}".encode(), digest_size=8
        ).hexdigest()
    )
    summaries = row.get(command.summaries)
    summaries = tuple(
        filter(None, map(text_of, summaries if isinstance(summaries, list) else [summaries]))
    )
    return Paper(
        id=paper_id,
        summaries=summaries,
        source=stream,
        **texts | ({"field": fields[paper_id]} if paper_id in fields else {}),
    )


def repeats_title(paper: Paper) -> bool:
    """Whether the title, if it has TITLE_WORDS words or more, stands word for word in the abstract."""
    title, abstract = (
        re.findall(r"\w+", normalise(text)) for text in (paper.title, paper.abstract)
    )
    return len(title) >= TITLE_WORDS and f" {' '.join(title)} " in f" {' '.join(abstract)} "


def why_not(paper: Paper, command: Command, excluded: SeenPapers, seen: SeenPapers) -> str | None:
    """The reason to leave a paper out, None to keep it. SciDocs is taken whole: what models are
    compared on must not depend on our filters.
    """
    if command.source == "scidocs" and not paper.field:
        return "no label"
    if not paper.abstract or not paper.title:
        return "no title" if paper.abstract else "no abstract"
    if command.source == "scidocs":
        return "collected already (same id)" if paper.id in seen.ids else None
    if len(paper.abstract.split()) < command.min_words:
        return "short abstract"
    if repeats_title(paper):
        return "abstract repeats the title"
    for known, where in ((excluded, "in an excluded file"), (seen, "collected already")):
        if same := known.reason(paper):
            return f"{where} (same {same})"
    return None


class Collection:
    """The papers kept so far and where the run stands; until it is done both lie in hidden files
    beside the output.

    Two counts tell the story: papers `looked` at by stream, and `dropped` by reason.
    """

    def __init__(self, command: Command) -> None:
        self.command, self.output = command, Path(command.output)
        self.partial, self.record = (
            self.output.with_name(f".{self.output.name}.{end}") for end in ("partial", "state.json")
        )
        request = json.loads(json.dumps(dataclasses.asdict(command)))
        self.state: dict[str, Any] = {
            "request": request,
            "bytes": 0,
            "places": {},
            "looked": {},
            "dropped": {},
        }
        if self.record.exists() and self.partial.exists():
            self.state = files.read_json(self.record)
            if changed := ", ".join(
                key for key, value in request.items() if self.state["request"].get(key) != value
            ):
                raise UserError(
                    f"{self.output}: its unfinished run had another {changed}",
                    f"give the same flags, or delete {self.record} to start over",
                )
            os.truncate(self.partial, self.state["bytes"])
        self.looked, self.dropped = (
            Counter[str](self.state["looked"]),
            Counter[str](self.state["dropped"]),
        )
        self.lines: list[str] = []  # of papers that are kept, but not yet in the file
        self.excluded = SeenPapers(paper for path in command.exclude for paper in read_papers(path))
        self.seen = SeenPapers(read_papers(self.partial) if self.kept() else ())

    def kept(self) -> int:
        """Papers kept so far."""
        return self.looked.total() - self.dropped.total()

    def offer(self, paper: Paper) -> None:
        """Keep a paper, or count why not."""
        if reason := why_not(paper, self.command, self.excluded, self.seen):
            self.dropped[reason] += 1
        else:
            self.seen.add(paper)
            self.lines.append(json.dumps(paper.as_row(), ensure_ascii=False) + "\n")
        self.looked[paper.source] += 1

    def save(self, streams: Mapping[str, Any]) -> None:
        """Bring the kept papers to the disk, then record where the run stands."""
        with self.partial.open("ab" if self.state["bytes"] else "wb") as handle:
            handle.write("".join(self.lines).encode())
            handle.flush()
            os.fsync(handle.fileno())
            self.state |= {
                "bytes": handle.tell(),
                "places": {name: stream.state_dict() for name, stream in streams.items()},
            }
        files.write_json(self.record, self.state | {"looked": self.looked, "dropped": self.dropped})
        self.lines.clear()

    def finish(self) -> None:
        """Write the output from the saved papers; the two files go."""
        with (
            files.atomic_path(self.output) as target,
            self.partial.open("rb") as papers,
            target.open("wb") as plain,
        ):
            zipped = (
                gzip.GzipFile("", "wb", 6, plain, mtime=0)
                if self.output.suffix == ".gz"
                else contextlib.nullcontext(plain)
            )
            with zipped as written:
                shutil.copyfileobj(papers, written)
        self.record.unlink()
        self.partial.unlink()


def rows_of(
    streams: Mapping[str, Any], looked: Mapping[str, int], kind: type[UserError]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(stream, row): always the next row of the stream of which the fewest papers were looked at,
    so that streams of any shape mix evenly.
    """
    rows = {name: iter(stream) for name, stream in streams.items()}
    while rows:
        name = min(rows, key=lambda one: looked[one])
        with faults_as(
            kind, f"{name}: reading stopped", "mend that and give the same command again to go on"
        ):
            row = next(rows[name], None)
        if row is None:
            del rows[name]
        else:
            yield name, row


def collect(command: Command) -> None:
    """Read, screen, write, and log what was left out and why. UserError: bad input or no paper
    left. RunError: the Hub is gone; what was read is kept.
    """
    from tqdm import tqdm

    papers = Collection(command)
    fields = scidocs_fields() if command.source == "scidocs" else {}
    streams = open_streams(command)
    for name, place in papers.state["places"].items():
        streams[name].load_state_dict(place)
    rows = rows_of(streams, papers.looked, UserError if Path(command.input).is_file() else RunError)
    row: dict[str, Any] = {}
    with (
        command_line.StopSignal() as stop,
        tqdm(
            total=command.limit or None, initial=papers.kept(), desc="collecting", unit="paper"
        ) as bar,
    ):
        for number, (name, row) in enumerate(rows, start=1):
            for found in objects_with((command.title, command.abstract), row):
                if not 0 < command.limit <= papers.kept():
                    papers.offer(paper_of(found, command, name, fields))
            bar.update(papers.kept() - bar.n)
            if papers.kept() and (stop.received or number % CHECKPOINT_ROWS == 0):
                papers.save(streams)
            stop.raise_received()
            if 0 < command.limit <= papers.kept() or (
                number == CHECKPOINT_ROWS and not papers.looked
            ):
                break
    reasons = ", ".join(f"{count} {reason}" for reason, count in papers.dropped.most_common())
    account = (
        f"kept {papers.kept()} of {papers.looked.total()} papers; left out: {reasons or 'none'}"
    )
    if not papers.kept():
        raise UserError(
            f"{account} (columns: {', '.join(row)})", "check --title, --abstract and --min-words"
        )
    papers.save(streams)
    papers.finish()
    log.info(
        "%s: %s; looked at: %s",
        command.output,
        account,
        ", ".join(f"{count} of {name}" for name, count in papers.looked.items()),
    )
    if fields:
        log.info(
            "%d SciDocs labels have no text",
            len(fields)
            - papers.kept()
            - papers.dropped["no abstract"]
            - papers.dropped["no title"],
        )


def main() -> None:
    """The script: parse, check, then collect."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    for noisy in ("datasets.packaged_modules", "huggingface_hub.utils"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # our error line says it
    output = Path(command.output)
    if not command.output or output.is_dir():
        raise UserError("--output names no file", "name the papers file to write")
    if bool(command.source) == bool(command.input):
        raise UserError("give either --source or --input", "see collect_papers.py --help")
    with files.lock(output.with_name(f".{output.name}.lock")):
        collect(command)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
