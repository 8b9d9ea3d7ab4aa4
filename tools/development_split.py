"""Cut the development papers into files to train on, to choose settings by, and to report on. Only
the ids are in this repository (development_ids.json).

    python tools/development_split.py --data FOLDER --output-dir runs/development

FOLDER holds papers_dev, llm_summaries and llm_definitions (.jsonl.gz). Written are
    evaluation.jsonl   1,100 papers: 200 with a query (a person's one-sentence summary), 900 of nine
    literature reviews (the review is the `field`)
    validation.jsonl     500 papers of the same two kinds, for choosing settings
    more_validation.jsonl  those 500 and, for small differences, 800 more: 500 of the reviews, 300
    with their one-sentence summary as query
    train.jsonl        what may be trained on, no paper of the two files above nor a near-copy of
                       one: papers with LLM summaries (three visits an epoch), papers with several
                       summaries by people (two), 1,500 groups of LLM definitions (one)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from semcse import command_line, files
from semcse.near_duplicates import SeenPapers, drop_seen
from semcse.papers import Paper, read_papers

IDS = Path(__file__).with_name("development_ids.json")
DEFINITIONS = 1_500
SIZES = {"evaluation": {"query": 200, "review": 900}, "validation": {"query": 110, "review": 390}}


@dataclass(frozen=True)
class Command:
    """Cut the development papers into training, validation and evaluation files."""

    data: str = "../shared/data"  # folder of the development papers
    output_dir: str = "runs/development"  # where the files are written
    renew: bool = False  # choose the ids again and write development_ids.json


def kind(paper: Paper) -> str:
    """What a paper can be evaluated on: "query", "review" or "" (training only: with two summaries
    it can make a pair).
    """
    return (
        "query"
        if paper.query and len(paper.summaries) < 2
        else "review"
        if paper.source.startswith("review-")
        else ""
    )


def choose(papers: list[Paper]) -> dict[str, list[str]]:
    """Part -> ids, by a hash of the id, so that the choice does not depend on the file's order;
    papers like an earlier one are passed over.
    """
    chosen: dict[str, list[str]] = {}
    seen = SeenPapers()
    ordered = sorted(papers, key=lambda paper: zlib.crc32(paper.id.encode()))
    used: set[str] = set()
    for part, sizes in SIZES.items():
        chosen[part] = []
        for what, size in sizes.items():
            for paper in ordered:
                if size and kind(paper) == what and paper.id not in used and not seen.reason(paper):
                    chosen[part].append(paper.id)
                    used.add(paper.id)
                    seen.add(paper)
                    size -= 1
    return chosen


def with_query(paper: Paper) -> Paper:
    """A person's one-sentence summary is the query of a paper that has no other."""
    return dataclasses.replace(paper, query=paper.query or "".join(paper.summaries[:1]))


def write(path: Path, papers: Iterable[Paper]) -> int:
    """Write a papers file; returns how many papers."""
    rows = [json.dumps(paper.as_row(), ensure_ascii=False) + "\n" for paper in papers]
    files.write_text(path, "".join(rows))
    return len(rows)


def main() -> None:
    """Read, cut, write, and say the sizes."""
    command = command_line.parse_command_line(Command, None, Command())
    data, output = Path(command.data), Path(command.output_dir)
    papers = list(read_papers(data / "papers_dev.jsonl.gz", ("title", "abstract")))
    ids = files.read_json(IDS)
    if command.renew:
        ids |= choose(papers)
        files.write_json(IDS, ids)
    parts = {part: [paper for paper in papers if paper.id in set(ids[part])] for part in SIZES}
    more = set(ids["more_validation"]) - {
        paper.id for part_papers in parts.values() for paper in part_papers
    }
    parts["more_validation"] = [
        *parts["validation"],
        *(with_query(paper) for paper in papers if paper.id in more),
    ]
    sizes = {
        part: write(output / f"{part}.jsonl", part_papers) for part, part_papers in parts.items()
    }
    seen = SeenPapers(paper for part_papers in parts.values() for paper in part_papers)
    summaries, _ = drop_seen(read_papers(data / "llm_summaries.jsonl.gz", ("summaries",)), seen)
    by_people, _ = drop_seen((paper for paper in papers if len(paper.summaries) >= 2), seen)
    definitions = itertools.islice(
        read_papers(data / "llm_definitions.jsonl.gz", ("summaries",)), DEFINITIONS
    )
    mixed = {
        paper.id: dataclasses.replace(paper, visits=visits)
        for visits, part in ((1, definitions), (2, by_people), (3, summaries))
        for paper in part
    }
    sizes["train"] = write(output / "train.jsonl", mixed.values())
    print(", ".join(f"{name} {size}" for name, size in sizes.items()))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
