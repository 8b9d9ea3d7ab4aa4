"""Embeds papers, or lines of text: one float32 vector each, by any model or recipe of the
benchmark, for search, maps and statistics.

python embed_papers.py --model runs/quickstart-euclidean/model --input papers.jsonl.gz --output
vectors.npy

Memory holds one chunk of texts with its vectors, and the papers' ids (some 100 bytes each). A chunk
is a file in the folder OUTPUT.parts, whole or not there: a run that was stopped, however, goes on
with the same command and gives the same bytes (on a CPU with as many threads). In the end the
folder becomes OUTPUT, OUTPUT.json (model, use, counts) and, for .npy, OUTPUT.ids.jsonl (id and
title of each row).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
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
    """Embed papers, or lines of text; the same command again continues a run that was stopped."""

    model: str = ""  # recipe name, Hub id, or folder
    # papers file, or text with one text a line (*.txt); gzipped or not; "-" for standard input
    input: str = ""
    # *.npy (memory-mappable, with *.npy.ids.jsonl beside it) or *.parquet (columns id, title,
    # vector)
    output: str = ""
    # what the input holds where its name does not tell; standard input: papers
    format: Literal["papers", "lines"] | None = None
    # what is embedded of a paper; none: as its recipe says, else the abstract
    text: Literal["abstract", "title_abstract", "title"] | None = None
    pooling: Pooling | None = None  # overrides the model's own pooling
    metric: Metric | None = None  # overrides the model's own metric
    max_length: int | None = None  # overrides the tokens kept of a text
    # 2/8: embed only the second of eight shares, and leave it in OUTPUT.parts; shares may run side
    # by side or on several machines
    shard: str = "1/1"
    # 8: make the output of the eight shares in OUTPUT.parts, byte for byte what one process would
    # have written
    merge: int = 0
    # texts embedded and saved together: what memory holds, and what a kill can cost
    chunk: int = 4096
    # count and log bad lines, papers without the text among them, instead of stopping at the first
    skip_invalid: bool = False
    trust_remote_code: bool = False  # allow a model to bring and run its own Python code
    device: Device = "auto"  # auto: a CUDA GPU where there is one, else the CPU
    # bf16: several times as fast where the hardware has it natively, cosine to float32 above 0.999;
    # auto: bf16 there
    precision: Precision = "float32"


def checked(command: Command) -> Command:
    """The command with its format. UserError: it cannot work; before anything is read or loaded."""
    lines = (
        command.format == "lines"
        if command.format
        else command.input.removesuffix(".gz").endswith(".txt")
    )
    if not command.output.endswith((".npy", ".parquet")):
        raise UserError(
            f"--output {command.output or 'missing'}: is neither .npy nor .parquet",
            "name one of these",
        )
    whole = shard_slice(command.shard).step == 1
    if not (whole if command.merge else command.model and command.input):
        raise UserError(
            "--model or --input is missing, or --shard stands beside --merge",
            "give both; embed every share before --merge",
        )
    if (
        command.merge < 0
        or command.chunk < 1
        or (command.max_length is not None and command.max_length < 3)
        or (command.text and lines)
    ):
        raise UserError(
            "--merge, --chunk or --max-length is too small, or --text is given for lines",
            "give at least 1, 1, 3, and --text for papers only",
        )
    return dataclasses.replace(command, format="lines" if lines else "papers")


def read_chunks(command: Command, keys: list[str]) -> Iterator[list[Paper]]:
    """The input, some papers at a time. A line of text becomes a paper: its number is the id, its
    first words are the title, all of it the abstract.
    """
    papers = read_papers(command.input, keys, command.skip_invalid)
    if command.format == "lines":
        papers = (
            Paper(str(number), line[:100], line)
            for number, line in text_lines(command.input, command.skip_invalid)
        )
    while chunk := list(itertools.islice(papers, command.chunk)):
        yield chunk


def load_chunk(path: Path) -> dict[str, Any]:
    """A saved chunk: vectors (n, d) float32, ids (n JSON lines as bytes), cut, seconds, digest.
    UserError: missing or damaged.
    """
    try:
        with np.load(path) as saved:
            return dict(saved)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: cannot be read ({error})",
            "delete it and embed again: only this chunk is made anew",
        ) from None


def make_chunk(encoder: Any, papers: list[Paper], texts: list[str], digest: str) -> dict[str, Any]:
    """Embed one chunk (see `load_chunk`)."""
    started = time.monotonic()
    found = encoder.embed(texts, encoder.usage.document_prompt)
    vectors, seconds = found.vectors.numpy().astype("<f4"), time.monotonic() - started
    ids = "".join(
        json.dumps({"id": one.id, "title": one.title}, ensure_ascii=False) + "\n" for one in papers
    ).encode()
    return {
        "vectors": vectors,
        "ids": np.frombuffer(ids, np.uint8),
        "cut": found.cut,
        "seconds": seconds,
        "digest": digest,
    }


def embed(command: Command, folder: Path) -> None:
    """Embed every chunk of this share that is not in `folder` yet. A chunk's digest covers the
    settings and the input up to its end.
    """
    from semcse.encoder import uses_bf16
    from semcse.models import find_recipe, load_model, title_separator

    part, parts = map(int, command.shard.split("/"))
    title_first = getattr(find_recipe(command.model), "title_first", False)
    text = command.text or (
        "title_abstract" if title_first and command.format == "papers" else "abstract"
    )
    chunks = read_chunks(command, keys := text.split("_"))
    chunks = itertools.chain([next(chunks)], chunks)  # a wrong input shows before a model is loaded
    encoder = load_model(
        command.model,
        command.pooling,
        command.metric,
        command.max_length,
        device=command.device,
        trust_remote_code=command.trust_remote_code,
    )
    encoder.bf16 = uses_bf16(command.precision, encoder.device)
    separator = title_separator(command.model, encoder.tokenizer) if len(keys) > 1 else ""
    # tells one model from another, not one machine's rounding
    weights = sum(tensor.double().abs().sum().item() for tensor in encoder.model.parameters())
    made = dataclasses.asdict(encoder.usage) | {
        "text": text,
        "separator": separator,
        "chunk": command.chunk,
        "bf16": encoder.bf16,
        "weights": f"{weights:.9g}",
    }
    before = files.read_json(folder / "made.json") if any(folder.glob("*.npz")) else made
    if changed := [
        f"{key} was {before.get(key)!r}, is {value!r}"
        for key, value in made.items()
        if before.get(key) != value
    ]:
        raise UserError(
            f"{folder}: was begun with other settings ({'; '.join(changed)})",
            "give the same command, or delete that folder to start over",
        )
    files.write_json(folder / "made.json", made)
    logging.info(
        "embedding with %s",
        ", ".join(
            f"{key} {value}" for key, value in ({"model": command.model} | made).items() if value
        ),
    )
    total = (
        sum(1 for _ in raw_lines(command.input)) // parts if Path(command.input).is_file() else None
    )
    digest, count = (
        hashlib.blake2b(json.dumps(made).encode(), digest_size=16),
        {"rows": 0, "cut": 0, "seconds": 0.0},
    )
    with tqdm(total=total, unit="text") as bar:
        for number, papers in enumerate(chunks):
            texts = [separator.join(getattr(paper, key) for key in keys) for paper in papers]
            digest.update(
                json.dumps(
                    [[paper.id, paper.title, one] for paper, one in zip(papers, texts, strict=True)]
                ).encode()
            )
            count["rows"] += len(papers)
            # chunks are dealt out, not papers: they are computed together
            if number % parts != part - 1:
                continue
            path = folder / f"{number:08}.npz"
            if path.exists():
                bar.initial += len(papers)  # not of this run's rate
            else:
                with files.atomic_path(path) as partial, partial.open("wb") as handle:
                    np.savez(handle, **make_chunk(encoder, papers, texts, digest.hexdigest()))
            chunk = load_chunk(path)
            if str(chunk["digest"]) != digest.hexdigest():
                raise UserError(
                    f"{folder}: was begun with another input",
                    "give the same input, or delete that folder to start over",
                )
            count["cut"] += int(chunk["cut"])
            count["seconds"] += float(chunk["seconds"])
            bar.update(len(papers))
    files.write_json(
        folder / f"share-{part}-of-{parts}.json",
        {"model": command.model, "input": digest.hexdigest()} | made | count,
    )


def finish(output: Path, folder: Path, parts: int) -> None:
    """Make OUTPUT and its companions of the chunks in `folder`. UserError: shares that are missing
    or do not belong together.
    """
    shares = [folder / f"share-{part}-of-{parts}.json" for part in range(1, parts + 1)]
    if missing := [str(part) for part, share in enumerate(shares, 1) if not share.exists()]:
        raise UserError(
            f"{folder}: lacks share {', '.join(missing)} of {parts}",
            f"run --shard {missing[0]}/{parts}, or copy its files into that folder",
        )
    facts = [files.read_json(share) for share in shares]
    if other := [
        share.name
        for share, fact in zip(shares, facts, strict=True)
        if fact["input"] != facts[0]["input"]
    ]:
        raise UserError(
            f"{folder}: {', '.join(other)} had other settings or another input than share 1",
            "embed it again with the same command",
        )
    rows, cut, seconds = (
        facts[0]["rows"],
        sum(fact["cut"] for fact in facts),
        sum(fact["seconds"] for fact in facts),
    )
    paths = [folder / f"{number:08}.npz" for number in range(-(-rows // facts[0]["chunk"]))]
    d = load_chunk(paths[0])["vectors"].shape[1]
    (write_parquet if output.suffix == ".parquet" else write_npy)(
        folder, map(load_chunk, paths), rows, d
    )
    # vectors of an earlier run never stand beside what describes new ones
    output.unlink(missing_ok=True)
    counts = {"rows": rows, "dimension": d, "cut": cut, "share_cut": cut / rows, "seconds": seconds}
    files.write_json(
        Path(f"{output}.json"), facts[0] | counts | {"versions": run_folder.versions()}
    )
    for name, place in (("ids", f"{output}.ids.jsonl"), ("vectors", output)):
        if (folder / name).exists():
            os.replace(folder / name, place)
    shutil.rmtree(folder)
    logging.info(
        "%s: %d rows of %d numbers, %.1f%% of the texts cut, %.1f texts/s",
        output,
        rows,
        d,
        100 * cut / rows,
        rows / max(seconds, 1e-9),
    )


def write_npy(folder: Path, chunks: Iterable[dict[str, Any]], rows: int, d: int) -> None:
    """The files `vectors`, which is what np.save would write, and `ids`, chunk by chunk."""
    with (
        files.atomic_path(folder / "vectors") as vectors,
        files.atomic_path(folder / "ids") as ids,
        ids.open("wb") as lines,
        vectors.open("wb") as numbers,
    ):
        np.lib.format.write_array_header_1_0(
            numbers, {"descr": "<f4", "fortran_order": False, "shape": (rows, d)}
        )
        for chunk in chunks:
            numbers.write(chunk["vectors"].tobytes())
            lines.write(chunk["ids"].tobytes())


def write_parquet(folder: Path, chunks: Iterable[dict[str, Any]], rows: int, d: int) -> None:
    """The file `vectors`: columns id, title and vector (a list of fixed size), one row group a
    chunk.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    schema = pa.schema(
        [("id", pa.string()), ("title", pa.string()), ("vector", pa.list_(pa.float32(), d))]
    )
    with (
        files.atomic_path(folder / "vectors") as partial,
        pq.ParquetWriter(partial, schema) as writer,
    ):
        for chunk in chunks:
            ids = [json.loads(line) for line in chunk["ids"].tobytes().splitlines()]
            columns = [
                [one["id"] for one in ids],
                [one["title"] for one in ids],
                pa.FixedSizeListArray.from_arrays(chunk["vectors"].reshape(-1), d),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def main() -> None:
    """The script: parse, embed, finish."""
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
