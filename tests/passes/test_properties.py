"""Property tests: random residual networks are converted with the right answer, or refused with the right reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from support import reference
from support.dominators import bypassed
from support.network_graphs import queries, rewritten
from support.networks import (
    BRANCHES,
    INJECTIONS,
    NO_CONTRACTION,
    OBSTACLES,
    SPELLINGS,
    LayerSpec,
    Network,
    Spec,
    normal_spec,
)
from support.passes import prepared
from torch import Tensor

import attnres_fx
from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.rewrite.partition import partition

LAYERS = st.builds(LayerSpec, st.sampled_from(BRANCHES), st.sampled_from(SPELLINGS))
SPECS = st.builds(
    Spec,
    layers=st.lists(LAYERS, min_size=1, max_size=6).map(tuple),
    obstacle=st.one_of(st.none(), st.none(), st.sampled_from(sorted(OBSTACLES))),
    obstacle_at=st.integers(1, 5),
    position_table=st.booleans(),
    read_hidden=st.booleans(),
    final_norm=st.booleans(),
    grouped=st.booleans(),
    seed=st.integers(0, 10_000),
    injection=st.one_of(st.none(), st.sampled_from(INJECTIONS)),
    injection_at=st.integers(1, 5),
    turned_start=st.booleans(),
    checkpointed=st.sampled_from((False, False, True)),
)


def by_definition(
    network: Network, ids: Tensor, query: Tensor, gain: Tensor, boundaries: Any, mix_scale: str
) -> list[Tensor]:
    layers = [lambda x, i=i: network.output(i, x, ids) for i in range(len(network.spec.layers))]
    mixes = reference.attention_residuals(network.embed(ids), layers, query, gain, boundaries, mix_scale=mix_scale)
    return network.finish(mixes[-1], mixes)


def check(spec: Spec) -> str:
    """Convert and compare, or check the refusal; returns "converted" or "refused"."""
    spec = normal_spec(spec)
    network = Network(spec).double()
    ids = torch.randint(0, 17, (3, 5), generator=torch.Generator().manual_seed(spec.seed))
    captured, inputs = capture(network, (ids,), {})
    streams = detect(prepared(captured).graph)
    if spec.obstacle is not None:
        return check_refusal(spec, streams)
    kinds = [layer.branch for layer in spec.layers]
    if spec.injection is not None and spec.late and kinds[spec.injection_at] in ("flat", "permuted"):
        return check_layouts(kinds, streams)
    if all(kind in NO_CONTRACTION for kind in kinds):
        assert not streams
        return "refused"
    if kinds[0] in NO_CONTRACTION or kinds[-1] in NO_CONTRACTION:
        # An end without a contraction is left out of the stream; what is found must still be a part of the truth.
        assert len(streams) == 1
        assert streams[0].num_layers < len(kinds)
        return "refused"
    assert [stream.num_layers for stream in streams] == [len(kinds)], spec
    stream = streams[0]
    assert stream.refusal() is None, stream.refusal()
    assert not bypassed(stream) or spec.injection is not None, spec
    invariant = spec.final_norm and not spec.read_hidden and "plain" not in kinds[1:]
    invariant = invariant and not (spec.injection is not None and spec.late)
    assert stream.function_preserving == invariant, (spec, stream.raw_readers)
    for num_blocks, mix_scale in ((2, "paper"), (len(kinds), "sum")):
        boundaries = partition(len(kinds), num_blocks=num_blocks)
        query, gain = queries(len(kinds), network.width, spec.seed)
        with torch.no_grad():
            wanted = by_definition(network, ids, query, gain, boundaries, mix_scale)
            fresh = prepared(captured)
            graph = rewritten(fresh, detect(fresh.graph)[0], boundaries, mix_scale)
            got = graph(query, gain, *inputs)
            for ours, theirs in zip(got, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            if mix_scale == "sum":
                for ours, theirs in zip(graph(0 * query, 1 + 0 * gain, *inputs), network(ids), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return "converted"


def check_layouts(kinds: list[str], streams: list[Stream]) -> str:
    """Features that only some readers see, added in another layout than the next layer's: refused, and named."""
    assert not any(stream.refusal() is None and stream.num_layers == len(kinds) for stream in streams)
    if not set(kinds) & NO_CONTRACTION:
        assert "injected features" in str(streams[0].refusal())
    return "refused"


def check_refusal(spec: Spec, streams: list[Stream]) -> str:
    """A stream with something on it is never one convertible stream of all layers."""
    assert not any(stream.refusal() is None and stream.num_layers == len(spec.layers) for stream in streams), spec
    sides = spec.layers[: spec.obstacle_at], spec.layers[spec.obstacle_at :]
    if all(any(layer.branch not in NO_CONTRACTION for layer in side) for side in sides) and spec.obstacle != "gate":
        refusals = [type(stream.refusal()).__name__ for stream in streams if stream.refusal() is not None]
        whole = [s for s in streams if s.num_layers >= 2]
        assert not whole or refusals or all(s.num_layers < len(spec.layers) for s in whole), spec
    if all(layer.branch not in NO_CONTRACTION for layer in spec.layers):
        assert OBSTACLES[str(spec.obstacle)] in {type(s.refusal()).__name__ for s in streams}, spec
    return "refused"


EXAMPLES = [
    Spec((LayerSpec("pre", "x + f"), LayerSpec("plain", "iadd"), LayerSpec("parallel_left", "x + f"))),
    Spec((LayerSpec("nested", "x + f"), LayerSpec("nested", "x + f"))),
    Spec((LayerSpec("nested", "x + f"),)),
    Spec((LayerSpec("permuted", "x + f"), LayerSpec("flat", "x + f"), LayerSpec("broadcast", "x + f"))),
    Spec((LayerSpec("in_place", "x + f"), LayerSpec("pre", "x + f"), LayerSpec("in_place", "f += x"))),
    Spec((LayerSpec("pre", "f += x"), LayerSpec("mixer", "alpha"), LayerSpec("attention", "stack"))),
    # An unread fused norm was a reader of the sum, and the features after it were not a term of its layer.
    Spec((LayerSpec("rms", "fused in place"), LayerSpec("rms", "x + f")), injection="written", injection_at=1),
    # The zeros that features are written into are made in the likeness of the stream, and do not descend from it.
    Spec((LayerSpec("pre", "x + f"), LayerSpec("rezero", "fused"), LayerSpec("pre", "x + f")), injection="written",
         injection_at=2, read_hidden=True),
    # The mix that other readers see with the features was taken for one of the terms.
    Spec((LayerSpec("pre", "x + f"), LayerSpec("permuted", "x + f"), LayerSpec("mixer", "sub")), injection="masked",
         injection_at=2),
    Spec((LayerSpec("pre", "x + f"), LayerSpec("pre", "sub"), LayerSpec("permuted", "x + f")), injection="masked",
         injection_at=2, read_hidden=True),
    # Lanes that are a reshape of the stream, mixed before a layer in another layout.
    Spec((LayerSpec("rms", "x + f"), LayerSpec("attention", "sub"), LayerSpec("permuted", "x + f")), obstacle="lanes",
         obstacle_at=2),
    Spec((LayerSpec("pre", "x + f"), LayerSpec("pre", "x + f"), LayerSpec("flat", "x + f")), obstacle="overwrite",
         obstacle_at=1),
    # A long skip before a layer in another layout was named after the factor of what it brings.
    Spec((LayerSpec("pre", "x + f"),) * 3 + (LayerSpec("flat", "x + f"),), obstacle="long skip", obstacle_at=1,
         read_hidden=True),
]


@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(SPECS)
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
@example(EXAMPLES[4])
@example(EXAMPLES[5])
@example(EXAMPLES[6])
@example(EXAMPLES[7])
@example(EXAMPLES[8])
@example(EXAMPLES[9])
@example(EXAMPLES[10])
@example(EXAMPLES[11])
@example(EXAMPLES[12])
def test_random_networks(spec: Spec) -> None:
    check(spec)


@pytest.mark.many
@pytest.mark.parametrize("shard", range(10))
def test_many_random_networks(shard: int) -> None:
    """1,000 networks, the same ones in every run; :mod:`test_compiled_networks` takes 2,000 others through AOTAutograd."""

    @seed(shard)
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(SPECS)
    def run(spec: Spec) -> None:
        check(spec)

    run()


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(SPECS)
def test_random_networks_through_convert(spec: Spec) -> None:
    spec = normal_spec(spec)
    kinds = [layer.branch for layer in spec.layers]
    if spec.obstacle is not None or kinds[0] in NO_CONTRACTION or kinds[-1] in NO_CONTRACTION:
        return
    if spec.injection is not None and spec.late and kinds[spec.injection_at] in ("flat", "permuted"):
        return
    torch._dynamo.reset()
    network = Network(spec).double()
    ids = torch.randint(0, 17, (3, 5))
    attnres_fx.convert(network, (ids,), layers_per_block=2)
    query, gain = queries(len(kinds), network.width, spec.seed)
    with torch.no_grad():
        network.attnres.stream.query.copy_(query)
        network.attnres.stream.key_gain.copy_(gain)
        wanted = by_definition(network, ids, query, gain, partition(len(kinds), layers_per_block=2), "paper")
        for ours, theirs in zip(network(ids), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
