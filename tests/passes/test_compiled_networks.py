"""Property tests: random residual networks through the compiler compute what their eager graphs do, with all gradients.

They meet the layouts (batch and sequence swapped, transposing views, slices, channels last), the spellings of an addition
and of a scale, injected features and checkpointed layers, in every order; half of them in float64, where a mistake cannot
pass for rounding. :mod:`test_properties` holds the rewrite itself to the definition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from support.comparison import REFERENCE, check_both, disturbed
from support.network_graphs import queries, rewritten
from support.networks import BRANCHES, INJECTIONS, NO_CONTRACTION, SPELLINGS, LayerSpec, Network, Spec, normal_spec
from support.passes import prepared
from support.ways import by_graph
from torch import Tensor, nn

import attnres_fx
from attnres_fx.backend import attnres
from attnres_fx.by_value import can_run
from attnres_fx.downstream import compile_downstream
from attnres_fx.options import Options
from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.rewrite.partition import partition
from attnres_fx.runtime.errors import StreamRefusedError

Check = Callable[[Spec, dict[str, Any]], None]

def draw(chance: Random) -> Spec:
    """A network that is converted. Drawn evenly, where hypothesis varies what it drew before, to make it smaller."""
    kinds = [kind for kind in BRANCHES if kind not in NO_CONTRACTION]
    inner = chance.choices(BRANCHES, k=chance.randrange(3))
    layers = [chance.choice(kinds), *inner, chance.choice(kinds)]  # a stream begins and ends at a contraction
    spec = normal_spec(Spec(
        layers=tuple(LayerSpec(kind, chance.choice(SPELLINGS)) for kind in layers),
        position_table=chance.random() < 0.5, read_hidden=chance.random() < 0.5, final_norm=chance.random() < 0.5,
        grouped=chance.random() < 0.5, turned_start=chance.random() < 0.5, checkpointed=chance.random() < 0.3,
        injection=chance.choice(INJECTIONS) if chance.random() < 0.5 else None, injection_at=chance.randint(1, 5),
        seed=chance.randrange(10_000)))
    refused = spec.injection is not None and spec.late and spec.layers[spec.injection_at].branch in ("flat", "permuted")
    return draw(chance) if refused else spec  # features that only some readers see, before a layer in another layout


def by_inductor(spec: Spec) -> dict[str, Any]:
    """All defaults."""
    return {}


def by_aot_eager(spec: Spec) -> dict[str, Any]:
    """AOTAutograd alone, with and without what is the default under Inductor only."""
    return {"downstream": "aot_eager", "fuse": ("always", "never")[spec.seed // 2 % 2],
            "schedule": ("one-pass", "two-phase")[spec.seed // 4 % 2]}


def converted(spec: Spec) -> tuple[Network, Tensor, float]:
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
    network, ids, bound = converted(spec)
    fast = torch.compile(network, backend="attnres", fullgraph=True, options=options)
    slow = torch.compile(network, backend="attnres", fullgraph=True, options=REFERENCE)
    check_both(network, fast, fast, slow, (ids,), {}, bound)


def check_backend(spec: Spec, options: dict[str, Any]) -> None:
    """Dynamo traces the network once; what it would call is called three times on that graph."""
    if spec.injection == "written":
        return check_compiled(spec, options)  # an index by a mask has a size that only Dynamo's own shapes can hold
    network, ids, bound = converted(spec)
    graph, inputs = capture(network, (ids,), {})
    with torch.no_grad():
        inference = attnres(graph, inputs, options=options)
    training, slow = (attnres(graph, inputs, options=each) for each in (options, REFERENCE))
    check_both(network, inference, training, slow, inputs, {}, bound)
    return None


# The spellings of an addition that is seen as one when the stream is a value.
PLAIN = ("x + f", "f + x", "torch.add", "alpha", "iadd", "add_", "f += x", "sum")


def plain(name: str) -> Spec:
    """A network whose additions are spelled plainly; every other one as it is drawn."""
    chance = Random(name)
    spec = draw(chance)
    if chance.random() < 0.3:
        return spec
    return replace(spec, injection=None,
                   layers=tuple(replace(layer, spelling=chance.choice(PLAIN)) for layer in spec.layers))


def by_value(spec: Spec) -> str:
    """How a network ends whose streams are values, called eagerly: "right", or why it is not run so."""
    try:
        network, ids, bound = converted(spec)
    except StreamRefusedError:
        return "refused"
    if not can_run(network):
        return "not served"

    def whole(*args: Tensor) -> Any:
        with by_graph(network):
            return network(*args)

    check_both(network, network, network, whole, (ids,), {}, bound)
    return "right"


def check_graph(spec: Spec, options: dict[str, Any]) -> None:
    """The graph that the passes rewrite, in float64; inference where it is another graph, and of some others."""
    spec = replace(spec, injection="masked") if spec.injection == "written" else spec  # see above
    network = Network(spec).double()
    ids = torch.randint(0, 17, (3, 5), generator=torch.Generator().manual_seed(spec.seed))
    captured, inputs = capture(network, (ids,), {})
    gm = prepared(captured)
    (stream,) = detect(gm.graph)
    assert stream.num_layers == len(spec.layers)
    graph = rewritten(gm, stream, partition(stream.num_layers, layers_per_block=1 + spec.seed // 8 % 3), "paper")
    graph.meta.pop("dynamo_compile_id", None)  # two inputs are not its own
    query, gain = queries(stream.num_layers, network.width, spec.seed)
    network.attnres = nn.ModuleDict({"stream": nn.ParameterDict({"query": query, "key_gain": gain})})
    given = [*network.attnres.parameters(), *inputs]
    training, slow = (compile_downstream(graph, given, Options(**each)) for each in (options, REFERENCE))
    inference = None
    if spec.checkpointed or spec.seed % 4 == 0:
        with torch.no_grad():
            inference = compile_downstream(graph, given, Options(**options))
    check_both(network, inference, training, slow, given, {}, bound=1e-9)


def run_random(check: Check, options: Callable[[Spec], dict[str, Any]], number: int, start: int) -> None:
    """``number`` networks, the same in every run; ``draw(Random(f"{start} {index}"))`` is one of them again."""
    for index in range(number):
        spec = draw(Random(f"{start} {index}"))
        try:
            check(spec, options(spec))
        except Exception as error:
            raise AssertionError(f"network {index} of {start}, with {options(spec)}: {spec}") from error


def test_all_kinds_are_drawn() -> None:
    """In the 300 networks that go through Inductor."""
    drawn = [draw(Random(f"{start} {index}")) for start in range(29) for index in range(10)]
    assert {layer.branch for spec in drawn for layer in spec.layers} == set(BRANCHES)
    assert {layer.spelling for spec in drawn for layer in spec.layers} == set(SPELLINGS)
    assert {spec.injection for spec in drawn} == {None, *INJECTIONS}
    assert sum(spec.checkpointed for spec in drawn) > 50 < sum(spec.turned_start for spec in drawn)


def test_wrong_gradients_are_seen() -> None:
    """Values that are right, with gradients twice as large."""
    network, ids, bound = converted(draw(Random("0 0")))
    graph, inputs = capture(network, (ids,), {})
    right = attnres(graph, inputs, options=REFERENCE)

    def wrong(*given: Any) -> list[Tensor]:
        return [2 * part - part.detach() for part in right(*given)]

    with pytest.raises(AssertionError, match="key_gain deviates"):
        check_both(network, right, wrong, right, inputs, {}, bound)


@pytest.mark.parametrize("check", [check_compiled, pytest.param(check_backend, marks=pytest.mark.slow)])
def test_random_networks_through_inductor(check: Check) -> None:
    run_random(check, by_inductor, 5, 100 + (check is check_backend))


@pytest.mark.many
@pytest.mark.parametrize("shard", range(29))
def test_many_random_networks_through_inductor(shard: int) -> None:
    """290 networks; with those of the default tests, 300."""
    run_random(check_backend, by_inductor, 10, shard)


def test_random_networks_through_aot_eager() -> None:
    run_random(check_compiled, by_aot_eager, 5, 100)
    run_random(check_graph, by_aot_eager, 10, 100)


@pytest.mark.many
@pytest.mark.parametrize("shard", range(50))
def test_many_random_networks_through_aot_eager(shard: int) -> None:
    """2,000 networks."""
    run_random(check_graph, by_aot_eager, 40, shard)


def test_random_networks_by_value() -> None:
    """Right with all gradients, or one of our errors; never wrong."""
    ends = Counter(by_value(plain(f"by value {index}")) for index in range(12))
    assert ends["right"] >= 6, ends


@pytest.mark.many
@pytest.mark.parametrize("shard", range(10))
def test_many_random_networks_by_value(shard: int) -> None:
    """400 networks."""
    ends = Counter(by_value(plain(f"by value {shard} {index}")) for index in range(40))
    assert ends["right"] >= 20, ends
