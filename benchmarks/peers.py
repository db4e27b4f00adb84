"""Other public implementations of the mix, behind the signature that attnres_fx/conformance.py and benchmarks/mix.py use.

None is needed to run anything here. To compare: ``pip install --no-deps liger-kernel==0.8.5 attn-res==0.1.0``, then

    TRITON_INTERPRET=1 PYTHONPATH=benchmarks attnres conformance peers:liger_kernel
    PYTHONPATH=benchmarks attnres conformance peers:attn_res
    python benchmarks/mix.py --variants native inductor attn_res "attn_res, inductor"
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def liger_kernel(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Liger-Kernel's Triton kernel: on the CPU in Triton's interpreter alone. It takes packed sources and a key gain."""
    from liger_kernel.ops.attn_res import LigerAttnResFunction

    gain = torch.ones_like(query) if key_gain is None else key_gain
    mixed: Tensor = LigerAttnResFunction.apply(torch.stack(list(sources)), query, gain, eps)
    return mixed


def attn_res(sources: Sequence[Tensor], query: Tensor, key_gain: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The eager operator of the package attn-res: packed [N, B, T, d], no key gain, which is folded into its query."""
    from attn_res.main import AttnResOperator

    shape = sources[0].shape
    stacked = torch.stack(list(sources)).reshape(len(sources), 1, -1, shape[-1])
    operator = AttnResOperator(shape[-1], eps)
    folded = (query if key_gain is None else query * key_gain).to(stacked.dtype)
    mixed: Tensor = torch.func.functional_call(operator, {"pseudo_query": folded}, (stacked,))
    return mixed.reshape(shape)
