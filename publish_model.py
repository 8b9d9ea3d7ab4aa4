"""Publish a trained model: check a finished run's model folder, write its model card, and upload
both to the Hugging Face Hub in one commit.

python publish_model.py --run runs/quickstart-euclidean --repo-id NAME/REPO --dry-run      what
would go up, and the card; no network, no token
python publish_model.py --run runs/quickstart-euclidean --repo-id NAME/REPO --private

The token is read from HF_TOKEN or from the login that `hf auth login` keeps. The card says what the
run's files say, and "unknown" where they are silent.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub as hub  # lazy: it reads its environment when first used
import jinja2
import numpy as np
import tyro
import yaml  # type: ignore[import-untyped]

from semantic_benchmark import perf_scores
from semcse import command_line, files
from semcse.errors import RunError, UserError
from semcse.papers import read_papers
from semcse.report import TASK_NAMES, Run, read_run, terms
from semcse.tables import ROWS, TASKS, main_score, notes_on, table_lines
from settings import Settings

log = logging.getLogger(__name__)


HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])(?<!\.git)", re.ASCII)
NEEDED = (
    "semcse.json",
    "config.json",
    "modules.json",
    "1_Pooling/config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model*.safetensors",
)
# What goes up of a model folder; whatever else stands in it (checkpoints, optimizer state, notes)
# stays here.
USED = (
    *NEEDED[:-1],
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
)
MEND = "publish a model folder as main.py wrote it"
TOLERANCE = 1e-5  # of vectors, times their largest value where that is above 1
# One text is longer than any model reads, one holds what tokenizers normalise differently, and no
# two are equally long: padding must not show.
PROBES = (
    "Soil.",
    "Ligature ﬁnd, full width \uff21\uff22\uff23,\u200bZarrieß.",
    "Voters trust courts more than parliaments, two surveys find.",
    "river " * 9_000,
)


@dataclass(frozen=True)
class Command:
    """Check a finished run's model, write its model card and upload both to the Hugging Face Hub
    (token: HF_TOKEN, or the login of hf auth login).
    """

    run: str = tyro.MISSING  # run folder that main.py made and finished
    repo_id: str = tyro.MISSING  # where to: NAME/REPO, made if it does not exist
    private: bool = False  # make the repository private; an existing public one is refused
    # only check, write the card to <run>/model_card.md and list what would go up: no network, no
    # token
    dry_run: bool = False
    # licence of the model, as the Hub spells it (apache-2.0); empty: the base model's, where it is
    # known
    license: str = ""
    # licence or terms of the summaries that a language model wrote; empty: said as unknown
    llm_license: str = ""


def public(name: str) -> str:
    """A model's name fit to be published: a Hub id as it is, of a path on this machine the last
    part.
    """
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else Path(name).name


def origins(run: Run, folder: Path) -> dict[str, Any]:
    """What is known of where a run began; empty: unknown. `base`: the encoder's name, `base_id`: on
    the Hub, `base_license`, `writer`: the language model that the generator's report beside the
    training file names, `sources`: of that file's papers. A file that was changed after the run
    began tells nothing of it.
    """
    from semcse.models import find_recipe

    encoder, path = run.facts["settings"]["encoder"], Path(run.facts["settings"]["train_file"])
    recipe, report = find_recipe(encoder), Path(f"{path}.report.json")
    base = recipe.hub_id if recipe else public(encoder)
    told = path.is_file() and path.stat().st_mtime <= (folder / "settings.json").stat().st_mtime
    writer = (
        public(str(files.read_json(report).get("model", ""))) if told and report.is_file() else ""
    )
    sources = (
        sorted({paper.source for paper in read_papers(path, skip_invalid=True)} - {""})
        if told
        else []
    )
    known = {
        "base": base,
        "base_id": base if "/" in base else "",
        "base_license": recipe.licence.replace("unknown", "") if recipe else "",
    }
    return known | {"writer": writer, "sources": sources}


def eval_results(benchmark: Mapping[str, Any]) -> list[hub.EvalResult]:
    """The four tasks' scores for the Hub. `dataset_config` names the task: without it the Hub would
    take three tasks for one.
    """
    found = []
    for task, scores in benchmark["tasks"].items():
        kind = "clustering" if task == "clustering" else "information-retrieval"
        named = {
            key: f"{key.replace('_', ' ')}, pool {scores.get('pool')}, higher is better"
            for key in ("mrr", "recall_at_1", "recall_at_10")
        }
        for key, name in ({main_score(task): terms(task, scores)} | named).items():
            if scores.get(key) is not None:
                file, interval = (
                    Path(benchmark["eval_file"]).name,
                    ({"ci95": scores["ci95"]} if key == main_score(task) else None),
                )
                found.append(
                    hub.EvalResult(
                        kind,
                        "unknown",
                        file,
                        key,
                        scores[key],
                        TASK_NAMES[task],
                        task,
                        metric_name=name,
                        metric_args=interval,
                    )
                )
    return found


def code(value: object) -> str:
    """Foreign words as a Markdown code span, in which nothing is markup; unprintable characters go."""
    text = "".join(char for char in " ".join(str(value).split()) if char.isprintable())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text or ' '}{fence}"


def describe(run: Run, folder: Path, command: Command) -> dict[str, Any]:
    """Everything the card's template needs, but the model's name and the example texts."""
    benchmark, sample = (
        run.results["benchmark"],
        run.facts["settings"]["train_file"] == Settings.train_file,
    )
    scores = {
        ROWS[stem]: {task: result["tasks"][task][main_score(task)] for task in TASKS}
        for stem, result in run.results.items()
    }
    perf = perf_scores(scores)
    # two rows may be one and the same use of one model
    if None in perf.values() or len({str(row) for row in scores.values()}) < 3:
        perf = {}
    table = table_lines({ROWS[stem]: result for stem, result in run.results.items()}, perf)
    notes = notes_on(benchmark | {"eval_file": code(Path(benchmark["eval_file"]).name)})
    citation = yaml.safe_load(Path(__file__).with_name("CITATION.cff").read_text(encoding="utf-8"))[
        "preferred-citation"
    ]
    known = {
        "run": run,
        "s": run.facts["settings"],
        "sample": sample,
        "rows": ROWS,
        "perf": perf,
        "table": table,
        "notes": notes,
        "citation": citation,
    }
    return (
        known
        | {"license": command.license, "llm_license": command.llm_license}
        | origins(run, folder)
    )


def body(facts: Mapping[str, Any], name: str, texts: tuple[str, ...]) -> str:
    """The card without its metadata. In its two blocks of Python the model is called `name` and
    embeds `texts`.
    """
    made = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "code": code,
        "literal": lambda value: json.dumps(value, ensure_ascii=False),
        "file": lambda path: Path(path).name,
    }
    template = Path(__file__).parent / "semcse" / "model_card.md.j2"
    return (
        made.from_string(template.read_text(encoding="utf-8"))
        .render(facts, name=name, texts=texts)
        .strip()
        + "\n"
    )


def card(facts: Mapping[str, Any], repo_id: str) -> str:
    """The whole model card: metadata that the Hub reads, then the text."""
    # The collector opens `source` with a Hub data set's id, but so it does with a folder's: only
    # SciRepEval's is sure to be on the Hub.
    datasets = sorted(
        {
            source.split()[0]
            for source in facts["sources"]
            if source.startswith("allenai/scirepeval")
        }
    )
    data = hub.ModelCardData(
        language="en",
        license=facts["license"] or facts["base_license"] or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[
            "sentence-transformers",
            "sentence-similarity",
            "feature-extraction",
            "semcse",
            "scientific-papers",
        ],
        datasets=datasets or None,
        base_model=facts["base_id"] or None,
        model_name=repo_id.split("/")[1],
        eval_results=eval_results(facts["run"].results["benchmark"]),
    )
    text = body(facts, repo_id, ("first abstract", "second abstract"))
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def chosen_files(model: Path, facts: Mapping[str, Any], text: str) -> dict[str, Path | bytes]:
    """{path in the repository: file, or content}, no path of this machine in ours. UserError: a
    file is missing, or semcse.json is not what the run says.
    """
    from semcse.model_folder import read_marker

    if missing := [name for name in NEEDED if not any(model.glob(name))]:
        raise UserError(f"{model}: has no {missing[0]}", MEND)
    benchmark, marker = facts["run"].results["benchmark"], read_marker(model) or {}
    for key in ("metric", "pooling"):
        if {marker[key]} != (told := {facts["s"][key], benchmark[key]}):
            raise UserError(
                f"{model}: semcse.json says {key} {marker[key]}, the run's files say"
                f" {' and '.join(sorted(told))}",
                MEND,
            )
    benchmark = benchmark | {"model": facts["base"], "eval_file": Path(benchmark["eval_file"]).name}
    written = {
        "semcse.json": files.read_json(model / "semcse.json") | {"base": facts["base"]},
        "benchmark.json": benchmark,
    }
    ours = {
        name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        for name, value in written.items()
    }
    found: dict[str, Path | bytes] = {
        path.relative_to(model).as_posix(): path
        for used in USED
        for path in sorted(model.glob(used))
        if path.is_file()
    }
    return found | ours | {"README.md": text.encode()}


def check_vectors(model: Path, text: str) -> None:
    """Run the two blocks of Python in `text`, a card's `body` that embeds PROBES with the folder
    `model`. UserError: one fails or gives other vectors.
    """
    from semcse.models import load_model

    ours = load_model(str(model), device="cpu").embed(PROBES).vectors.numpy()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for library, block in zip(("transformers", "sentence-transformers"), blocks, strict=True):
        names: dict[str, Any] = {"print": lambda *_: None}
        try:
            exec(block, names)  # just what a reader of the card will run
            worst = float(np.abs(np.asarray(names["vectors"]) - ours).max())
        # the libraries raise whatever they like for files that do not fit each other
        except Exception as error:
            raise UserError(
                f"{model}: {library} cannot use it ({type(error).__name__}: {str(error)[:200]})",
                MEND,
            ) from None
        if not worst <= TOLERANCE * max(1.0, float(np.abs(ours).max())):  # NaN too
            raise UserError(
                f"{model}: {library} gives other vectors than this project, by {worst:.2g}", MEND
            )
        log.info("%s gives the same vectors (largest difference %.1g)", library, worst)


def upload(chosen: Mapping[str, Path | bytes], command: Command, token: str) -> str:
    """Put everything into the repository in one commit, making it before if need be; returns the
    commit's address. RunError: refused, or not reached.
    """
    api, repo = hub.HfApi(token=token), command.repo_id
    mends = {
        401: "check HF_TOKEN, or run: hf auth login",
        403: f"use a token with write access to {repo}",
        404: "check --repo-id and the token's rights",
    }
    try:
        api.create_repo(repo, private=command.private or None, exist_ok=True)
        if not command.private or api.model_info(repo).private:
            operations = [hub.CommitOperationAdd(name, content) for name, content in chosen.items()]
            return str(
                api.create_commit(
                    repo, operations, commit_message="Upload the model, its card and its benchmark"
                ).commit_url
            )
    # the library, its HTTP client and its storage client raise many kinds, none of which is a fault
    # of ours
    except Exception as error:
        http = next(
            (one for one in (error, error.__cause__) if isinstance(one, hub.errors.HfHubHTTPError)),
            None,
        )
        what = (
            f"the Hub answered HTTP {http.response.status_code}: {http.server_message}"
            if http
            else f"{type(error).__name__}: {error}"
        )
        what = what.replace(token, "***")[:300]  # a server may repeat what it was sent
        mend = mends.get(
            http.response.status_code if http else 0,
            "check the network and run the same command again",
        )
        raise RunError(f"{repo} is not uploaded ({what})", mend) from None
    raise RunError(
        f"{repo} exists and is public",
        "make it private on the Hub, leave --private out, or name another --repo-id",
    )


def publish(command: Command) -> None:
    """Check, write the card, list what goes up, and upload unless it is a dry run."""
    folder = Path(command.run).resolve()
    if not HUB_ID.fullmatch(command.repo_id):
        raise UserError(
            f"--repo-id {command.repo_id}: is not NAME/REPO",
            "name the account and the repository, as in someone/my-semcse",
        )
    if not folder.is_dir():
        raise UserError(
            f"--run {command.run}: no such folder", "name a folder that main.py made and finished"
        )
    token = "" if command.dry_run else hub.get_token()
    if token is None:
        raise UserError(
            "no token of the Hugging Face Hub",
            "set HF_TOKEN to one with write access, or run: hf auth login (--dry-run needs none)",
        )
    # no new run may take this one's place meanwhile
    with files.lock(folder.with_name(f".{folder.name}.lock")):
        run, model = read_run(folder, folder.name), folder / "model"
        try:
            facts = describe(run, folder, command)
            text = card(facts, command.repo_id)
            chosen = chosen_files(model, facts, text)
        except (AttributeError, KeyError, TypeError, ValueError, jinja2.UndefinedError) as error:
            raise UserError(
                f"{folder}: its JSON files are not a run's ({type(error).__name__}: {error})",
                "run main.py again",
            ) from None
        check_vectors(model, body(facts, str(model), PROBES))
        files.write_text(folder / "model_card.md", text)
        for name, content in chosen.items():
            sys.stdout.write(
                f"{len(content) if isinstance(content, bytes) else content.stat().st_size:>15,} "
                f" {name}\n"
            )
        log.info("the card is %s", folder / "model_card.md")
        if not command.dry_run:
            sys.stdout.write(upload(chosen, command, token) + "\n")


def main() -> None:
    """The script: parse, then publish."""
    command = command_line.parse_command_line(Command, None, Command())
    # the check runs where all agree to the last digits
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""} | (
        {"HF_HUB_OFFLINE": "1"} if command.dry_run else {}
    )
    command_line.log_to_stderr()
    publish(command)


if __name__ == "__main__":
    sys.exit(command_line.run_command(main))
