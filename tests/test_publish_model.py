"""Publishing: the card's numbers and its code against the run, its markup as a Markdown parser sees
it, the upload on a stand-in for the Hub and back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import numpy as np
import pytest
from conftest import ROOT, make_paper, run_script
from hub_stub import HubStub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from markdown_it import MarkdownIt

import publish_model
from publish_model import Command, card, describe, public, publish
from semcse import files
from semcse.encoder import Encoder, Usage
from semcse.errors import RunError, UserError
from semcse.model_folder import load_encoder
from semcse.report import read_run
from semcse.tables import ROWS, TASKS, main_score

SECRET = "hf_PlantedSecretThatNobodyMayRead"
TEXTS = ["first abstract", "second abstract"]
MODEL_FILES = {
    "1_Pooling/config.json",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "semcse.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def trained(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that main.py made of the tiny encoder: CLS, Euclidean."""
    folder = tmp_path_factory.mktemp("trained")
    papers = {
        "train": [
            {"id": f"train-{n}", "summaries": make_paper(n)["summaries"]} for n in range(40, 60)
        ],
        "eval": [make_paper(n) for n in range(24)],
    }
    for name, rows in papers.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    flags = {
        "encoder": tiny_bert,
        "train-file": folder / "train.jsonl",
        "eval-file": folder / "eval.jsonl",
        "output-dir": folder / "run",
        "max-steps": 4,
    }
    more = {"batch-size": 8, "validate-every": 2, "log-every": 2, "max-length": 60}
    done = run_script(
        "main.py",
        *(word for key, value in (flags | more).items() for word in (f"--{key}", str(value))),
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run to spoil."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def change(path: Path, **values: Any) -> None:
    files.write_json(path, files.read_json(path) | values)


def change_settings(run: Path, **values: Any) -> None:
    change(
        run / "settings.json", settings=files.read_json(run / "settings.json")["settings"] | values
    )


def switch(run: Path) -> None:
    """Make it a run with mean pooling and cosine."""
    encoder = load_encoder(str(run / "model"), Usage("mean", "cosine", 60), "cpu")
    encoder.save(run / "model", base="tiny")
    change_settings(run, pooling="mean", metric="cosine", loss="infonce", temperature=0.07)
    change(run / "benchmark.json", pooling="mean", metric="cosine")


def dry_run(run: Path, **flags: Any) -> str:
    publish(Command(str(run), "someone/my-semcse", dry_run=True, **flags))
    return (run / "model_card.md").read_text(encoding="utf-8")


def card_of(run: Path, **flags: Any) -> str:
    command = Command(str(run), "someone/my-semcse", **flags)
    return card(describe(read_run(run, "run"), run, command), command.repo_id)


def blocks(text: str) -> list[str]:
    return [
        token.content
        for token in MarkdownIt().parse(text)
        if token.type == "fence" and token.info == "python"
    ]


def our_encoder(run: Path) -> Encoder:
    marker = files.read_json(run / "model" / "semcse.json")
    return load_encoder(
        str(run / "model"), Usage(marker["pooling"], marker["metric"], marker["max_length"]), "cpu"
    )


@pytest.mark.parametrize("cosine", [False, True])
def test_the_code_of_the_card_gives_the_vectors_and_distances_that_it_says(
    cosine: bool, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if cosine:
        switch(run)
    vectors = our_encoder(run).embed(TEXTS).vectors.numpy()
    one, other = vectors
    expected = (
        float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        if cosine
        else float(np.linalg.norm(one - other))
    )
    found = blocks(dry_run(run))
    assert len(found) == 2
    for number, block in enumerate(found):
        assert len([line for line in block.splitlines() if line.strip()]) <= 8
        names: dict[str, Any] = {}
        capsys.readouterr()
        exec(block.replace('"someone/my-semcse"', repr(str(run / "model"))), names)
        np.testing.assert_allclose(np.asarray(names["vectors"]), vectors, atol=1e-6)
        printed = float(re.findall(r"-?\d+\.\d+(?:e-\d+)?", capsys.readouterr().out)[1])
        assert printed == pytest.approx(-expected if number and not cosine else expected, abs=1e-3)


def test_the_metadata_is_what_the_hub_reads_and_holds_the_scores(run: Path) -> None:
    text = card_of(run, license="mit")
    data: Any = ModelCard(text).data
    assert {
        key: data[key]
        for key in (
            "license",
            "language",
            "library_name",
            "pipeline_tag",
            "base_model",
            "datasets",
            "model_name",
        )
    } == {
        "license": "mit",
        "language": "en",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "base_model": None,
        "datasets": None,
        "model_name": "my-semcse",
    }
    tasks = files.read_json(run / "benchmark.json")["tasks"]
    found = {(one.dataset_config, one.metric_type): one for one in data.eval_results}
    assert len(found) == len(data.eval_results) == 13
    for (task, key), one in found.items():
        assert one.metric_value == tasks[task][key]
        assert f"pool {tasks[task]['pool']}" in one.metric_name
        assert (one.metric_args or {}).get("ci95") == (
            tasks[task]["ci95"] if key == main_score(task) else None
        )
    assert {task for task, key in found if key == main_score(task)} == set(TASKS)
    assert "lower is better" in found["query", "mean_rank"].metric_name
    assert "higher is better" in found["clustering", "purity"].metric_name
    again: Any = ModelCard(str(ModelCard(text))).data
    assert again.to_dict() == data.to_dict()


def test_the_text_says_what_the_files_of_the_run_say(run: Path, trained: Path) -> None:
    text = card_of(run)
    facts, best = files.read_json(run / "settings.json"), read_run(run, "run").best
    s = facts["settings"]
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for stem, row in ROWS.items():
        for task, result in files.read_json(run / f"{stem}.json")["tasks"].items():
            digits = 3 if task == "clustering" else 2
            low, high = result["ci95"]
            assert (
                f"{result[main_score(task)]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
                in rows[row]
            )
            assert f"{task} (pool {result['pool']}" in rows[""]
    for words in (
        (
            f"Papers: {facts['papers']['train']} of `train.jsonl`; {facts['papers']['held_out']}"
            " others"
        ),
        "margin 1.0",
        "4 of at most 4",
        "batches of 8 papers",
        f"seed {s['seed']}",
        f"step {best['step']}, at which",
        f"torch {facts['versions']['torch']}",
        f"started from: `{Path(s['encoder']).name}`",
        "which one wrote these: unknown",
        "where the papers come from: unknown",
        "this model: not stated",
        f"`{Path(s['encoder']).name}`: unknown",
        "cut at 60 tokens",
        "24 papers of `eval.jsonl`",
        "{SemCSE: Semantic Contrastive",
        "{Brinner, Marc Felix and Zarrieß, Sina}",
    ):
        assert words.lower() in text.lower()
    assert "demonstration" not in text
    assert str(trained.parent) not in text
    assert "Perf" not in text  # before and the recipe of a model without one are the same


def test_perf_stands_where_it_is_defined(run: Path) -> None:
    scores = {"before": (4.0, 0.2), "benchmark": (3.0, 0.3), "recipe": (1.0, 0.4)}
    for stem, (rank, purity) in scores.items():
        tasks = files.read_json(run / f"{stem}.json")["tasks"]
        for task in TASKS:
            tasks[task] |= {main_score(task): purity if task == "clustering" else rank}
        change(run / f"{stem}.json", tasks=tasks)
    rows = {
        line.split("|")[1].strip(): line.split("|")[-2].strip()
        for line in card_of(run).splitlines()
        if line.startswith("|")
    }
    # ranks: best 1, median 3; purity: best 0.4, median 0.3
    assert rows == {"": "Perf"} | {
        ROWS["before"]: f"{3 * 0.25 / 4:.3f}",
        ROWS["benchmark"]: "0.500",
        ROWS["recipe"]: "1.000",
    } | {k: v for k, v in rows.items() if "--" in k}
    for stem in scores:
        tasks = files.read_json(run / f"{stem}.json")["tasks"]
        change(
            run / f"{stem}.json",
            tasks=tasks
            | {"query": {"mean_rank": None, "reason": "no paper has the text this task needs"}},
        )
    text = card_of(run)
    assert "Perf" not in text
    assert "query: no data" in text
    assert {one.dataset_config for one in ModelCard(text).data["eval_results"]} == set(TASKS) - {
        "query"
    }


def test_what_the_training_file_tells_is_told_unless_it_was_changed_since(run: Path) -> None:
    train = run.parent / "train.jsonl"
    rows = [
        make_paper(n, source=source)
        for n, source in enumerate(("allenai/scirepeval fos", "mine.bib", ""))
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (run.parent / "train.jsonl.report.json").write_text(
        json.dumps({"model": "meta-llama/Llama-3.1-8B-Instruct"}), encoding="utf-8"
    )
    change_settings(run, train_file=str(train), encoder="all-MiniLM-L6-v2")
    began = (run / "settings.json").stat().st_mtime
    os.utime(train, (began - 5, began - 5))
    text = card_of(run, llm_license="Llama 3.1 Community License")
    for words in (
        "name: `allenai/scirepeval fos`, `mine.bib`.",
        "these: `meta-llama/Llama-3.1-8B-Instruct`.",
        "learnt from: `Llama 3.1 Community License`.",
    ):
        assert words in text
    data = ModelCard(text).data
    assert (data["datasets"], data["base_model"], data["license"]) == (
        ["allenai/scirepeval"],
        "sentence-transformers/all-MiniLM-L6-v2",
        "apache-2.0",
    )
    os.utime(train, (began + 5, began + 5))
    text = card_of(run)
    assert "these: unknown" in text
    assert "scirepeval" not in text


HOSTILE = (
    "<script>alert(1)<b> `x` ``y [a](javascript:1) ![i](u) **b** {{ 1234567*7 }} | --- \nlicense:"
    " evil\n---\n\u202e<b>"
)


def test_hostile_names_are_only_text(run: Path) -> None:
    plain = MarkdownIt().enable("table")
    kinds = [token.type for token in plain.parse(card_of(run).split("\n---\n", 1)[1])]
    train, name = run.parent / HOSTILE.replace("/", " "), HOSTILE.replace("/", " ")
    train.write_text(json.dumps(make_paper(0, source=HOSTILE)) + "\n", encoding="utf-8")
    os.utime(train, (0, 0))
    Path(f"{train}.report.json").write_text(json.dumps({"model": name}), encoding="utf-8")
    change_settings(run, encoder=name, train_file=str(train))
    for stem in ROWS:
        change(run / f"{stem}.json", eval_file=name, model=name)
    text = card_of(run, license=name, llm_license=name)
    data: Any = ModelCard(text).data
    assert data["license"] == name
    assert {one.dataset_name for one in data["eval_results"]} == {name}
    assert set(data.to_dict()) == {
        "language",
        "library_name",
        "license",
        "pipeline_tag",
        "tags",
        "model-index",
    }
    tokens = plain.parse(text.split("\n---\n", 1)[1])
    assert [token.type for token in tokens] == kinds
    inner = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inner} <= {
        "text",
        "code_inline",
        "softbreak",
        "strong_open",
        "strong_close",
    }
    shown = " ".join(name.replace("\u202e", "").split())
    assert sum(child.content == shown for child in inner if child.type == "code_inline") >= 8
    assert not any(
        word in child.content
        for child in inner
        if child.type == "text"
        for word in ("script", "javascript", "evil", "8641969")
    )


def test_only_hub_ids_are_taken_for_hub_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "a/b A-1/b.c_d ab/c-d ab a/b/c /a a/ a//b a--b/c a/b..c -a/b a-/b a/b- .a/b a/b. a/b.git"
        " ä/b a/b%20 a/\nb".split(" ")
    )
    library: Any = huggingface_hub.utils
    for name in names:
        try:
            library.validate_repo_id(name)
            taken = "/" in name
        except HFValidationError:
            taken = False
        assert bool(publish_model.HUB_ID.fullmatch(name)) <= taken, name
    assert [name for name in names if publish_model.HUB_ID.fullmatch(name)] == [
        "a/b",
        "A-1/b.c_d",
        "ab/c-d",
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "llm").mkdir(parents=True)
    assert [
        public(name)
        for name in ("allenai/specter", "runs/llm", "/home/me/models/x", "all-MiniLM-L6-v2")
    ] == ["allenai/specter", "llm", "x", "all-MiniLM-L6-v2"]


def spoil_pooling(run: Path) -> None:
    change(
        run / "model/1_Pooling/config.json",
        pooling_mode_cls_token=False,
        pooling_mode_mean_tokens=True,
    )


def spoil_length(run: Path) -> None:
    change(run / "model/sentence_bert_config.json", max_seq_length=16)
    change(run / "model/tokenizer_config.json", model_max_length=16)


def spoil_run(run: Path) -> None:
    change_settings(run, pooling="mean")
    change(run / "benchmark.json", pooling="mean")


def spoil_modules(run: Path) -> None:
    files.write_json(
        run / "model/modules.json", [{"idx": 0, "name": "0", "path": "", "type": "x.Y"}]
    )


def spoil_weights(run: Path) -> None:
    path = run / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


SPOILS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "unfinished": ("is marked UNFINISHED", lambda run: (run / "UNFINISHED").write_text("")),
    "no marker": ("has no semcse.json", lambda run: (run / "model/semcse.json").unlink()),
    "no pooling file": (
        "has no 1_Pooling/config.json",
        lambda run: (run / "model/1_Pooling/config.json").unlink(),
    ),
    "no weights": (
        "has no model\\*.safetensors",
        lambda run: (run / "model/model.safetensors").unlink(),
    ),
    "cut weights": ("cannot be loaded", spoil_weights),
    "another run's model": ("says pooling cls, the run's files say mean", spoil_run),
    "unknown metric": (
        "does not name a known metric",
        lambda run: change(run / "model/semcse.json", metric="dot"),
    ),
    "normalised": (
        "transformers gives other vectors",
        lambda run: change(run / "model/semcse.json", normalize=True),
    ),
    "other pooling file": ("sentence-transformers gives other vectors", spoil_pooling),
    "other length": ("sentence-transformers gives other vectors", spoil_length),
    "unknown module": ("sentence-transformers cannot use it", spoil_modules),
    "settings of something else": (
        "are not a run's",
        lambda run: change(run / "settings.json", versions=None),
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_run_that_is_not_whole_is_refused(name: str, run: Path) -> None:
    match, spoil = SPOILS[name]
    spoil(run)
    with pytest.raises(UserError, match=match) as caught:
        dry_run(run)
    assert caught.value.exit_code == 2
    assert not (run / "model_card.md").exists()


def hub_environment(hub: HubStub, home: Path, **more: str) -> Any:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": "",
    } | more


def one_line(text: str) -> str:
    """The error line of a script's stderr, which is its last and only one."""
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert lines == text.splitlines()[-1:]
    return lines[0]


DOWNLOAD = """
import json, sys
from pathlib import Path
import numpy as np
from huggingface_hub import hf_hub_download, snapshot_download
found = []
for block in json.loads(sys.argv[1]):
    names = {"print": lambda *_: None}
    exec(block, names)
    found.append(np.asarray(names["vectors"]).tolist())
folder = Path(snapshot_download("someone/my-semcse"))
sys.path.insert(0, sys.argv[2])
from baseline_models import Wanted, load_model
from settings import Settings
found.append(load_model("someone/my-semcse", Wanted(), Settings(device="cpu"))[0].embed(["first abstract", "second abstract"]).vectors.tolist())
print(json.dumps([found, sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())]))
"""


def test_up_to_the_hub_and_back(run: Path, trained: Path, tmp_path: Path) -> None:
    """Just the right files arrive, without paths of this machine; a model loaded from there has
    equal vectors; the token is seen nowhere.
    """
    for extra in (
        "optimizer.pt",
        "training_args.bin",
        "notes.txt",
        "checkpoint-3/model.safetensors",
        ".cache/token",
        "model_old.safetensors",
    ):
        (run / "model" / extra).parent.mkdir(exist_ok=True)
        (run / "model" / extra).write_text("not for the Hub", encoding="utf-8")
    with HubStub(SECRET) as hub:
        words = [
            "publish_model.py",
            "--run",
            str(run),
            "--repo-id",
            "someone/my-semcse",
            "--private",
        ]
        done = run_script(*words, **hub_environment(hub, tmp_path / "home", HF_TOKEN=SECRET))
        assert done.returncode == 0, done.stderr
        repo = hub.repos["someone/my-semcse"]
        assert repo.private
        assert [set(paths) for paths in repo.commits] == [
            MODEL_FILES | {"README.md", "benchmark.json"}
        ]
        assert repo.files["README.md"].decode() == (run / "model_card.md").read_text(
            encoding="utf-8"
        )
        for name, content in repo.files.items():
            assert name.endswith(".safetensors") or not re.search(
                rf"{trained.parent.parent}|{tmp_path}", content.decode()
            ), name
        assert (
            json.loads(repo.files["benchmark.json"])["tasks"]
            == files.read_json(run / "benchmark.json")["tasks"]
        )

        code = json.dumps(blocks(repo.files["README.md"].decode()))
        back = run_script(
            "-c",
            DOWNLOAD,
            code,
            ROOT,
            cwd=tmp_path,
            **hub_environment(hub, tmp_path / "empty", HF_TOKEN=SECRET),
        )
        assert back.returncode == 0, back.stderr
    found, names = json.loads(back.stdout)
    assert set(names) == set(repo.files)
    assert len(found) == 3
    for vectors in found:
        np.testing.assert_allclose(
            vectors, our_encoder(trained).embed(TEXTS).vectors.numpy(), atol=1e-6
        )
    assert SECRET not in done.stdout + done.stderr
    written = [
        path for folder in (run, tmp_path / "home") for path in folder.rglob("*") if path.is_file()
    ]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_a_dry_run_asks_nobody_and_needs_no_token(run: Path, tmp_path: Path) -> None:
    (run / "model" / "optimizer.pt").write_text("x", encoding="utf-8")
    words = ["publish_model.py", "--run", str(run), "--repo-id", "someone/my-semcse"]
    with HubStub(SECRET) as hub:
        done = run_script(*words, "--dry-run", **hub_environment(hub, tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        refused = run_script(*words, **hub_environment(hub, tmp_path / "home"))
        assert hub.asked == []
    sizes = {
        line.split()[1]: int(line.split()[0].replace(",", "")) for line in done.stdout.splitlines()
    }
    assert set(sizes) == MODEL_FILES | {"README.md", "benchmark.json"}
    assert sizes["model.safetensors"] == (run / "model/model.safetensors").stat().st_size
    assert sizes["README.md"] == (run / "model_card.md").stat().st_size
    assert refused.returncode == 2
    assert "set HF_TOKEN" in one_line(refused.stderr)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, which this process takes for the Hub."""
    with HubStub(SECRET) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def test_publishing_again_goes_on_where_it_was_refused_and_changes_only_what_changed(
    run: Path, stub: HubStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    stub.refuse = ("/commit/", 409)
    with pytest.raises(RunError, match="HTTP 409"):
        publish(Command(str(run), "someone/my-semcse"))
    repo = stub.repos["someone/my-semcse"]
    assert repo.commits == []
    stub.refuse = ("no such path", 0)
    for llm_license, commits in (("", 1), ("", 1), ("MIT", 2)):
        publish(Command(str(run), "someone/my-semcse", llm_license=llm_license))
        assert len(repo.commits) == commits
    assert repo.commits[1] == ["README.md"]
    assert sum(asked.startswith("PUT /lfs/") for asked in stub.asked) == 1
    assert SECRET not in "".join(capsys.readouterr())


COMMAND = Command("run", "someone/my-semcse")
CONTENT: dict[str, Path | bytes] = {
    "README.md": b"---\nlicense: mit\n---\n# x\n",
    "large.bin": b"0" * 30_000,
}


@pytest.mark.parametrize(
    ("path", "status", "mend"),
    [
        ("/repos/create", 401, "hf auth login"),
        ("/repos/create", 403, "use a token with write access to someone/my-semcse"),
        ("/repos/create", 500, "run the same command again"),
        ("/validate-yaml", 400, "run the same command again"),
        ("/preupload/", 403, "use a token with write access"),
        ("/preupload/", 404, "check --repo-id"),
        ("/objects/batch", 401, "hf auth login"),
        ("/lfs/", 403, "use a token with write access"),
        ("/commit/", 409, "run the same command again"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token_and_can_be_run_again(
    path: str, status: int, mend: str, stub: HubStub
) -> None:
    stub.refuse = (path, status)
    with pytest.raises(RunError) as caught:
        publish_model.upload(CONTENT, COMMAND, SECRET)
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert message.startswith("someone/my-semcse is not uploaded (")
    assert message.endswith(mend) or mend in message
    assert status == 400 or f"HTTP {status}" in message
    assert SECRET not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    stub.refuse = ("no such path", 0)
    assert (
        publish_model.upload(CONTENT, COMMAND, SECRET)
        == f"{stub.url}/someone/my-semcse/commit/{stub.repos['someone/my-semcse'].sha}"
    )
    assert stub.repos["someone/my-semcse"].files == CONTENT


def test_a_hub_that_is_not_there(stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}"
        )
        with pytest.raises(RunError, match=r"ConnectError.*check the network"):
            publish_model.upload(CONTENT, COMMAND, SECRET)


def test_private_means_private(stub: HubStub) -> None:
    publish_model.upload(CONTENT, COMMAND, SECRET)
    private = Command("run", "someone/my-semcse", private=True)
    with pytest.raises(RunError, match="exists and is public"):
        publish_model.upload({"README.md": b"changed"}, private, SECRET)
    assert stub.repos["someone/my-semcse"].files == CONTENT
    publish_model.upload(CONTENT, Command("run", "someone/other", private=True), SECRET)
    assert stub.repos["someone/other"].private


@pytest.mark.parametrize(
    "repo_id", ["my-semcse", "a/b/c", "a/b c", "../b", "a/b\nlicense: x", 'a/b"']
)
def test_names_that_the_hub_does_not_take(repo_id: str, run: Path) -> None:
    with pytest.raises(UserError, match="is not NAME/REPO"):
        publish(Command(str(run), repo_id, dry_run=True))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        publish(Command(str(tmp_path / "no" / "run"), "a/b", dry_run=True))
    assert list(tmp_path.iterdir()) == []
