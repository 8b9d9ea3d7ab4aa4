"""Cut the development papers into files for training, for choosing settings and for reporting.

    python tools/development_split.py --data FOLDER --output-dir runs/development

FOLDER holds papers_dev, llm_summaries and llm_definitions (.jsonl.gz), which are not in this
repository. The evaluation and validation papers (development_ids.json) were chosen once, in the
order of a hash of the id and without near-duplicates. The files are:

    evaluation.jsonl       1,100 papers: 200 with a query (a one-sentence summary by a person), and
                           900 of nine literature reviews (the review is the field)
    validation.jsonl       500 papers of the same two kinds, for choosing settings
    more_validation.jsonl  those 500, and 800 more for small differences: 500 of the reviews, and
                           300 with their one-sentence summary as the query
    train.jsonl            papers with LLM summaries (three visits per epoch), papers with several
                           summaries by people (two) and 1,500 groups of LLM definitions (one);
                           no paper of the other files and no near-duplicate of one
"""

import json
import sys
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from semcse import command_line, files
from semcse.near_duplicates import SeenPapers, drop_seen
from semcse.papers import Paper, read_papers

IDS = Path(__file__).with_name("development_ids.json")
DEFINITIONS = 1_500


@dataclass(frozen=True)
class Command:
    """Cut the development papers into training, validation and evaluation files."""

    data: str = "../shared/data"  # folder of the development papers
    output_dir: str = "runs/development"  # folder for the files


def held_out_parts(papers: list[Paper]) -> dict[str, list[Paper]]:
    """Return name of a file -> the held-out papers in it, in the order of `papers`."""
    ids = {part: set(some) for part, some in files.read_json(IDS).items()}
    parts = {part: [paper for paper in papers if paper.id in some] for part, some in ids.items()}
    more = [
        replace(paper, query=paper.query or "".join(paper.summaries[:1]))
        for paper in parts["more_validation"]
    ]
    return parts | {"more_validation": parts["validation"] + more}


def training_papers(data: Path, papers: list[Paper], seen: SeenPapers) -> list[Paper]:
    """Return the papers and groups of definitions to train on, with their visits. Papers in `seen`
    are left out. A paper of several sources is taken from the one with the most visits.
    """
    summaries, _ = drop_seen(read_papers(data / "llm_summaries.jsonl.gz", ("summaries",)), seen)
    by_people, _ = drop_seen((paper for paper in papers if len(paper.summaries) >= 2), seen)
    definitions = read_papers(data / "llm_definitions.jsonl.gz", ("summaries",))
    sources = {1: islice(definitions, DEFINITIONS), 2: by_people, 3: summaries}
    found: dict[str, Paper] = {}
    for visits, source in sources.items():
        found |= {paper.id: replace(paper, visits=visits) for paper in source}
    return list(found.values())


def main() -> None:
    """Read the papers, write the four files, and print their sizes."""
    command = command_line.parse_command_line(Command, None, Command())
    data = Path(command.data)
    papers = list(read_papers(data / "papers_dev.jsonl.gz", ("title", "abstract")))
    parts = held_out_parts(papers)
    parts["train"] = training_papers(data, papers, SeenPapers(chain(*parts.values())))
    for name, part in parts.items():
        rows = [json.dumps(paper.as_row(), ensure_ascii=False) + "\n" for paper in part]
        files.write_text(Path(command.output_dir) / f"{name}.jsonl", "".join(rows))
    print(", ".join(f"{name} {len(part)}" for name, part in parts.items()))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
