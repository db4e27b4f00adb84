"""What Block Attention Residuals mean, point by point, on rewritten graphs and on formulas."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import models, reference
from support.comparison import disturbed
from torch import Tensor, fx, nn

import attnres_fx
from attnres_fx.converted import plans_of
from attnres_fx.errors import AttnResError
from attnres_fx.passes.findings import find_marked
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.record import record_of
from attnres_fx.passes.graph.vocabulary import is_mix, op_name
from attnres_fx.passes.rewrite.partition import sources_at
from attnres_fx.runtime.mix import depth_weights

# (layers, layers per block): even, odd, non-dividing, whole, one block, Full.
SHAPES = [(6, 2), (6, 3), (7, 3), (7, 4), (12, 5), (5, 5), (5, 9), (6, 1)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def converted(num_layers: int, **options: Any) -> Any:
    model = models.nanogpt(num_layers, width=16, heads=2).double()
    return attnres_fx.convert(model, models.token_ids(2, 5), **options)


def rewritten_graph(model: Any) -> tuple[fx.GraphModule, list[Any]]:
    gm, inputs = capture(model, (models.token_ids(2, 5),), {})
    return find_marked(gm).rewritten(), inputs


@functools.cache
def shaped(num_layers: int, size: int) -> tuple[Any, fx.GraphModule, list[Any]]:
    """A model with blocks of ``size`` layers and its rewritten graph, which the tests share and do not change."""
    model = converted(num_layers, layers_per_block=size)
    return model, *rewritten_graph(model)


def mixes_of(gm: fx.GraphModule) -> dict[int, fx.Node]:
    """The mix nodes by position; every position at most once."""
    found = [node for node in gm.graph.nodes if is_mix(node)]
    positions = [record_of(node).position for node in found]
    assert len(set(positions)) == len(positions)
    return dict(zip(positions, found))


def terms_of(source: fx.Node, embedding: fx.Node) -> list[fx.Node]:
    """The layer outputs that a block sum adds up, seen through the additions that the rewrite made."""
    if source is not embedding and op_name(source) == "add" and getattr(record_of(source), "role", "") == "partial":
        return [term for part in source.all_input_nodes for term in terms_of(part, embedding)]
    return [source]


def sources_by_count(num_layers: int, size: int) -> list[int]:
    """Number of sources at positions 1..L: stored rows, and the partial sum where a block is under way."""
    inner = [done // size + 1 + (done % size != 0) for done in range(1, num_layers)]
    return [*inner, -(-num_layers // size) + 1]


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_zero_queries_give_the_residual_network(num_blocks: int) -> None:
    """(a) Zero queries: the network is the pre-norm residual network, as eps goes to 0."""
    model = models.set_norm_eps(models.nanogpt(5, width=16, heads=2).double())
    ids = models.token_ids(2, 5)
    before = model(ids).detach()
    attnres_fx.convert(model, ids, num_blocks=num_blocks, eps=1e-30)
    assert models.relative(model(ids), before) <= 1e-12


def test_one_layer_a_block_is_full() -> None:
    """(b) S=1: every layer output is a source of its own, Eq. 1-4, without any notion of a block."""
    model = converted(5, layers_per_block=1)
    generator = torch.Generator().manual_seed(0)
    query = model.attnres.stream.query
    with torch.no_grad():
        query.copy_(torch.randn(query.shape, generator=generator))
    ids = models.token_ids(2, 5)
    values = [model.embed(ids)]
    h = values[0]
    for position, layer in enumerate(reference.nanogpt_layers(model), start=1):
        values.append(layer(h))
        scores = torch.stack([(v * query[position]).sum(-1) / (v.square().mean(-1) + 1e-6).sqrt() for v in values])
        weights = scores.exp() / scores.exp().sum(0)
        h = sum(w[..., None] * v for w, v in zip(weights, values))
    assert models.relative(model(ids), model.head(model.ln_f(h))) <= 1e-10
    by_blocks = converted(5, num_blocks=5)
    by_blocks.load_state_dict(model.state_dict())
    assert torch.equal(by_blocks(ids), model(ids))


@pytest.mark.parametrize("stored", [1, 2, 5])
def test_two_phase_equals_one_pass(stored: int) -> None:
    """(c) Two phases: softmax statistics over stored blocks, merged with the partial sum, give the one-pass mix."""
    generator = torch.Generator().manual_seed(stored)
    sources = [torch.randn(3, 4, 8, generator=generator, dtype=torch.float64) for _ in range(stored + 1)]
    query, gain = torch.randn(8, generator=generator).double(), torch.randn(8, generator=generator).double()
    expected = attnres_fx.mix(sources, query, gain)

    def logit(value: Tensor) -> Tensor:
        return torch.rsqrt(value.square().mean(-1) + 1e-6) * (value @ (query * gain))

    scores = torch.stack([logit(value) for value in sources[:-1]])
    m1, m2 = scores.amax(0), logit(sources[-1])
    l1 = (scores - m1).exp().sum(0)
    o1 = ((scores - m1).exp()[..., None] * torch.stack(sources[:-1])).sum(0)
    m = torch.maximum(m1, m2)
    e1, e2 = (m1 - m).exp(), (m2 - m).exp()
    merged = (e1[..., None] * o1 + e2[..., None] * sources[-1]) / (e1 * l1 + e2)[..., None]
    assert models.relative(merged, expected) <= 1e-14
    # The normalised form: one scalar a token.
    o1, p = o1 / l1[..., None], torch.sigmoid(m2 - m1 - l1.log())
    assert models.relative(o1 + p[..., None] * (sources[-1] - o1), expected) <= 1e-14
    assert models.relative(p, depth_weights(sources, query, gain)[-1]) <= 1e-13


@pytest.mark.parametrize("num_layers, size", SHAPES)
def test_source_counts(num_layers: int, size: int) -> None:
    """(d) Source counts of every position and of the output, in the graph, the partition and the weights."""
    expected = sources_by_count(num_layers, min(size, num_layers))
    model, gm, _ = shaped(num_layers, size)
    mixes = mixes_of(gm)
    assert [len(mixes[position].args[0]) for position in range(1, num_layers + 1)] == expected
    boundaries = (*range(size, num_layers, size), num_layers)
    assert [len(sources_at(boundaries, position)) for position in range(1, num_layers + 1)] == expected
    weights = attnres_fx.depth_weights(model, models.token_ids(2, 5))["stream"]
    assert weights.shape == (num_layers + 1, -(-num_layers // size) + 1)
    assert [int((row > 0).sum()) for row in weights] == [1, *expected]
    assert torch.allclose(weights.sum(1), torch.ones(num_layers + 1, dtype=torch.float64))
    for row, count in zip(weights[1:], expected):  # zero queries: uniform
        assert torch.allclose(row[:count], torch.full((count,), 1 / count, dtype=torch.float64))


@pytest.mark.parametrize("num_layers, size", SHAPES)
def test_embedding_once_and_every_output_once(num_layers: int, size: int) -> None:
    """(e) The embedding appears exactly once in every source set, never in a block sum; so does every layer output."""
    _, gm, _ = shaped(num_layers, size)
    mixes = mixes_of(gm)
    embedding = mixes[1].args[0][0]
    seen: dict[int, list[fx.Node]] = {}
    for position, mix in mixes.items():
        sources = mix.args[0]
        assert sources[0] is embedding and list(sources).count(embedding) == 1
        terms = [term for source in sources[1:] for term in terms_of(source, embedding)]
        assert embedding not in terms
        assert len(set(terms)) == len(terms) == position
        seen[position] = terms
    for position in range(2, num_layers + 1):
        assert seen[position][: position - 1] == seen[position - 1], "outputs come in order, one more each position"
    # No block sum reaches back to another mix: the plain chain of additions is gone.
    assert all(not is_mix(term) for term in seen[num_layers])


@pytest.mark.parametrize("factor", [1e-3, 0.5, 40.0])
def test_scaling_a_source(factor: float) -> None:
    """(f) Scaling one source by c > 0 leaves all weights as they are and scales its contribution alone."""
    generator = torch.Generator().manual_seed(3)
    sources = [torch.randn(2, 3, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    query, gain = torch.randn(8, generator=generator).double(), torch.randn(8, generator=generator).double()
    scaled = [*sources[:2], factor * sources[2], sources[3]]
    weights = depth_weights(sources, query, gain, eps=1e-30)
    assert models.relative(depth_weights(scaled, query, gain, eps=1e-30), weights) <= 1e-14
    difference = attnres_fx.mix(scaled, query, gain, eps=1e-30) - attnres_fx.mix(sources, query, gain, eps=1e-30)
    assert models.relative(difference, (factor - 1) * weights[2][..., None] * sources[2]) <= 1e-12


def test_one_source_is_the_identity() -> None:
    """(g) One-source site: no node is emitted, the first layer reads the embedding itself."""
    sources = [torch.randn(2, 3, 8, dtype=torch.float64)]
    assert torch.equal(attnres_fx.mix(sources, torch.randn(8, dtype=torch.float64)), sources[0])

    model = converted(6, layers_per_block=3)
    gm, _ = rewritten_graph(model)
    mixes = mixes_of(gm)
    assert sorted(mixes) == [1, 2, 3, 4, 5, 6]
    embedding = mixes[1].args[0][0]
    norms = [user for user in embedding.users if op_name(user) == "layer_norm"]
    assert len(norms) == 1, "the norm of the first layer, and of no other"
    assert all(len(mix.args[0]) >= 2 for mix in mixes.values())
    model(models.token_ids(2, 5)).sum().backward()
    assert not model.attnres.stream.query.grad[0].any()


@pytest.mark.parametrize("num_layers, size", SHAPES)
def test_boundary_layer_sees_no_zero_row(num_layers: int, size: int) -> None:
    """(h) A boundary layer reads complete blocks alone: no partial sum, no row of zeros."""
    _, gm, inputs = shaped(num_layers, size)
    made_zero = {"zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "full", "full_like"}
    assert not [node for node in gm.graph.nodes if op_name(node) in made_zero]
    mixes = mixes_of(gm)
    starts = [position for position in range(1, num_layers) if position % size == 0]
    for position in starts:
        kept = mixes[position].args[0]
        assert len(kept) == position // size + 1
        later = [mixes[p].args[0][: len(kept)] for p in range(position, num_layers + 1)]
        assert all(list(sources) == list(kept) for sources in later), "complete rows stay permanently"

    smallest: list[float] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if is_mix(n):
                smallest.extend(float(self.env[source].norm(dim=-1).min()) for source in n.args[0])
            return super().run_node(n)

    with torch.no_grad():
        Watch(gm, garbage_collect_values=False).run(*inputs)
    assert min(smallest) > 1e-2


def test_one_mix_a_position_whoever_reads_it() -> None:
    """Every reader of a position reads its one mix: routers, heads, hidden states."""

    class Watched(reference.NanoGPT):
        def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
            x = self.embed(ids)
            states = [x]
            for block in self.h:
                x = block(x)
                states.append(x)
            return self.head(self.ln_f(x)), states

    model = models.randomize(Watched(6, width=16, heads=2)).double()
    ids = models.token_ids(2, 5)
    attnres_fx.convert(model, ids, num_blocks=3)
    query = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.attnres.stream.query.copy_(query)
        value, states = model(ids)
        layers = reference.nanogpt_layers(model)
        expected = reference.attention_residuals(model.embed(ids), layers, query, None, [2, 4, 6])
    assert models.relative(states, [expected[0], expected[2], expected[4], expected[6]]) <= 1e-10
    assert models.relative(value, model.head(model.ln_f(expected[6]))) <= 1e-10


@pytest.mark.parametrize("called_before", [False, True])
def test_hidden_states_are_the_mixes(called_before: bool) -> None:
    """``output_hidden_states`` returns the mixes, b_0 first; the last is the output mix after the final norm."""
    model = models.exact_norms(models.llama()).double()
    ids, kwargs = models.token_ids(), {"use_cache": False, "output_hidden_states": True}
    if called_before:  # the first such call installs hooks, under a lock that cannot be traced
        model(ids, **kwargs)
    attnres_fx.convert(model, ids, kwargs, num_blocks=2)
    query = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.attnres.stream.query.copy_(0.3 * query)
        states = model(ids, **kwargs).hidden_states
        expected = reference.llama_mixes(model, ids, 0.3 * query, None, [3, 6])
        wanted = [expected[0], expected[2], expected[4], model.model.norm(expected[6])]
    assert len(states) == 4
    assert models.relative(list(states), wanted) <= 1e-10


def test_layers_that_begin_without_gradients_leave_them_to_the_others() -> None:
    """The rows of queries and gains are taken in front of all layers, not in the grad mode of the first."""

    class Lower(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.inner(x)

    model = models.nanogpt(6)
    model.h[0] = Lower(model.h[0])
    attnres_fx.convert(model, models.token_ids(), num_blocks=3)
    model(models.token_ids()).sum().backward()
    query = model.attnres.stream.query
    assert query.grad is not None and all(query.grad[position].abs().sum() > 0 for position in (3, 4, 5, 6))


@torch.library.custom_op("semantics_tests::add", mutates_args=())
def half_added(x: Tensor, y: Tensor) -> Tensor:
    return x + 0.5 * y


half_added.register_fake(lambda x, y: torch.empty_like(x))


def test_an_operator_of_another_library_is_no_addition_by_its_name() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.branch = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return half_added(x, self.branch(self.norm(x)))

    model = models.nanogpt(6)
    model.h = nn.ModuleList(Half() for _ in range(3))
    with pytest.raises(AttnResError):
        attnres_fx.convert(model, models.token_ids())


class TwoCalls(nn.Module):
    """Calls one tower twice in an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = models.nanogpt(4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower(ids) - 2 * self.tower(ids.flip(1))


class OneLayer(nn.Module):
    """Has one layer at three places."""

    def __init__(self) -> None:
        super().__init__()
        model = models.nanogpt(2)
        self.wte, self.ln_f, self.h = model.wte, model.ln_f, nn.ModuleList([model.h[0]] * 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


@pytest.mark.parametrize(("build", "owner", "layers"), [(TwoCalls, "tower", 4), (OneLayer, "", 6)])
def test_modules_that_are_called_again(build: Any, owner: str, layers: int) -> None:
    """One stream, one set of parameters; the sum at zero queries, and the definition with others, however it is called."""
    torch._dynamo.reset()
    model, ids = build().eval().double(), models.token_ids()
    with torch.no_grad():
        plain = model(ids)
        attnres_fx.convert(model, (ids,), num_blocks=2, mix_scale="sum")
        (plan,) = plans_of(model)
        assert (plan.owner, plan.num_layers) == (owner, layers)
        assert models.relative(model(ids), plain) < 1e-12
        disturbed(model)
        assert attnres_fx.verify(model, (ids,)).passed
        compiled = torch.compile(model, backend="attnres", options={"downstream": "aot_eager"})
        assert models.relative(compiled(ids), model(ids)) < 1e-12 < models.relative(model(ids), plain)
