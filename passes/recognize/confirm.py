"""Whether a proposed region computes a mix, decided by running it beside the operator's reference.

The region is run on the CPU in float64, every cast and dtype argument in it neutralised: what is compared is the
mathematics, and a region that casts to float32 differs from the mix by its own roundings only. The free numbers of the
mix are never estimated. The eps and the logit scale are tried from the constants that stand in the region (an eps of a
sum of squares divided by the width, a scale as a product of constants and powers of the width), and a combination counts
when values and all gradients agree at several magnitudes, at a magnitude where the eps dominates, and with a zero row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnres_fx.passes._compat.graphs import plain_torch, pytree
from attnres_fx.passes._compat.symbols import hinted
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.vocabulary import ATTENTION, RMS_NORMS, argument, op_name
from attnres_fx.passes.recognize.closure import Proposal, query_axes
from attnres_fx.passes.recognize.evaluate import Inputs, Region, default_eps, hint_of, random_inputs
from attnres_fx.passes.recognize.gather import is_symbol, row_shape, shape_of
from attnres_fx.runtime import reference

_CLOSE = 1e-9
_MAGNITUDES = (1e-3, 1.0, 1e3)
_PROBE_MAGNITUDES = (1e-4, 1.0, 1e-2, 1e-3, 1e-6, 10.0)
# Above this many source elements the number of positions is reduced, and above the second number nothing is confirmed.
_MANY, _TOO_MANY = 2**19, 2**26


@dataclass(frozen=True)
class Meaning:
    """The parameters of ``attnres::mix`` under which a proposal is one.

    ``output`` indexes the proposal's outputs, ``query`` and ``gain`` its vectors; ``query_axis`` is where the output has
    the axis of several queries, and ``scaled`` whether the query is to be multiplied by the proposal's scalars.
    """

    output: int
    query: int
    gain: int | None
    num_queries: int
    transposed: bool
    query_axis: int
    scaled: bool
    eps: float
    logit_scale: float
    normalize_values: bool


def _roles(proposal: Proposal, inputs: Inputs, meaning: Meaning) -> tuple[Tensor, Tensor | None]:
    """The query and the gain as the operator takes them."""
    width = row_shape(proposal.rows[0])[-1]
    query = inputs.vectors[meaning.query]
    query = query.reshape(width, -1).t() if meaning.transposed else query.reshape(-1, width)
    if meaning.num_queries == 1 and meaning.query_axis < 0:
        query = query.reshape(width)
    if meaning.scaled:
        for scalar in inputs.scalars:
            query = query * scalar.reshape(())
    gain = None if meaning.gain is None else inputs.vectors[meaning.gain].reshape(width)
    return query, gain


def _mixed(proposal: Proposal, inputs: Inputs, meaning: Meaning) -> Tensor:
    """What ``attnres::mix`` makes of the inputs; several queries come first."""
    query, gain = _roles(proposal, inputs, meaning)
    rows = inputs.rows()
    return reference.mix_forward([rows[row] for row in proposal.rows], query, gain, meaning.eps, meaning.logit_scale,
                                 meaning.normalize_values, 1.0)


def _constants(proposal: Proposal) -> list[float]:
    """The numbers that stand in the region, in order, each once."""
    found: dict[float, None] = {}

    def note(value: Any) -> None:
        if isinstance(value, torch.SymFloat):
            found.setdefault(float(hinted(value)))
        elif isinstance(value, float) and math.isfinite(value):
            found.setdefault(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            found.setdefault(float(value))

    for node in proposal.region:
        name = op_name(node)
        if name in RMS_NORMS and argument(node, 3, "eps") is None:
            note(default_eps(value_of(argument(node, 0, "input")).dtype))
        pytree.tree_map(note, (node.args, node.kwargs))
        for source in node.all_input_nodes:
            if is_symbol(source) and isinstance(value_of(source), (float, torch.SymFloat)):
                note(value_of(source))
    return list(found)


def _epsilons(constants: Sequence[float], width: int) -> list[float]:
    small = [value for value in constants if 0 < value <= 0.5]
    return [*small, 0.0, *(value / width for value in small)]


def _scales(constants: Sequence[float], width: int) -> Iterator[float]:
    """Factors of the logits: the plain one, the usual one, those that stand in the graph and their products."""
    yielded: set[float] = set()
    useful = [value for value in constants if value not in (0.0, 1.0) and 1e-4 < abs(value) < 1e5][:8]
    useful = [value for value in useful if not (value == int(value) and abs(value) <= 4)] or useful
    factors = [1.0, *useful, *(1.0 / value for value in useful)]
    pairs = [a * b for a, b in itertools.combinations(factors[1:], 2)]
    for power in (1.0, width**-0.5, float(width) ** 0.5):
        for factor in (*factors, *pairs[:40]):
            scale = factor * power
            if scale not in yielded:
                yielded.add(scale)
                yield scale


def _query_forms(proposal: Proposal) -> Iterator[tuple[int, int | None, int, bool]]:
    """(query, gain, number of queries, whether the query is stored as columns): the roles that vectors can play."""
    width = row_shape(proposal.rows[0])[-1]
    count = len(proposal.vectors)
    pairs = [(0, None)] if count == 1 else [(1, 0), (0, 1)] if count == 2 else []
    assert isinstance(width, int)
    for query, gain in pairs:
        sizes = [math.prod(int(size) for size in shape_of(node)) for node in proposal.vectors]
        if sizes[query] % width or (gain is not None and sizes[gain] != width):
            continue
        queries = sizes[query] // width
        yield query, gain, queries, False
        if queries > 1 and shape_of(proposal.vectors[query])[0] == width:
            yield query, gain, queries, True


def _meanings(proposal: Proposal, region: Region) -> Iterator[Meaning]:
    """All meanings that agree with the region on one probe, whose positions have very different magnitudes."""
    shape = region.source_shape()
    positions = max(1, math.prod(shape[:-1]))
    magnitude = torch.tensor([_PROBE_MAGNITUDES[i % len(_PROBE_MAGNITUDES)] for i in range(positions)], dtype=torch.float64)
    inputs = random_inputs(region, 0, magnitude)
    values = region.run(inputs, proposal.outputs[-1])
    width = shape[-1]
    constants = _constants(proposal)
    # The first positions are enough to find the numbers.
    beginning = inputs.stacked.reshape(len(inputs.distinct), -1, width)[:, :12]
    few = Inputs(inputs.distinct, beginning, inputs.vectors, inputs.scalars)
    made: dict[Meaning, Tensor] = {}
    for query, gain, queries, transposed in _query_forms(proposal):
        scaled = bool(proposal.scalars)
        if len(proposal.rows) == 1 and not _scores_agree(proposal, values, few, query, gain, constants):
            continue
        targets = _targets(proposal, values, shape, queries)
        for (index, axis, target), normalised in itertools.product(targets, (False, True)):
            first = Meaning(index, query, gain, queries, transposed, axis, scaled, 0.0, 1.0, normalised)
            for eps, scale in _fitting_numbers(proposal, few, first, target, constants):
                meaning = replace(first, eps=eps, logit_scale=scale)
                key = replace(meaning, output=0, query_axis=0)
                if key not in made:
                    made[key] = _mixed(proposal, few, meaning)
                if _close_rows(target, made[key]):
                    yield meaning


def _scores_agree(
    proposal: Proposal, values: dict[fx.Node, Any], inputs: Inputs, query: int, gain: int | None, constants: Sequence[float]
) -> bool:
    """Whether the scores are those of a mix, where there is one source and its weight is 1 whatever they are."""
    logits = values.get(argument(proposal.anchor, 0, "input"))
    if not isinstance(logits, Tensor) or op_name(proposal.anchor) == ATTENTION:
        return False
    row = inputs.stacked[0]
    logits = logits.reshape(-1)[: row.shape[0]]
    keyed = inputs.vectors[query].reshape(-1) * (1.0 if gain is None else inputs.vectors[gain].reshape(-1))
    if keyed.numel() != row.shape[-1] or logits.numel() != row.shape[0]:
        return False
    for eps in _epsilons(constants, row.shape[-1]):
        scores = (row @ keyed) * torch.rsqrt(row.square().mean(-1) + eps)
        if any(_agree(logits, scale * scores) for scale in _scales(constants, row.shape[-1])):
            return True
    return False


def _fitting_numbers(
    proposal: Proposal, inputs: Inputs, meaning: Meaning, target: Tensor, constants: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """The candidates for (eps, logit scale) that one position does not rule out.

    The weights of that position follow from its value by linear algebra, and from them the scale. It only selects among
    the candidates; a position whose weights are not a softmax of the scores selects none.
    """
    rows = inputs.stacked
    count, positions, width = rows.shape
    epsilons, scales = _epsilons(constants, width), list(_scales(constants, width))
    if count > width:
        yield from itertools.product(epsilons, scales[:12])
        return
    times = torch.tensor([proposal.rows.count(row) for row in inputs.distinct], dtype=torch.float64)
    place = min(1, positions - 1)
    query, gain = _roles(proposal, inputs, meaning)
    query = query.reshape(-1, width)[0]
    here = rows[:, place]
    value = target.reshape(-1, positions, width)[0, place]
    value = value if gain is None or not meaning.normalize_values else value / gain
    parts = torch.linalg.lstsq(here.t(), value.unsqueeze(-1)).solution.squeeze(-1)
    if float((parts @ here - value).abs().max()) > 1e-6 * float(value.abs().max()):
        return
    for eps in epsilons:
        inverse = torch.rsqrt(here.square().mean(-1) + eps)
        weights = parts / inverse if meaning.normalize_values else parts
        if bool((weights < -1e-6).any()) or abs(float(weights.sum()) - 1) > 1e-5:
            continue
        keyed = query if gain is None else query * gain
        seen = weights > 1e-7
        logs, scores = (weights / times)[seen].log(), ((here @ keyed) * inverse)[seen]
        logs, scores = logs - logs.mean(), scores - scores.mean()
        if float(scores.square().sum()) == 0:
            yield eps, scales[0]
            continue
        measured = float((logs * scores).sum() / scores.square().sum())
        yield from ((eps, scale) for scale in scales if abs(scale - measured) <= 1e-4 * abs(measured))


def _targets(
    proposal: Proposal, values: dict[fx.Node, Any], shape: tuple[int, ...], queries: int
) -> list[tuple[int, int, Tensor]]:
    """(output, its query axis, its first positions) for every output of the right shape."""
    found = []
    for index, node in enumerate(proposal.outputs):
        value = values[node]
        if not isinstance(value, Tensor):
            continue
        if queries == 1 and tuple(value.shape) == shape:
            found.append((index, -1, value.reshape(-1, shape[-1])[:12]))
        for axis in query_axes(tuple(value.shape), shape) if queries > 1 else []:
            if value.shape[axis] == queries:
                found.append((index, axis, value.movedim(axis, 0).reshape(queries, -1, shape[-1])[:, :12]))
    return found


def _close_rows(found: Tensor, wanted: Tensor) -> bool:
    """Equality row by row, each relative to its own magnitude."""
    if found.shape != wanted.shape:
        return False
    difference = (found - wanted).abs().amax(-1)
    return bool((difference <= 1e-8 * wanted.abs().amax(-1)).all())


def _confirmed(proposal: Proposal, region: Region, meaning: Meaning) -> bool:
    """Values and all gradients at several magnitudes, one near the root of the eps, and with zero rows.

    The mix works position by position, so the magnitudes stand side by side in one run where there are positions enough.
    """
    kinds = [*_MAGNITUDES, 1.0] if meaning.eps == 0 else [*_MAGNITUDES, math.sqrt(meaning.eps), 1.0]
    positions = math.prod(region.source_shape()[:-1])
    # Without an eps a zero row has no weights: it makes the gradient of the query undefined, so it stands alone.
    batches = [list(range(len(kinds)))] if meaning.eps > 0 else [list(range(len(kinds) - 1)), [len(kinds) - 1]]
    for batch in batches:
        for start in range(0, len(batch), positions):
            chosen = [batch[(start + place) % len(batch)] for place in range(positions)]
            magnitude = torch.tensor([kinds[kind] for kind in chosen], dtype=torch.float64)
            zero = torch.tensor([kind == len(kinds) - 1 for kind in chosen])
            if not _same(proposal, region, meaning, random_inputs(region, 1 + start, magnitude, zero), magnitude):
                return False
    return True


def _same(proposal: Proposal, region: Region, meaning: Meaning, inputs: Inputs, magnitude: Tensor) -> bool:
    leaves = [leaf.requires_grad_() for leaf in inputs.leaves()]
    output = proposal.outputs[meaning.output]
    found = region.run(inputs, output)[output]
    wanted = _mixed(proposal, inputs, meaning)
    found = found.movedim(meaning.query_axis, 0) if meaning.query_axis > 0 else found
    if found.shape != wanted.shape or not _agree(found.detach(), wanted.detach()):
        return False
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(77), dtype=torch.float64, device="cpu")
    if not meaning.normalize_values:
        # So that every position counts as much in the gradient of the query.
        weights = weights / magnitude.reshape(*region.source_shape()[:-1], 1)
    ours = torch.autograd.grad(found, leaves, weights, allow_unused=True)
    theirs = torch.autograd.grad(wanted, leaves, weights, allow_unused=True)
    for number, (mine, other, leaf) in enumerate(zip(ours, theirs, leaves)):
        # The operator gives a lone source's query a zero gradient; an optimizer would notice any other missing gradient.
        if other is None and len(proposal.rows) > 1:
            return False
        mine = torch.zeros_like(leaf) if mine is None else mine
        other = torch.zeros_like(leaf) if other is None else other
        if not _agree(mine, other, across=0 if number == 0 else None):
            return False
    return True


def _agree(found: Tensor, wanted: Tensor, across: int | None = None) -> bool:
    """Equal row by row, each relative to its own largest element, and undefined at the same places.

    ``across`` names an axis along which rows are parts of one result: none need be closer than 1e-3 of the largest there.
    """
    if not torch.equal(found.isfinite(), wanted.isfinite()):
        return False
    found, wanted = found.nan_to_num(0.0, 0.0, 0.0), wanted.nan_to_num(0.0, 0.0, 0.0)
    if not wanted.dim() or not wanted.numel():
        return bool(((found - wanted).abs() <= _CLOSE * wanted.abs()).all())
    size = wanted.abs().amax(-1)
    if across is not None:
        size = torch.maximum(size, 1e-3 * size.amax(across, keepdim=True))
    return bool(((found - wanted).abs().amax(-1) <= _CLOSE * size + 1e-16).all())


def meaning_of(proposal: Proposal) -> Meaning | None:
    """The mix that ``proposal`` computes, confirmed, or None. Leaves no trace: no random state, no gradient, no mode."""
    with plain_torch():
        for region in _regions(proposal):
            try:
                fitting = itertools.islice(_meanings(proposal, region), 16)
                return next((meaning for meaning in fitting if _confirmed(proposal, region, meaning)), None)
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError):
                continue  # the region cannot be run at these sizes
    return None


def _regions(proposal: Proposal) -> list[Region]:
    """The sizes to run at, in order of trial: the traced ones, or fewer positions where the tensors are large."""
    shape = tuple(hint_of(size) for size in row_shape(proposal.rows[0]))
    count = len(proposal.rows) * math.prod(shape)
    if count <= _MANY:
        return [Region(proposal)]
    leading = tuple(size if size <= 8 else 4 for size in shape[:-1])
    # Sizes in arguments can be distinguished only if nothing else has the same size.
    taken = {shape[-1], len(proposal.rows), *range(9)}
    sizes = {old: new for old, new in zip(shape, leading) if old not in taken}
    sizes.setdefault(math.prod(shape[:-1]), math.prod(leading))
    few = Region(proposal, leading, sizes)
    return [few, Region(proposal)] if count <= _TOO_MANY else [few]
