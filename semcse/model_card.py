"""The model card that publish_model.py uploads. Its text is in model_card.md.j2."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from jinja2 import StrictUndefined, Template

from semcse import files
from semcse.papers import read_papers
from semcse.report import TASK_NAMES, Run, describe_score
from semcse.tables import ROWS, main_score, notes_on, table_lines

TAGS = "sentence-transformers sentence-similarity feature-extraction semcse scientific-papers"


def is_hub_id(name: str) -> bool:
    """Return whether `name` is the id of a repository on the Hub, NAME/REPO."""
    # huggingface_hub reads its environment variables when this is first imported.
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return name.count("/") == 1


def public_name(name: str) -> str:
    """Return a Hub id unchanged, and only the last part of a path on this machine."""
    return name if is_hub_id(name) and not Path(name).exists() else Path(name).name


def card_facts(run: Run, **more: Any) -> dict[str, Any]:
    """Return what the card's template needs, except the model's name and the example texts.

    `more` holds `sample` (whether the run was trained on the sample papers), `license` and
    `llm_license` (empty if unknown).
    """
    benchmark = run.results["benchmark"]
    rows = {ROWS[stem]: result for stem, result in run.results.items()}
    facts = {
        "run": run,
        "rows": ROWS,
        "table": table_lines(rows),
        "notes": notes_on(benchmark | {"eval_file": code(Path(benchmark["eval_file"]).name)}),
    }
    return facts | _base_model(run) | _training_data(run) | more


def _base_model(run: Run) -> dict[str, str]:
    """Return the encoder's Hub id or name, and its licence, which is empty if it is unknown."""
    from semcse.models import find_recipe

    encoder = run.facts["settings"]["encoder"]
    recipe = find_recipe(encoder)
    base = recipe.hub_id if recipe else public_name(encoder)
    return {
        "base": base,
        "base_licence": recipe.licence.replace("unknown", "") if recipe else "",
    }


def _training_data(run: Run) -> dict[str, Any]:
    """Return the sources of the training papers, and the language model that wrote their summaries.

    Both are empty if the training file was changed after the run began.
    """
    path = Path(run.facts["settings"]["train_file"])
    report, sources, writer = Path(f"{path}.report.json"), set[str](), ""
    if path.is_file() and path.stat().st_mtime <= (run.folder / "settings.json").stat().st_mtime:
        sources = {paper.source for paper in read_papers(path, skip_invalid=True)} - {""}
        if report.is_file():
            writer = public_name(str(files.read_json(report).get("model", "")))
    return {"sources": sorted(sources), "writer": writer}


def eval_results(benchmark: Mapping[str, Any]) -> Iterator[hub.EvalResult]:
    """Yield the scores of the four tasks in the form that the Hub stores."""
    for task, scores in benchmark["tasks"].items():
        for key in (main_score(task), "mrr", "recall_at_1", "recall_at_10"):
            main = key == main_score(task)
            name = f"{key.replace('_', ' ')}, pool {scores.get('pool')}, higher is better"
            if scores.get(key) is not None:
                yield hub.EvalResult(
                    task_type="clustering" if task == "clustering" else "information-retrieval",
                    dataset_type="unknown",
                    dataset_name=Path(benchmark["eval_file"]).name,
                    # Without this name, the Hub would merge three of the tasks into one.
                    dataset_config=task,
                    task_name=TASK_NAMES[task],
                    metric_type=key,
                    metric_value=scores[key],
                    metric_name=describe_score(task, scores) if main else name,
                    metric_args={"ci95": scores["ci95"]} if main else None,
                )


def code(value: object) -> str:
    """Return a Markdown code span, in which no text is markup, without unprintable characters."""
    text = "".join(char for char in " ".join(str(value).split()) if char.isprintable())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text or ' '}{fence}"


def card_text(facts: Mapping[str, Any], name: str, texts: list[str]) -> str:
    """Return the card without metadata. Its Python examples embed `texts` with the model `name`."""
    text = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    template = Template(text, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    card = str(template.render(facts, name=name, texts=texts, code=code, literal=repr))
    return card.strip() + "\n"


def model_card(facts: Mapping[str, Any], repo_id: str) -> str:
    """Return the whole card: the metadata that the Hub reads, then the text."""
    # Other sources may be folders of this machine, whose names look like Hub ids.
    known = {one.split()[0] for one in facts["sources"] if one.startswith("allenai/scirepeval")}
    data = hub.ModelCardData(
        language="en",
        license=facts["license"] or facts["base_licence"] or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=TAGS.split(),
        datasets=sorted(known) or None,
        base_model=facts["base"] if "/" in facts["base"] else None,
        model_name=repo_id.split("/")[1],
        eval_results=list(eval_results(facts["run"].results["benchmark"])),
    )
    text = card_text(facts, repo_id, ["first abstract", "second abstract"])
    return f"---\n{data.to_yaml()}\n---\n\n{text}"
