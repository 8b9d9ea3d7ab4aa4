"""The flags that the scripts share which use a language model, and the check of their values."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from semcse.errors import UserError
from semcse.llm import api_key
from semcse.papers import shard_slice


@dataclass(frozen=True)
class GenerationFlags:
    """The flags of every script that uses a language model."""

    input: Path = tyro.MISSING  # papers file with abstracts
    # Papers file to write, gzipped if its name ends in .gz. The journal, the list of failures and
    # the report are written next to it.
    output: Path = tyro.MISSING
    # OpenAI-compatible server, such as http://127.0.0.1:8000/v1. Repeat the flag to share the work
    # among several servers. The environment variable OPENAI_API_KEY holds their key.
    base_url: tuple[str, ...] = ()
    model: str = tyro.MISSING  # name of the model on the server
    concurrency: int = 32  # most requests in flight; lowered after HTTP 429 and timeouts
    temperature: float = 0.7  # sampling temperature [A]
    top_p: float = 0.95  # nucleus sampling [A]
    max_tokens: int = 120  # most tokens of a text; longer texts are rejected as cut off
    attempts: int = 3  # most answers to ask for until one passes the quality gate
    retries: int = 8  # how often a request is sent again after a fault of server or network
    timeout: float = 120.0  # seconds to wait for an answer
    price_in: float = 0.0  # price of a million prompt tokens
    price_out: float = 0.0  # price of a million completion tokens
    # Stop sending requests when all answers in the journal, those of earlier runs included, have
    # cost this much.
    max_cost: float | None = None
    # Use OpenAI's Batch API: half the price, answers within a day. If the run is stopped, the same
    # command continues with the batches that are in progress.
    batch: bool = False
    estimate: bool = False  # print what the missing texts would cost, and send nothing
    skip_invalid: bool = False  # count and log bad lines of the input instead of stopping
    # Part of the papers to do, such as 2/4 for the second of four parts. Each part has its own
    # output files; docs/scaling.md shows how to merge them.
    shard: str = "1/1"


BASE_URL = re.compile(r"https?://(\[[\da-f:.]+\]|[^\s/?#@:]+)(:\d{1,5})?(/[^\s?#]*)?", re.I)
# The smallest and the largest value of each number.
BOUNDS: dict[str, tuple[float, float]] = {
    "concurrency": (1, 1000),
    "temperature": (0, 10),
    "top_p": (0.001, 1),
    "max_tokens": (1, 1e6),
    "attempts": (1, 1e6),
    "retries": (0, 1e6),
    "timeout": (0.001, 1e6),
    "price_in": (0, 1e6),
    "price_out": (0, 1e6),
}


def check_flags(flags: GenerationFlags) -> None:
    """Check the flags before anything is read or sent.

    Raises:
        UserError: a flag cannot work; the message names it.
    """
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(flags, name) <= high:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is out of range", f"give a number from {low} to {high:g}")
    if not flags.base_url or not all(map(BASE_URL.fullmatch, flags.base_url)):
        raise UserError(
            "--base-url is missing or is not of the form http(s)://host[:port]/path",
            "name a server, and put its key into OPENAI_API_KEY",
        )
    if flags.batch and len(flags.base_url) > 1:
        raise UserError("--batch works with one --base-url only", "name one server")
    if flags.max_cost is not None and not flags.price_in + flags.price_out > 0:
        raise UserError("--max-cost needs a price", "give --price-in and --price-out")
    if flags.output.is_dir() or os.path.realpath(flags.output) == os.path.realpath(flags.input):
        raise UserError(f"--output {flags.output} is a folder or the input", "name another file")
    if os.path.exists(flags.input) and not (flags.input.is_file() or flags.input.is_dir()):
        raise UserError(
            f"--input {flags.input} is a pipe or device, and papers are read three times",
            "write them to a file first",
        )
    api_key()
    shard_slice(flags.shard)
