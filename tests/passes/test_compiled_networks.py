"""Property tests: random residual networks through the compiler compute what their eager graphs do, with all gradients.

They meet the layouts (batch and sequence swapped, transposing views, slices, channels last), the spellings of an addition
and of a scale, injected features and checkpointed layers, in every order; half of them in float64, where a mistake cannot
pass for rounding. :mod:`test_properties` holds the rewrite itself to the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compared import REFERENCE, check_both, disturbed
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from networks import BRANCHES, INJECTIONS, NO_CONTRACTION, SPELLINGS, LayerSpec, Network, Spec, normal_spec
from torch import Tensor

import attnres_fx
from attnres_fx.backend import attnres
from attnres_fx.passes.capture import capture

Check = Callable[[Spec, dict[str, Any]], None]

LAYERS = st.builds(LayerSpec, st.sampled_from(BRANCHES), st.sampled_from(SPELLINGS))
# A stream begins and ends at a layer with a contraction.
ENDS = st.builds(LayerSpec, st.sampled_from([kind for kind in BRANCHES if kind not in NO_CONTRACTION]),
                 st.sampled_from(SPELLINGS))


def convertible(spec: Spec) -> bool:
    """Features that only some readers see, in another layout than the next layer's, are refused."""
    return spec.injection is None or not spec.late or spec.layers[spec.injection_at].branch not in ("flat", "permuted")


SPECS = st.builds(
    Spec,
    layers=st.tuples(ENDS, st.lists(LAYERS, max_size=2).map(tuple), ENDS).map(lambda three: (three[0], *three[1], three[2])),
    position_table=st.booleans(),
    read_hidden=st.booleans(),
    final_norm=st.booleans(),
    grouped=st.booleans(),
    seed=st.integers(0, 10_000),
    injection=st.one_of(st.none(), st.sampled_from(INJECTIONS)),
    injection_at=st.integers(1, 5),
    turned_start=st.booleans(),
    checkpointed=st.sampled_from((False, False, True)),
).map(normal_spec).filter(convertible)


def by_inductor(spec: Spec) -> dict[str, Any]:
    """All defaults."""
    return {}


def by_aot_eager(spec: Spec) -> dict[str, Any]:
    """AOTAutograd alone, with and without what is the default under Inductor only."""
    return {"downstream": "aot_eager", "fuse": ("always", "never")[spec.seed // 2 % 2],
            "schedule": ("one-pass", "two-phase")[spec.seed // 4 % 2]}


def prepared(spec: Spec) -> tuple[Network, Tensor, float]:
    """The converted network, its input, and what rounding explains."""
    torch._dynamo.reset()
    double = spec.seed % 2 == 1
    network = Network(spec).to(torch.float64 if double else torch.float32)
    ids = torch.randint(0, 17, (3, 5), generator=torch.Generator().manual_seed(spec.seed))
    attnres_fx.convert(network, (ids,), layers_per_block=1 + spec.seed // 8 % 3)
    disturbed(network)
    return network, ids, 1e-9 if double else 1e-4


def check_compiled(spec: Spec, options: dict[str, Any]) -> None:
    """As a user calls it."""
    network, ids, bound = prepared(spec)
    fast = torch.compile(network, backend="attnres", fullgraph=True, options=options)
    slow = torch.compile(network, backend="attnres", fullgraph=True, options=REFERENCE)
    check_both(network, fast, fast, slow, (ids,), {}, bound)


def check_backend(spec: Spec, options: dict[str, Any]) -> None:
    """Dynamo traces the network once; what it would call is called three times on that graph."""
    if spec.injection == "written":
        return check_compiled(spec, options)  # an index by a mask has a size that only Dynamo's own shapes can hold
    network, ids, bound = prepared(spec)
    graph, inputs = capture(network, (ids,), {})
    with torch.no_grad():
        inference = attnres(graph, inputs, options=options)
    training, slow = (attnres(graph, inputs, options=each) for each in (options, REFERENCE))
    check_both(network, inference, training, slow, inputs, {}, bound)
    return None


def run_random(check: Check, options: Callable[[Spec], dict[str, Any]], number: int, start: int) -> None:
    """``number`` networks, the same in every run. One that fails is not made smaller, which would cost many compilations."""
    seen = []

    @seed(start)
    @settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck), database=None,
              phases=[Phase.generate])
    @given(SPECS)
    def run(spec: Spec) -> None:
        seen.append(spec)
        check(spec, options(spec))

    run()
    assert len(seen) >= number


@pytest.mark.parametrize("shard", range(2))
def test_random_networks_through_inductor(shard: int) -> None:
    run_random(check_compiled, by_inductor, 10, 100 + shard)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(14))
def test_many_random_networks_through_inductor(shard: int) -> None:
    """280 networks; with those of the default tests, 300."""
    run_random(check_backend, by_inductor, 20, shard)


def test_random_networks_through_aot_eager() -> None:
    run_random(check_compiled, by_aot_eager, 10, 100)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(20))
def test_many_random_networks_through_aot_eager(shard: int) -> None:
    """2,000 networks."""
    run_random(check_backend, by_aot_eager, 100, shard)
