"""Every touch of private interfaces of AOTAutograd and Inductor: how a graph is compiled, and where our passes run in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


def captures_graphs() -> bool:
    """Whether Inductor is set to capture graphs of GPU work."""
    import torch._inductor.config

    return bool(torch._inductor.config.triton.cudagraphs)


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings for a mode of ``torch.compile``."""
    from torch._inductor import list_mode_options

    found: dict[str, Any] = list_mode_options(mode)
    return found


@dataclass(frozen=True)
class GraphPasses:
    """Passes for Inductor to run, before those that others have asked for.

    ``joint`` runs on the joint graph of AOTAutograd; ``call`` on the graph of a call without a backward, when all others are
    done; ``forward`` likewise on the forward of a training step, with the number of its outputs that are not kept for the
    backward. ``identity`` represents them, and everything else that the graph alone does not show, in the keys of torch's
    caches.
    """

    identity: str
    joint: Callable[[fx.Graph], object]
    call: Callable[[fx.Graph], object] | None = None
    forward: Callable[[fx.Graph, int], object] | None = None


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
        """Used where a pass is not given the purpose of its graph."""
        nonlocal compiling_inference
        compiling_inference = bool(settings.get("is_inference"))
        return compile_fx_inner(module, given, **settings)

    ours = {"joint_custom_pre_pass": JointPass(), "post_grad_custom_post_pass": LastPass()}
    for name, own in ours.items():
        patches = {**patches, name: _before(own, patches.get(name, getattr(torch._inductor.config, name)))}
    told = {} if aware is not None else {"inner_compile": inner_compile}
    return compile_fx(gm, list(inputs), config_patches=patches, **told)


def _before(own: Any, theirs: Any) -> Any:
    """The value for Inductor's setting for a custom pass with which ``own`` runs before the passes already there."""
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


def tunes_products() -> bool:
    """Whether Inductor chooses among kernels of its own for products of matrices, and joins to them what follows."""
    config = torch._inductor.config
    return bool(config.max_autotune or config.max_autotune_gemm)


def orders_copies(device: torch.device) -> bool:
    """Whether Inductor lets a loop that is copied into a view wait for the memory behind the view.

    On the CPU, where torch 2.11 joins loops of several shapes, it forgets what else a loop has to wait for.
    """
    from torch._inductor.scheduler import SchedulerNode

    return device.type != "cpu" or "with_read" in SchedulerNode.recompute_size_and_body.__code__.co_names


_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
                       torch.ops.aten.baddbmm.default, torch.ops.aten.convolution.default})


def runs_in_place_order(target: Any) -> bool:
    """Whether Inductor is known to compute an operator at its place in the graph, from inputs that are stored by then.

    It computes loops over elements where their result is needed, as part of the reader, perhaps twice.
    """
    from torch._inductor.lowering import fallbacks, lowerings

    if not isinstance(target, torch._ops.OpOverload):
        return False
    own = target.namespace == "attnres" or target in _PRODUCTS or target is torch.ops.aten.copy_.default
    return own or target in fallbacks or target not in lowerings


def run_aot_eager(
    gm: fx.GraphModule, inputs: Sequence[Any], joint_pass: Callable[[fx.Graph], object] | None = None
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
    """Mark a node as one of the backward, as AOTAutograd does."""
    node.meta["partitioner_tag"] = "is_backward"
