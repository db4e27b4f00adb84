"""Select: put the requested kernels behind the mixes of a rewritten graph.

Matches: ``attnres::mix`` nodes, the two phases and ``attnres::mix_norm``. Replaces with: the operator that always runs the
named implementation, where one is named. "auto" and "native" leave the operators that choose by device when they run;
"native" checks what they will choose.
The last pass: other passes need not know these operators.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.nodes import float_tensor
from attnres_fx.runtime import triton
from attnres_fx.runtime.cpu import native
from attnres_fx.runtime.errors import KernelError
from attnres_fx.runtime.mix import MIX, MIX_REFERENCE, MIX_TRITON
from attnres_fx.runtime.mix_norm import MIX_NORM, MIX_NORM_REFERENCE, MIX_NORM_TRITON
from attnres_fx.runtime.phases import PHASE1, PHASE1_REFERENCE, PHASE1_TRITON, PHASE2, PHASE2_REFERENCE, PHASE2_TRITON

_CHOOSING = (MIX, PHASE1, PHASE2, MIX_NORM)
_OPERATORS: dict[str, dict[Any, Any]] = {
    "reference": dict(zip(_CHOOSING, (MIX_REFERENCE, PHASE1_REFERENCE, PHASE2_REFERENCE, MIX_NORM_REFERENCE))),
    "triton": dict(zip(_CHOOSING, (MIX_TRITON, PHASE1_TRITON, PHASE2_TRITON, MIX_NORM_TRITON))), "native": {}}
KERNELS = ("auto", "native", "reference", "triton")


def select_kernels(graph: fx.Graph, context: Context) -> int:
    """Run the pass in place, by ``context.kernels``; returns the number of mixes that run another operator.

    Raises: KernelError if the kernels cannot run on the device of a mix.
    """
    mixes = [node for node in graph.nodes if _operator(node) is not None]
    if context.kernels == "auto":
        return 0
    for device in sorted({_device(node) for node in mixes}):
        refusal = _obstacle(context.kernels, device)
        if refusal is not None:
            raise refusal
    chosen = [(node, _OPERATORS[context.kernels].get(_operator(node))) for node in mixes]
    for node, operator in chosen:
        node.target = operator or node.target
    return sum(operator is not None for _, operator in chosen)


def _operator(node: fx.Node) -> Any:
    """The operator of a mix, a phase or a fused mix that chooses its kernels when it runs; None for anything else."""
    # Dynamo records the packet where a user's code calls torch.ops.attnres.mix without naming an overload.
    return next((operator for operator in _CHOOSING
                 if node.op == "call_function" and node.target in (operator, operator.overloadpacket)), None)


def _device(node: fx.Node) -> str:
    value = next(value for source in node.all_input_nodes if (value := float_tensor(source)) is not None)
    return value.device.type


def _obstacle(kernels: str, device: str) -> KernelError | None:
    """Why the named kernels cannot run on a kind of device, or None."""
    if kernels == "triton":
        return triton.obstacle(device)
    if kernels == "reference":
        return None
    if device != "cpu":
        return KernelError(f"kernels is 'native', and a mix of the graph is on '{device}'",
                           remedy="leave the option out; the native kernels are for the CPU")
    if native.ensure():
        return None
    return KernelError(f"the native kernels are not available: {native.state().reason}",
                       remedy="see `attnres doctor`, or leave the option out for the reference kernels")
