"""The experiment: take an encoder, train it on summary pairs, and measure it on the four semantic
tasks before and after.

python main.py                      sample papers, bundled encoder, CPU
python main.py --metric cosine      the cosine version (or edit the line `metric` in settings.py)
python main.py --profile paper      the published setting: full data, GPU
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

from semcse import command_line, files, report, run_folder
from semcse.tables import ROWS
from settings import Settings, parse_settings


def main() -> None:
    """Benchmark the encoder, train it, benchmark it again, and its authors' recipe beside it. Of
    several processes all but the first only train.
    """
    settings = parse_settings()
    command_line.log_to_stderr()
    from load_data import read_training_papers
    from semantic_benchmark import read_evaluation_papers
    from semcse.checkpoints import facts_of
    from semcse.distributed import join
    from semcse.encoder import Usage
    from semcse.models import load_for_training, load_model
    from train_embedding_model import train

    group = join(settings.device)
    evaluation = read_evaluation_papers(settings.eval_file, settings.skip_invalid)
    papers, held_out = read_training_papers(settings, evaluation)
    usage = Usage(settings.pooling, settings.metric, settings.max_length)
    encoder = load_for_training(
        settings.encoder, usage, settings.device, settings.trust_remote_code
    )
    facts = facts_of(encoder, group, papers, held_out, evaluation)
    if group.rank:
        train(encoder, papers, held_out, settings, Path(), group)
        return
    with run_folder.RunFolder.locked(Path(settings.output_dir)) as folder:
        folder.begin(dataclasses.asdict(settings), facts, settings.resume)
        command_line.log_to_stderr(folder.path / "run.log")
        results = {"before": benchmark(encoder, evaluation, settings, folder.path / "before.json")}
        train(encoder, papers, held_out, settings, folder.path, group)
        encoder.save(folder.path / "model", base=settings.encoder)
        results["benchmark"] = benchmark(
            encoder, evaluation, settings, folder.path / "benchmark.json"
        )
        recipe = load_model(
            settings.encoder,
            default=usage,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
        )
        results["recipe"] = benchmark(recipe, evaluation, settings, folder.path / "recipe.json")
        conclude(results, settings, folder)


def benchmark(
    encoder: Any,
    evaluation: list[Any],
    settings: Settings,
    path: Path,
) -> dict[str, Any]:
    """Score `encoder` and write `path`; a resumed run takes what it scored before."""
    from semantic_benchmark import describe, evaluate

    if path.exists() and settings.resume:
        return dict(files.read_json(path))
    scored = evaluate(encoder, evaluation, settings.seed, ROWS[path.stem])
    report.save_map(path.with_suffix(".npz"), evaluation, scored.abstracts, settings.seed)
    result = describe(encoder, settings.eval_file, scored, settings.seed)
    files.write_json(path, result)
    return result


def conclude(
    results: dict[str, dict[str, Any]], settings: Settings, folder: run_folder.RunFolder
) -> None:
    """Print the table, write benchmark.md, end the run, and make its page."""
    from semcse.tables import markdown, notes_on, table_lines

    named = {f"{settings.encoder} {ROWS[key]}": results[key] for key in ROWS}
    usages = [
        f'"{row}": {result["pooling"]} pooling, {result["metric"]} distance.'
        for row, result in named.items()
    ]
    text = markdown(
        f"SemCSE run {Path(settings.output_dir).name}",
        table_lines(named),
        [*notes_on(results["benchmark"]), *usages],
    )
    files.write_text(folder.path / "benchmark.md", text)
    folder.finish()
    logging.info("the trained model is %s", folder.output / "model")
    print("\n" + text.rstrip())
    report.make(folder.output)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
