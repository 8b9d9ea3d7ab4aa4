"""Abstracts -> one search query each, as a person would type it, by a language model: the queries
of the benchmark's query task.

python generate_search_queries.py --input papers.jsonl --output papers_with_queries.jsonl --base-url
http://127.0.0.1:8000/v1 --model NAME

The queries of the SemCSE paper are by Mistral 3.1 small
(mistralai/Mistral-Small-3.1-24B-Instruct-2503); its prompt is unknown, this one is ours. A run can
be killed at any time; the same command goes on and sends only what is missing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from semcse import command_line
from semcse.batch_api import BatchRun
from semcse.generation import Run, run_job
from semcse.llm import Flags
from semcse.quality_gate import Job, Prompt

# A query by somebody who wants this very paper's content and does not know the paper: their words,
# not the title's, and specific enough to find it first.
QUERY = Prompt(
    "query",
    "You write short search queries, as researchers type them into the search box of a library.",
    "Write a search query of 4 to 10 words for the main finding above, as somebody would type it"
    " who does not know this paper: plain and specific words on one line, no sentence, not the"
    " title. Answer with the query only.",
)


@dataclass(frozen=True)
class Command(Flags):
    """Write one search query for every abstract of a papers file."""

    max_tokens: int = 40  # most tokens of a query; longer ones are refused as cut off
    overwrite: bool = False  # also write new queries for papers that have one


def main() -> None:
    """Parse, generate, write."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    run_job(
        command,
        Job("query", (QUERY,), texts=1, least=1, words=(2, 16), keep=not command.overwrite),
        BatchRun if command.batch else Run,
    )


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
