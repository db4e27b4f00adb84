"""Is attnres_fx right on a GPU, and how fast is it: one command, the most telling first.

    python benchmarks/gpu.py [--out FOLDER] [--seconds 390] [--only parallel:170,whole:130,...] [--device cpu]

    parallel what is right or wrong, in many processes at once: ``values``, ``model``, ``graphs``; compiles the whole models
    whole    whole models beside plain ones: inference, a training step and where its time goes, decoding; peak memory
    mix      one mix beside a copy, the list form under Inductor, and other packages
    search   the configurations of the kernels: the fastest, as lines of their table, serve the sections after it
    values   every operator and its gradients against float64, the same bits twice, offsets of 64 bits
    model    a small Llama under every option, inference and training, against eager reference kernels; streams
    graphs   mode="reduce-overhead"
    compile  the whole models, compiled and not timed

``model:90`` gives a section 90 seconds at most, ``values=phases`` takes those of its parts whose names hold the text; the
first four run if nothing is said. Each result is a line of FOLDER/results.jsonl as soon as it is known. What fails is
reported, and the rest runs. On ``--device cpu`` the sizes are tiny, to see that it runs. ``make gpu-bundle`` makes ./.gpu of
it and of the project, for a machine without a network.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_mix import mix
from gpu_models import compile_whole, graphs, model, whole
from gpu_parallel import parallel
from gpu_search import search
from gpu_tools import Bench
from gpu_values import values

import attnres_fx

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "parallel": parallel, "whole": whole, "mix": mix, "search": search, "values": values, "model": model, "graphs": graphs,
    "compile": compile_whole}
ALL = "parallel:170,whole:130,mix:45,search"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=390)
    parser.add_argument("--only", default=ALL)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(arguments)
    bench = Bench(chosen.out, chosen.device, chosen.seconds)
    import triton

    card = torch.cuda.get_device_name(0) if bench.cuda else platform.processor() or "cpu"
    bench.say("machine", torch=torch.__version__, triton=triton.__version__, python=sys.version.split()[0], device=card,
              project=attnres_fx.__version__)
    for section in chosen.only.split(","):
        words, _, most = section.partition(":")
        name, _, wanted = words.partition("=")
        if bench.left() < 15:
            bench.say("skipped", what=name)
            continue
        with bench.guarded(name), bench.section(name, float(most or "inf"), wanted):
            SECTIONS[name](bench)
    bad = [row for row in bench.rows if row["kind"] == "FAILED" or row.get("ok") is False]
    for row in bad:
        print("NOT RIGHT:", row)
    print(f"{len(bench.rows)} results, {len(bad)} failed or wrong")
    return bench.rows


if __name__ == "__main__":
    main()
