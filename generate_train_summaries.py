"""Abstracts -> several one-sentence summaries of each, by a language model: the texts that
contrastive training pulls together.

python generate_train_summaries.py --input papers.jsonl --output data/train_summaries.jsonl.gz
--base-url http://127.0.0.1:8000/v1 --model NAME

The summaries of one paper take different views of it, so that they differ in words and agree in
what they are about. A run can be killed at any time; the same command goes on and sends only what
is missing. The paper's own prompts are unknown; these are ours. Sampling as in the same group's
SemCSE-Multi.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from semcse import command_line, errors
from semcse.batch_api import BatchRun
from semcse.generation import Run, run_job
from semcse.llm import Flags
from semcse.quality_gate import Job, Prompt

# What every summary must be: one sentence that stands alone, so that read without the abstract it
# still says which paper it belongs to. The demands are few and the last stands in the task: small
# models follow what they read last, and copy or ignore long instructions.
SYSTEM = (
    "You write short factual sentences about science: in your own words, specific, and"
    " understandable alone."
)
FORM = (
    'as a fact in one sentence of at most 40 words. Begin with its subject, not with "the study" or'
    ' "this paper".'
)
# One view each: what came out, why it matters, how it was found, what follows, and all of it in
# short.
VIEWS = {
    "finding": f"State the main finding above {FORM}",
    "importance": f"State why the subject above is important or difficult {FORM}",
    "method": f"State which material, data or method led to the finding above {FORM}",
    "consequence": f"State what the finding above means for its subject in practice {FORM}",
    "whole": f"State subject, approach and finding of the above together {FORM}",
}
# The same in one request; the views keep the sentences apart.
ALL_AT_ONCE = (
    "Write {n} different sentences, each with another view of the above: its finding, its"
    " importance, its method, what follows from it, the whole. "
    f'State each {FORM} Answer with JSON only: {{"texts": ["...", "..."]}} with exactly {{n}}'
    " strings."
)


@dataclass(frozen=True)
class Command(Flags):
    """Write several one-sentence summaries of every abstract of a papers file."""

    # summaries wanted of each abstract, at least 2; raising it later sends only the new ones
    summaries_per_abstract: int = 4
    # one request per abstract for all its summaries, with a JSON schema: fewer tokens read, less
    # variety
    structured: bool = False


def main() -> None:
    """Parse, generate, write."""
    command = command_line.parse_command_line(Command, None, Command())
    if command.summaries_per_abstract < 2:
        raise errors.UserError(
            "--summaries-per-abstract is out of range", "give at least 2: training needs pairs"
        )
    command_line.log_to_stderr()
    prompts = (
        [Prompt("all at once", SYSTEM, ALL_AT_ONCE)]
        if command.structured
        else [Prompt(name, SYSTEM, task) for name, task in VIEWS.items()]
    )
    texts = command.summaries_per_abstract
    run_job(
        command,
        Job("summaries", tuple(prompts), texts, least=2, words=(6, 80), at_once=command.structured),
        BatchRun if command.batch else Run,
    )


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
