"""Every touch of private interfaces of torch.fx, AOTAutograd, Inductor and the dispatcher; Dynamo's are in ``_dynamo``.

Written against torch 2.11 to 2.15; what a release lacks is looked for, not its number. ``tests/passes/test_compat.py`` holds
one test for each: a new release needs them to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._logging import trace_structured
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from attnres_fx.runtime.marker import ENTER

__all__ = ["HigherOrderOperator", "OpOverload", "OpOverloadPacket", "pytree", "trace_structured"]

# Dead-code elimination must keep the marker, or other backends would run the plain network without a word.
fx.node.has_side_effect(ENTER)

_MODULE_ATTRIBUTES = ("_param_name_to_source", "compile_subgraph_reason", "_backend_id")


def carry_dynamo_metadata(old: fx.GraphModule, new: fx.GraphModule, mapping: dict[fx.Node, fx.Node]) -> None:
    """Copy what ``Graph.graph_copy`` loses: the sources of placeholders and Dynamo's attributes of the module."""
    for before, after in mapping.items():
        if before.op == "placeholder" and hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    for name in _MODULE_ATTRIBUTES:
        if hasattr(old, name):
            value = getattr(old, name)
            setattr(new, name, dict(value) if isinstance(value, dict) else value)


def schema_of(operator: Any) -> Any:
    """The schema of an overload of an operator."""
    return operator._schema


def codegen_of(graph: fx.Graph) -> Any:
    """What writes the code of a graph, and knows how its inputs and outputs are nested."""
    return graph._codegen


def tracer_of(graph: fx.Graph) -> Any:
    """The class of the tracer that made a graph, or None."""
    return getattr(graph, "_tracer_cls", None)


def copy_codegen(old: fx.Graph, new: fx.Graph) -> None:
    """Let a graph nest its inputs and outputs as another does."""
    new._codegen = old._codegen


def captures_graphs() -> bool:
    """Whether Inductor is set to capture graphs of a GPU's work."""
    import torch._inductor.config

    return bool(torch._inductor.config.triton.cudagraphs)


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings for a mode of ``torch.compile``."""
    from torch._inductor import list_mode_options

    found: dict[str, Any] = list_mode_options(mode)
    return found


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The fake-tensor mode that the values belong to, or None when they are real tensors."""
    from torch._subclasses.fake_tensor import FakeTensor

    for value in values:
        while isinstance(value, (tuple, list)) and value:
            value = value[0]  # the values of one node share a mode; looking at all would be quadratic in large tuples
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def propagate_fake(gm: fx.GraphModule, args: Sequence[Any]) -> None:
    """Give every node of ``gm`` its fake value as ``meta["val"]``; sizes of inputs other than 0 and 1 stay symbolic.

    Each size is a symbol of its own: two sizes that are equal in these inputs alone must not be taken for one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(duck_shape=False))
    FakeTensorProp(gm, mode).propagate(*args)


@dataclass(frozen=True)
class GraphPasses:
    """Passes for Inductor to run, before those that others have asked for.

    ``joint`` runs on the joint graph of AOTAutograd; ``call`` on the graph of a call without a backward, when all others are
    done; ``forward`` likewise on the forward of a training step, with the number of its outputs that are not kept for the
    backward. ``identity`` stands for them, and for everything else that the graph alone does not tell, in the keys of
    torch's caches.
    """

    identity: str
    joint: Callable[[fx.Graph], None]
    call: Callable[[fx.Graph], None] | None = None
    forward: Callable[[fx.Graph, int], None] | None = None


def run_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], passes: GraphPasses | None = None
) -> Callable[..., Any]:
    """Hand a graph to Inductor with configuration patches, and passes of our own."""
    from torch._inductor import custom_graph_pass
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    if passes is None:
        return compile_fx(gm, list(inputs), config_patches=patches or None)
    identity, joint, call, forward = passes.identity, passes.joint, passes.call, passes.forward
    plain: Any = custom_graph_pass.CustomGraphPass
    aware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)  # from torch 2.12 on
    compiling_inference = False

    class JointPass(plain):
        def __call__(self, graph: fx.Graph) -> None:
            joint(graph)

        def uuid(self) -> str:
            return identity

    class LastPass(aware or plain):  # type: ignore[misc]
        def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
            is_inference = compiling_inference if is_inference is None else is_inference
            if is_inference and call is not None:
                call(graph)
            elif not is_inference and forward is not None and not _is_backward_graph(graph):
                metadata = torch._guards.TracingContext.get().fw_metadata
                assert metadata is not None
                visible = graph.output_node().meta.get("user_visible_output_idxs", ())
                if all(index < metadata.num_forward for index in visible):  # else it is the body of another operator
                    forward(graph, metadata.num_forward)

        def uuid(self) -> str:
            return identity

    def inner_compile(module: fx.GraphModule, given: Sequence[Any], **settings: Any) -> Any:
        """Where no pass is told what its graph is for, this is."""
        nonlocal compiling_inference
        compiling_inference = bool(settings.get("is_inference"))
        return compile_fx_inner(module, given, **settings)

    ours = {"joint_custom_pre_pass": JointPass(), "post_grad_custom_post_pass": LastPass()}
    for name, own in ours.items():
        patches = {**patches, name: _before(own, patches.get(name, getattr(torch._inductor.config, name)))}
    told = {} if aware is not None else {"inner_compile": inner_compile}
    return compile_fx(gm, list(inputs), config_patches=patches, **told)


def _before(own: Any, theirs: Any) -> Any:
    """What Inductor's setting for a custom pass has to hold, that ``own`` may run before what it holds."""
    from torch._inductor import custom_graph_pass

    if hasattr(custom_graph_pass, "get_custom_graph_passes"):  # from torch 2.13 on a setting holds a list
        return [own, *custom_graph_pass.get_custom_graph_passes(theirs)]
    if theirs is None:
        return own
    plain: Any = custom_graph_pass.CustomGraphPass
    aware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    told = aware is not None and any(isinstance(member, aware) for member in (own, theirs))

    class Both(aware if told else plain):  # type: ignore[misc]
        def __call__(self, graph: fx.Graph, *is_inference: bool) -> None:
            for member in (own, theirs):
                member(graph, *(is_inference if told and isinstance(member, aware) else ()))

        def uuid(self) -> Any:
            known = [member.uuid() if isinstance(member, (plain, aware or plain)) else None for member in (own, theirs)]
            return None if None in known else tuple(known)

    return Both()


def _is_backward_graph(graph: fx.Graph) -> bool:
    """Whether AOTAutograd made a graph of the backward: only there are there gradients among the inputs."""
    return any(node.op == "placeholder" and str(node.target).startswith("tangents_") for node in graph.nodes)


def input_symbols(graph: fx.Graph) -> set[Any]:
    """The symbols of sizes that the inputs of a graph give, as numbers or as sizes of tensors."""
    found = set()
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.add(size.node.expr)
    return found


def symbols_of(number: Any) -> set[Any]:
    """The symbols in a number; none in an integer."""
    return set(number.node.expr.free_symbols) if isinstance(number, torch.SymInt) else set()


def tunes_products() -> bool:
    """Whether Inductor chooses among kernels of its own for products of matrices, and joins to them what follows."""
    config = torch._inductor.config
    return bool(config.max_autotune or config.max_autotune_gemm)


def orders_copies(device: torch.device) -> bool:
    """Whether Inductor lets a loop that is copied into a view wait for the memory behind the view.

    Torch 2.11 forgets on the CPU, where it joins loops of several shapes, what else a loop has to wait for.
    """
    from torch._inductor.scheduler import SchedulerNode

    return device.type != "cpu" or "with_read" in SchedulerNode.recompute_size_and_body.__code__.co_names


_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
                       torch.ops.aten.baddbmm.default, torch.ops.aten.convolution.default})


def runs_in_place_order(target: Any) -> bool:
    """Whether Inductor surely computes an operator where it stands in the graph, from inputs that are stored by then.

    Loops over elements it computes where somebody needs their result, as part of what needs it, and may do so twice.
    """
    from torch._inductor.lowering import fallbacks, lowerings

    if not isinstance(target, torch._ops.OpOverload):
        return False
    own = target.namespace == "attnres" or target in _PRODUCTS or target is torch.ops.aten.copy_.default
    return own or target in fallbacks or target not in lowerings


def numbers_as_nodes(graph: fx.Graph) -> Callable[[Any], Any]:
    """Makes arguments of nodes from numbers: integers stay, symbolic ones become nodes that compute them from the inputs."""
    from torch.fx.experimental.proxy_tensor import py_sym_types
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    place = placeholders[-1].next if placeholders else next(iter(graph.nodes))
    tracer = fx.proxy.GraphAppendingTracer(graph)
    known: dict[Any, Any] = {}

    for node in placeholders:
        if isinstance(node.meta.get("val"), py_sym_types):
            known.setdefault(node.meta["val"].node.expr, fx.Proxy(node, tracer))
    for node in placeholders:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and size.node.expr not in known:
                with graph.inserting_before(place):
                    read = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                read.meta["val"] = size
                known[size.node.expr] = fx.Proxy(read, tracer)

    def as_argument(number: Any) -> Any:
        if not isinstance(number, torch.SymInt) or number.node.expr.is_number:
            return int(number)
        if number.node.expr not in known:
            before = place.prev
            with graph.inserting_before(place):
                made = sympy_interp(OptimizedPythonReferenceAnalysis, known, number.node.expr)
            node = before.next
            while node is not place:
                node.meta["val"] = node.target(*fx.map_arg(node.args, lambda arg: arg.meta["val"]))
                node = node.next
            known[number.node.expr] = made
        return known[number.node.expr].node

    return as_argument


def run_aot_eager(
    gm: fx.GraphModule, inputs: Sequence[Any], joint_pass: Callable[[fx.Graph], None] | None = None
) -> Callable[..., Any]:
    """Run a graph through AOTAutograd with the min-cut partitioner, and its two halves eagerly."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._functorch.aot_autograd import aot_module_simplified

    def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        if joint_pass is not None:
            joint_pass(joint.graph)
        halves: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(joint, *args, **kwargs)
        return halves

    return aot_module_simplified(gm, list(inputs), fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition)


def is_backward_node(node: fx.Node) -> bool:
    """Whether AOTAutograd traced a node of a joint graph in the backward."""
    return bool(node.meta.get("partitioner_tag") == "is_backward")


def mark_backward(node: fx.Node) -> None:
    """Say that a node is of the backward, as AOTAutograd says it."""
    node.meta["partitioner_tag"] = "is_backward"


def sort_topologically(graph: fx.Graph) -> None:
    """Put the nodes of a graph in an order in which each comes after its inputs, changing as little as possible."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Real tensors and plain operators whatever modes, subclasses or autocast are active around; gradients recorded."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction(), torch.enable_grad(), \
            torch.autocast("cpu", enabled=False):
        yield


def known_int(size: Any) -> int | None:
    """The number that a symbolic size has become since it was traced, without a guard; None while it is free."""
    return int(size) if isinstance(size, int) else size.node.maybe_as_int()


def hinted(number: Any, unknown: float = 8) -> Any:
    """The traced number behind a symbolic one, without a guard on it; ``unknown`` for a size known only at run time."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat)):
        return number
    node: Any = number.node
    return unknown if node.hint is None else node.hint

