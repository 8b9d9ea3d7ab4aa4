"""TODO: say what this file is for: tools.scirepeval."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from semcse import command_line, files
from semcse.errors import UserError

if TYPE_CHECKING:
    from semcse.encoder import Encoder


log = logging.getLogger(__name__)


def export_scirepeval(encoder: Encoder, folder: Path) -> None:
    """Write `folder`/model and `folder`/tokenizer, which SciRepEval's own code loads; it pools by
    CLS or mean and ranks by Euclidean distance.

    Raises:
        UserError: the model is used in a way that this code does not know, so that its scores there
            would not be the model's.
    """
    theirs = {
        "metric": "euclidean",
        "max_length": 512,
        "query_prompt": "",
        "document_prompt": "",
        "normalize": False,
    }
    other = [
        f"{key} is {value!r}"
        for key, value in dataclasses.asdict(encoder.usage).items()
        if theirs.get(key, value) != value
    ]
    other += [
        f"its tokenizer has no {token}"
        for token in ("sep_token", "pad_token")
        if getattr(encoder.tokenizer, token) is None
    ]
    if other:
        raise UserError(
            f"model {encoder.name} cannot be exported for SciRepEval: {other[0]}",
            "use the wrapper in docs/other_harnesses.md",
        )
    with files.atomic_path(folder) as partial:
        encoder.save(partial / "model", base=encoder.name)
        (partial / "tokenizer").mkdir()
        for file in (partial / "model").glob("*token*.json"):
            shutil.copy(file, partial / "tokenizer")
    log.info(
        "wrote %s; in SciRepEval's folder: python scirepeval.py -m %s --pooling-mode %s",
        folder,
        folder.resolve(),
        encoder.usage.pooling,
    )


@dataclasses.dataclass(frozen=True)
class Command:
    """Write a model to a new folder in the form that SciRepEval's own code loads."""

    model: str = ""  # recipe name, Hub id, or folder
    output: str = ""  # new folder to write
    trust_remote_code: bool = False  # allow a model to bring and run its own Python code


def main() -> None:
    """Parse the command line, load the model and export it."""
    command = command_line.parse_command_line(Command, None, Command())
    command_line.log_to_stderr()
    if not command.model or not command.output:
        raise UserError("--model or --output is missing", "give both")
    if Path(command.output).exists():
        raise UserError(f"--output {command.output}: exists", "name a new folder")
    from semcse.models import load_model

    encoder = load_model(command.model, trust_remote_code=command.trust_remote_code)
    export_scirepeval(encoder, Path(command.output))


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
