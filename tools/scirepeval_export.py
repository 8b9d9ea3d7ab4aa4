"""Write a model to a folder that SciRepEval's own code loads (docs/other_harnesses.md).

python tools/scirepeval_export.py --model runs/quickstart-euclidean/model --output runs/scirepeval
"""

import logging
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from semcse import command_line, files
from semcse.errors import UserError

if TYPE_CHECKING:
    from semcse.encoder import Encoder


@dataclass(frozen=True)
class Command:
    """Write a model to a new folder in the form that SciRepEval's own code loads."""

    model: str  # recipe name, Hub id, or folder
    output: str  # new folder to write
    trust_remote_code: bool = False  # allow Python code that comes with a model to run


def export_model(encoder: "Encoder", folder: Path) -> None:
    """Write `folder`/model and `folder`/tokenizer, if SciRepEval's code would use the model as
    `encoder.usage` says.
    """
    from semcse.encoder import Usage
    from semcse.model_folder import save_model

    theirs = asdict(Usage(encoder.usage.pooling, "euclidean", max_length=512))
    for key, value in asdict(encoder.usage).items():
        if value != theirs[key]:
            what = f"SciRepEval cannot use {encoder.name} as it was trained: its {key} is {value!r}"
            raise UserError(what, "use the wrapper in docs/other_harnesses.md")
    with files.atomic_path(folder) as partial:
        save_model(encoder, partial / "model", base=encoder.name)
        (partial / "tokenizer").mkdir()
        for file in (partial / "model").glob("*token*.json"):
            shutil.copy(file, partial / "tokenizer")
    call = f"python scirepeval.py -m {folder.resolve()} --pooling-mode {encoder.usage.pooling}"
    logging.info("wrote %s; run in SciRepEval's folder: %s", folder, call)


def main() -> None:
    """Load the model and export it."""
    command = command_line.parse_command_line(Command, None, Command(tyro.MISSING, tyro.MISSING))
    command_line.log_to_stderr()
    if Path(command.output).exists():
        raise UserError(f"--output {command.output} exists", "name a new folder")
    from semcse.models import load_model

    encoder = load_model(command.model, trust_remote_code=command.trust_remote_code)
    export_model(encoder, Path(command.output))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
