"""The shape of the project: which script may import which, that importing one has no effect, and
how long they may be.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, run_script

# Arrows of the design: a script may import what stands at the end of its arrows, and everything
# that may import in turn.
ARROWS = {
    "main": ("report", "train_embedding_model"),
    "report": ("semantic_benchmark",),
    "train_embedding_model": ("semantic_benchmark", "checkpoints"),
    "checkpoints": ("encoder", "parallel"),
    "parallel": ("files", "settings"),
    "semantic_benchmark": ("baseline_models",),
    "baseline_models": ("encoder",),
    "encoder": ("similarity", "load_data", "packed"),
    "packed": (),
    "similarity": ("files", "settings"),
    "load_data": ("files", "settings"),
    "settings": ("files",),
    "files": (),
    "generate_train_summaries": ("batch_api",),
    "generate_search_queries": ("batch_api",),
    "batch_api": ("language_model",),
    "language_model": ("load_data",),
    "collect_papers": ("load_data",),
    "embed_papers": ("baseline_models",),
    "search_papers": ("baseline_models",),
    "publish_model": ("report",),
}
LINE_CAPS = {"main": 110, "train_embedding_model": 600}
# Formatted at 100 columns. The goal is 7,000 together with tools.
ALL_LINES = 8_700

SCRIPTS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}


def reachable(name: str) -> set[str]:
    return set(ARROWS[name]).union(*(reachable(other) for other in ARROWS[name]))


def imported(path: Path) -> set[str]:
    """Every module a script names in an import, wherever it stands (in functions, under
    TYPE_CHECKING), and in importlib's calls.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path.name}:{node.lineno}: a relative import in a folder of scripts"
            )
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            found.update(str(word.value) for word in node.args if isinstance(word, ast.Constant))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_run_one_way(name: str) -> None:
    assert name in ARROWS, f"{name}.py is not in the design: give it its place in ARROWS"
    wrong = (imported(SCRIPTS[name]) & set(ARROWS)) - reachable(name)
    assert not wrong, f"{name}.py may not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_do_not_import_tests_or_benches(name: str) -> None:
    assert imported(SCRIPTS[name]).isdisjoint({"pytest", "conftest", "tests", "bench"})


def test_the_arrows_have_no_circle_and_the_checker_sees_every_kind_of_import(
    tmp_path: Path,
) -> None:
    assert all(name not in reachable(name) for name in ARROWS)
    path = tmp_path / "script.py"
    path.write_text(
        "import a, b.inner as c\nfrom d.inner import x\ndef f():\n    import e\n    class G:\n     "
        "   from g import *\n    importlib.import_module('h')\nif TYPE_CHECKING:\n    from i"
        " import J\n",
        encoding="utf-8",
    )
    assert imported(path) == {"a", "b", "d", "e", "g", "h", "i"}


OBSERVE = """
import ast, json, logging, os, pathlib, random, signal, sys, threading, warnings
root, here = pathlib.Path(sys.argv[1]), pathlib.Path.cwd()
for name in [name for name in os.environ if name.startswith(("HF_", "TOKENIZERS_", "TRANSFORMERS_", "OMP_", "MKL_"))]:
    del os.environ[name]  # else setting one to what it is would not show
sys.path[0] = str(root)
ours = {path.stem for path in root.glob("*.py")}
for path in root.glob("*.py"):  # what others do when they are imported is not ours: first all of them
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name if isinstance(node, ast.Import) else "__future__"
        if name.partition(".")[0] not in ours | {"__future__"}:
            exec(ast.unparse(node))
import numpy, torch

def state():
    files = {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for folder in (root, here) for path in folder.iterdir() if path.name != "__pycache__"}
    return {
        "files": files,
        "runs": sorted(map(str, (root / "runs").glob("*"))),
        "torch seed": torch.initial_seed(),
        "torch state": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy state": hash(str(numpy.random.get_state())),
        "python state": hash(random.getstate()),
        "environment": dict(os.environ),
        "handlers": [repr(handler) for handler in logging.root.handlers],
        "levels": {name: logging.getLogger(name).level for name in (None, *logging.root.manager.loggerDict) if name not in ours},
        "own loggers": {name: (len(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in sorted(ours)},
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "warnings": [repr(one) for one in warnings.filters],
        "threads": (threading.active_count(), torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": (torch.cuda.is_initialized(), torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled()),
        "matmul": torch.get_float32_matmul_precision(),
        "folder and path": (os.getcwd(), list(sys.path), sys.argv, sys.getrecursionlimit()),
        "output": (id(sys.stdout), id(sys.stderr), id(sys.excepthook)),
    }

first = state()
changed = {}
for name in sorted(ours):
    before = state()
    __import__(name)
    after = state()
    changed[name] = sorted(key for key in before if before[key] != after[key])
assert pathlib.Path(sys.modules["encoder"].__file__).parent == root
print("RESULT", json.dumps(changed))
"""


def test_importing_a_script_has_no_effect(tmp_path: Path) -> None:
    """No file, seed, random state, environment variable, logging set-up, signal handler, thread or
    CUDA call; nothing printed.
    """
    done = run_script("-c", OBSERVE, ROOT, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RESULT ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    changed = json.loads(done.stdout.removeprefix("RESULT "))
    assert set(changed) == set(SCRIPTS)
    assert {name: keys for name, keys in changed.items() if keys} == {}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").split("\n")) - 1


@pytest.mark.parametrize("name", LINE_CAPS)
def test_a_script_stays_within_its_cap(name: str) -> None:
    assert lines(SCRIPTS[name]) <= LINE_CAPS[name]


def test_all_scripts_together_stay_within_their_cap() -> None:
    assert sum(map(lines, SCRIPTS.values())) <= ALL_LINES


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_first_what_it_is_for(name: str) -> None:
    text = ast.get_docstring(ast.parse(SCRIPTS[name].read_text(encoding="utf-8")))
    assert text
    assert len(text.partition("\n")[0]) > 30


# What is installed


def pins(name: str) -> dict[str, str]:
    """Package -> version of the lines "package==version" of a requirements file, extras left out."""
    found = re.findall(
        r"^([\w.-]+)(?:\[[^]]*])?==(\S+)$",
        (ROOT / name).read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    return {canonical(package): version for package, version in found}


def canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def needed_by(package: str, seen: set[str]) -> None:
    """Add an installed package and all it needs here to `seen`."""
    if package not in seen:
        seen.add(package)
        for line in importlib.metadata.requires(package) or []:
            name = re.match(r"[\w.-]+", line)
            assert name
            if "extra ==" not in line and "platform_system" not in line:
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    importlib.metadata.version(name[0])
                    needed_by(canonical(name[0]), seen)


def test_every_package_that_is_installed_has_its_version_in_the_constraints() -> None:
    """All but torch, which has several builds; direct pins and constraints agree; no addresses,
    paths or hashes.
    """
    direct, known = pins("requirements.txt") | pins("requirements-dev.txt"), pins("constraints.txt")
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert len(lines) == len(known)
    assert "torch" not in known
    assert {name: known[name] for name in direct if name != "torch"} == {
        name: version for name, version in direct.items() if name != "torch"
    }
    needed: set[str] = set()
    for package in direct.keys() - {"torch"}:
        needed_by(package, needed)
    assert not {
        name
        for name in needed - set(known) - {"torch"}
        if not name.startswith(("nvidia", "triton", "cuda"))
    }
