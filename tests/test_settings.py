"""settings.py: which value wins, what the line `metric` switches, what --help says, and which
values are refused.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import re
import tokenize
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import ROOT, run_script

from semcse.command_line import run_command
from semcse.errors import UserError
from semcse.run_folder import FREE_ON_RESUME
from semcse.types import Metric
from settings import (
    MARGINS,
    PROFILES,
    TEMPERATURES,
    Profile,
    Settings,
    complete,
    default_settings,
    parse_settings,
    require_files,
)

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
TYPES = get_type_hints(Settings)
profiles = pytest.mark.parametrize("profile", get_args(Profile))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def other_value(name: str, now: Any) -> Any:
    """A permitted value of a field that is not `now`."""
    kind = TYPES[name]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != now)
    if kind in (str, bool):
        return f"other {name}" if kind is str else not now
    return now + 7 if kind is int else 0.625


# Which value wins


@profiles
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "profile"])
def test_a_flag_beats_the_profile_and_the_profile_beats_the_default_line(
    profile: Profile, name: str
) -> None:
    """Each flag, given any order, sets its own field and leaves all others as the profile's block
    and then the default lines say.
    """
    base = {
        field: PROFILES[profile].get(field, default.default) for field, default in FIELDS.items()
    } | {"profile": profile}
    value = other_value(name, base[name])
    words = [flag(name)] if value is True else [flag(name), str(value)]
    expected = base | {name: value}
    metric: Metric = expected["metric"]
    expected["margin"] = MARGINS[metric] if expected["margin"] is None else expected["margin"]
    expected["temperature"] = (
        TEMPERATURES[metric] if expected["temperature"] is None else expected["temperature"]
    )
    expected["output_dir"] = expected["output_dir"] or f"runs/{profile}-{metric}"
    for order in (["--profile", profile, *words], [*words, f"--profile={profile}"]):
        assert dataclasses.asdict(parse_settings(order)) == expected


def test_without_flags_the_quickstart_profile_runs_the_sample_papers() -> None:
    found = parse_settings([])
    assert found == complete(default_settings("quickstart"))
    assert (found.profile, found.metric, found.margin, found.output_dir) == (
        "quickstart",
        "euclidean",
        1.0,
        "runs/quickstart-euclidean",
    )
    assert (ROOT / found.train_file).is_file()
    assert (ROOT / found.eval_file).is_file()


def test_a_flag_can_set_a_profiles_value_back_to_the_default_line() -> None:
    assert PROFILES["quickstart"]["max_steps"] != Settings().max_steps
    assert (
        parse_settings(["--max-steps", str(Settings().max_steps)]).max_steps == Settings().max_steps
    )
    assert (
        parse_settings(["--profile", "paper", "--encoder", Settings().encoder]).encoder
        == Settings().encoder
    )


def test_the_last_of_two_equal_flags_wins() -> None:
    assert parse_settings(["--profile", "paper", "--profile", "quickstart"]) == parse_settings([])
    assert parse_settings(["--metric", "cosine", "--metric", "euclidean"]).metric == "euclidean"


@profiles
def test_profiles_name_real_settings_and_never_the_metric(profile: Profile) -> None:
    block = PROFILES[profile]
    assert set(block) <= set(FIELDS) - {"metric", "profile"}
    complete(default_settings(profile))
    assert all(value != FIELDS[name].default for name, value in block.items()), (
        "a line of the block that changes nothing"
    )


def test_both_profiles_are_there_and_the_names_of_free_settings_are_real() -> None:
    assert tuple(PROFILES) == get_args(Profile)
    assert set(FIELDS) > FREE_ON_RESUME


@pytest.mark.parametrize("metric", get_args(Metric))
@profiles
def test_the_metric_brings_its_margin_temperature_and_folder_unless_they_are_given(
    metric: Metric, profile: Profile
) -> None:
    found = parse_settings(["--profile", profile, "--metric", metric])
    assert (found.margin, found.temperature) == {"euclidean": (1.0, 0.25), "cosine": (0.1, 0.07)}[
        metric
    ]
    assert found.output_dir == f"runs/{profile}-{metric}"
    given = parse_settings(
        ["--metric", metric, "--margin", "0", "--temperature", "3", "--output-dir", "here"]
    )
    assert (given.margin, given.temperature, given.output_dir) == (0.0, 3.0, "here")
    assert parse_settings(["--metric", metric, "--margin", "None"]).margin == MARGINS[metric]


# The one line


def test_editing_the_line_metric_switches_the_whole_project(tmp_path: Path) -> None:
    source = (ROOT / "settings.py").read_text(encoding="utf-8")
    line = '\n    metric: Metric = "euclidean"  #'
    assert source.count(line) == 1
    (tmp_path / "settings.py").write_text(
        source.replace(line, '\n    metric: Metric = "cosine"  #'), encoding="utf-8"
    )
    code = """
import dataclasses, json, sys
sys.path[:0] = sys.argv[1:3]
import settings
commands = [[], ["--profile", "paper"], ["--metric", "euclidean"]]
found = [dataclasses.asdict(settings.parse_settings(words)) for words in commands]
print(json.dumps([settings.__file__, *found]))
"""
    done = run_script("-c", code, tmp_path, ROOT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, plain, paper, by_flag = json.loads(done.stdout)
    assert where == str(tmp_path / "settings.py")
    assert [plain, paper, by_flag] == [
        dataclasses.asdict(parse_settings(words))
        for words in (["--metric", "cosine"], ["--metric", "cosine", "--profile", "paper"], [])
    ]


@pytest.mark.parametrize("name", ["metric", "profile", "pooling", "loss", "device", "precision"])
def test_a_word_that_is_no_choice_is_refused_also_in_the_settings_lines(name: str) -> None:
    """The command line checks its own words; an edited line is checked when the settings are
    completed.
    """
    choices = ", ".join(get_args(TYPES[name]))
    changes: dict[str, Any] = {name: "euclidian"}
    with pytest.raises(
        UserError, match=rf"{flag(name)} is out of range; give a value that is one of {choices}$"
    ):
        complete(dataclasses.replace(Settings(), **changes))


def test_the_metric_is_decided_in_that_line_alone() -> None:
    """Outside settings.py's line no field, parameter or variable has a metric as its default, apart
    from the recipes of other people's models.
    """
    defaults = []
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values: list[ast.expr | None] = []
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                values = [*node.args.defaults, *node.args.kw_defaults]
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                values = [node.value]
            defaults += [
                path.name
                for value in values
                if isinstance(value, ast.Constant) and value.value in get_args(Metric)
            ]
    assert defaults == ["settings.py"]


# --help


def help_text(*words: str) -> str:
    """What `main.py --help` says, without its frame, in one line."""
    done = run_script(ROOT / "main.py", *words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    return " ".join(done.stdout.replace("│", " ").split())


def comments() -> dict[str, str]:
    """Field -> the comment at the end of its line in settings.py."""
    source = (ROOT / "settings.py").read_text(encoding="utf-8")
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (settings_class,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    fields = [
        node
        for node in settings_class.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    assert all(node.lineno == node.end_lineno for node in fields), "one line a setting"
    return {
        node.target.id: by_line.get(node.lineno, "")
        for node in fields
        if isinstance(node.target, ast.Name)
    }


def test_help_says_every_settings_meaning_and_default() -> None:
    said, meant = help_text(), comments()
    assert list(meant) == list(FIELDS)
    base = default_settings("quickstart")
    for name, comment in meant.items():
        assert len(comment) > 10, f"{name} has no comment"
        default = getattr(base, name)
        shown = repr(default) if default == "" else str(default)
        pattern = rf"{flag(name)} [^-]*{re.escape(comment)} \(default: {re.escape(shown)}\)"
        assert re.search(pattern, said), (
            f"--help does not show: {name}: {comment} (default: {shown})"
        )


def test_help_of_a_profile_shows_its_values() -> None:
    said = help_text("--profile", "paper")
    for value in PROFILES["paper"].values():
        assert f"(default: {value})" in said


def test_the_paper_profile_is_the_published_setting() -> None:
    """A change of these values is a change of what the project claims to reproduce."""
    paper = dataclasses.asdict(parse_settings(["--profile", "paper"]))
    published = {
        "metric": "euclidean",
        "encoder": "KISTI-AI/Scideberta-full",
        "pooling": "cls",
        "loss": "triplet",
        "margin": 1.0,
        "batch_size": 32,
        "max_steps": 40_000,
        "learning_rate": 2e-5,
        "weight_decay": 1e-4,
        "warmup_steps": 0,
        "decay": False,
        "clip_norm": 0.0,
        "joined_share": 0.0,
        "start_share": 0.0,
        "train_max_length": 128,
        "validation_papers": 150,
        "validate_every": 1_000,
        "patience": 7,
    }
    assert {name: paper[name] for name in published} == published


def test_a_missing_file_of_the_paper_profile_names_the_scripts_that_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"train_summaries.*collect_papers.*generate_train_summaries"
    ):
        require_files(parse_settings(["--profile", "paper"]))
    require_files(parse_settings(["--train-file", "elsewhere.jsonl", "--eval-file", "no.jsonl"]))


# Ranges

BAD_VALUES = [
    ("batch_size", "1", "at least 2"),
    ("batch_size", "-32", "at least 2"),
    ("max_steps", "0", "at least 1"),
    ("max_length", "2", "at least 3"),
    ("train_max_length", "2", "at least 3"),
    ("validate_every", "0", "at least 1"),
    ("patience", "0", "at least 1"),
    ("checkpoint_every", "0", "at least 1"),
    ("log_every", "0", "at least 1"),
    ("validation_papers", "1", "at least 2"),
    ("warmup_steps", "-1", "at least 0"),
    ("weight_decay", "-0.1", "at least 0"),
    ("weight_decay", "nan", "at least 0"),
    ("clip_norm", "-1", "at least 0"),
    ("joined_share", "-0.1", "between 0 and 1"),
    ("joined_share", "1.1", "between 0 and 1"),
    ("margin", "-0.5", "at least 0"),
    ("margin", "nan", "at least 0"),
    ("seed", "-1", "at least 0"),
    ("learning_rate", "0", "positive"),
    ("learning_rate", "-1e-5", "positive"),
    ("learning_rate", "inf", "positive"),
    ("learning_rate", "nan", "positive"),
    ("temperature", "0", "positive"),
    ("temperature", "inf", "positive"),
    ("validation_share", "0", "between 0 and 1"),
    ("validation_share", "1", "between 0 and 1"),
    ("validation_share", "nan", "between 0 and 1"),
    # Unchecked, these would end in a traceback later (infinity where settings.json is written, the
    # seed in torch.manual_seed).
    ("margin", "inf", ""),
    ("weight_decay", "inf", ""),
    ("clip_norm", "inf", ""),
    ("seed", str(2**64), ""),
]


@pytest.mark.parametrize("name, value, need", BAD_VALUES)
def test_a_value_out_of_range_is_refused_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], name: str, value: str, need: str
) -> None:
    def command() -> None:
        parse_settings([flag(name), value])

    assert run_command(command) == 2
    assert re.fullmatch(
        rf"error: [^\n]*{flag(name)} is out of range; give a value that is [^\n]*{need}[^\n]*\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 2),
        ("max_steps", 1),
        ("max_length", 3),
        ("train_max_length", 3),
        ("validate_every", 1),
        ("patience", 1),
        ("checkpoint_every", 1),
        ("log_every", 1),
        ("validation_papers", 2),
        ("warmup_steps", 0),
        ("weight_decay", 0.0),
        ("clip_norm", 0.0),
        ("margin", 0.0),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("learning_rate", 1e-30),
        ("temperature", 1e-30),
        ("validation_share", 1e-9),
        ("validation_share", math.nextafter(1, 0)),
    ],
)
def test_the_ends_of_a_range_are_allowed(name: str, value: float) -> None:
    assert getattr(parse_settings([flag(name), repr(value)]), name) == value


@pytest.mark.parametrize(
    "name", [name for name, kind in TYPES.items() if kind in (int, float) or kind == (float | None)]
)
def test_every_number_has_a_range(name: str) -> None:
    """No numeric setting takes a value far below zero."""
    with pytest.raises(UserError, match=flag(name)):
        parse_settings([flag(name), "-1000000"])
