"""Search the vectors that embed_papers.py wrote: the k nearest papers of each query, exactly.

    python search_papers.py --vectors vectors.npy --query "how soil stores carbon"
    python search_papers.py --vectors vectors.npy --id PAPER_ID

The model, the metric and the query prompt come from VECTORS.json. The model is loaded only if a
query is a text. A .npy file is read once, block by block, and may be larger than memory; a .parquet
file is read completely.
"""

import dataclasses
import json
import logging
import sys
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
    id: tuple[str, ...] = ()  # id of a paper; finds the other papers nearest to it; may be repeated
    k: Annotated[int, arg(aliases=("-k",))] = 10  # number of papers per query
    json: bool = False  # print one JSON object per neighbour instead of tables
    model: str = ""  # path of the model, if it is not the one in VECTORS.json
    trust_remote_code: bool = False  # allow Python code that comes with a model to run
    device: Device = "auto"  # auto: a CUDA GPU if there is one, else the CPU


def read_vectors(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Read an output of embed_papers.py: the vectors, an (n, d) float32 numpy array; a pyarrow
    table of their ids and titles, in the same order; and the content of VECTORS.json.
    """
    about = files.read_json(Path(f"{path}.json"))
    try:
        vectors, papers = read_parquet(path) if path.suffix == ".parquet" else read_npy(path)
    except (OSError, ValueError, EOFError) as error:  # pyarrow's errors are subclasses of these
        what = f"{path}: cannot be read ({str(error)[:200]})"
        raise UserError(what, "give a file that embed_papers.py wrote") from None
    shape = (about["rows"], about["dimension"]) if about.keys() >= KEYS else None
    if vectors.shape != shape or len(papers) != len(vectors):
        what = f"{path}: does not belong to its companion files (its shape is {vectors.shape})"
        raise UserError(what, "embed the papers again, or bring the right files together")
    return vectors, papers, about


def read_parquet(path: Path) -> tuple[Any, Any]:
    """Read the vectors, (n, d), and the table of ids and titles."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    papers = parquet.read_table(path, columns=["id", "title", "vector"])
    flat = papers["vector"].combine_chunks().flatten()
    return flat.to_numpy(zero_copy_only=False, writable=True).reshape(len(papers), -1), papers


def read_npy(path: Path) -> tuple[Any, Any]:
    """Memory-map the vectors, (n, d), and read the table of ids and titles."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import json as pa_json

    # Without a schema, pyarrow would turn titles that look like dates into dates.
    schema = pa.schema([("id", pa.string()), ("title", pa.string())])
    options = pa_json.ReadOptions(block_size=2**25), pa_json.ParseOptions(schema)
    papers = pa_json.read_json(f"{path}.ids.jsonl", *options)
    return np.load(path, mmap_mode="c"), papers  # copy on write: torch needs writable memory


def embed_queries(texts: list[str], about: dict[str, Any], command: Command) -> Any:
    """Embed texts in the query role, with the model that made the vectors: (len(texts), d)."""
    from semcse.models import load_model

    name = command.model or about["model"]
    fix = f"give the path of the model that made {command.vectors} with --model"
    usage = {key: about[key] for key in ("pooling", "metric", "max_length")}
    try:
        encoder = load_model(
            name, **usage, device=command.device, trust_remote_code=command.trust_remote_code
        )
    except UserError as error:
        raise UserError(str(error), f"or {fix}") from None
    vectors = encoder.embed(texts, about["query_prompt"]).vectors
    if (d := vectors.shape[1]) != about["dimension"]:
        raise UserError(f"model {name} makes vectors of {d} numbers, not {about['dimension']}", fix)
    return vectors


def format_hits(query: str, hits: list[dict[str, Any]], as_json: bool) -> Iterator[str]:
    """Yield the lines to print for one query. A hit has the keys "distance", "id" and "title"."""
    if not as_json:
        yield f"{printable(query)[:TITLE_WIDTH]}\n rank  distance  {'id':<20}  title\n"
    for rank, hit in enumerate(hits, 1):
        if as_json:
            yield json.dumps({"query": query, "rank": rank} | hit, ensure_ascii=False) + "\n"
        else:
            title = printable(hit["title"])[:TITLE_WIDTH]
            yield f"{rank:5}  {hit['distance']:8.4f}  {printable(hit['id']):<20}  {title}\n"


def search(command: Command) -> None:
    """Embed the queries, find their nearest papers and print them."""
    import torch

    from semcse.distances import nearest

    stored, papers, about = read_vectors(Path(command.vectors))
    rows = [papers["id"].index(one).as_py() for one in command.id]  # -1: not found
    if -1 in rows:
        what = f"--id {command.id[rows.index(-1)]}: no such paper in {command.vectors}"
        raise UserError(what, "give the id of a paper in it")
    lines = text_lines(command.queries) if command.queries else ()
    texts = [*command.query, *(text for _, text in lines)]
    vectors = torch.from_numpy(stored)
    embedded = [embed_queries(texts, about, command)] if texts else []
    queries = torch.cat([*embedded, vectors[rows]])
    excluded, k = torch.tensor([-1] * len(texts) + rows), min(command.k, len(vectors))
    logging.info("searching %d vectors for %d queries", len(vectors), len(queries))
    try:
        found = nearest(queries, vectors, k, about["metric"], excluded)
    except ValueError as error:
        raise UserError(f"{command.vectors}: {error}", "embed the papers again") from None
    for query, distances, neighbours in zip([*texts, *command.id], *found, strict=True):
        neighbours = neighbours[neighbours >= 0]  # there may be fewer than k
        hits = papers.select(["id", "title"]).take(neighbours.numpy()).to_pylist()
        hits = [{"distance": d} | hit for d, hit in zip(distances.tolist(), hits, strict=False)]
        sys.stdout.writelines(format_hits(query, hits, command.json))


def main() -> None:
    """Parse the command line and search."""
    command = command_line.parse_command_line(Command, None, Command())
    if not command.vectors or command.k < 1 or not (command.query or command.queries or command.id):
        what = "--vectors, a query, or a --k of 1 or more is missing"
        raise UserError(what, "give --vectors FILE and --query TEXT, --queries FILE or --id ID")
    command_line.log_to_stderr()
    search(command)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
