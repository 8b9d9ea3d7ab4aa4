"""TODO: say what this file is for: load_data."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from semcse.errors import UserError
from semcse.near_duplicates import SeenPapers, drop_seen
from semcse.papers import Paper, read_papers
from settings import Settings

log = logging.getLogger(__name__)


def split_validation(
    papers: list[Paper], share: float, most: int, seed: int
) -> tuple[list[Paper], list[Paper]]:
    """(papers to train on, papers held out to choose the checkpoint): whole topics where the papers
    have one, else single papers.

    About `share` of the papers are held out: at least two, at most `most` (or a little more, to the
    end of a topic). Which ones depends on `seed`, topics and ids alone, not on the file's order.

    Raises:
        UserError: too few papers to leave two on both sides.
    """
    wanted = max(2, min(most, round(share * len(papers))))
    held: set[str] = set()
    for by_topic in (True, False):  # by paper if the topics cannot be parted
        groups: dict[str, list[str]] = {}
        for paper in papers:
            key = f"{paper.field}\n{paper.topic}" if by_topic and paper.topic else paper.id
            groups.setdefault(key, []).append(paper.id)
        names = sorted(groups)
        for key in (names[i] for i in np.random.default_rng(seed).permutation(len(names))):
            if len(held) < wanted and len(held) + len(groups[key]) <= min(
                2 * wanted, len(papers) - 2
            ):
                held.update(groups[key])
        if len(held) >= 2:
            return [p for p in papers if p.id not in held], [p for p in papers if p.id in held]
    raise UserError(
        f"{len(papers)} papers with two different summaries are too few to train and validate on",
        "give at least four papers",
    )


def steps_per_epoch(papers: list[Paper], batch_size: int) -> int:
    """Batches that visit each paper `visits` times; an incomplete last batch is left to the next
    epoch's shuffle.
    """
    return max(1, sum(paper.visits for paper in papers) // batch_size)


def batch_pairs(
    papers: list[Paper], seed: int, step: int, batch_size: int, joined_share: float = 0.0
) -> list[tuple[str, str]]:
    """The pairs (anchor, positive) of one step: each paper at most once, two different summaries of
    it drawn at random; in `joined_share` of the pairs the positive is all its other summaries in
    one text.

    A pure function of (seed, epoch, step): nothing is carried from step to step, so a resumed run
    sees the same batches. `step` counts from 0.
    """
    epoch, place = divmod(step, steps_per_epoch(papers, batch_size))
    visited = np.repeat(np.arange(len(papers)), [paper.visits for paper in papers])
    order = np.random.default_rng([seed, epoch]).permutation(visited)
    chosen = list(dict.fromkeys(order[place * batch_size : (place + 1) * batch_size].tolist()))
    if len(chosen) == 1:  # one paper's visits filled the batch: a pair needs a negative
        chosen += [other for other in order.tolist() if other != chosen[0]][:1]
    draw = np.random.default_rng([seed, epoch, place + 1])
    return [_draw_pair(papers[i].summaries, draw, joined_share) for i in chosen]


def _draw_pair(
    summaries: tuple[str, ...], draw: np.random.Generator, joined_share: float
) -> tuple[str, str]:
    first, second = draw.choice(len(summaries), size=2, replace=False)
    if joined_share and draw.random() < joined_share:
        others = [i for i in draw.permutation(len(summaries)) if i != first]
        return summaries[first], " ".join(summaries[i] for i in others)
    return summaries[first], summaries[second]


def trainable(papers: Iterable[Paper]) -> list[Paper]:
    """Papers with at least two different summaries; the others are logged by number."""
    papers = list(papers)
    kept = [paper for paper in papers if len(paper.summaries) >= 2]
    if len(kept) < len(papers):
        log.info(
            "left out %d papers with fewer than two different summaries", len(papers) - len(kept)
        )
    return kept


def read_training_papers(
    settings: Settings, evaluation: list[Paper]
) -> tuple[list[Paper], list[Paper]]:
    """(papers to train on, held-out papers to choose the checkpoint by), none of them in the
    evaluation file.

    Raises:
        UserError: see `load_data.read_papers` and `load_data.split_validation`.
    """
    papers, dropped = drop_seen(
        read_papers(settings.train_file, ("summaries",), settings.skip_invalid),
        SeenPapers(evaluation),
    )
    if dropped:
        reasons = ", ".join(f"{count} by {reason}" for reason, count in sorted(dropped.items()))
        log.info(
            "dropped %d training papers that stand in %s (%s)",
            dropped.total(),
            settings.eval_file,
            reasons,
        )
    papers = trainable(papers)
    if len(papers) < 4:
        raise UserError(
            f"{settings.train_file}: {len(papers)} papers with two different summaries are too few"
            " to train and validate on",
            "give at least four",
        )
    train, held_out = split_validation(
        papers, settings.validation_share, settings.validation_papers, settings.seed
    )
    log.info(
        "%d papers to train on, %d held out to choose the checkpoint", len(train), len(held_out)
    )
    return train, held_out
