"""The experiment: take an encoder, train it on summary pairs, and measure it on the four semantic
tasks before and after.

python main.py                      sample papers, bundled encoder, CPU
python main.py --metric cosine      the cosine version (or edit the line `metric` in settings.py)
python main.py --profile paper      the published setting: full data, GPU
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import files
import report
from report import ROWS
from settings import FREE_ON_RESUME, Settings, parse_settings


def main() -> None:
    """Benchmark the encoder, train it, benchmark it again, and its authors' recipe beside it. Of
    several processes all but the first only train.
    """
    settings = parse_settings()
    files.log_to_stderr()
    from baseline_models import Wanted, load_for_training, load_model
    from checkpoints import facts_of
    from parallel import join
    from semantic_benchmark import read_evaluation_papers
    from train_embedding_model import read_training_papers, train

    group = join(settings.device)
    evaluation = read_evaluation_papers(settings.eval_file, settings.skip_invalid)
    papers, held_out = read_training_papers(settings, evaluation)
    encoder = load_for_training(settings)
    facts = facts_of(encoder, group, papers, held_out, evaluation)
    if group.rank:
        train(encoder, papers, held_out, settings, Path(), group)
        return
    with files.RunFolder.locked(Path(settings.output_dir)) as folder:
        folder.begin(dataclasses.asdict(settings), facts, settings.resume, FREE_ON_RESUME)
        files.log_to_stderr(folder.path / "run.log")
        results = {"before": benchmark(encoder, evaluation, settings, folder.path / "before.json")}
        train(encoder, papers, held_out, settings, folder.path, group)
        encoder.save(folder.path / "model", base=settings.encoder)
        results["benchmark"] = benchmark(
            encoder, evaluation, settings, folder.path / "benchmark.json"
        )
        recipe, origins = load_model(settings.encoder, Wanted(), settings)
        results["recipe"] = benchmark(
            recipe, evaluation, settings, folder.path / "recipe.json", origins
        )
        conclude(results, settings, folder)


def benchmark(
    encoder: Any,
    evaluation: list[Any],
    settings: Settings,
    path: Path,
    origins: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Score `encoder` and write `path`; a resumed run takes what it scored before."""
    from semantic_benchmark import describe, evaluate

    if path.exists() and settings.resume:
        return dict(files.read_json(path))
    scored = evaluate(encoder, evaluation, settings.seed, ROWS[path.stem])
    report.save_map(path.with_suffix(".npz"), evaluation, scored.abstracts, settings.seed)
    result = describe(encoder, settings.eval_file, scored, origins or {}, settings.seed)
    files.write_json(path, result)
    return result


def conclude(
    results: dict[str, dict[str, Any]], settings: Settings, folder: files.RunFolder
) -> None:
    """Print the table, write benchmark.md, end the run, and make its page."""
    from semantic_benchmark import markdown, notes_on, table_lines

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
    sys.exit(files.run_command(main))
