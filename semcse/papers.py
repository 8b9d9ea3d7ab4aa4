"""Papers files, splits, summary pairs and batches: the only code that reads the papers format
(README, "Data format").

A papers file is JSONL, UTF-8, optionally gzipped, one object a line: `id` (unique), `title`,
`abstract`, and optionally `summaries` (list of strings), `query`, `field`, `topic`, `source`
(strings), `visits` (visits an epoch in training). Unknown keys are kept in `extra`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import re
import unicodedata
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from semcse.errors import UserError

log = logging.getLogger(__name__)


TEXT_KEYS = ("id", "title", "abstract", "query", "field", "topic", "source")
# A line longer than this is no paper: 16 MiB are some three million words.
LONGEST_LINE = 16 * 2**20
# characters; comparing texts takes time by the square of a word's combining marks
LONGEST_ID, LONGEST_WORD = 1_000, 5_000
MOST_VISITS = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Paper:
    """One paper; absent texts are empty. `summaries` holds texts that differ after normalisation
    (see `normalise`); `visits` is its visits an epoch.
    """

    id: str
    title: str = ""
    abstract: str = ""
    summaries: tuple[str, ...] = ()
    query: str = ""
    field: str = ""
    topic: str = ""
    source: str = ""
    visits: int = 1
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        """The JSON object of this paper: absent keys are left out, unknown ones kept."""
        row: dict[str, Any] = {key: getattr(self, key) for key in TEXT_KEYS if getattr(self, key)}
        if self.visits != 1:
            row["visits"] = self.visits
        if self.summaries:
            row["summaries"] = list(self.summaries)
        return row | self.extra


def normalise(text: str) -> str:
    """The form in which texts are compared for equality: NFKC, lower case, single spaces, no
    closing full stop.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(". ")


def read_papers(
    path: str | Path, need: Collection[str] = (), skip_invalid: bool = False
) -> Iterator[Paper]:
    """Stream the papers of a file, plain or gzipped, each validated.

    Args:
        path: the papers file.
        need: keys besides `id` that every paper must have, non-blank ("summaries" for training,
            "title" and "abstract" for the benchmark).
        skip_invalid: leave bad lines out and log how many, instead of stopping at the first.

    Raises:
        UserError: no such file, not a papers file, or (without skip_invalid) a bad line; names
            file, line, key and mend.
    """
    seen: set[str] = set()
    skipped, count = 0, 0
    for number, line in raw_lines(path):
        try:
            paper = _parse(line, need)
            if paper.id in seen:
                raise _BadLine(
                    f'id "{paper.id[:80]}" stands on an earlier line too',
                    "give every paper its own id",
                )
        except _BadLine as bad:
            if not skip_invalid:
                raise UserError(
                    f"{path}:{number}: {bad.what}",
                    f"{bad.mend} (or leave bad lines out with --skip-invalid)",
                ) from None
            skipped += 1
            continue
        seen.add(paper.id)
        count += 1
        yield paper
    if skipped:
        log.warning("%s: left out %d bad lines, kept %d papers", path, skipped, count)
    if not count:
        raise UserError(
            f"{path}: holds no papers",
            "give a JSONL file with one paper a line (README, Data format)",
        )


def text_lines(path: str | Path, skip_invalid: bool = False) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of every non-blank line of a plain text file (see `raw_lines`),
    without white space around it.

    Raises:
        UserError: as `raw_lines`; without skip_invalid also a line that is not UTF-8; no line at
            all.
    """
    count, skipped = 0, 0
    for number, line in raw_lines(path):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            if not skip_invalid:
                raise UserError(
                    f"{path}:{number}: is not UTF-8",
                    "save the file as UTF-8 (or leave bad lines out with --skip-invalid)",
                ) from None
            skipped += 1
            continue
        count += 1
        yield number, text
    if skipped:
        log.warning("%s: left out %d bad lines, kept %d", path, skipped, count)
    if not count:
        raise UserError(f"{path}: holds no text", "give one text a line")


class _BadLine(Exception):
    def __init__(self, what: str, mend: str) -> None:
        super().__init__(what)
        self.what, self.mend = what, mend


def raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, raw line) of every non-blank line of a file, or of standard input for "-";
    gzip is told by its first two bytes, not by the name.

    Raises:
        UserError: no such file, damaged, or a line longer than LONGEST_LINE.
    """
    try:
        with Path("/dev/stdin" if str(path) == "-" else path).open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"  # a pipe cannot be rewound
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
            number = 0
            while line := stream.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise UserError(
                        f"{path}:{number}: line is longer than {LONGEST_LINE >> 20} MiB",
                        "give one paper a line",
                    )
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file", "check the path and the folder you are in"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: damaged gzip file ({error})", "copy or compress it again"
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"{path}: is a folder", "name a papers file (README, Data format)"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error})",
            "check the path and its permissions",
        ) from None


def _parse(line: bytes, need: Collection[str]) -> Paper:
    """One raw line -> Paper, or _BadLine."""
    row = _json_object(line)
    for key in TEXT_KEYS:
        if not isinstance(row.get(key, ""), str):
            raise _BadLine(
                f'key "{key}" is {_kind(row[key])}', "make it a string, or leave the key out"
            )
    summaries = row.get("summaries", [])
    if not isinstance(summaries, list) or not all(isinstance(text, str) for text in summaries):
        raise _BadLine('key "summaries" is not a list of strings', "make it one")
    for key in ("id", *need):
        if key not in row:
            raise _BadLine(f'key "{key}" is missing', "add it")
        texts = row[key] if isinstance(row[key], list) else [row[key]]
        if not texts or not all(text.strip() for text in texts):
            raise _BadLine(f'key "{key}" is blank', "fill it or drop the paper")
    _check_sizes(row["id"], [row[key] for key in TEXT_KEYS if key in row] + summaries)
    distinct: dict[str, str] = {}
    for text in summaries:
        if text.strip():
            distinct.setdefault(normalise(text), text)
    visits = row.get("visits", 1)
    if type(visits) is not int or not 1 <= visits <= MOST_VISITS:
        raise _BadLine(
            'key "visits" is not a whole number from 1 to 100', "mend it, or leave the key out"
        )
    extra = {
        key: value for key, value in row.items() if key not in (*TEXT_KEYS, "summaries", "visits")
    }
    return Paper(
        summaries=tuple(distinct.values()),
        visits=visits,
        extra=extra,
        **{key: row[key] for key in TEXT_KEYS if key in row},
    )


def _check_sizes(identity: str, texts: list[str]) -> None:
    if len(identity) > LONGEST_ID:
        raise _BadLine(
            f'key "id" has more than {LONGEST_ID} characters', "give the paper a shorter id"
        )
    for text in texts:
        if len(text) > LONGEST_WORD and max(map(len, text.split()), default=0) > LONGEST_WORD:
            raise _BadLine(
                f"a text holds a word of more than {LONGEST_WORD} characters",
                "mend that text or drop the paper",
            )


def _json_object(line: bytes) -> dict[str, Any]:
    if b"\x00" in line:
        raise _BadLine("is not text (NUL byte)", "give a JSONL file, plain or gzipped")
    try:
        text = line.decode("utf-8-sig")
        row = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_twins)
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeDecodeError:
        raise _BadLine("is not UTF-8", "save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise _BadLine("holds half a surrogate pair", "write the character whole") from None
    except json.JSONDecodeError as error:
        raise _BadLine(
            f"is not JSON ({error.msg} at column {error.colno})", "write one JSON object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"is not JSON ({error})", "write one JSON object a line") from None
    if not isinstance(row, dict):
        raise _BadLine(f"is {_kind(row)}, not a JSON object", "write one JSON object a line")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return row


def _kind(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def shard_slice(shard: str) -> slice:
    """Which papers of a file, by their place in it, belong to shard "i/n" (counted from 1): "2/4"
    -> slice(1, None, 4). UserError: it is not written so.
    """
    parts = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", shard)
    if not parts or int(parts[1]) > int(parts[2]):
        raise UserError(f"--shard {shard} is no shard", "give i/n with 1 <= i <= n, such as 2/4")
    return slice(int(parts[1]) - 1, None, int(parts[2]))
