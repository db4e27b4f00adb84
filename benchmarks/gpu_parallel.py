"""Of ``gpu.py``: what is right or wrong, whoever runs beside it, in many processes at once.

Each process is this benchmark with one section, narrowed to one part of it, and writes results of its own; they are taken
over as they come. Compiling takes most of the time of such a check, on one core of many. The whole models are compiled
here, too, so that their timing finds Inductor's and Triton's kernels in the caches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_models import OPTIONS, WHOLE
from gpu_tools import Bench

LATER = ("dynamic", "fuse never", "arena never", "arena and fuse never")


def jobs(cuda: bool) -> list[str]:
    """Sections with what they are narrowed to, the most telling first."""
    if not cuda:
        return ["compile=infer", "values=phases"]
    options = [name for name, _ in OPTIONS if name not in LATER]
    whole = dict.fromkeys(what for what, *_ in WHOLE)
    return [*(f"compile={what}" for what in whole), *(f"model={name} bfloat16" for name in reversed(options)), "graphs",
            *(f"values={part}" for part in ("torch.bfloat16", "norm", "phases", "far")), "model=reduce-overhead float32",
            *(f"model={name} bfloat16" for name in LATER), "values=torch.float32", "model=two-phase float32",
            "model=default float32", "values=torch.float16", "model=streams", "model=dynamic float32"]


def parallel(bench: Bench) -> None:
    """Run all jobs, so many at a time, until they are done or the time is up."""
    waiting = [job for job in jobs(bench.cuda) if bench.wanted in job]
    most = max(2, (os.cpu_count() or 2) - 3)
    running: list[tuple[str, float, Path, subprocess.Popen[bytes]]] = []
    script = Path(__file__).with_name("gpu.py")
    try:
        while (waiting or running) and bench.left() > 3:
            while waiting and len(running) < most:
                job = waiting.pop(0)
                folder = bench.path.parent / "parts" / job.replace("=", " ").replace(" ", "-")
                folder.mkdir(parents=True, exist_ok=True)
                threads = "4" if job.startswith("compile") else "1"
                environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": "1"}
                with (folder / "log").open("wb") as log:
                    started = subprocess.Popen(
                        [sys.executable, str(script), "--out", str(folder), "--only", job, "--device", bench.device.type,
                         "--seconds", str(round(bench.left()))], stdout=log, stderr=log, env=environment)
                running.append((job, time.monotonic(), folder, started))
            time.sleep(0.2)
            for entry in [entry for entry in running if entry[-1].poll() is not None]:
                running.remove(entry)
                _take_over(bench, *entry)
    finally:
        for job, began, folder, process in running:
            process.kill()
            process.wait()
            _take_over(bench, job, began, folder, process, late=True)
    for job in waiting:
        bench.say("skipped", what=job)


def _take_over(
    bench: Bench, job: str, began: float, folder: Path, process: subprocess.Popen[bytes], late: bool = False
) -> None:
    """The results of a process, and how it ended."""
    path = folder / "results.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if row["kind"] not in ("machine", "section"):
            bench.say(row.pop("kind"), **{**row, "t_job": row.pop("t"), "job": job})
    how = {"error": "out of time"} if late else {"code": process.returncode, "ok": process.returncode == 0}
    bench.say("job", name=job, seconds=round(time.monotonic() - began, 1), **how)
