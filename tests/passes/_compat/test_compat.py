"""One test for each private interface of torch that ``passes/_compat`` touches, Dynamo's apart."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.dynamo_graphs import Small, traced
from torch import Tensor, fx

from attnres_fx.passes._compat import graphs, inductor, symbols
from attnres_fx.passes.graph.edit import copy_graph_module, sort_topologically
from attnres_fx.passes.graph.nodes import stack_paths, value_of
from attnres_fx.runtime.errors import PlainPathError
from attnres_fx.runtime.marker import ENTER


def test_dead_code_elimination_keeps_the_marker() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(ENTER, (x, None, "{}"))
    graph.output(x)
    graph.eliminate_dead_code()
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [ENTER]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [True, False])
def test_other_backends_keep_the_marker_and_its_kernel_raises(backend: str, grad: bool) -> None:
    class Marked(Small):
        def forward(self, x: Tensor) -> Tensor:
            ENTER(self.inner.weight, None, "{}")
            return super().forward(x)

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad), pytest.raises(PlainPathError):
        torch.compile(Marked(), backend=backend)(torch.ones(2, 4))


def test_a_copied_graph_keeps_what_dynamo_needs() -> None:
    captured, _ = traced(Small(), torch.ones(2, 4))
    copied = copy_graph_module(captured[0])
    for before, after in zip(captured[0].graph.nodes, copied.graph.nodes, strict=True):
        assert getattr(before, "_dynamo_source", None) is getattr(after, "_dynamo_source", None)
        assert before.meta.keys() == after.meta.keys()
    assert copied.meta == captured[0].meta
    assert copied._param_name_to_source == captured[0]._param_name_to_source


@pytest.mark.parametrize("downstream", ["inductor", "aot_eager"])
def test_downstream_compilers_run_a_copied_graph_with_gradients(downstream: str) -> None:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        gm = copy_graph_module(gm)
        return inductor.run_inductor(gm, inputs, {}) if downstream == "inductor" else inductor.run_aot_eager(gm, inputs)

    module, x = Small(), torch.randn(2, 4)
    _, result = traced(module, x, backend=backend)
    torch.testing.assert_close(result, module(x))
    result.sum().backward()
    assert module.inner.weight.grad is not None


@pytest.mark.parametrize("downstream", ["inductor", "aot_eager"])
def test_a_joint_pass_sees_both_halves_and_others_run_after_it(downstream: str) -> None:
    seen: list[str] = []

    def ours(graph: fx.Graph) -> None:
        seen.append("ours")
        kinds = [inductor.is_backward_node(node) for node in graph.nodes if node.op == "call_function"]
        assert any(kinds) and not all(kinds)
        last = next(reversed(graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)))
        inductor.mark_backward(last)
        assert inductor.is_backward_node(last)
        sort_topologically(graph)
        graph.lint()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        gm = copy_graph_module(gm)
        if downstream == "aot_eager":
            return inductor.run_aot_eager(gm, inputs, ours)
        patches = {"joint_custom_pre_pass": lambda graph: seen.append("theirs"), "force_disable_caches": True}
        return inductor.run_inductor(gm, inputs, patches, inductor.GraphPasses("identity", ours))

    class Sine(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin()

    module, x = Sine(), torch.randn(2, 4)
    _, result = traced(module, x, backend=backend)
    result.sum().backward()
    assert seen == (["ours", "theirs"] if downstream == "inductor" else ["ours"])


@pytest.mark.parametrize("training", [False, True])
def test_last_passes_see_the_graph_of_a_call_or_the_forward_of_a_training_step(training: bool) -> None:
    """Never the backward; in the forward, as many of the outputs as the model returns come first."""
    seen: list[tuple[str, int, int]] = []

    def record(kind: str, graph: fx.Graph, returned: int = -1) -> None:
        seen.append((kind, returned, len(graph.output_node().args[0])))

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        passes = inductor.GraphPasses("identity", lambda graph: None, functools.partial(record, "call"),
                                     functools.partial(record, "forward"))
        return inductor.run_inductor(copy_graph_module(gm), inputs, {"force_disable_caches": True}, passes)

    class Two(Small):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x).sin()
            return y, y.exp()

    module, x = Two(), torch.randn(2, 4)
    with torch.set_grad_enabled(training):
        result = torch.compile(module, backend=backend)(x)
    if training:
        (result[0].sum() + result[1].sum()).backward()
    ((kind, returned, outputs),) = seen
    assert (kind, returned) == (("forward", 2) if training else ("call", -1))
    assert outputs > 2 if training else outputs == 2


def test_numbers_become_nodes() -> None:
    """Whatever sizes an expression is made of, its node gives its value at other sizes, too."""
    made: list[tuple[Any, list[Any]]] = []

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        number = symbols.numbers_as_nodes(gm.graph)
        given = next(node.meta["val"] for node in gm.graph.nodes if getattr(node.meta.get("val"), "ndim", 0) == 2)
        rows, width = given.shape
        known = symbols.input_symbols(gm.graph)
        assert known == symbols.symbols_of(rows) | symbols.symbols_of(width) == symbols.symbols_of(rows * width + 3)
        assert len(known) == 2 and not symbols.symbols_of(3)
        wished = [7, rows * 0 + 5, rows, rows * width, (rows * width + 15) // 16 * 16, torch.sym_max(rows, width) + 1]
        nodes = [number(each) for each in wished]
        assert nodes == [number(each) for each in wished] and not isinstance(nodes[1], fx.Node)
        assert all(node.meta["val"].node.expr == each.node.expr for node, each in zip(nodes[2:], wished[2:], strict=True))
        output = gm.graph.output_node()
        output.args = ((*output.args[0], *nodes),)
        gm.graph.lint()
        gm.recompile()

        def call(arguments: list[Any]) -> Any:
            results = gm.forward(*arguments)
            made.append((arguments, list(results[1:])))
            return results[:1]

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    from functorch.compile import aot_module_simplified

    function = torch.compile(lambda x: x.sin(), dynamic=True, backend=lambda gm, inputs: aot_module_simplified(
        gm, inputs, fw_compiler=compiler, inference_compiler=compiler))
    for rows, width in ((3, 4), (6, 5)):
        function(torch.ones(rows, width))
        assert made[-1][1] == [7, 5, rows, rows * width, -(-rows * width // 16) * 16, max(rows, width) + 1]


def test_inductor_takes_patches() -> None:
    module, x = Small(), torch.randn(2, 4)
    with pytest.raises(Exception, match="no_such_setting"):
        traced(module, x, backend=lambda gm, inputs: inductor.run_inductor(gm, inputs, {"no_such_setting": 1}))


def test_module_stack_keys_are_identities_of_live_modules() -> None:
    module = Small()
    captured, _ = traced(module, torch.ones(2, 4))
    linear = next(node for node in captured[0].graph.nodes if "linear" in str(node.target))
    assert stack_paths(linear)[-1][0] == str(id(module.inner))
    assert stack_paths(linear)[-1][1].endswith(".inner")


def test_fake_mode_is_found() -> None:
    captured, _ = traced(Small(), torch.ones(2, 4))
    values = [value_of(node) for node in captured[0].graph.nodes]
    assert graphs.fake_mode_of(values) is not None
    assert graphs.fake_mode_of([torch.ones(1)]) is None


def test_plain_torch_leaves_every_mode_behind() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(torch.ones(2), FakeTensor)
        with graphs.plain_torch():
            made = torch.ones(2, 2, requires_grad=True)
            product = made @ made
    assert type(made) is Tensor
    assert product.dtype == torch.float32
    assert product.requires_grad


def test_symbolic_sizes_tell_their_number_without_a_guard() -> None:
    captured, _ = traced(Small(), torch.ones(3, 4), dynamic=True)
    size = next(value for node in captured[0].graph.nodes if isinstance(value := value_of(node), torch.SymInt))
    guards = len(size.node.shape_env.guards)
    assert symbols.known_int(size) is None
    assert symbols.hinted(size) == 3
    assert symbols.hinted(5) == 5
    assert symbols.known_int(5) == 5
    assert len(size.node.shape_env.guards) == guards


def test_fake_values_of_a_symbolically_traced_graph() -> None:
    """Every node gets a value; sizes that are equal in the example alone are different symbols; weights stay static."""
    gm = fx.symbolic_trace(Small())
    graphs.propagate_fake(gm, (torch.randn(3, 3, 4),))
    values = {node.name: value_of(node) for node in gm.graph.nodes if node.op != "output"}
    assert set(values) == {"x", "inner", "add"}
    for value in values.values():
        first, second, width = value.shape
        assert isinstance(first, torch.SymInt) and isinstance(second, torch.SymInt) and width == 4
        assert str(first) != str(second)
    assert graphs.fake_mode_of(values.values()) is not None



@pytest.mark.parametrize("missing", [
    (), ("get_custom_graph_passes",), ("get_custom_graph_passes", "CustomInferenceAwareGraphPass")])
def test_older_releases_run_both_passes(missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.13, 2.12 and 2.11 know custom passes. Here each is run by hand, as Inductor of that release would."""
    from torch._inductor import custom_graph_pass

    for name in missing:
        monkeypatch.delattr(custom_graph_pass, name, raising=False)
    known: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())
    seen: list[Any] = []

    class Theirs(custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            seen.append("theirs")

        def uuid(self) -> str:
            return "theirs"

    def compile_fx(gm: fx.GraphModule, inputs: Any, config_patches: dict[str, Any], **told: Any) -> Any:
        last = config_patches["post_grad_custom_post_pass"]
        if told:
            told["inner_compile"](gm, inputs, is_inference=True)
        for each in last if isinstance(last, list) else [last]:
            each(gm.graph, *((True,) if isinstance(each, known) else ()))
            assert each.uuid() is not None

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", lambda *_, **__: None)
    passes = inductor.GraphPasses("ours", lambda graph: None, call=lambda graph: seen.append("ours"))
    inductor.run_inductor(fx.symbolic_trace(Small()), [], {"post_grad_custom_post_pass": Theirs()}, passes)
    assert seen == ["ours", "theirs"]


def test_operators_and_schemas() -> None:
    add = torch.ops.aten.add
    assert isinstance(add, graphs.OpOverloadPacket) and isinstance(add.Tensor, graphs.OpOverload)
    assert isinstance(torch.ops.higher_order.cond, graphs.HigherOrderOperator)
    assert [argument.name for argument in graphs.schema_of(add.Tensor).arguments] == ["self", "other", "alpha"]
    assert graphs.schema_of(torch.ops.aten.add_.Tensor).is_mutable


def test_the_code_of_a_graph_can_be_carried() -> None:
    one, other = fx.symbolic_trace(Small()).graph, fx.Graph()
    assert type(graphs.codegen_of(one)) is fx.graph.CodeGen
    assert graphs.tracer_of(one) is fx.Tracer and graphs.tracer_of(other) is None
    graphs.copy_codegen(one, other)
    assert graphs.codegen_of(other) is graphs.codegen_of(one)


def test_settings_and_trees() -> None:
    assert not inductor.captures_graphs()
    assert inductor.mode_options("reduce-overhead") == {"triton.cudagraphs": True}
    leaves, spec = graphs.pytree.tree_flatten(((1, 2), {"a": [3]}))
    assert leaves == [1, 2, 3] and graphs.pytree.tree_unflatten(leaves, spec) == ((1, 2), {"a": [3]})
    assert graphs.pytree.tree_map(lambda number: -number, [1, (2,)]) == [-1, (-2,)]
    graphs.trace_structured("artifact", metadata_fn=lambda: {"name": "test", "encoding": "string"}, payload_fn=lambda: "")
