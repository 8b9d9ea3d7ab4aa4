"""Every command and every piece of Python in README.md is run here, in a copy of the repository
with fewer sample papers, offline.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from fake_llm_server import FakeServer

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands that other checks run: make's own targets, by the reader and by CI, which is `make test`.
ELSEWHERE = {"make quickstart", "make test", "make local-llm", "make bench", "make test-slow"}
# Those that need the Hub, a language model or a GPU run on
# stand-ins in the tests of the scripts.
NEEDS_MORE = (
    "--source",
    "--base-url http://127.0.0.1:8001",
    "meta-llama",
    "--profile paper",
    "--private",
)

SCRIPTS = (
    "main.py",
    "semantic_benchmark.py",
    "collect_papers.py",
    "generate_train_summaries.py",
    "generate_search_queries.py",
    "embed_papers.py",
    "search_papers.py",
    "publish_model.py",
)
# The commands that write to this folder need each other: one test runs them in their order.
PIPELINE = "runs/few"
# The commands of these scripts run in test_search_papers.py, in their order.
RUN_ELSEWHERE = ("embed_papers.py", "search_papers.py")


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """All shell commands of the README's bash blocks, without comments."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scripts with 24 training and 24 evaluation papers under the same names, and the
    quickstart run in it.
    """
    folder = tmp_path_factory.mktemp("workspace")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "semcse", folder / "semcse")
    shutil.copy(ROOT / "CITATION.cff", folder)
    (folder / "data").mkdir()
    for name in ("sample_train.jsonl", "sample_test.jsonl"):
        lines = (ROOT / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "data" / name).write_text("".join(lines[:24]), encoding="utf-8")
    done = run_script("main.py", "--max-steps", "4", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def needs_more(command: str) -> bool:
    return any(words in command for words in NEEDS_MORE)


@pytest.mark.parametrize(
    "command", [command for command in dict.fromkeys(commands()) if needs_more(command)]
)
def test_command_that_needs_more_is_understood(command: str) -> None:
    """Its script knows every flag in it."""
    words = shlex.split(command)
    known = run_script(words[1], "--help").stdout
    assert all(re.search(rf"{word}\b", known) for word in words if word.startswith("--"))


@pytest.mark.slow
def test_the_pipeline_from_papers_to_a_benchmark_with_a_language_model(workspace: Path) -> None:
    """The commands of "Your own summaries and queries, offline", in their order, with a fake
    server in place of that of `make local-llm`.
    """
    pipeline = [command for command in commands() if PIPELINE in command]
    assert [shlex.split(command)[1].split("_")[0] for command in pipeline] == [
        "collect",
        "generate",
        "collect",
        "generate",
        "main.py",
        "semantic",
    ]
    with FakeServer() as server:
        for command in pipeline:
            done = run_script(
                *shlex.split(command.replace("http://127.0.0.1:8000/v1", server.url))[1:],
                cwd=workspace,
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
    report = json.loads(
        (workspace / PIPELINE / "benchmark" / "benchmark.json").read_text(encoding="utf-8")
    )
    assert [model["tasks"]["query"]["n"] for model in report["models"]] == [24, 24]


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in dict.fromkeys(commands())
        if command not in ELSEWHERE
        and not needs_more(command)
        and PIPELINE not in command
        and shlex.split(command)[1] not in RUN_ELSEWHERE
    ],
)
def test_command(command: str, workspace: Path) -> None:
    words = shlex.split(command)
    assert words[0] == "python", f"README has a command that no test runs: {command}"
    short = ["--max-steps", "4", "--overwrite"] if words[1] == "main.py" else []
    done = run_script(*words[1:], *short, cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_python_blocks(workspace: Path) -> None:
    """The lines for the published checkpoint are those for a model trained here, so they are run on
    one.
    """
    found = blocks("python")
    assert len(found) >= 2
    for number, block in enumerate(found):
        script = workspace / f"block_{number}.py"
        script.write_text(
            re.sub(
                r'name = "CLAUSE-Bielefeld/SemCSE"',
                'name = "runs/quickstart-euclidean/model"',
                block,
            ),
            encoding="utf-8",
        )
        done = run_script(script.name, cwd=workspace)
        assert done.returncode == 0, done.stderr
        assert "tensor(" in done.stdout


def test_settings_named_in_the_readme_exist() -> None:
    known = "".join(run_script(name, "--help").stdout for name in SCRIPTS)
    for flag in sorted(set(re.findall(r"`(--[a-z][a-z-]+)", README))):
        assert re.search(rf"{flag}\b", known), f"README names {flag}, which no script has"


def test_files_named_in_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}"
