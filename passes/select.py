"""Select: put the wished kernels behind the mixes of a rewritten graph.

Matches: ``attnres::mix`` nodes. Replaces with: the operator that always runs the named implementation, where one is named.
"auto" and "native" leave ``attnres::mix``, which chooses by device when it runs; "native" makes sure what it will choose.
The last pass: others need not know the operators.
"""

from __future__ import annotations

from torch import fx

from attnres_fx.passes.graph import copy_graph_module, float_tensor
from attnres_fx.runtime import triton
from attnres_fx.runtime.cpu import native
from attnres_fx.runtime.errors import KernelError
from attnres_fx.runtime.mix import MIX, MIX_REFERENCE, MIX_TRITON

OPERATORS = {"native": MIX, "reference": MIX_REFERENCE, "triton": MIX_TRITON}
KERNELS = ("auto", *OPERATORS)


def select_kernels(gm: fx.GraphModule, kernels: str) -> fx.GraphModule:
    """A copy of ``gm`` whose mixes run the named kernels; ``gm`` itself where there is nothing to change.

    Raises: KernelError if they cannot run on the device of a mix.
    """
    mixes = [node for node in gm.graph.nodes if _is_mix(node)]
    if kernels == "auto" or not mixes:
        return gm
    for device in sorted({value.device.type for node in mixes if (value := float_tensor(node)) is not None}):
        refusal = _obstacle(kernels, device)
        if refusal is not None:
            raise refusal
    gm = copy_graph_module(gm)
    for node in gm.graph.nodes:
        if _is_mix(node):
            node.target = OPERATORS[kernels]
    gm.graph.lint()
    gm.recompile()
    return gm


def _is_mix(node: fx.Node) -> bool:
    # Dynamo records the packet where a user's code calls torch.ops.attnres.mix without naming an overload.
    return node.op == "call_function" and node.target in (MIX, MIX.overloadpacket)


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
