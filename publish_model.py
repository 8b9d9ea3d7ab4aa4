"""Publish a trained model on the Hugging Face Hub, with a model card and its benchmark results.

    python publish_model.py --run runs/quickstart-euclidean --repo-id NAME/REPO --dry-run
    python publish_model.py --run runs/quickstart-euclidean --repo-id NAME/REPO --private

The first command uploads nothing and needs neither a network nor a token: it writes the card and
lists the files. Before an upload, the script checks that transformers and sentence-transformers
give the same vectors as this project. The token comes from HF_TOKEN or from `hf auth login`.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub as hub  # imports its parts when they are first used
import numpy as np
import tyro

from semcse import command_line, files
from semcse.errors import RunError, UserError
from semcse.model_card import card_facts, card_text, is_hub_id, model_card
from semcse.report import read_run
from settings import Settings

log = logging.getLogger(__name__)

# Only these files of the model folder are uploaded, never checkpoints, optimizer states or notes.
UPLOADED = (
    "semcse.json config.json modules.json 1_Pooling/config.json sentence_bert_config.json"
    " config_sentence_transformers.json model.safetensors model-?????-of-?????.safetensors"
    " model.safetensors.index.json tokenizer.json tokenizer_config.json special_tokens_map.json"
    " added_tokens.json vocab.json vocab.txt merges.txt *.model"
).split()
FIX = "publish a model folder as main.py wrote it"
TOLERANCE = 1e-5  # largest allowed difference, relative to max(1, largest absolute value)
# Texts for the comparison of the libraries: each has a different length, so padding matters; one
# has characters that tokenizers normalize differently; one is longer than any model reads.
PROBES = [
    "Soil.",
    "Ligature ﬁnd, full width \uff21\uff22\uff23,\u200bZarrieß.",
    "Voters trust courts more than parliaments, two surveys find.",
    "river " * 9_000,
]


@dataclass(frozen=True)
class Command:
    """Upload a run's model with a model card to the Hugging Face Hub."""

    run: str = tyro.MISSING  # run folder that main.py has finished
    repo_id: str = tyro.MISSING  # repository NAME/REPO; created if it does not exist
    private: bool = False  # create a private repository; refuse an existing public one
    dry_run: bool = False  # only write <run>/model_card.md and list the files; needs no token
    license: str = ""  # licence of the model, such as apache-2.0; empty: the base model's
    llm_license: str = ""  # licence of the summaries that a language model wrote; empty: unknown


def files_to_upload(model: Path, facts: Mapping[str, Any], card: str) -> dict[str, Path | bytes]:
    """Return path in the repository -> file to upload, or content without paths of this machine."""
    run, base = facts["run"], facts["base"]
    benchmark, metric = run.results["benchmark"], run.facts["settings"]["metric"]
    names = {"model": base, "eval_file": Path(benchmark["eval_file"]).name}
    marker = files.read_json(model / "semcse.json")
    if marker.get("metric") != metric:
        raise UserError(f"{model}: semcse.json has another metric than the run's, {metric}", FIX)
    written = {"semcse.json": marker | {"base": base}, "benchmark.json": benchmark | names}
    paths = [path for pattern in UPLOADED for path in sorted(model.glob(pattern))]
    chosen: dict[str, Path | bytes] = {path.relative_to(model).as_posix(): path for path in paths}
    for name, value in written.items():
        chosen[name] = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    return chosen | {"README.md": card.encode()}


def check_vectors(model: Path, text: str) -> None:
    """Run the two Python examples of a card that embed PROBES with the folder `model`, and raise a
    UserError if their vectors are not those of this project.
    """
    from semcse.models import load_model

    expected = load_model(str(model), device="cpu").embed(PROBES).vectors.numpy()
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    examples = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for library, example in zip(("transformers", "sentence-transformers"), examples, strict=True):
        names: dict[str, Any] = {"print": lambda *_: None}
        try:
            exec(example, names)  # exactly what a reader of the card will run
            np.testing.assert_allclose(names["vectors"], expected, 0, tolerance, equal_nan=False)
        # The libraries raise errors of many kinds for files that do not fit together.
        except Exception as error:
            what = f"{model}: {library} cannot use it or gives other vectors than this project"
            raise UserError(f"{what} ({type(error).__name__}: {str(error)[:200]})", FIX) from None
        log.info("%s gives the same vectors as this project", library)


def upload(chosen: Mapping[str, Path | bytes], command: Command, token: str) -> str:
    """Upload everything in one commit and return its address; create the repository if needed."""
    api, repo = hub.HfApi(token=token), command.repo_id
    operations = [hub.CommitOperationAdd(name, content) for name, content in chosen.items()]
    message = "Upload the model, its card and its benchmark"
    try:
        api.create_repo(repo, private=command.private or None, exist_ok=True)
        if command.private and not api.model_info(repo).private:
            raise PermissionError("the repository exists and is public, but --private was given")
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    # The library, its HTTP client and its storage client raise errors of many kinds.
    except Exception as error:
        # A server may repeat the token that it was sent.
        what = f"{type(error).__name__}: {error}".replace(token, "***")[:300]
        fix = "check the network, --repo-id and the rights of the token, and run it again"
        raise RunError(f"{repo} was not uploaded ({what})", fix) from None


def publish(command: Command) -> None:
    """Check the model, write its card, list the files and, unless it is a dry run, upload them."""
    folder = Path(command.run).resolve()
    if not is_hub_id(command.repo_id):
        raise UserError(f"--repo-id {command.repo_id} is not valid", "write it as NAME/REPO")
    if not folder.is_dir():
        raise UserError(f"--run {command.run}: no such folder", "name a finished run of main.py")
    token = "" if command.dry_run else hub.get_token()
    if token is None:
        raise UserError("no token for the Hugging Face Hub", "set HF_TOKEN or run hf auth login")
    # The lock prevents a new run from replacing this one in the meantime.
    with files.lock(folder.with_name(f".{folder.name}.lock")):
        run, model = read_run(folder), folder / "model"
        sample = run.facts["settings"]["train_file"] == Settings.train_file
        licences = {"license": command.license, "llm_license": command.llm_license}
        facts = card_facts(run, sample=sample, **licences)
        card = model_card(facts, command.repo_id)
        chosen = files_to_upload(model, facts, card)
        check_vectors(model, card_text(facts, str(model), PROBES))
        files.write_text(folder / "model_card.md", card)
        for name, content in chosen.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            sys.stdout.write(f"{size:>15,}  {name}\n")
        log.info("the card is %s", folder / "model_card.md")
        if not command.dry_run:
            sys.stdout.write(upload(chosen, command, token) + "\n")


def main() -> None:
    """Parse the command line and publish."""
    command = command_line.parse_command_line(Command, None, Command())
    # On the CPU all libraries agree to the last digits.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if command.dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"
    command_line.log_to_stderr()
    publish(command)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
