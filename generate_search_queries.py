"""Generate one search query for each abstract with a language model: the queries of the
benchmark's query task.

    python generate_search_queries.py --input papers.jsonl --output papers_with_queries.jsonl \\
        --base-url http://127.0.0.1:8000/v1 --model NAME

A run can be killed at any time; the same command continues and requests only what is missing. The
queries of the SemCSE paper were written by mistralai/Mistral-Small-3.1-24B-Instruct-2503. The
prompt is ours, because theirs is not in the authors' README, model card or main.py.
"""

import sys
from dataclasses import dataclass

from semcse import command_line
from semcse.generation import GenerationFlags, GenerationTask, generate_texts

# Somebody who looks for the content of this paper but does not know the paper types this query.
SYSTEM = (
    "You write short search queries, as researchers type them into the search box of a library."
)
QUERY = (
    "Write a search query of 4 to 10 words for the main finding above, as somebody would type it"
    " who does not know this paper: plain and specific words on one line, no sentence, not the"
    " title. Answer with the query only."
)


@dataclass(frozen=True)
class Command(GenerationFlags):
    """Write one search query for every abstract of a papers file."""

    max_tokens: int = 40  # largest number of tokens of a query; longer queries are rejected
    overwrite: bool = False  # also write new queries for papers that have one


def main() -> None:
    """Parse the command line and generate the queries."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    task = GenerationTask(
        key="query",
        system=SYSTEM,
        prompts={"query": QUERY},
        texts=1,
        min_texts=1,
        words=(2, 16),
        keep_existing=not command.overwrite,
    )
    generate_texts(command, task)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
