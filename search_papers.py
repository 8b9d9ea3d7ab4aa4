"""Searches vectors that embed_papers.py wrote: the k nearest papers of each query, exactly, with
distance and title.

python search_papers.py --vectors vectors.npy --query "how soil stores carbon"
python search_papers.py --vectors vectors.npy --id PAPER_ID

Model, metric and query prompt are those that VECTORS.json names; the model is loaded for texts
only. A .npy file is read once for all queries, block by block, and need not fit into memory; a
.parquet file is read whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from semcse import command_line, files
from semcse.errors import UserError
from semcse.papers import text_lines
from semcse.types import Device

TITLE_WIDTH = 100  # characters shown of a title
# what must stand in VECTORS.json
KEYS = {"model", "pooling", "metric", "max_length", "query_prompt", "rows", "dimension"}


@dataclasses.dataclass(frozen=True)
class Command:
    """Find the nearest papers of texts, or of papers."""

    vectors: str = ""  # .npy or .parquet file that embed_papers.py wrote
    query: tuple[str, ...] = ()  # text to search for; may be repeated
    queries: str = ""  # file with one such text a line; "-" for standard input
    # id of a paper whose neighbours are wanted, itself left out; may be repeated
    id: tuple[str, ...] = ()
    k: Annotated[int, arg(aliases=("-k",))] = 10  # neighbours of each query
    json: bool = False  # one JSON object a neighbour instead of a table a query
    model: str = ""  # where the model is, if not where VECTORS.json says
    trust_remote_code: bool = False  # allow a model to bring and run its own Python code
    device: Device = "auto"  # auto: a CUDA GPU where there is one, else the CPU


def read_vectors(path: Path) -> tuple[Any, dict[str, Any]]:
    """(vectors (n, d) float32, memory-mapped where they are .npy; what the JSON file beside them
    says). UserError: missing, damaged, or not a pair.
    """
    import numpy as np
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    about = files.read_json(Path(f"{path}.json"))
    try:
        if path.suffix == ".parquet":
            column = read_table(path, columns=["vector"])["vector"].combine_chunks()
            vectors = (
                column.flatten()
                .to_numpy(zero_copy_only=False, writable=True)
                .reshape(len(column), -1)
            )
        else:
            # "c": torch wants memory that could be written to
            vectors = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError) as error:  # pyarrow's errors are among these
        raise UserError(
            f"{path}: cannot be read ({' '.join(str(error).split())[:100]})",
            "give a file that embed_papers.py wrote",
        ) from None
    if not (
        isinstance(about, dict)
        and about.keys() >= KEYS
        and vectors.shape == (about["rows"], about["dimension"])
        and vectors.dtype == np.float32
    ):
        raise UserError(
            f"{path}: is not what {path.name}.json describes",
            "embed the papers again, or bring the right files together",
        )
    return vectors, about


def entries(path: Path) -> Iterator[bytes]:
    """Id and title of each row as a JSON line."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        for batch in ParquetFile(path).iter_batches(columns=["id", "title"]):
            yield from (json.dumps(row, ensure_ascii=False).encode() for row in batch.to_pylist())
    else:
        with Path(f"{path}.ids.jsonl").open("rb") as lines:
            yield from lines


def rows_of(ids: Collection[str], path: Path, count: int) -> list[int]:
    """The row of each id. UserError: one that is not there, or ids that are not `count`."""
    # lines without them need not be parsed
    marks = [json.dumps(one, ensure_ascii=False).encode() for one in ids]
    found, number = {}, 0
    for number, line in enumerate(entries(path), 1):
        if any(mark in line for mark in marks):
            found[json.loads(line)["id"]] = number - 1
    if number != count:
        raise UserError(
            f"{path}: holds {count} vectors, but {number} ids stand beside it",
            "embed the papers again, or bring the right files together",
        )
    if missing := [one for one in ids if one not in found]:
        raise UserError(f"--id {missing[0]}: no such paper in {path}", "give an id of its papers")
    return [found[one] for one in ids]


def embed_queries(texts: list[str], about: dict[str, Any], command: Command) -> Any:
    """Vectors (len(texts), d) of texts in the query role. UserError: the model cannot be loaded, or
    is not the one of the vectors.
    """
    from semcse.models import load_model

    name = command.model or about["model"]
    try:
        encoder = load_model(
            name,
            about["pooling"],
            about["metric"],
            about["max_length"],
            device=command.device,
            trust_remote_code=command.trust_remote_code,
        )
    except UserError as error:
        raise UserError(
            str(error), f"or give by --model the place of the model that made {command.vectors}"
        ) from None
    vectors = encoder.embed(texts, about["query_prompt"]).vectors
    if (d := vectors.shape[1]) != about["dimension"]:
        raise UserError(
            f"model {name} gives {d} numbers a text, not {about['dimension']}",
            f"give by --model the model that made {command.vectors}",
        )
    return vectors


def answer(
    labels: list[str], found: list[list[tuple[float, int]]], command: Command
) -> Iterator[str]:
    """The lines to print. `found`: (distance, row) of each query's neighbours."""
    wanted = {row for hits in found for _, row in hits}
    papers = {
        row: json.loads(line)
        for row, line in enumerate(entries(Path(command.vectors)))
        if row in wanted
    }
    for label, hits in zip(labels, found, strict=True):
        if not command.json:
            yield f"{plain(label)}\n rank  distance  {'id':<20}  title"
        for rank, (distance, row) in enumerate(hits, 1):
            if command.json:
                yield json.dumps(
                    {"query": label, "rank": rank, "distance": distance} | papers[row],
                    ensure_ascii=False,
                )
            else:
                yield (
                    f"{rank:5}  {distance:8.4f}  {plain(papers[row]['id']):<20} "
                    f" {plain(papers[row]['title'])}"
                )


def plain(text: str) -> str:
    """A text that moves no cursor and fits on a line."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:TITLE_WIDTH]


def main() -> None:
    """The script: parse, embed the queries, search, print."""
    command = command_line.parse_command_line(Command, None, Command())
    if not command.vectors or command.k < 1 or not (command.query or command.queries or command.id):
        raise UserError(
            "--vectors, a query, or a --k of 1 or more is missing",
            "give --vectors FILE and --query TEXT, --queries FILE or --id ID",
        )
    command_line.log_to_stderr()
    stored, about = read_vectors(Path(command.vectors))
    own = rows_of(command.id, Path(command.vectors), len(stored))
    texts = [
        *command.query,
        *(text for _, text in (text_lines(command.queries) if command.queries else ())),
    ]
    import torch

    from semcse.distances import nearest_streamed

    vectors = torch.from_numpy(stored)
    queries = torch.cat(([embed_queries(texts, about, command)] if texts else []) + [vectors[own]])
    started = time.monotonic()
    distances, rows = nearest_streamed(
        queries,
        vectors,
        min(command.k, len(vectors)),
        about["metric"],
        torch.tensor([-1] * len(texts) + own),
    )
    logging.info(
        "%d queries among %d vectors: %.2f s",
        len(queries),
        len(vectors),
        time.monotonic() - started,
    )
    pairs = [
        list(zip(*one, strict=True)) for one in zip(distances.tolist(), rows.tolist(), strict=True)
    ]
    for line in answer(
        [*texts, *command.id], [[pair for pair in one if pair[1] >= 0] for one in pairs], command
    ):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
