"""Generate several one-sentence summaries of each abstract with a language model: the texts that
contrastive training pulls together.

    python generate_train_summaries.py --input papers.jsonl --output summaries.jsonl.gz \\
        --base-url http://127.0.0.1:8000/v1 --model NAME

The summaries of one paper take different views of it, so that they differ in words and agree in
content. A run can be killed at any time; the same command continues and requests only what is
missing. The prompts are ours, because those of the SemCSE paper are not in the authors' README,
model card or main.py. The sampling parameters are those of SemCSE-Multi, by the same group.
"""

import sys
from dataclasses import dataclass

from semcse import command_line
from semcse.errors import UserError
from semcse.generation import GenerationFlags, GenerationTask, generate_texts

# A summary is one sentence that says which paper it belongs to even without the abstract. The
# instructions are short, and the required form comes last in the prompt, because small models
# follow what they read last, and copy or ignore long instructions.
SYSTEM = (
    "You write short factual sentences about science: in your own words, specific, and"
    " understandable alone."
)
FORM = (
    'as a fact in one sentence of at most 40 words. Begin with its subject, not with "the study" or'
    ' "this paper".'
)
# One view for each summary.
VIEWS = {
    "finding": f"State the main finding above {FORM}",
    "importance": f"State why the subject above is important or difficult {FORM}",
    "method": f"State which material, data or method led to the finding above {FORM}",
    "consequence": f"State what the finding above means for its subject in practice {FORM}",
    "whole": f"State subject, approach and finding of the above together {FORM}",
}
# All summaries in one request. The views make the sentences differ.
ALL_AT_ONCE = (
    "Write {n} different sentences, each with another view of the above: its finding, its"
    " importance, its method, what follows from it, the whole. "
    f'State each {FORM} Answer with JSON only: {{"texts": ["...", "..."]}} with exactly {{n}}'
    " strings."
)


@dataclass(frozen=True)
class Command(GenerationFlags):
    """Write several one-sentence summaries of every abstract of a papers file."""

    summaries_per_abstract: int = 4  # at least 2; raise it later to request only the new ones
    structured: bool = False  # one request per paper, with JSON schema: fewer tokens, less variety


def main() -> None:
    """Parse the command line and generate the summaries."""
    command = command_line.parse_command_line(Command, None, Command())
    if command.summaries_per_abstract < 2:
        raise UserError("--summaries-per-abstract is out of range", "give at least 2")
    command_line.log_to_stderr()
    task = GenerationTask(
        key="summaries",
        system=SYSTEM,
        prompts={"all at once": ALL_AT_ONCE} if command.structured else VIEWS,
        texts=command.summaries_per_abstract,
        min_texts=2,
        words=(6, 80),
        structured=command.structured,
    )
    generate_texts(command, task)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
