"""Two processes on one machine that train the same converted network, in every way that torch offers (see test_parallel).

    python parallel_modes.py FILE

writes a JSON object: for every mode, and its compiled form, what the gradients of queries and key gains deviate by from one
process's on all the samples, or the error.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WIDTH, LAYERS, WORLD = 16, 2, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.into, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(torch.tanh(self.into(self.norm1(x))))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(64, WIDTH), nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def samples() -> Tensor:
    return torch.randint(0, 64, (2 * WORLD, 6), generator=torch.Generator().manual_seed(2))


def own_samples() -> Tensor:
    return samples()[2 * dist.get_rank():][:2]


def loss(model: Any, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


@functools.cache
def once() -> nn.Module:
    return converted(Network())


def converted(model: nn.Module | None = None) -> Any:
    import attnres_fx

    if model is None:
        return copy.deepcopy(once())
    model = attnres_fx.convert(model, (samples(),), num_blocks=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.attnres.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


# --- the modes: (what is called, what is trained, its samples) ------------------------------------------------------------


def tensor_parallel(output: str) -> Any:
    """Linear maps split over the processes; the stream stays whole ("whole"), or each keeps its tokens: as a local tensor
    ("shares"), or as a distributed one ("distributed").
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    shares = output != "whole"
    local = output != "distributed"
    entry = ColwiseParallel(input_layouts=Shard(1) if shares else Replicate())
    back = RowwiseParallel(output_layouts=Shard(1) if shares else Replicate(), use_local_output=local)
    plan: dict[str, Any] = {}
    for index in range(LAYERS):
        plan |= {f"layers.{index}.{name}": entry for name in ("into", "up")}
        plan |= {f"layers.{index}.{name}": back for name in ("out", "down")}
        plan |= {f"layers.{index}.{name}": SequenceParallel() for name in ("norm1", "norm2") if shares}
    if shares:
        plan |= {"norm": SequenceParallel(), "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
                 "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=local)}
    model = parallelize_module(converted(), init_device_mesh("cpu", (WORLD,)), plan)
    return model, model, samples()


def frozen_shares() -> Any:
    called, model, ids = tensor_parallel("shares")
    model.attnres.requires_grad_(False)
    return called, model, ids


def data_parallel(ignored: bool = False) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = converted()
    if ignored:
        names = [name for name, _ in model.named_parameters() if name.startswith("attnres")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model), model, own_samples()


def frozen_ignored() -> Any:
    called, model, ids = data_parallel(ignored=True)
    model.attnres.requires_grad_(False)
    return called, model, ids


def converted_within() -> Any:
    wrapped = nn.parallel.DistributedDataParallel(Network())
    return wrapped, converted(wrapped.module), own_samples()


def called_before() -> Any:
    """The graph is there when the wrapper comes."""
    called, model, ids = converted_within()
    loss(model, ids).backward()
    model.zero_grad(set_to_none=True)
    return called, model, ids


def sharded(ignored: bool = False, part: bool = False) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Network()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)

    model = converted(Outer() if part else None)
    fully_shard(model.inner if part else model, mesh=init_device_mesh("cpu", (WORLD,)),
                ignored_params=set(model.attnres.parameters()) if ignored else None)
    return model, model, own_samples()


def sharded_first_form(ignored: bool = False) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = converted()
    called = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True,
                                      ignored_states=list(model.attnres.parameters()) if ignored else None)
    return called, model, own_samples()


MODES: dict[str, Callable[[], Any]] = {
    "tensor parallel": lambda: tensor_parallel("whole"),
    "sequence parallel": lambda: tensor_parallel("shares"),
    "sequence parallel, frozen": frozen_shares,
    "distributed stream": lambda: tensor_parallel("distributed"),
    "DDP": data_parallel,
    "DDP, ignored": lambda: data_parallel(ignored=True),
    "DDP, ignored and frozen": frozen_ignored,
    "DDP, converted within": converted_within,
    "DDP, converted within and called before": called_before,
    "fully_shard": sharded,
    "fully_shard, ignored": lambda: sharded(ignored=True),
    "fully_shard, a part": lambda: sharded(part=True),
    "FSDP": sharded_first_form,
    "FSDP, ignored": lambda: sharded_first_form(ignored=True),
}
INFERENCE = ("sequence parallel", "DDP, ignored", "fully_shard, ignored")


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def trained(mode: str, compiled: bool, expected: dict[str, Tensor]) -> Any:
    called, model, ids = MODES[mode]()
    fast = torch.compile(called, backend="attnres", options={"downstream": "aot_eager"}) if compiled else called
    loss(fast, ids).backward()
    found = {name.rpartition(".")[2]: parameter.grad for name, parameter in model.named_parameters() if "attnres" in name}
    if mode == "FSDP":  # a process holds the gradients of its own pieces, which are vectors
        pieces = torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found.values()])
        total = (pieces.double().square().sum())
        dist.all_reduce(total)
        return abs((total / sum(g.double().square().sum() for g in expected.values())).item() - 1)
    return {name: None if g is None else ((whole(g) - expected[name]).norm() / expected[name].norm()).item()
            for name, g in found.items()}


def inferred(mode: str, expected: Tensor) -> float:
    called, _, _ = MODES[mode]()
    with torch.no_grad():
        return (called(samples()) - expected).abs().max().item()


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    torch._dynamo.reset()
    try:
        return function(*args)
    except Exception as error:
        error = getattr(error, "inner_exception", error)
        return f"{type(error).__name__}: {error}"


def work(rank: int, port: int, file: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch._dynamo.config.optimize_ddp = False
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    one = converted()
    loss(one, samples()).backward()
    gradients = {name.rpartition(".")[2]: p.grad for name, p in one.attnres.named_parameters()}
    with torch.no_grad():
        values = one(samples())
    found: dict[str, Any] = {}
    for mode in MODES:
        for compiled in (False, True):
            found[f"{mode}{', compiled' if compiled else ''}"] = attempt(trained, mode, compiled, gradients)
            dist.barrier()
    for mode in INFERENCE:
        found[f"{mode}, inference"] = attempt(inferred, mode, values)
        dist.barrier()
    if rank == 0:
        Path(file).write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (number, sys.argv[1]), nprocs=WORLD)
