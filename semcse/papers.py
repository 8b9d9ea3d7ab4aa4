"""Read papers files, the JSON Lines format that all scripts share (README, Data format).

A papers file is JSONL in UTF-8, optionally gzipped, with one object per line: `id` (unique),
`title`, `abstract`, and optionally `summaries` (a list of strings), `query`, `field`, `topic`,
`source` (strings) and `visits` (how often an epoch draws the paper). Unknown keys are kept.
"""

import dataclasses
import gzip
import json
import logging
import re
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from semcse.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

TEXT_KEYS = ("id", "title", "abstract", "query", "field", "topic", "source")
# A longer line cannot be a paper: 16 MiB are about three million words.
LONGEST_LINE = 16 * 2**20
# Lengths in characters. The time to normalise a word grows with the square of its combining marks.
LONGEST_ID, LONGEST_WORD = 1_000, 5_000
MOST_VISITS = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Paper:
    """One paper; absent texts are empty. The `summaries` differ from each other after `normalise`,
    `visits` is how often an epoch draws the paper, and `extra` holds the unknown keys.
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
        """Return the JSON object of this paper, without the keys that are empty."""
        row: dict[str, Any] = {key: getattr(self, key) for key in TEXT_KEYS if getattr(self, key)}
        if self.visits != 1:
            row["visits"] = self.visits
        if self.summaries:
            row["summaries"] = list(self.summaries)
        return row | self.extra


def normalise(text: str) -> str:
    """Return the form in which two texts are compared: Unicode NFKC, lower case, single spaces,
    no full stop at the end.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(". ")


def read_papers(
    path: str | Path, need: Collection[str] = (), skip_invalid: bool = False
) -> Iterator[Paper]:
    """Read the papers of a file one at a time. Raise a UserError for a line that is not valid,
    and if the file cannot be read or holds no papers.

    Args:
        path: The papers file, plain or gzipped; "-" means standard input.
        need: Keys besides `id` that every paper must have and that must not be blank.
        skip_invalid: Leave out bad lines and log how many, instead of stopping at the first.
    """
    ids: set[str] = set()
    lines = _parsed_lines(path, lambda line: _parse_paper(line, need, ids), skip_invalid, "paper")
    return (paper for _, paper in lines)


def text_lines(path: str | Path, skip_invalid: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (1-based line number, stripped text) of each line of a text file that is not blank;
    `skip_invalid` leaves out lines that are not UTF-8.
    """
    yield from _parsed_lines(path, lambda line: _decode(line).strip(), skip_invalid, "text")


def raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (1-based line number, raw line) of each line that is not blank. The path "-" means
    standard input. Gzip is detected from the first two bytes, not from the name.
    """
    try:
        with Path("/dev/stdin" if str(path) == "-" else path).open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"  # peek, because a pipe cannot be rewound
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
            lines = iter(lambda: stream.readline(LONGEST_LINE), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) == LONGEST_LINE:
                    what = f"{path}:{number}: line is longer than {LONGEST_LINE >> 20} MiB"
                    raise UserError(what, "write one paper per line")
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "check the path and the current folder") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"{path}: damaged gzip file ({error})"
        raise UserError(what, "copy or compress the file again") from None
    except OSError as error:
        what = f"{path}: cannot be read ({error.strerror or error})"
        raise UserError(what, "check the path and its permissions") from None


def shard_slice(shard: str) -> slice:
    """Return the slice of a file's papers in the shard "i/n": "2/4" gives slice(1, None, 4)."""
    parts = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", shard)
    if not parts or int(parts[1]) > int(parts[2]):
        raise UserError(f"--shard {shard} is not a shard", "give i/n with 1 <= i <= n, such as 2/4")
    return slice(int(parts[1]) - 1, None, int(parts[2]))


def _parsed_lines(
    path: str | Path, parse: Callable[[bytes], T], skip_invalid: bool, noun: str
) -> Iterator[tuple[int, T]]:
    """Yield (line number, parsed line). `parse` raises a UserError; `noun` says what a line is."""
    kept, skipped = 0, 0
    for number, line in raw_lines(path):
        try:
            value = parse(line)
        except UserError as bad:
            if not skip_invalid:
                fix = f"{bad.fix} (or leave out bad lines with --skip-invalid)"
                raise UserError(f"{path}:{number}: {bad.what}", fix) from None
            skipped += 1
        else:
            kept += 1
            yield number, value
    if skipped:
        log.warning("%s: left out %d bad lines, kept %d %ss", path, skipped, kept, noun)
    if not kept:
        raise UserError(f"{path}: holds no {noun}s", f"give a file with one {noun} per line")


def _parse_paper(line: bytes, need: Collection[str], ids: set[str]) -> Paper:
    """Parse and check a line. `ids` holds the ids of earlier lines, and this one is added."""
    row = _parse_object(line)
    texts = {key: row[key] for key in TEXT_KEYS if key in row}
    summaries, visits = row.get("summaries", []), row.get("visits", 1)
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f'key "{key}" is not a string', "make it a string or leave it out")
    if not isinstance(summaries, list) or not all(isinstance(text, str) for text in summaries):
        raise UserError('key "summaries" is not a list of strings', "make it a list of strings")
    if type(visits) is not int or not 1 <= visits <= MOST_VISITS:
        what = f'key "visits" is not a whole number from 1 to {MOST_VISITS}'
        raise UserError(what, "fix it, or leave the key out")
    _check_needed(row, ("id", *need))
    _check_sizes(texts["id"], [*texts.values(), *summaries])
    if texts["id"] in ids:
        what = f'id "{texts["id"][:80]}" is already on an earlier line'
        raise UserError(what, "give each paper a unique id")
    ids.add(texts["id"])
    distinct: dict[str, str] = {}
    for text in filter(str.strip, summaries):
        distinct.setdefault(normalise(text), text)
    extra = {key: row[key] for key in row if key not in (*TEXT_KEYS, "summaries", "visits")}
    return Paper(summaries=tuple(distinct.values()), visits=visits, extra=extra, **texts)


def _check_needed(row: dict[str, Any], keys: Collection[str]) -> None:
    for key in keys:
        if key not in row:
            raise UserError(f'key "{key}" is missing', "add it")
        values = row[key] if isinstance(row[key], list) else [row[key]]
        if not values or not all(value.strip() for value in values):
            raise UserError(f'key "{key}" is blank', "fill it, or leave the paper out")


def _check_sizes(paper_id: str, texts: list[str]) -> None:
    if len(paper_id) > LONGEST_ID:
        raise UserError(f'key "id" has more than {LONGEST_ID} characters', "give a shorter id")
    for text in texts:
        # The first comparison avoids splitting short texts.
        if len(text) > LONGEST_WORD and max(map(len, text.split()), default=0) > LONGEST_WORD:
            what = f"a text has a word of more than {LONGEST_WORD} characters"
            raise UserError(what, "fix the text, or leave the paper out")


def _parse_object(line: bytes) -> dict[str, Any]:
    if b"\x00" in line:
        raise UserError("is not text (NUL byte)", "give a JSONL file, plain or gzipped")
    try:
        row = json.loads(_decode(line), object_pairs_hook=_refuse_duplicate_keys)
        # Python reads NaN, infinity and halves of surrogate pairs, but other readers do not.
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise UserError("has half a surrogate pair", "write the whole character") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)  # without its line number, which is always 1
        raise UserError(f"is not JSON ({reason})", "write one JSON object per line") from None
    if not isinstance(row, dict):
        raise UserError("is not a JSON object", "write one JSON object per line")
    return row


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("is not UTF-8", "save the file as UTF-8") from None


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object has the same key twice")
    return row
