"""The rest of ``passes/_compat``, one test per function, so that a new release of torch fails by name; none is left out."""

from __future__ import annotations

import ast
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.dynamo_graphs import Small, traced
from torch import Tensor, fx, nn

from attnres_fx.passes._compat import distributed, dynamo, graphs, inductor, transformers

aten = torch.ops.aten
HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def as_it_is(gm: fx.GraphModule, inputs: Any) -> Any:
    return gm.forward


def broken(function: Any, x: Tensor) -> BaseException:
    """What Dynamo raises when it is to capture all of ``function``."""
    torch._dynamo.reset()
    with pytest.raises(Exception) as caught, dynamo.quiet_dynamo():
        torch.compile(function, backend=as_it_is, fullgraph=True)(x)
    return caught.value


def test_every_touch_is_named_by_a_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in HERE.glob("*.py"))
    tests += (ROOT / "tests" / "runtime" / "test_runtime_compat.py").read_text(encoding="utf-8")
    files = [*(ROOT / "passes" / "_compat").glob("*.py"), ROOT / "runtime" / "_compat.py"]
    names = [node.name for path in files for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    assert not [name for name in names if name not in tests]


def test_compile_whole_has_a_limit_of_its_own() -> None:
    torch._dynamo.reset()
    compiled = dynamo.compile_whole(lambda x: x + 1, as_it_is, dynamic=False, limit=2)
    other = dynamo.compile_whole(lambda x: x - 1, as_it_is, dynamic=False, limit=2)
    for size in (2, 3):
        assert compiled(torch.ones(size)).sum() == 2 * size and other(torch.ones(size)).sum() == 0
    with pytest.raises(Exception) as caught, dynamo.quiet_dynamo():
        compiled(torch.ones(4))
    assert dynamo.is_recompile_limit(caught.value)


def test_unwrap_takes_the_compiled_wrapper_off() -> None:
    module = Small()
    assert dynamo.unwrap(torch.compile(module, backend=as_it_is)) is module and dynamo.unwrap(module) is module


def test_is_traced_is_asked_of_the_code_that_runs() -> None:
    def mark(x: Tensor) -> Tensor:
        return x + (1 if dynamo.is_traced() else 2)

    torch._dynamo.reset()
    zero = torch.zeros(2)
    assert mark(zero)[0] == 2 and torch.compile(mark, backend="eager")(zero)[0] == 1

    class Marks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mark(x)

    assert torch.export.export(Marks(), (zero,)).module()(zero)[0] == 1


def test_tracing_alone_is_quiet_unlimited_and_leaves_nothing() -> None:
    config, logger = torch._dynamo.config, logging.getLogger("torch._dynamo")
    before = config.recompile_limit, logger.level
    with dynamo.tracing_alone():
        assert config.recompile_limit > 10**6 and logger.level == logging.CRITICAL
    assert (config.recompile_limit, logger.level) == before == (dynamo.recompile_limit(), logger.level)
    with dynamo.unlimited_compiles():
        assert dynamo.recompile_limit() > 10**6


def test_without_messages_passes_over_them_and_is_message_break_knows_them() -> None:
    def speaks(x: Tensor) -> Tensor:
        warnings.warn("something", stacklevel=2)
        return x + 1

    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    x = torch.ones(2)
    assert dynamo.is_message_break(broken(speaks, x)) and not dynamo.is_message_break(broken(breaks, x))
    torch._dynamo.reset()
    with dynamo.without_messages():
        assert torch.compile(speaks, backend=as_it_is, fullgraph=True)(x)[0] == 2


def test_pass_over_requires_grad_where_a_graph_is_captured() -> None:
    def asks(x: Tensor) -> Tensor:
        return (x * 2).requires_grad_() + 1

    dynamo.pass_over_requires_grad()  # a second time is none
    x = torch.ones(2)
    assert dynamo.is_graph_break(broken(asks, x))
    torch._dynamo.reset()
    with dynamo.tracing_alone():
        assert torch.compile(asks, backend=as_it_is, fullgraph=True)(x)[0] == 3


def test_is_model_failure_tells_the_model_from_the_tracer() -> None:
    x = torch.ones(2, 3)
    assert dynamo.is_model_failure(broken(lambda x: x @ x, x))
    assert not dynamo.is_model_failure(broken(lambda x: (torch._dynamo.graph_break(), x)[1], x))


def test_a_given_up_frame_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.callback import callback_handler

    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                torch._dynamo.graph_break()
            return x

    monkeypatch.setattr(callback_handler, "end_callbacks", callback_handler.end_callbacks)  # taken back afterwards
    seen: list[tuple[Any, str]] = []

    def report(frame: dynamo.Frame, why: str, where: str, settings: Any) -> None:
        seen.append((frame.this, why))

    dynamo.watch_given_up_frames(as_it_is, report)
    torch._dynamo.reset()
    module = Loop()
    torch.compile(module, backend=as_it_is)(torch.ones(2))
    assert [this for this, _ in seen] == [module] and "graph_break" in seen[0][1]


def test_modules_that_run_are_seen_on_the_stack() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self) -> Any:
            return self.inner()

    class Inner(nn.Module):
        def forward(self) -> Any:
            return dynamo.runs_within_a_module(None), dynamo.runs_within_a_module(self), distributed.calling_modules()

    outer = Outer()
    any_module, another, calling = outer()
    assert any_module and another and [m for m in calling if isinstance(m, (Outer, Inner))][:1] == [outer.inner]
    assert not dynamo.runs_within_a_module(None) and outer.inner()[1] is False


def test_one_process_reduces_nothing() -> None:
    module = nn.Linear(2, 2)
    assert not distributed.in_parallel()
    assert distributed.reduces(module, module.weight) is None and distributed.wrapper_name(module) == "Linear"


def test_carry_dynamo_metadata_brings_sources_and_attributes() -> None:
    (gm, *_), _ = traced(Small(), torch.ones(2, 4))
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(gm.graph, mapping))
    made = fx.GraphModule(gm, copied)
    graphs.carry_dynamo_metadata(gm, made, mapping)
    assert made._param_name_to_source == gm._param_name_to_source
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    assert inputs and all(mapping[node]._dynamo_source is node._dynamo_source for node in inputs)


def test_late_module_generates_code_when_it_is_needed() -> None:
    graph = fx.symbolic_trace(Small()).graph
    late, early = (graphs.late_module(Small(), graph) for _ in range(2))
    before = late.forward
    assert graphs.generate_code(early).forward != before and "def forward" in early.code
    x = torch.ones(2, 4)
    assert late(x).shape == early.forward(x).shape == before(x).shape


def test_what_inductor_does_with_operators() -> None:
    assert not inductor.tunes_products()
    with torch._inductor.config.patch(max_autotune=True):
        assert inductor.tunes_products()
    assert inductor.orders_copies(torch.device("cuda"))
    assert inductor.orders_copies(torch.device("cpu")) == (torch.__version__ >= "2.12")
    assert inductor.runs_in_place_order(aten.mm.default) and inductor.runs_in_place_order(torch.ops.attnres.mix.default)
    assert not inductor.runs_in_place_order(aten.add.Tensor) and not inductor.runs_in_place_order(len)


def test_what_transformers_installs_within_a_call() -> None:
    model = models.llama(2)
    assert not transformers.install_output_capture(nn.Linear(2, 2), {"output_hidden_states": True})
    assert not transformers.install_output_capture(model, {"output_hidden_states": False})
    assert transformers.install_output_capture(model, {"output_hidden_states": True})
    assert not transformers.install_output_capture(model, {"output_hidden_states": True}), "they are there by now"
    assert len(model(models.token_ids(1, 4), output_hidden_states=True).hidden_states) == 3
    variable, collected = transformers.output_collector() or (None, "unknown")
    assert variable is not None and collected is None
    assert not transformers.is_capture_break(ValueError()) and not transformers.is_collector_break(ValueError())


def test_outside_graphs_runs_in_python_and_what_it_calls_is_compiled() -> None:
    graphs: list[fx.GraphModule] = []

    def inner(x: Tensor) -> Tensor:
        return x.sin()

    @dynamo.outside_graphs
    def outer(x: Tensor) -> Tensor:
        assert not torch.compiler.is_dynamo_compiling()
        return inner(x)

    def whole(x: Tensor) -> Tensor:
        return outer(x + 1) + 1

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    assert torch.equal(torch.compile(whole, backend=backend)(torch.zeros(2)), torch.ones(2).sin() + 1)
    assert [len([n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]) for gm in graphs] == [1, 1, 1]


def test_has_compiled_parts() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert not dynamo.has_compiled_parts(model)
    model.compile()
    assert not dynamo.has_compiled_parts(model)
    model[0].compile()
    assert dynamo.has_compiled_parts(model)


def test_is_tensor_parallel(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        assert not distributed.is_tensor_parallel(model)
        fully_shard(model[0], mesh=mesh)
        assert not distributed.is_tensor_parallel(model)
        parallelize_module(model[1], mesh, ColwiseParallel())
        assert distributed.is_tensor_parallel(model)
    finally:
        torch.distributed.destroy_process_group()


def test_not_in_buckets_while_a_wrapper_runs(tmp_path: Path) -> None:
    seen = []

    class Asked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with distributed.not_in_buckets():
                seen.append(torch._dynamo.config.optimize_ddp)
            return super().forward(x)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        Asked(2, 2)(torch.ones(2))
        nn.parallel.DistributedDataParallel(Asked(2, 2))(torch.ones(2))
    finally:
        torch.distributed.destroy_process_group()
    before = torch._dynamo.config.optimize_ddp
    assert before and seen == [before, False]


def test_has_backward_hooks() -> None:
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        model = nn.Linear(2, 2)
        model.register_forward_hook(lambda *_: None)
        assert not dynamo.has_backward_hooks(model)
        handle = getattr(model, register)(lambda *_: None)
        assert dynamo.has_backward_hooks(model)
        handle.remove()
        assert not dynamo.has_backward_hooks(model)
