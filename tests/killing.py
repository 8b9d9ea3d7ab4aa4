"""Faults done to training runs on purpose, for the tests and for the torture harness. Interface:

    kill_and_resume_training(folder, seed, signal=None)  main.py killed at a random moment, then
                                                         resumed; `signal` is "SIGKILL", "SIGTERM"
                                                         or "SIGINT" (None: drawn by the seed)
    corrupt_checkpoint(folder, seed)                     an unfinished run's newest checkpoint
    damaged in a random way (in one of six trials all), then resumed
    disk_full(folder, seed)                              main.py on a disk that fills up at a random
    place, which is then given more room, and resumed
    dead_rank(folder, seed=0)                            two processes train together, one is
    killed: the other must end by itself; then both resume

Each returns {"fault": str, "recovered": bool, "detail": str}. Recovered means: the faulty run ended
as documented (exit code, one error line), and the resumed one ended with the same model, metrics
rows and scores, bit by bit, as a run without the fault. `folder` is any writable folder; what
trials share (tiny model, papers, reference runs) is made in it at the first call, so give all
trials the same one, not at once. A trial starts two to four processes and takes some 15 seconds on
one core; the first one of a folder twice that. Run by itself: python tests/killing.py FOLDER TRIALS
[NAME]
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal as signals
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT, make_paper, write_tiny_bert

STEPS = 120
WORDS = (
    "--encoder bert --train-file train.jsonl --eval-file eval.jsonl --device cpu --precision"
    f" float32 --batch-size 7 --max-steps {STEPS} --validate-every 15 --patience 100"
    " --checkpoint-every 10 --log-every 1 --learning-rate 3e-3 --validation-share 0.25"
).split()
# differ from run to run
MEASURED = {"pairs_per_second", "tokens_per_second", "peak_memory_mib", "seconds", "versions"}
# seconds that any process may take; two hundred are not enough where ten others share a core
LIMIT = 600
Outcome = dict[str, Any]


class Run:
    """main.py as one process, or several that train together, with what they print in files."""

    def __init__(
        self,
        world: Path,
        out: str,
        *more: str,
        processes: int = 1,
        before: tuple[str, ...] = (),
        limit: Callable[[], None] | None = None,
    ) -> None:
        self.out = world / out
        self.logs = [world / f"{out}.{rank}.log" for rank in range(processes)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.children = []
        for rank, log in enumerate(self.logs):
            environment = os.environ | {
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": "1",
            }
            if processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            resumed = ["--resume"] if (self.out / "UNFINISHED").exists() else []
            command = [
                *before,
                sys.executable,
                str(ROOT / "main.py"),
                *WORDS,
                "--output-dir",
                out,
                *resumed,
                *more,
            ]
            with log.open("w", encoding="utf-8") as handle:
                self.children.append(
                    subprocess.Popen(
                        command,
                        cwd=world,
                        env=environment,
                        stdout=handle,
                        stderr=handle,
                        preexec_fn=limit,
                    )
                )

    def step(self) -> int:
        """The last step that metrics.jsonl tells of; -1 before the first row."""
        path = self.out / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return max(
            (int(found) for found in re.findall(r'^{"step": (\d+),.*}$', text, flags=re.MULTILINE)),
            default=-1,
        )

    def wait_for(self, step: int) -> None:
        """Until the run has come to `step` or has ended."""
        deadline = time.monotonic() + LIMIT
        while (
            self.step() < step and self.children[0].poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.003)

    def end(self, rank: int = 0) -> int:
        """Exit code of a process, which is killed (-9) if it hangs."""
        try:
            return self.children[rank].wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.children[rank].kill()
            return self.children[rank].wait()

    def said(self, rank: int = 0) -> str:
        """All that a process printed."""
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")

    def error(self, rank: int = 0) -> str | None:
        """The one error line of a process; None if there is none, or more than one, or a traceback."""
        lines = [
            line
            for line in self.said(rank).replace("\r", "\n").splitlines()
            if line.startswith("error: ")
        ]
        return lines[0] if len(lines) == 1 and "Traceback" not in self.said(rank) else None


def world_of(folder: Path) -> Path:
    """The working folder that all trials share: tiny model and papers."""
    world = folder / "world"
    if not (world / "eval.jsonl").exists():
        write_tiny_bert(world / "bert")
        for name, numbers in (("train", range(16)), ("eval", range(16, 40))):
            (world / f"{name}.jsonl").write_text(
                "".join(json.dumps(make_paper(n, id=f"{name}-{n}")) + "\n" for n in numbers),
                encoding="utf-8",
            )
    return world


def reference(world: Path, processes: int = 1) -> Path:
    """The finished run without any fault."""
    out = world / f"reference{processes}"
    if not (out / "report.html").exists():
        run = Run(world, out.name, processes=processes)
        codes = [run.end(rank) for rank in range(processes)]
        assert codes == [0] * processes, "\n".join(run.said(rank) for rank in range(processes))
    return out


def difference(found: Path, expected: Path) -> str:
    """What of a finished run differs from another's; empty if all is the same but for clocks and
    memory.
    """
    if (found / "UNFINISHED").exists() or not (found / "benchmark.md").exists():
        return "not finished"
    if (found / "model/model.safetensors").read_bytes() != (
        expected / "model/model.safetensors"
    ).read_bytes():
        return "other weights"
    for name in ("metrics.jsonl", "before.json", "benchmark.json", "recipe.json"):
        if _comparable(found / name) != _comparable(expected / name):
            return f"other {name}"
    left = [
        path.name
        for path in found.rglob("*")
        if path.name.endswith(".partial") or path.name == "checkpoints"
    ]
    return f"left behind: {left}" if left else ""


def _comparable(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows = (
        [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else [json.loads(text)]
    )
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def finish(run: Run, world: Path, processes: int = 1) -> tuple[str, str]:
    """Continue a run to its end: (what went wrong or "", where it went on)."""
    again = Run(world, run.out.name, processes=processes)
    codes = [again.end(rank) for rank in range(processes)]
    if codes == [-9] * processes:
        return f"resumed run: did not end in {LIMIT} s", ""
    if codes != [0] * processes:
        return f"resumed run: exit {codes}: {' '.join(again.said().splitlines()[-1:])[:200]}", ""
    resumed = re.findall(r"resumed from step \d+", again.said())
    return difference(run.out, reference(world, processes)), (
        resumed[-1] if resumed else "started anew"
    )


def _outcome(fault: str, wrong: str, detail: str, run: Run) -> Outcome:
    if not wrong:
        shutil.rmtree(run.out, ignore_errors=True)
    return {
        "fault": fault,
        "recovered": not wrong,
        "detail": f"{detail}; {wrong}" if wrong else detail,
    }


def kill_and_resume_training(folder: Path, seed: int, signal: str | None = None) -> Outcome:
    """See the module's first lines."""
    world, draw = world_of(folder), random.Random(seed)
    reference(world)
    name = signal or draw.choice(("SIGKILL", "SIGTERM", "SIGINT"))
    # Most kills fall into the steps; one in five before them, one in five into what follows
    # (writing the model, benchmark, the end of the run).
    step, pause = (
        draw.choice((-1, *[draw.randrange(STEPS) for _ in range(3)], STEPS)),
        draw.uniform(0, 0.03),
    )
    run = Run(world, f"killed-{seed}")
    if step < 0:
        time.sleep(draw.uniform(0, 8))
    else:
        run.wait_for(step)
        time.sleep(draw.uniform(0, 2) if step == STEPS else pause)
    reached = run.step()
    run.children[0].send_signal(getattr(signals, name))
    code = run.end()
    detail = f"{name} at step {reached}, exit {code}"
    # Python itself dies of a signal that comes before the script has begun.
    expected = {"SIGKILL": {-9, 0}, "SIGTERM": {143, -15, 0}, "SIGINT": {130, -2, 1, 0}}[name]
    started = run.out.exists()
    if code not in expected or (started and code in (143, 130) and run.error() is None):
        return _outcome(name, f"the killed run said {run.said()[-300:]!r}", detail, run)
    if code == 0 or (started and not (run.out / "UNFINISHED").exists()):
        return _outcome(
            name, difference(run.out, reference(world)), f"{detail}, finished already", run
        )
    wrong, where = finish(run, world)
    return _outcome(name, wrong, f"{detail}, {where}", run)


def corrupt_checkpoint(folder: Path, seed: int) -> Outcome:
    """See the module's first lines."""
    world, draw = world_of(folder), random.Random(seed)
    half = world / "half"
    if not half.exists():
        run = Run(world, "half-begun")
        run.wait_for(75)
        run.children[0].kill()
        run.end()
        run.out.rename(half)
    run = Run.__new__(Run)
    run.out = world / f"corrupt-{seed}"
    shutil.rmtree(run.out, ignore_errors=True)
    shutil.copytree(half, run.out)
    found = sorted((run.out / "checkpoints").glob("step-*.safetensors"))
    ways = [damage(path, draw) for path in (found if seed % 6 == 5 else found[-1:])]
    wrong, where = finish(run, world)
    newest = max(int(path.stem.removeprefix("step-")) for path in found)
    if not wrong and where == f"resumed from step {newest}":
        wrong = "the damage was not seen"
    return _outcome("corrupt checkpoint", wrong, f"{' and '.join(ways)}; {where}", run)


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file in a random way; returns the way."""
    content = bytearray(path.read_bytes())
    way = draw.choice(("cut", "bit", "zeros", "empty", "text", "noise"))
    at = draw.randrange(len(content))
    if way == "cut":
        del content[at:]
    elif way == "bit":
        content[at] ^= 1 << draw.randrange(8)
    elif way == "zeros":
        content[at : at + 512] = bytes(
            byte ^ 255 if byte == 0 else 0 for byte in content[at : at + 512]
        )
    else:
        content = bytearray(
            {
                "empty": b"",
                "text": b"This is no checkpoint.\n" * 9,
                "noise": draw.randbytes(len(content)),
            }[way]
        )
    path.write_bytes(content)
    return way


def can_mount() -> bool:
    """Whether a small file system can be mounted here."""
    trial = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
    return (
        bool(shutil.which("unshare"))
        and subprocess.run(trial, capture_output=True, check=False).returncode == 0
    )


def disk_full(folder: Path, seed: int) -> Outcome:
    """See the module's first lines. Where nothing can be mounted, a limit on the size of a file
    stands for the full disk.
    """
    world, draw = world_of(folder), random.Random(seed)
    reference(world)
    out = f"full-{seed}"
    (world / out).mkdir(exist_ok=True)
    if not can_mount():
        size = draw.randrange(2_000, 350_000)
        shutil.rmtree(world / out)
        run = Run(
            world,
            out,
            limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)),
        )
        code, what = run.end(), f"files of {size} bytes at most"
        error = run.error() or ""
        wrong, where = finish(run, world)
    else:
        size = draw.randrange(48_000, 1_000_000)
        what = f"disk of {size} bytes"
        # The small disk lives as long as this shell: the second run, on the enlarged disk, is
        # copied out at its end.
        words = " ".join(
            [sys.executable, str(ROOT / "main.py"), *WORDS, "--output-dir", f"{out}/run"]
        )
        script = f"""
            mount -t tmpfs -o size={size} none {out} || exit 99
            {words}; code=$?; echo "CODE $code"
            mount -o remount,size=64m none {out}
            resume=; [ -e {out}/run/UNFINISHED ] && resume=--resume
            {words} $resume > {out}.1.log 2>&1 || {{ tail -n 1 {out}.1.log; exit 98; }}
            grep -o 'resumed from step [0-9]*' {out}.1.log
            cp -r {out}/run {out}.copy
            exit $code"""
        run = Run(world, out, before=("unshare", "-rm", "sh", "-c", script, "sh"))
        code = run.end()
        error = run.error() or ""
        resumed = re.findall("resumed from step [0-9]+", run.said())
        where = resumed[-1] if resumed else "started anew"
        run.out = world / f"{out}.copy"
        wrong = (
            difference(run.out, reference(world))
            if run.out.exists()
            else f"the resumed run failed: {run.said()[-200:]!r}"
        )
        (world / out).rmdir()
    if not wrong and (code != 1 or not re.search("No space left on device|File too large", error)):
        wrong = f"the run on the full disk: exit {code}, {error or run.said()[-300:]!r}"
    return _outcome("disk full", wrong, f"{what}: {error[7:90]}; {where}", run)


def dead_rank(folder: Path, seed: int = 0) -> Outcome:
    """See the module's first lines."""
    world, draw = world_of(folder), random.Random(seed)
    reference(world, processes=2)
    victim, step = draw.randrange(2), draw.randrange(STEPS)
    run = Run(world, f"dead-{seed}", processes=2)
    run.wait_for(step)
    time.sleep(draw.uniform(0, 0.03))
    run.children[victim].kill()
    died = time.monotonic()
    run.end(victim)
    code, seconds = run.end(1 - victim), time.monotonic() - died
    error = run.error(1 - victim)
    detail = (
        f"process {victim} of 2 killed at step {step}, the other ended after {seconds:.1f} s with"
        f" exit {code}"
    )
    if code != 1 or error is None or "lost contact" not in error:
        return _outcome("dead rank", f"it said {run.said(1 - victim)[-300:]!r}", detail, run)
    wrong, where = finish(run, world, processes=2)
    return _outcome("dead rank", wrong, f"{detail}; {where}", run)


ALL: dict[str, Callable[[Path, int], Outcome]] = {
    "kill": kill_and_resume_training,
    "corrupt": corrupt_checkpoint,
    "full": disk_full,
    "dead": dead_rank,
}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for one in sys.argv[3:] or list(ALL):
        for number in range(int(sys.argv[2])):
            begun = time.monotonic()
            print(
                json.dumps(
                    ALL[one](Path(sys.argv[1]), number)
                    | {"seconds": round(time.monotonic() - begun, 1)}
                ),
                flush=True,
            )
