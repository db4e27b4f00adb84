"""The marker: the operator by which the parameters of a converted stream enter a traced graph.

A converted module calls it first in its forward. The tracer lifts its tensors as ordinary guarded inputs, so that
optimizers, ``state_dict`` and ``functional_call`` see them; the rewrite consumes it. Its kernel raises: running the graph
without the rewrite gives an error, never the plain residual network.

``within``: a restarted frame calls it from within (see attnres_fx.one_line). Such a marker counts only if the stream has no
other, as it does once the generated forward is traced.
"""

from __future__ import annotations

import torch

from attnres_fx.runtime.errors import PlainPathError

_LIBRARY = torch.library.Library("attnres", "FRAGMENT")
_LIBRARY.define("enter(Tensor query, Tensor? key_gain, str plan, bool within=False) -> Tensor")


def _refuse(query: torch.Tensor, key_gain: torch.Tensor | None, plan: str, within: bool = False) -> torch.Tensor:
    raise PlainPathError(
        "a converted model reached a place where its graph is not rewritten, and would have run as the plain "
        "residual network",
        remedy="call the model as it is, or compile it with torch.compile(model, backend='attnres'); other backends, "
        "torch.jit, exported programs and a disabled torch.compile cannot run a converted model",
    )


def _fake(query: torch.Tensor, key_gain: torch.Tensor | None, plan: str, within: bool = False) -> torch.Tensor:
    return query.new_empty(())


_LIBRARY.impl("enter", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("attnres::enter", _fake, lib=_LIBRARY)

ENTER = torch.ops.attnres.enter.default

# What a module is called with, noted in a traced graph while a model is converted: which argument is b_0.
_LIBRARY.define("witness(Tensor handed, str place) -> Tensor")
_LIBRARY.impl("witness", lambda handed, place: handed.new_empty(()), "CompositeExplicitAutograd")
torch.library.register_fake("attnres::witness", lambda handed, place: handed.new_empty(()), lib=_LIBRARY)

WITNESS = torch.ops.attnres.witness.default
