"""Tests of publish_model.py and the model card.

They compare the card's numbers and examples with the run, parse its Markdown, and upload to a local
server that answers like the Hub.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, make_paper, run_script
from hub_stub import HubStub
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import publish_model
from publish_model import Command, publish
from semcse import files
from semcse.encoder import Encoder, Usage
from semcse.errors import RunError, UserError
from semcse.model_card import is_hub_id, public_name
from semcse.model_folder import load_encoder, save_model
from semcse.models import load_model
from semcse.report import read_run
from semcse.tables import ROWS, TASKS, main_score

REPO = "someone/my-semcse"
SECRET = "hf_PlantedSecretThatNobodyMayRead"
TEXTS = ["first abstract", "second abstract"]
UPLOADED = {
    "1_Pooling/config.json",
    "README.md",
    "benchmark.json",
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
    """A run that main.py made with the tiny encoder: CLS pooling, Euclidean distance."""
    folder = tmp_path_factory.mktemp("trained")
    summaries = [make_paper(n)["summaries"] for n in range(40, 60)]
    papers = {
        "train": [{"id": f"train-{n}", "summaries": four} for n, four in enumerate(summaries)],
        "eval": [make_paper(n) for n in range(24)],
    }
    for name, rows in papers.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    flags = (
        f"--encoder {tiny_bert} --train-file {folder}/train.jsonl --eval-file {folder}/eval.jsonl"
        f" --output-dir {folder}/run --max-steps 4 --batch-size 8 --validate-every 2 --log-every 2"
        " --max-length 60"
    )
    done = run_script("main.py", *flags.split())
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, which a test may change."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def change(path: Path, **values: Any) -> None:
    files.write_json(path, files.read_json(path) | values)


def change_settings(run: Path, **values: Any) -> None:
    settings = files.read_json(run / "settings.json")["settings"]
    change(run / "settings.json", settings=settings | values)


def change_tasks(run: Path, stem: str, **values: dict[str, Any]) -> None:
    tasks = files.read_json(run / f"{stem}.json")["tasks"]
    change(run / f"{stem}.json", tasks=tasks | values)


def card_of(run: Path, **flags: Any) -> str:
    """The card that a dry run writes."""
    publish(Command(str(run), REPO, dry_run=True, **flags))
    return (run / "model_card.md").read_text(encoding="utf-8")


def python_examples(card: str) -> list[str]:
    tokens = MarkdownIt().parse(card)
    return [one.content for one in tokens if one.type == "fence" and one.info == "python"]


def table_rows(card: str) -> dict[str, str]:
    lines = [line for line in card.splitlines() if line.startswith("|")]
    return {line.split("|")[1].strip(): line for line in lines}


def our_encoder(run: Path) -> Encoder:
    marker = files.read_json(run / "model" / "semcse.json")
    usage = Usage(marker["pooling"], marker["metric"], marker["max_length"])
    return load_encoder(str(run / "model"), usage, "cpu")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_examples_of_the_card_give_our_vectors_and_print_the_distances(
    metric: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if metric == "cosine":
        encoder = load_encoder(str(run / "model"), Usage("mean", "cosine", 60), "cpu")
        save_model(encoder, run / "model", base="tiny")
        change_settings(run, pooling="mean", metric="cosine", loss="infonce", temperature=0.07)
        change(run / "benchmark.json", pooling="mean", metric="cosine")
    vectors = our_encoder(run).embed(TEXTS).vectors.numpy()
    one, other = vectors
    cosine = float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    distance = float(np.linalg.norm(one - other))
    expected = {"euclidean": [distance, -distance], "cosine": [cosine, cosine]}[metric]
    examples = python_examples(card_of(run))
    for example, value in zip(examples, expected, strict=True):
        names: dict[str, Any] = {}
        capsys.readouterr()
        exec(example.replace(REPO, str(run / "model")), names)
        np.testing.assert_allclose(np.asarray(names["vectors"]), vectors, atol=1e-6)
        printed = re.findall(r"-?\d+\.\d+(?:e-\d+)?", capsys.readouterr().out)
        assert float(printed[1]) == pytest.approx(value, abs=1e-3)


def test_the_metadata_holds_what_the_hub_reads(run: Path) -> None:
    card = ModelCard(card_of(run, license="mit"))
    data: Any = card.data
    assert (data["license"], data["language"], data["model_name"]) == ("mit", "en", "my-semcse")
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert (data["base_model"], data["datasets"]) == (None, None)
    tasks = files.read_json(run / "benchmark.json")["tasks"]
    found = {(one.dataset_config, one.metric_type): one for one in data.eval_results}
    assert len(found) == len(data.eval_results) == 13
    for (task, key), one in found.items():
        assert one.metric_value == tasks[task][key]
        assert f"pool {tasks[task]['pool']}" in one.metric_name
        interval = tasks[task]["ci95"] if key == main_score(task) else None
        assert (one.metric_args or {}).get("ci95") == interval
    assert {task for task, key in found if key == main_score(task)} == set(TASKS)
    assert "lower is better" in found["query", "mean_rank"].metric_name
    assert "higher is better" in found["clustering", "purity"].metric_name
    again: Any = ModelCard(str(card)).data
    assert again.to_dict() == data.to_dict()


def test_the_text_agrees_with_the_files_of_the_run(run: Path, trained: Path) -> None:
    card = card_of(run)
    facts, best = files.read_json(run / "settings.json"), read_run(run).best
    rows, papers = table_rows(card), facts["papers"]
    for stem, row in ROWS.items():
        for task, result in files.read_json(run / f"{stem}.json")["tasks"].items():
            digits = 3 if task == "clustering" else 2
            score, low, high = (
                f"{value:.{digits}f}" for value in (result[main_score(task)], *result["ci95"])
            )
            assert f"{score} [{low}, {high}]" in rows[row]
            assert f"{task} (pool {result['pool']}" in rows[""]
    encoder = Path(facts["settings"]["encoder"]).name
    for words in (
        f"Papers: {papers['train']} of `train.jsonl`; {papers['held_out']} other papers",
        "margin 1.0",
        "4 of at most 4",
        "batches of 8 papers",
        f"seed {facts['settings']['seed']}",
        f"Checkpoint: step {best['step']}",
        f"torch {facts['versions']['torch']}",
        f"Base model: `{encoder}`",
        "The language model that wrote these: unknown",
        "Source of the papers: unknown",
        "This model: not stated",
        f"The base model, `{encoder}`: unknown",
        "cut after 60 tokens",
        "24 papers of `eval.jsonl`",
    ):
        assert words in card
    assert "demonstration" not in card
    assert str(trained.parent) not in card


def test_the_citation_is_that_of_the_repository(run: Path) -> None:
    bibtex = card_of(run).split("```bibtex")[1]
    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8").split("preferred-citation:")[1]
    for key in ("title", "family-names", "given-names", "collection-title", "start", "end", "year"):
        for value in re.findall(rf'\b{key}: "?(.*?)"?\n', cff):
            assert value in bibtex


def test_a_task_without_data_is_said_on_the_card(run: Path) -> None:
    reason = "no paper has the text this task needs"
    for stem in ROWS:
        change_tasks(run, stem, query={"mean_rank": None, "reason": reason})
    card = card_of(run)
    assert "query: no data" in card
    with_scores = {one.dataset_config for one in ModelCard(card).data["eval_results"]}
    assert with_scores == set(TASKS) - {"query"}


def test_the_card_uses_the_training_file_unless_it_was_changed_since(run: Path) -> None:
    train = run.parent / "train.jsonl"
    sources = ("allenai/scirepeval fos", "mine.bib", "")
    rows = [make_paper(n, source=source) for n, source in enumerate(sources)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files.write_json(Path(f"{train}.report.json"), {"model": "meta-llama/Llama-3.1-8B-Instruct"})
    change_settings(run, train_file=str(train), encoder="all-MiniLM-L6-v2")
    began = (run / "settings.json").stat().st_mtime
    os.utime(train, (began - 5, began - 5))
    card = card_of(run, llm_license="Llama 3.1 Community License")
    assert "Sources of the papers in this file: `allenai/scirepeval fos`, `mine.bib`." in card
    assert "that wrote these: `meta-llama/Llama-3.1-8B-Instruct`." in card
    assert "The training summaries: `Llama 3.1 Community License`." in card
    data = ModelCard(card).data
    assert data["datasets"] == ["allenai/scirepeval"]
    assert data["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert data["license"] == "apache-2.0"
    os.utime(train, (began + 5, began + 5))
    card = card_of(run)
    assert "that wrote these: unknown" in card
    assert "scirepeval" not in card


HOSTILE = (
    "<script>alert(1)<b> `x` ``y [a](javascript:1) ![i](u) **b** {{ 1234567*7 }} | --- \nlicense:"
    " evil\n---\n\u202e<b>"
)


def test_hostile_names_are_only_text(run: Path) -> None:
    markdown = MarkdownIt().enable("table")
    expected = [token.type for token in markdown.parse(card_of(run).split("\n---\n", 1)[1])]
    name = HOSTILE.replace("/", " ")
    train = run.parent / name
    train.write_text(json.dumps(make_paper(0, source=HOSTILE)) + "\n", encoding="utf-8")
    os.utime(train, (0, 0))
    files.write_json(Path(f"{train}.report.json"), {"model": name})
    change_settings(run, encoder=name, train_file=str(train))
    for stem in ROWS:
        change(run / f"{stem}.json", eval_file=name, model=name)
    card = card_of(run, license=name, llm_license=name)
    data: Any = ModelCard(card).data
    assert data["license"] == name
    assert {one.dataset_name for one in data["eval_results"]} == {name}
    tokens = markdown.parse(card.split("\n---\n", 1)[1])
    assert [token.type for token in tokens] == expected
    inner = [child for token in tokens for child in token.children or []]
    spans = [child.content for child in inner if child.type == "code_inline"]
    assert spans.count(" ".join(name.replace("\u202e", "").split())) >= 8
    assert {child.type for child in inner} <= {
        *("text", "code_inline", "softbreak", "strong_open", "strong_close")
    }
    text = " ".join(child.content for child in inner if child.type == "text")
    assert not re.search("script|javascript|evil|8641969", text)


def test_only_the_last_part_of_a_path_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "llm").mkdir(parents=True)
    names = ("allenai/specter", "runs/llm", "/home/me/models/x", "all-MiniLM-L6-v2")
    assert [public_name(name) for name in names] == [names[0], "llm", "x", names[3]]


def damage_weights(run: Path) -> None:
    path = run / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def change_pooling_file(run: Path) -> None:
    wrong = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    change(run / "model/1_Pooling/config.json", **wrong)


def change_length(run: Path) -> None:
    change(run / "model/sentence_bert_config.json", max_seq_length=16)
    change(run / "model/tokenizer_config.json", model_max_length=16)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "is not a finished run": lambda run: (run / "UNFINISHED").touch(),
    "semcse.json: no such file": lambda run: (run / "model/semcse.json").unlink(),
    "sentence-transformers cannot": lambda run: (run / "model/1_Pooling/config.json").unlink(),
    "cannot be loaded": damage_weights,
    "another metric": lambda run: change(run / "model/semcse.json", metric="cosine"),
    "model: transformers cannot": lambda run: change_settings(run, pooling="mean"),
    "sentence-transformers .*Mismatched": change_pooling_file,
    "sentence-transformers .* gives other vectors": change_length,
    "sentence-transformers .*Error": lambda run: files.write_json(
        run / "model/modules.json", [{"idx": 0, "name": "0", "path": "", "type": "x.Y"}]
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_run_is_refused(message: str, run: Path) -> None:
    DAMAGE[message](run)
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        card_of(run)
    assert caught.value.exit_code == 2
    assert not (run / "model_card.md").exists()


def test_only_the_right_files_are_uploaded_and_give_the_same_vectors(
    run: Path, trained: Path, tmp_path: Path
) -> None:
    """The uploaded files name no path of this machine, and the token is written nowhere."""
    for name in ("optimizer.pt", "notes.txt", "checkpoint-3/model.safetensors", ".cache/token"):
        (run / "model" / name).parent.mkdir(exist_ok=True)
        (run / "model" / name).write_text("not for the Hub", encoding="utf-8")
    home, copy = tmp_path / "home", tmp_path / "copy"
    switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment: Any = switches | {"HF_HOME": str(home), "HF_TOKEN": SECRET}
    words = ("publish_model.py", "--run", run, "--repo-id", REPO, "--private")
    with HubStub(SECRET) as hub:
        done = run_script(*words, HF_ENDPOINT=hub.url, **environment)
    assert done.returncode == 0, done.stderr
    repo = hub.repos[REPO]
    assert repo.private
    assert [set(paths) for paths in repo.commits] == [UPLOADED]
    for name, content in repo.files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
        text = "" if name.endswith(".safetensors") else content.decode()
        assert not re.search(rf"{trained.parent.parent}|{tmp_path}", text), name
    card = (copy / "README.md").read_text(encoding="utf-8")
    assert card == (run / "model_card.md").read_text(encoding="utf-8")
    tasks = files.read_json(copy / "benchmark.json")["tasks"]
    assert tasks == files.read_json(run / "benchmark.json")["tasks"]
    expected = our_encoder(trained).embed(TEXTS).vectors.numpy()
    found = [load_model(str(copy), device="cpu").embed(TEXTS).vectors]
    for example in python_examples(card):
        names: dict[str, Any] = {}
        exec(example.replace(REPO, str(copy)), names)
        found.append(names["vectors"])
    np.testing.assert_allclose(found, [expected] * 3, atol=1e-6)
    assert SECRET not in done.stdout + done.stderr
    written = [path for path in (*run.rglob("*"), *home.rglob("*")) if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """The local server, which this process takes for the Hub."""
    with HubStub(SECRET) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def test_a_dry_run_needs_neither_network_nor_token(
    run: Path, stub: HubStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run / "no_token"))
    with pytest.raises(UserError, match="set HF_TOKEN"):
        publish(Command(str(run), REPO))
    publish(Command(str(run), REPO, dry_run=True))
    assert stub.asked == []
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = {name: int(size.replace(",", "")) for size, name in listed}
    assert set(sizes) == UPLOADED
    assert sizes["model.safetensors"] == (run / "model/model.safetensors").stat().st_size
    assert sizes["README.md"] == (run / "model_card.md").stat().st_size


def test_publishing_again_uploads_only_what_changed(
    run: Path,
    stub: HubStub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for llm_license, commits in (("", 1), ("", 1), ("MIT", 2)):
        publish(Command(str(run), REPO, llm_license=llm_license))
        assert len(stub.repos[REPO].commits) == commits
    assert stub.repos[REPO].commits[1] == ["README.md"]
    assert sum(asked.startswith("PUT /lfs/") for asked in stub.asked) == 1
    assert SECRET not in "".join(capsys.readouterr())


COMMAND = Command("run", REPO)
CONTENT: dict[str, Path | bytes] = {
    "README.md": b"---\nlicense: mit\n---\n# x\n",
    "large.bin": b"0" * 30_000,
}


@pytest.mark.parametrize(
    ("path", "status"),
    [("/repos/create", 401), ("/validate-yaml", 400), ("/lfs/", 403), ("/commit/", 409)],
)
def test_a_refused_upload_is_one_error_without_the_token_and_can_be_repeated(
    path: str, status: int, stub: HubStub
) -> None:
    stub.refuse = (path, status)
    with pytest.raises(RunError, match=f"{REPO} was not uploaded") as caught:
        publish_model.upload(CONTENT, COMMAND, SECRET)
    assert caught.value.exit_code == 1
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__
    stub.refuse = ("no such path", 0)
    address = publish_model.upload(CONTENT, COMMAND, SECRET)
    assert address == f"{stub.url}/{REPO}/commit/{stub.repos[REPO].sha}"
    assert stub.repos[REPO].files == CONTENT


def test_an_unreachable_hub(stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        with pytest.raises(RunError, match=r"ConnectError.*check the network"):
            publish_model.upload(CONTENT, COMMAND, SECRET)


def test_private_refuses_a_public_repository(stub: HubStub) -> None:
    publish_model.upload(CONTENT, COMMAND, SECRET)
    with pytest.raises(RunError, match="exists and is public"):
        publish_model.upload({"README.md": b"x"}, Command("run", REPO, private=True), SECRET)
    assert stub.repos[REPO].files == CONTENT
    publish_model.upload(CONTENT, Command("run", "someone/other", private=True), SECRET)
    assert stub.repos["someone/other"].private


@pytest.mark.parametrize("name", ["my-semcse", "a/b/c", "a/b c", "../b", "a/b\nlicense: x", 'a/b"'])
def test_names_that_the_hub_does_not_accept(name: str, tmp_path: Path) -> None:
    assert is_hub_id(REPO)
    with pytest.raises(UserError, match="is not valid; write it as NAME/REPO"):
        publish(Command(str(tmp_path), name, dry_run=True))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        publish(Command(str(tmp_path / "no" / "run"), REPO, dry_run=True))
    assert list(tmp_path.iterdir()) == []
