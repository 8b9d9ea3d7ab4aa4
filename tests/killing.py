"""Harms training runs on purpose and resumes them; test_faults.py runs these trials.

Each trial harms a run of main.py at a moment or place drawn from its `seed`, gives the same command
again, and asserts that the harmed run ended as documented (exit code, one error line) and that the
resumed run has the same weights, metrics and scores, bit by bit, as a run without the fault. It
returns where the resumed run went on.

`folder` is any writable folder. The tiny model, its papers and the undisturbed runs are made in it
once, so all trials of one process share it.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conftest import ROOT, make_paper, write_tiny_bert

STEPS = 120
FLAGS = (
    "--encoder bert --train-file train.jsonl --eval-file eval.jsonl --device cpu --precision"
    f" float32 --batch-size 7 --max-steps {STEPS} --validate-every 15 --patience 100"
    " --checkpoint-every 10 --log-every 1 --learning-rate 3e-3 --validation-share 0.25"
).split()
# Python itself dies of a signal that comes before the script has begun.
EXIT_CODES = {"SIGKILL": {-9, 0}, "SIGTERM": {143, -15, 0}, "SIGINT": {130, -2, 1, 0}}
# What differs between equal runs.
MEASURED = {"pairs_per_second", "tokens_per_second", "peak_memory_mib", "seconds", "versions"}
LIMIT = 600  # seconds that any process may take


def main_command(out: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *FLAGS, "--output-dir", out]


class Run:
    """One or several processes of a training run in the folder `world`/`out`."""

    def __init__(
        self, world: Path, out: str, processes: int = 1, command: list[str] | None = None
    ) -> None:
        self.out = world / out
        self.logs = [world / f"{out}.{rank}.log" for rank in range(processes)]
        if command is None:
            resume = ["--resume"] if (self.out / "UNFINISHED").exists() else []
            command = [*main_command(out), *resume]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": port}
        self.children = []
        for rank, log in enumerate(self.logs):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            with log.open("w", encoding="utf-8") as handle:
                self.children.append(
                    subprocess.Popen(
                        command, cwd=world, env=environment | ranks, stdout=handle, stderr=handle
                    )
                )

    def step(self) -> int:
        """The last step in metrics.jsonl; -1 before the first row."""
        path = self.out / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        steps = re.findall(r'^{"step": (\d+),.*}$', text, flags=re.MULTILINE)
        return max(map(int, steps), default=-1)

    def wait_for(self, step: int) -> None:
        """Wait until the run has reached `step` or has ended."""
        end = time.monotonic() + LIMIT
        while self.step() < step and self.children[0].poll() is None and time.monotonic() < end:
            time.sleep(0.003)

    def exit_codes(self) -> list[int]:
        """Wait for every process; one that hangs is killed (-9)."""
        codes = []
        for child in self.children:
            try:
                codes.append(child.wait(timeout=LIMIT))
            except subprocess.TimeoutExpired:
                child.kill()
                codes.append(child.wait())
        return codes

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")

    def error(self, rank: int = 0) -> str:
        """The error line of a process, which must have printed one, and no traceback."""
        printed = self.output(rank).replace("\r", "\n")
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, printed[-500:]
        assert "Traceback" not in printed
        return lines[0]

    def resumed_from(self) -> str:
        """Where a resumed run went on."""
        found: list[str] = re.findall(r"resumed from step \d+", self.output())
        return found[-1] if found else "started anew"


def world_of(folder: Path) -> Path:
    """The working folder that all trials share, with a tiny model and papers."""
    world = folder / "world"
    if not (world / "eval.jsonl").exists():
        write_tiny_bert(world / "bert")
        for name, numbers in (("train", range(16)), ("eval", range(16, 40))):
            rows = [json.dumps(make_paper(n, id=f"{name}-{n}")) + "\n" for n in numbers]
            (world / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return world


def undisturbed(world: Path, processes: int = 1) -> Path:
    """The folder of the finished run without any fault."""
    out = world / f"undisturbed{processes}"
    if not (out / "report.html").exists():
        run = Run(world, out.name, processes)
        assert run.exit_codes() == [0] * processes, run.output()
    return out


def difference(found: Path, expected: Path) -> str:
    """How a finished run differs from another, apart from times and memory; "" if it does not."""
    if (found / "UNFINISHED").exists() or not (found / "benchmark.md").exists():
        return "not finished"
    weights = [run / "model/model.safetensors" for run in (found, expected)]
    if weights[0].read_bytes() != weights[1].read_bytes():
        return "other weights"
    for name in ("metrics.jsonl", "before.json", "benchmark.json", "recipe.json"):
        if _comparable(found / name) != _comparable(expected / name):
            return f"other {name}"
    left = [path.name for path in found.rglob("*") if path.suffix == ".partial"]
    left += [path.name for path in found.glob("checkpoints")]
    return f"left behind: {left}" if left else ""


def _comparable(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows = map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text])
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def resume(world: Path, out: str, processes: int = 1) -> str:
    """Resume a run to its end and compare it with the undisturbed one."""
    run = Run(world, out, processes)
    assert run.exit_codes() == [0] * processes, run.output()[-500:]
    assert difference(run.out, undisturbed(world, processes)) == ""
    shutil.rmtree(run.out)
    return run.resumed_from()


def kill_training(folder: Path, seed: int, name: str) -> str:
    """Send main.py the signal `name`: in three of five trials during the steps, in one before them,
    and in one after them, while it writes the model, the benchmark or the report.
    """
    world, draw = world_of(folder), random.Random(seed)
    undisturbed(world)
    step = draw.choice((-1, *[draw.randrange(STEPS) for _ in range(3)], STEPS))
    run = Run(world, f"{name}-{seed}")
    run.wait_for(step)
    time.sleep(draw.uniform(0, {-1: 8, STEPS: 2}.get(step, 0.03)))
    run.children[0].send_signal(getattr(signal, name))
    (code,) = run.exit_codes()
    assert code in EXIT_CODES[name], run.output()[-500:]
    if run.out.exists() and code in (143, 130):
        run.error()
    if code == 0 or (run.out.exists() and not (run.out / "UNFINISHED").exists()):
        assert difference(run.out, undisturbed(world)) == ""
        return "finished already"
    return resume(world, run.out.name)


def corrupt_checkpoint(folder: Path, seed: int) -> str:
    """Damage the newest checkpoint of an unfinished run, or in one of six trials all of them."""
    world, draw = world_of(folder), random.Random(seed)
    undisturbed(world)
    half, out = world / "half", f"corrupt-{seed}"
    if not half.exists():
        run = Run(world, "half-begun")
        run.wait_for(75)
        run.children[0].kill()
        run.exit_codes()
        run.out.rename(half)
    shutil.copytree(half, world / out)
    checkpoints = sorted((world / out / "checkpoints").glob("step-*.safetensors"))
    for path in checkpoints if seed % 6 == 5 else checkpoints[-1:]:
        damage(path, draw)
    newest = max(int(path.stem.removeprefix("step-")) for path in checkpoints)
    where = resume(world, out)
    assert where != f"resumed from step {newest}", "the damage was not noticed"
    return where


def damage(path: Path, draw: random.Random) -> None:
    """Damage a file in one of six ways."""
    content = path.read_bytes()
    at = draw.randrange(len(content))
    bit = bytes([content[at] ^ 1 << draw.randrange(8)])
    inverted = bytes(0 if byte else 255 for byte in content[at : at + 512])
    ways = (
        content[:at],
        content[:at] + bit + content[at + 1 :],
        content[:at] + inverted + content[at + 512 :],
        b"",
        b"This is no checkpoint.\n" * 9,
        draw.randbytes(len(content)),
    )
    path.write_bytes(draw.choice(ways))


@functools.cache
def can_mount() -> bool:
    """Whether a small file system can be mounted here."""
    trial = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
    if not shutil.which("unshare"):
        return False
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


def on_full_disk(disk: Path, size: int, first: list[str], second: str) -> list[str]:
    """The command that runs `first` on a disk of `size` bytes, then `second` with more room.

    The second one writes its output to DISK.log. What is on the disk after each is copied to
    DISK.before and DISK.after. The exit code is that of the first. Where nothing can be mounted, a
    limit on the size of files replaces the full disk.
    """
    shrink, grow = f"ulimit -S -f {size // 1024}", "ulimit -S -f unlimited"
    if can_mount():
        shrink = f"mount -t tmpfs -o size={size} none {disk} || exit 99"
        grow = f"mount -o remount,size=64m none {disk}"
    script = f"""
        {shrink}
        {shlex.join(first)}; code=$?
        {grow}
        cp -r {disk} {disk}.before
        {second} > {disk}.log 2>&1 || {{ tail -n 1 {disk}.log; exit 98; }}
        cp -r {disk} {disk}.after
        exit $code"""
    disk.mkdir()
    return [*(["unshare", "-rm"] if can_mount() else []), "bash", "-c", script]


def full_disk(folder: Path, seed: int) -> str:
    """Train on a disk that fills up at a random place, and resume when it has more room."""
    world, draw = world_of(folder), random.Random(seed)
    undisturbed(world)
    disk = world / f"full-{seed}"
    size = draw.randrange(*((48_000, 1_000_000) if can_mount() else (2_000, 350_000)))
    command = main_command(f"{disk.name}/run")
    resume_flag = f"$([ -e {disk}/run/UNFINISHED ] && echo --resume)"
    script = on_full_disk(disk, size, command, f"{shlex.join(command)} {resume_flag}")
    run = Run(world, disk.name, command=script)
    assert run.exit_codes() == [1], run.output()[-500:]
    assert re.search("No space left on device|File too large", run.error())
    assert difference(Path(f"{disk}.after/run"), undisturbed(world)) == ""
    run.logs = [Path(f"{disk}.log")]
    return run.resumed_from()


def dead_rank(folder: Path, seed: int) -> str:
    """Kill one of two processes that train together: the other must end by itself."""
    world, draw = world_of(folder), random.Random(seed)
    undisturbed(world, processes=2)
    victim, step = draw.randrange(2), draw.randrange(STEPS)
    run = Run(world, f"dead-{seed}", processes=2)
    run.wait_for(step)
    time.sleep(draw.uniform(0, 0.03))
    run.children[victim].kill()
    assert run.exit_codes()[1 - victim] == 1, run.output(1 - victim)
    assert "lost contact" in run.error(1 - victim)
    return resume(world, run.out.name, processes=2)
