"""The SemCSE experiment: train an encoder on pairs of summaries, and evaluate it before and after.

python main.py                      sample papers, bundled encoder, CPU
python main.py --metric cosine      the cosine version (or edit the line `metric` in settings.py)
python main.py --profile paper      the published setting: full data, GPU
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semcse import command_line, files
from semcse.run_folder import RunFolder
from settings import Settings, parse_settings, require_files

if TYPE_CHECKING:
    from semcse.encoder import Encoder
    from semcse.papers import Paper


def main() -> None:
    """Run the whole experiment and write its results to the output folder.

    1. Read the evaluation papers, and the training papers without those.
    2. Evaluate the encoder on the four semantic tasks before training.
    3. Train it: summaries of one abstract are pulled together, all others are pushed away.
    4. Evaluate it again, and also evaluate the untrained encoder as its authors use it.
    """
    settings = parse_settings()
    command_line.log_to_stderr()
    require_files(settings)
    from load_data import read_training_papers
    from semantic_benchmark import read_evaluation_papers
    from semcse.checkpoints import describe_run
    from semcse.distributed import join
    from semcse.encoder import Usage
    from semcse.model_folder import save_model
    from semcse.models import load_for_training, load_model
    from train_embedding_model import train

    group = join(settings.device)
    evaluation = read_evaluation_papers(settings.eval_file, settings.skip_invalid)
    papers, held_out = read_training_papers(settings, evaluation)
    usage = Usage(settings.pooling, settings.metric, settings.max_length)
    options: Any = {"device": settings.device, "trust_remote_code": settings.trust_remote_code}
    encoder = load_for_training(settings.encoder, usage, **options)
    facts = describe_run(encoder, group, papers, held_out, evaluation)
    if group.rank > 0:  # the other processes of a distributed run only train
        train(encoder, papers, held_out, settings, Path(), group)
        return
    with RunFolder.locked(Path(settings.output_dir)) as folder:
        folder.begin(dataclasses.asdict(settings), facts, settings.resume, settings.overwrite)
        command_line.log_to_stderr(folder.path / "run.log")
        benchmark(encoder, evaluation, settings, folder.path / "before.json")
        train(encoder, papers, held_out, settings, folder.path, group)
        save_model(encoder, folder.path / "model", base=settings.encoder)
        benchmark(encoder, evaluation, settings, folder.path / "benchmark.json")
        encoder = load_model(settings.encoder, default=usage, **options)
        benchmark(encoder, evaluation, settings, folder.path / "recipe.json")
        write_report(settings, folder)


def benchmark(encoder: "Encoder", papers: "list[Paper]", settings: Settings, path: Path) -> None:
    """Score `encoder` on the four tasks and write the result to `path`.

    A resumed run keeps a result that it has written before.
    """
    from semantic_benchmark import describe, evaluate
    from semcse.report import save_map
    from semcse.tables import ROWS

    if path.exists() and settings.resume:
        return
    scored = evaluate(encoder, papers, settings.seed, ROWS[path.stem])
    save_map(path.with_suffix(".npz"), papers, scored.abstracts, settings.seed)
    files.write_json(path, describe(encoder, settings.eval_file, scored, settings.seed))


def write_report(settings: Settings, folder: RunFolder) -> None:
    """Print the table of results, write benchmark.md and report.html, and mark the run finished."""
    from semcse.report import make
    from semcse.tables import ROWS, markdown, notes_on, table_lines

    results = {name: files.read_json(folder.path / f"{name}.json") for name in ROWS}
    table = table_lines({f"{settings.encoder} {ROWS[name]}": results[name] for name in ROWS})
    notes = notes_on(results["benchmark"])
    for name, result in results.items():
        usage = f"{result['pooling']} pooling, {result['metric']} distance"
        notes.append(f'"{settings.encoder} {ROWS[name]}": {usage}.')
    text = markdown(f"SemCSE run {Path(settings.output_dir).name}", table, notes)
    files.write_text(folder.path / "benchmark.md", text)
    folder.finish()
    logging.info("the trained model is %s", folder.path / "model")
    print("\n" + text.rstrip())
    make(folder.path)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
