"""Prepare the training data: from a papers file to the pairs of summaries of a training step.

Papers that the evaluation also uses are dropped. Some of the others are held out to choose the best
checkpoint; each training step draws a batch of pairs of summaries from the rest.
"""

import logging

import numpy as np

from semcse.errors import UserError
from semcse.near_duplicates import SeenPapers, drop_seen
from semcse.papers import Paper, read_papers
from settings import Settings

log = logging.getLogger(__name__)

FEWEST_PAPERS = 4  # two to train on (a pair needs a negative) and two to validate on


def read_training_papers(
    settings: Settings, evaluation: list[Paper]
) -> tuple[list[Paper], list[Paper]]:
    """Read the training papers, without those that the evaluation uses.

    Args:
        settings: Names the training file and the size of the validation split.
        evaluation: The evaluation papers. A training paper is dropped if its id, its title or
            nearly its whole abstract is the same as that of an evaluation paper.

    Returns:
        The papers to train on, and the papers held out to choose the best checkpoint.
    """
    stream = read_papers(settings.train_file, ("summaries",), settings.skip_invalid)
    papers, dropped = drop_seen(stream, SeenPapers(evaluation))
    if dropped:
        reasons = ", ".join(f"{count} by {reason}" for reason, count in sorted(dropped.items()))
        text = "dropped %d training papers that are in %s (%s)"
        log.info(text, dropped.total(), settings.eval_file, reasons)
    untrainable = sum(len(paper.summaries) < 2 for paper in papers)
    if untrainable:
        log.info("left out %d papers with fewer than two different summaries", untrainable)
        papers = [paper for paper in papers if len(paper.summaries) >= 2]
    if len(papers) < FEWEST_PAPERS:
        what = f"{settings.train_file}: only {len(papers)} papers have two different summaries"
        raise UserError(what, f"give at least {FEWEST_PAPERS} to train and validate on")
    train, held_out = split_validation(
        papers, settings.validation_share, settings.validation_papers, settings.seed
    )
    log.info("%d papers to train on, %d held out for validation", len(train), len(held_out))
    return train, held_out


def split_validation(
    papers: list[Paper], share: float, most: int, seed: int
) -> tuple[list[Paper], list[Paper]]:
    """Split the papers into a training part and a validation part.

    Papers that have a topic are held out by whole topics, because papers of one topic are much
    alike. If the topics cannot be divided, single papers are held out. The choice depends on the
    seed, the topics and the ids, but not on the order of the papers.

    Args:
        papers: All training papers, each with a different id.
        share: Share of the papers to hold out, in (0, 1).
        most: Largest number of papers to hold out; up to twice as many to complete a topic.
        seed: Seed of the random choice.

    Returns:
        The papers to train on and the held-out papers, at least two each.
    """
    wanted = max(2, min(most, round(share * len(papers))))
    limit = min(2 * wanted, len(papers) - 2)  # leaves at least two papers to train on
    held_out: set[str] = set()
    for by_topic in (True, False):
        groups: dict[str, list[str]] = {}
        for paper in papers:
            key = f"{paper.field}\n{paper.topic}" if by_topic and paper.topic else paper.id
            groups.setdefault(key, []).append(paper.id)
        names = sorted(groups)
        for index in np.random.default_rng(seed).permutation(len(names)):
            group = groups[names[index]]
            if len(held_out) < wanted and len(held_out) + len(group) <= limit:
                held_out.update(group)
        if len(held_out) >= 2:
            train = [paper for paper in papers if paper.id not in held_out]
            return train, [paper for paper in papers if paper.id in held_out]
    raise UserError(f"{len(papers)} papers are too few to split", "give at least four papers")


def steps_per_epoch(papers: list[Paper], batch_size: int) -> int:
    """Return the number of batches in an epoch, which draws each paper `visits` times.

    Papers that do not fill a last batch are not used. The next epoch shuffles the papers again.
    """
    return max(1, sum(paper.visits for paper in papers) // batch_size)


def batch_pairs(
    papers: list[Paper], seed: int, step: int, batch_size: int, joined_share: float = 0.0
) -> list[tuple[str, str]]:
    """Draw the pairs (anchor, positive) of one training step.

    No paper occurs twice in a batch, so that every text of another pair is a true negative. The
    result depends on the arguments alone: a resumed run draws the same batches.

    Args:
        papers: The training papers, each with at least two summaries.
        seed: Seed of the shuffle and of the choice of summaries.
        step: Number of the training step, from 0.
        batch_size: Number of papers in a batch; it has fewer if one is drawn twice.
        joined_share: Share of the pairs whose positive is all other summaries of the paper,
            joined into one text, in [0, 1].

    Returns:
        One pair of different summaries for each paper of the batch.
    """
    epoch, batch = divmod(step, steps_per_epoch(papers, batch_size))
    visits = np.repeat(np.arange(len(papers)), [paper.visits for paper in papers])
    order = np.random.default_rng([seed, epoch]).permutation(visits)
    chosen = list(dict.fromkeys(order[batch * batch_size : (batch + 1) * batch_size].tolist()))
    if len(chosen) == 1:  # the batch holds visits of one paper only, and a pair needs a negative
        chosen += [other for other in order.tolist() if other != chosen[0]][:1]
    draw = np.random.default_rng([seed, epoch, batch + 1])
    return [draw_pair(papers[i].summaries, draw, joined_share) for i in chosen]


def draw_pair(
    summaries: tuple[str, ...], draw: np.random.Generator, joined_share: float = 0.0
) -> tuple[str, str]:
    """Draw two summaries; with probability `joined_share`, the second is all others joined."""
    anchor, positive = draw.choice(len(summaries), size=2, replace=False)
    if joined_share and draw.random() < joined_share:
        others = [i for i in draw.permutation(len(summaries)) if i != anchor]
        return summaries[anchor], " ".join(summaries[i] for i in others)
    return summaries[anchor], summaries[positive]
