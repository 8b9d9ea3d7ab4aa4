"""Embed papers, or lines of text, with any model or recipe of the benchmark: one float32 vector
each, for search, maps and statistics.

    python embed_papers.py --model runs/quickstart-euclidean/model --input papers.jsonl.gz \
        --output vectors.npy

The script saves each chunk of texts in the folder OUTPUT.parts, so the same command continues an
interrupted run and gives the same bytes (on a CPU, with the same number of threads). At the end the
folder becomes OUTPUT, OUTPUT.json (model, how it was used, counts) and, for .npy, OUTPUT.ids.jsonl
(id and title of each row). Memory holds one chunk and the ids of the papers.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from semcse import command_line, files, run_folder
from semcse.errors import UserError
from semcse.papers import Paper, raw_lines, read_papers, shard_slice, text_lines
from semcse.types import Device, Metric, Pooling, Precision


@dataclasses.dataclass(frozen=True)
class Command:
    """Embed papers or lines of text. The same command continues a run that was interrupted."""

    model: str = ""  # recipe name, Hub id, or folder
    # papers file, or text file with one text per line (*.txt), gzipped or not; "-": standard input
    input: str = ""
    output: str = ""  # *.npy (with *.npy.ids.jsonl) or *.parquet (columns id, title, vector)
    format: Literal["papers", "lines"] | None = None  # default: lines for *.txt, else papers
    # text of a paper to embed; default: as the model's recipe says, else the abstract
    text: Literal["abstract", "title_abstract", "title"] | None = None
    pooling: Pooling | None = None  # overrides the model's pooling
    metric: Metric | None = None  # overrides the model's distance
    max_length: int | None = None  # overrides the model's maximum number of tokens
    # 2/8: embed only the second of eight shares, into OUTPUT.parts; shares may run in parallel
    shard: str = "1/1"
    merge: int = 0  # 8: combine eight shares in OUTPUT.parts into the output of one run
    chunk: int = 4096  # number of texts that are in memory at once and saved together
    skip_invalid: bool = False  # log and skip bad lines instead of stopping at the first
    trust_remote_code: bool = False  # allow Python code that comes with a model to run
    device: Device = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    precision: Precision = "float32"  # auto: bf16 if the hardware is fast at it (cosine > 0.999)


def checked(command: Command) -> Command:
    """Return the command with its format filled in, after checking that its flags fit together."""
    kind = command.format or ("lines" if command.input.endswith((".txt", ".txt.gz")) else "papers")
    command = dataclasses.replace(command, format=kind)
    if not command.output.endswith((".npy", ".parquet")):
        raise UserError(f"--output {command.output}: unknown format", "name it *.npy or *.parquet")
    whole = shard_slice(command.shard).step == 1
    if not (whole if command.merge else command.model and command.input):
        what = "--model or --input is missing, or --shard is given together with --merge"
        raise UserError(what, "give --model and --input, or --merge after all shares are embedded")
    max_length = 3 if command.max_length is None else command.max_length
    if command.merge < 0 or command.chunk < 1 or max_length < 3:
        raise UserError("--merge, --chunk or --max-length is too small", "give at least 1, 1 and 3")
    if command.text and command.format == "lines":
        raise UserError("--text is given for lines of text", "give it only for a papers file")
    return command


def read_chunks(command: Command, keys: list[str]) -> Iterator[list[Paper]]:
    """Yield the papers, which must have the `keys`, one chunk at a time. A line of text becomes a
    paper: its number is the id, its first 100 characters the title, and all of it the abstract.
    """
    papers = read_papers(command.input, keys, command.skip_invalid)
    if command.format == "lines":
        lines = text_lines(command.input, command.skip_invalid)
        papers = (Paper(str(number), line[:100], line) for number, line in lines)
    while chunk := list(itertools.islice(papers, command.chunk)):
        yield chunk


def load_chunk(path: Path) -> dict[str, Any]:
    """Read a saved chunk: "vectors" (n, d) float32, "ids" (n JSON lines as bytes), "cut" (number
    of truncated texts), "seconds" and "digest" (of the settings and the input up to its end).
    """
    try:
        with np.load(path) as saved:
            return dict(saved)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error})", "delete it and run again") from None


def embed_chunk(
    path: Path, encoder: Any, papers: list[Paper], texts: list[str], digest: str
) -> dict[str, Any]:
    """Return the chunk saved at `path`; if it is not there, embed and save it first."""
    if not path.exists():
        started = time.monotonic()
        found = encoder.embed(texts, encoder.usage.document_prompt)
        seconds = time.monotonic() - started
        rows = [{"id": paper.id, "title": paper.title} for paper in papers]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        chunk = {"vectors": found.vectors.numpy(), "ids": np.frombuffer(lines.encode(), np.uint8)}
        with files.atomic_path(path) as partial, partial.open("wb") as handle:
            np.savez(handle, **chunk, cut=found.cut, seconds=seconds, digest=digest)
    chunk = load_chunk(path)
    if str(chunk["digest"]) != digest:
        what = f"{path.parent}: was begun with another input"
        raise UserError(what, "give the same input, or delete that folder to start over")
    return chunk


def load_encoder(command: Command, folder: Path, text: str) -> tuple[Any, dict[str, Any]]:
    """Load the model, and list all settings that determine the vectors. The list is saved in
    `folder` and must equal the one that an interrupted run saved there.
    """
    from semcse.encoder import uses_bf16
    from semcse.models import load_model, title_separator

    options = ("pooling", "metric", "max_length", "device", "trust_remote_code")
    encoder = load_model(command.model, **{key: getattr(command, key) for key in options})
    encoder.bf16 = uses_bf16(command.precision, encoder.device)
    # This sum identifies the model. Its first nine digits do not depend on rounding.
    weights = sum(tensor.double().abs().sum().item() for tensor in encoder.model.parameters())
    separator = title_separator(command.model, encoder.tokenizer) if "_" in text else ""
    made = dataclasses.asdict(encoder.usage)
    made |= {"text": text, "separator": separator, "chunk": command.chunk}
    made |= {"bf16": encoder.bf16, "weights": f"{weights:.9g}"}
    record = folder / "made.json"
    if record.exists() and (before := files.read_json(record)) != made:
        what = f"{folder}: was begun with other settings ({dict(before.items() - made.items())})"
        raise UserError(what, "give the same command, or delete that folder to start over")
    files.write_json(record, made)
    return encoder, made


def embed(command: Command, folder: Path) -> None:
    """Embed every chunk of this share that is not in `folder` yet."""
    from semcse.models import find_recipe

    title_first = getattr(find_recipe(command.model), "title_first", False)
    joined = title_first and command.format == "papers"
    text = command.text or ("title_abstract" if joined else "abstract")
    chunks = read_chunks(command, keys := text.split("_"))
    chunks = itertools.chain([next(chunks)], chunks)  # finds a bad input before loading a model
    encoder, made = load_encoder(command, folder, text)
    share, is_file = shard_slice(command.shard), Path(command.input).is_file()
    total = sum(1 for _ in raw_lines(command.input)) // share.step if is_file else None
    # The digest of a chunk covers the settings and the input up to the end of the chunk.
    digest = hashlib.blake2b(json.dumps(made).encode(), digest_size=16)
    count = {"rows": 0, "cut": 0, "seconds": 0.0}
    with tqdm(total=total, unit="text") as bar:
        for number, papers in enumerate(chunks):
            texts = [made["separator"].join(getattr(one, key) for key in keys) for one in papers]
            rows = [[one.id, one.title, text] for one, text in zip(papers, texts, strict=True)]
            digest.update(json.dumps(rows).encode())
            count["rows"] += len(papers)
            if number % share.step == share.start:
                path = folder / f"{number:08}.npz"
                chunk = embed_chunk(path, encoder, papers, texts, digest.hexdigest())
                count["cut"] += int(chunk["cut"])
                count["seconds"] += float(chunk["seconds"])
                bar.update(len(papers))
    facts = {"model": command.model, "input": digest.hexdigest()} | made | count
    files.write_json(folder / f"share-{command.shard.replace('/', '-of-')}.json", facts)


def finish(output: Path, folder: Path, parts: int) -> None:
    """Combine the chunks in `folder` into OUTPUT and its companion files, and delete the folder."""
    shares = [folder / f"share-{part}-of-{parts}.json" for part in range(1, parts + 1)]
    if missing := [str(part) for part, share in enumerate(shares, 1) if not share.exists()]:
        what = f"{folder}: lacks share {', '.join(missing)} of {parts}"
        raise UserError(what, f"run --shard {missing[0]}/{parts}, or copy its files there")
    facts = [files.read_json(share) for share in shares]
    for share, fact in zip(shares, facts, strict=True):
        if fact["input"] != facts[0]["input"]:
            what = f"{share}: had other settings or another input than share 1"
            raise UserError(what, "embed it again with the same command")
    rows = facts[0]["rows"]
    cut, seconds = (sum(fact[key] for fact in facts) for key in ("cut", "seconds"))
    paths = [folder / f"{number:08}.npz" for number in range(-(-rows // facts[0]["chunk"]))]
    d = load_chunk(paths[0])["vectors"].shape[1]
    write = write_parquet if output.suffix == ".parquet" else write_npy
    write(folder, map(load_chunk, paths), rows, d)
    output.unlink(missing_ok=True)  # old vectors must never be next to the new description
    counts = {"rows": rows, "dimension": d, "cut": cut, "share_cut": cut / rows, "seconds": seconds}
    about = facts[0] | counts | {"versions": run_folder.versions()}
    files.write_json(Path(f"{output}.json"), about)
    if write is write_npy:
        (folder / "ids").replace(f"{output}.ids.jsonl")
    (folder / "vectors").replace(output)
    shutil.rmtree(folder)
    logging.info("%s: %d rows, %.1f%% of the texts truncated", output, rows, 100 * cut / rows)


def write_npy(folder: Path, chunks: Iterable[dict[str, Any]], rows: int, d: int) -> None:
    """Write the files `vectors`, in the format of np.save, and `ids`."""
    with (
        files.atomic_path(folder / "vectors") as vectors,
        files.atomic_path(folder / "ids") as ids,
        ids.open("wb") as lines,
        vectors.open("wb") as numbers,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, d)}
        np.lib.format.write_array_header_1_0(numbers, header)
        for chunk in chunks:
            numbers.write(chunk["vectors"].tobytes())
            lines.write(chunk["ids"].tobytes())


def write_parquet(folder: Path, chunks: Iterable[dict[str, Any]], rows: int, d: int) -> None:
    """Write the file `vectors` with the columns id, title and vector, one row group per chunk."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    vector = pa.list_(pa.float32(), d)
    schema = pa.schema([("id", pa.string()), ("title", pa.string()), ("vector", vector)])
    with (
        files.atomic_path(folder / "vectors") as partial,
        pq.ParquetWriter(partial, schema) as writer,
    ):
        for chunk in chunks:
            papers = map(json.loads, chunk["ids"].tobytes().splitlines())
            table = [one | {"vector": v} for one, v in zip(papers, chunk["vectors"], strict=True)]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))


def main() -> None:
    """Parse the command line, embed the texts, and combine the chunks."""
    command = checked(command_line.parse_command_line(Command, None, Command()))
    command_line.log_to_stderr()
    output, folder = Path(command.output), Path(f"{command.output}.parts")
    with files.lock(output.with_name(f".{output.name}.{command.shard.replace('/', '-of-')}.lock")):
        if not command.merge:
            embed(command, folder)
        if command.shard == "1/1":
            finish(output, folder, command.merge or 1)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
