"""Run a proposed region on the CPU in float64, with every cast and dtype argument in it neutralised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnres_fx.passes._compat.graphs import pytree
from attnres_fx.passes._compat.symbols import hinted
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.vocabulary import RMS_NORMS, SHAPED, argument, op_name
from attnres_fx.passes.recognize.closure import Proposal
from attnres_fx.passes.recognize.gather import Row, row_shape, shape_of


@dataclass
class Inputs:
    """Random values of everything that a region reads: distinct rows (``stacked`` in their order), vectors, scalars."""

    distinct: list[Row]
    stacked: Tensor
    vectors: list[Tensor]
    scalars: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [self.stacked, *self.vectors, *self.scalars]

    def rows(self) -> dict[Row, Tensor]:
        return dict(zip(self.distinct, self.stacked.unbind(0)))


def hint_of(size: Any) -> int:
    """The traced number behind a size, without a guard on it."""
    return int(hinted(size))


def default_eps(dtype: torch.dtype) -> float:
    """What ``rms_norm`` uses for ``eps=None``: the machine eps of the type it computes in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _neutral(value: Any, sizes: dict[int, int]) -> Any:
    """An argument without dtype and device: everything is float64 on the CPU."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.Size):
        return tuple(sizes.get(hint_of(size), hint_of(size)) for size in value)
    if isinstance(value, torch.SymInt):
        return sizes.get(hint_of(value), hint_of(value))
    if isinstance(value, torch.SymFloat):
        return float(hinted(value))
    return value


class Region:
    """Evaluates a proposal's region at the traced sizes, or with fewer positions.

    ``leading`` is then the shape of the positions, and ``sizes`` maps traced sizes that stand in the arguments of its
    operations.
    """

    def __init__(
        self, proposal: Proposal, leading: tuple[int, ...] | None = None, sizes: dict[int, int] | None = None
    ) -> None:
        self.proposal, self.leading, self.sizes = proposal, leading, sizes or {}
        self.leaf_nodes = list(dict.fromkeys(row.node for row in proposal.rows))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(hint_of(size) for size in shape_of(node))

    def source_shape(self) -> tuple[int, ...]:
        shape = tuple(hint_of(size) for size in row_shape(self.proposal.rows[0]))
        return shape if self.leading is None else (*self.leading, shape[-1])

    def run(self, inputs: Inputs, until: fx.Node) -> dict[fx.Node, Any]:
        """The values of the region's nodes up to ``until``."""
        env: dict[fx.Node, Any] = {}
        rows = inputs.rows()
        for node in self.leaf_nodes:
            env[node] = self._leaf(node, rows)
        for node, value in zip([*self.proposal.vectors, *self.proposal.scalars], [*inputs.vectors, *inputs.scalars]):
            env[node] = value.clone()
        for node, known in self.proposal.aliases:
            env[node] = env[known]
        for node in self.proposal.region:
            env[node] = call_neutral(node, env, self.sizes)
            if node is until:
                break
        return env

    def _leaf(self, node: fx.Node, rows: dict[Row, Tensor]) -> Tensor:
        """The tensor that holds the rows of ``node``: a row itself, or a packed tensor with all its slices."""
        whole = rows.get(Row(node))
        if whole is not None:
            return whole.clone()
        axis = next(row.axis for row in self.proposal.rows if row.node is node)
        assert axis is not None
        size = self.shape(node)[axis]
        slices = [rows.get(Row(node, axis, index)) for index in range(size)]
        shape = self.source_shape()
        return torch.stack([torch.ones(shape, dtype=torch.float64) if s is None else s for s in slices], axis)


def call_neutral(node: fx.Node, env: dict[fx.Node, Any], sizes: dict[int, int]) -> Any:
    """What ``node`` makes of the values in ``env``, its casts and dtype arguments neutralised.

    ``sizes`` maps traced sizes that stand in its arguments.
    """
    name = op_name(node)

    def argument_of(source: fx.Node) -> Any:
        return env[source] if source in env else value_of(source)

    args, kwargs = fx.map_arg((node.args, node.kwargs), argument_of)
    args, kwargs = pytree.tree_map(lambda value: _neutral(value, sizes), (args, kwargs))
    if name in SHAPED and sizes:
        args, kwargs = pytree.tree_map(
            lambda value: sizes.get(value, value) if type(value) is int else value, (args, kwargs))
    first = args[0] if args else None
    if name in {"float", "half", "bfloat16", "double"} or (name == "type" and isinstance(first, Tensor)):
        return first.to(torch.float64) if isinstance(first, Tensor) else first
    if name in {"cuda", "cpu"}:
        return first
    if name in RMS_NORMS and argument(node, 3, "eps") is None:
        source = argument(node, 0, "input")
        kwargs = {key: value for key, value in kwargs.items() if key != "eps"}
        return _function(node)(*args[:3], *([None] * (3 - len(args)) if "weight" not in kwargs else []),
                               eps=default_eps(value_of(source).dtype), **kwargs)
    if node.op == "call_method":
        return getattr(first, str(node.target))(*args[1:], **kwargs)
    return _function(node)(*args, **kwargs)


def _function(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def random_inputs(region: Region, seed: int, magnitude: Tensor, zero: Tensor | None = None) -> Inputs:
    """Rows of the given magnitude at each position, a query whose logits are of order one, by a generator of our own.

    At the positions that ``zero`` names, one source is a row of zeros: the first at one, the last at the next, and so on.
    """
    generator = torch.Generator().manual_seed(seed)
    proposal = region.proposal
    distinct = list(dict.fromkeys(proposal.rows))
    shape = region.source_shape()

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    drawn = draw(len(distinct), *shape) * magnitude.reshape(*shape[:-1], 1)
    if zero is not None:
        flat = drawn.reshape(len(distinct), -1, shape[-1])
        for number, position in enumerate(zero.nonzero().flatten().tolist()):
            flat[-(number % 2), position] = 0.0
    size = (2.0 / shape[-1] ** 0.5) ** (1 / len(proposal.vectors))
    vectors = [draw(*region.shape(node)) * size for node in proposal.vectors]
    scalars = [draw(*region.shape(node)).abs() + 0.5 for node in proposal.scalars]
    return Inputs(distinct, drawn, vectors, scalars)
