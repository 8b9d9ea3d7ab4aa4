"""Abstracts -> several one-sentence summaries of each, by a language model: the texts that contrastive training pulls together.

python generate_train_summaries.py --input papers.jsonl --output data/train_summaries.jsonl.gz --base-url http://127.0.0.1:8000/v1 --model NAME

The summaries of one paper take different views of it, so that they differ in words and agree in what they are about. A run can be killed at any time; the same
command goes on and sends only what is missing. The paper's own prompts are unknown; these are ours. Sampling as in the same group's SemCSE-Multi.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import files
from language_model import Flags, Job, Prompt, run_job

# What every summary must be: one sentence that stands alone. Read without the abstract it must still say which paper it belongs to.
SYSTEM = (
    "You write one-sentence summaries of scientific papers. A summary is a single declarative English sentence of 12 to 40 words that can be understood "
    "on its own. It names the specific subject, materials, places or methods, so that it fits this paper and no other. It states things as facts about the "
    "world: it never mentions a study, a paper, an abstract, authors or researchers, and never says we or our. It uses other words than the title and the "
    "abstract wherever that is possible. Answer with the sentence only: no introduction, no quotation marks, no list, no markdown."
)
# One view each: what was open, how it was approached, what came out, what follows, and all of it in short. Plain enough for small models.
VIEWS = {
    "problem": "Write one sentence about what was unknown, disputed or difficult here, and why that matters.",
    "method": "Write one sentence about what was done here to find out: with which material, data or idea.",
    "finding": "Write one sentence about the main result, as concretely as the abstract tells it.",
    "consequence": "Write one sentence about what follows from the result for this particular subject.",
    "whole": "Write one sentence that tells a colleague from another field all of this in short: question, approach and result.",
}
# The same in one request; the views keep the sentences apart.
ALL_AT_ONCE = (
    "Write {n} such sentences, each with another view (problem, approach, main result, what follows from it, the whole) and in different words. "
    'Answer with JSON only: {"texts": ["...", "..."]} with exactly {n} strings.'
)


@dataclass(frozen=True)
class Command(Flags):
    """Write several one-sentence summaries of every abstract of a papers file."""

    summaries_per_abstract: int = 4  # summaries wanted of each abstract, at least 2; raising it later sends only the new ones
    structured: bool = False  # one request per abstract for all its summaries, with a JSON schema: fewer tokens read, less variety


def main() -> None:
    """Parse, generate, write."""
    command = files.parse_command_line(Command, None, Command())
    if command.summaries_per_abstract < 2:
        raise files.UserError("--summaries-per-abstract is out of range", "give at least 2: training needs pairs")
    files.log_to_stderr()
    prompts = [Prompt("all at once", SYSTEM, ALL_AT_ONCE)] if command.structured else [Prompt(name, SYSTEM, task) for name, task in VIEWS.items()]
    texts = command.summaries_per_abstract
    run_job(command, Job("summaries", tuple(prompts), texts, least=2, words=(6, 80), at_once=command.structured))


if __name__ == "__main__":
    sys.exit(files.run_command(main))
