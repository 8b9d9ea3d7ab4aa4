"""Searches the vectors that embed_papers.py wrote: the k nearest papers of each query, exactly.

    python search_papers.py --vectors vectors.npy --query "how soil stores carbon"
    python search_papers.py --vectors vectors.npy --id PAPER_ID

The model, the metric and the query prompt come from VECTORS.json. The model is loaded only if a
query is a text. A .npy file is read once, block by block, and may be larger than memory; a .parquet
file is read completely.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from semcse import command_line, files
from semcse.errors import UserError, printable
from semcse.papers import text_lines
from semcse.types import Device

TITLE_WIDTH = 100  # characters of a title in the table
# Keys that VECTORS.json must have.
KEYS = {"model", "pooling", "metric", "max_length", "query_prompt", "rows", "dimension"}


@dataclasses.dataclass(frozen=True)
class Command:
    """Find the papers nearest to texts or to other papers."""

    vectors: str = ""  # .npy or .parquet file that embed_papers.py wrote
    query: tuple[str, ...] = ()  # text to search for; may be repeated
    queries: str = ""  # file with one query text per line; "-" for standard input
    id: tuple[str, ...] = ()  # paper id to search neighbors of (without itself); may be repeated
    k: Annotated[int, arg(aliases=("-k",))] = 10  # neighbors per query
    json: bool = False  # print one JSON object per neighbor instead of tables
    model: str = ""  # where the model is, if it is not where VECTORS.json says
    trust_remote_code: bool = False  # allow a model to bring and run its own Python code
    device: Device = "auto"  # auto: a CUDA GPU if there is one, else the CPU


def read_vectors(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Reads an output of embed_papers.py.

    Returns:
        (n, d) float32 numpy array of vectors, memory-mapped if the file is .npy; pyarrow table with
        the columns "id" and "title", in the same order; content of VECTORS.json.

    Raises:
        UserError: a file is missing or damaged, or the files do not belong together.
    """
    import numpy as np
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.json  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    about = files.read_json(Path(f"{path}.json"))
    try:
        if path.suffix == ".parquet":
            papers = pa.parquet.read_table(path, columns=["id", "title", "vector"])
            flat = papers["vector"].combine_chunks().flatten()
            vectors = flat.to_numpy(zero_copy_only=False, writable=True).reshape(len(papers), -1)
        else:
            vectors = np.load(path, mmap_mode="c")  # copy on write: torch wants writable memory
            # Without a schema, pyarrow would turn titles that look like dates into dates.
            schema = pa.schema([("id", pa.string()), ("title", pa.string())])
            papers = pa.json.read_json(
                f"{path}.ids.jsonl",
                pa.json.ReadOptions(block_size=2**25),
                pa.json.ParseOptions(explicit_schema=schema),
            )
    except (OSError, ValueError, EOFError) as error:  # pyarrow's errors are subclasses of these
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be read ({reason})", "give a file that embed_papers.py wrote"
        ) from None
    if not (
        isinstance(about, dict)
        and about.keys() >= KEYS
        and vectors.shape == (about["rows"], about["dimension"])
        and vectors.dtype == np.float32
        and len(papers) == len(vectors)
    ):
        raise UserError(
            f"{path}: does not belong to its companion files (vectors {vectors.shape},"
            f" {len(papers)} ids)",
            "embed the papers again, or bring the right files together",
        )
    return vectors, papers, about


def embed_queries(texts: list[str], about: dict[str, Any], command: Command) -> Any:
    """Embeds texts in the query role: (len(texts), d) float32.

    Raises:
        UserError: the model cannot be loaded, or it is not the one that made the vectors.
    """
    from semcse.models import load_model

    name = command.model or about["model"]
    fix = f"give by --model the place of the model that made {command.vectors}"
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
        raise UserError(str(error), f"or {fix}") from None
    vectors = encoder.embed(texts, about["query_prompt"]).vectors
    if (d := vectors.shape[1]) != about["dimension"]:
        raise UserError(f"model {name} gives {d} numbers a text, not {about['dimension']}", fix)
    return vectors


def format_hits(query: str, hits: list[dict[str, Any]], as_json: bool) -> Iterator[str]:
    """Lines to print for one query. Each hit has the keys "distance", "id" and "title"."""
    if not as_json:
        yield f"{printable(query)[:TITLE_WIDTH]}\n rank  distance  {'id':<20}  title\n"
    for rank, hit in enumerate(hits, 1):
        if as_json:
            row = {"query": query, "rank": rank} | hit
            yield json.dumps(row, ensure_ascii=False) + "\n"
        else:
            title = printable(hit["title"])[:TITLE_WIDTH]
            yield f"{rank:5}  {hit['distance']:8.4f}  {printable(hit['id']):<20}  {title}\n"


def main() -> None:
    """Parses the command line, embeds the queries, searches and prints."""
    command = command_line.parse_command_line(Command, None, Command())
    if not command.vectors or command.k < 1 or not (command.query or command.queries or command.id):
        raise UserError(
            "--vectors, a query, or a --k of 1 or more is missing",
            "give --vectors FILE and --query TEXT, --queries FILE or --id ID",
        )
    command_line.log_to_stderr()
    stored, papers, about = read_vectors(Path(command.vectors))
    row_of = {one: row for row, one in enumerate(papers["id"].to_pylist())} if command.id else {}
    if missing := [one for one in command.id if one not in row_of]:
        raise UserError(
            f"--id {missing[0]}: no such paper in {command.vectors}", "give the id of a paper in it"
        )
    rows = [row_of[one] for one in command.id]
    texts = list(command.query)
    if command.queries:
        texts += [text for _, text in text_lines(command.queries)]
    import torch

    from semcse.distances import nearest

    vectors = torch.from_numpy(stored)
    queries = vectors[rows]
    if texts:
        queries = torch.cat([embed_queries(texts, about, command), queries])
    excluded, k = torch.tensor([-1] * len(texts) + rows), min(command.k, len(vectors))
    started = time.monotonic()
    try:
        found = nearest(queries, vectors, k, about["metric"], excluded)
    except ValueError as error:
        raise UserError(f"{command.vectors}: {error}", "embed the papers again") from None
    seconds = time.monotonic() - started
    logging.info("%d queries among %d vectors: %.2f s", len(queries), len(vectors), seconds)
    for query, distances, neighbors in zip([*texts, *command.id], *found, strict=True):
        neighbors = neighbors[neighbors >= 0]  # there may be fewer than k
        hits = papers.select(["id", "title"]).take(neighbors.numpy()).to_pylist()
        hits = [{"distance": d} | hit for d, hit in zip(distances.tolist(), hits, strict=False)]
        sys.stdout.writelines(format_hits(query, hits, command.json))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
