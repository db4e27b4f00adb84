"""A model that spells attention residuals out is compiled with fused mixes: same values, same gradients, never converted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import handwritten, models
from support.handwritten import NearMiss, Network, Read
from support.models import relative
from torch import Tensor, fx, nn

import attnres_fx
from attnres_fx import backend
from attnres_fx.errors import HandWrittenMixError
from attnres_fx.passes.graph.vocabulary import is_mix

READS = {read.name: read for read in (*handwritten.READS, *handwritten.NEAR_MISSES)}
# "cat-2" makes its weights in float32 whatever the dtype; the operator rounds later.
TOLERANCES = {"cat-2": 1e-6}


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What the backend hands to the downstream compiler."""
    torch._dynamo.reset()
    seen: list[fx.GraphModule] = []
    hand_on = backend.compile_downstream

    def watch(gm: fx.GraphModule, *rest: Any) -> Any:
        seen.append(gm)
        return hand_on(gm, *rest)

    monkeypatch.setattr(backend, "compile_downstream", watch)
    return seen


def mixes(gm: fx.GraphModule) -> list[int]:
    """The number of sources of each mix."""
    return [len(node.args[0]) for node in gm.graph.nodes if is_mix(node)]


def network(read: Read, **settings: Any) -> Network:
    torch.manual_seed(0)
    return Network(read, **settings).double()


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(3))


def assert_equal_to_eager(model: nn.Module, args: tuple[Any, ...], downstream: str, tolerance: float) -> None:
    """Values and all gradients of the compiled model are those of the eager one; nothing was converted."""
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="attnres", options={"downstream": downstream}, fullgraph=True)
    torch.manual_seed(5)
    ours = compiled(*args)
    torch.manual_seed(5)
    theirs = plain(*args)
    assert relative(ours, theirs) <= tolerance
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert "attnres" not in dict(model.named_children())
    for (name, mine), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (mine.grad is None) == (wanted.grad is None), name
        if wanted.grad is not None and wanted.grad.any():
            assert relative(mine.grad, wanted.grad) <= tolerance, name


@pytest.mark.parametrize(("name", "settings", "sources"), [
    ("paper", {"block": 4}, [1, 2, 2, 2, 2, 3, 3]),
    ("paper", {"block": 2, "convention": "twice"}, None),
    ("list", {"block": 1, "convention": "none"}, [1, 2, 3, 4, 5, 6, 7]),
    ("cat-2", {"block": 4, "convention": "from-one"}, None),
])
def test_pseudocode_is_fused_and_not_converted(
    name: str, settings: dict[str, Any], sources: list[int] | None, compiled_graphs: list[fx.GraphModule]
) -> None:
    model = network(READS[name], **settings)
    assert_equal_to_eager(model, (tokens(),), "aot_eager", TOLERANCES.get(name, 1e-9))
    (graph,) = compiled_graphs
    assert len(mixes(graph)) == model.num_mixes()
    assert sources is None or mixes(graph) == sources


@pytest.mark.slow
def test_recompiled_for_another_length_and_under_inductor(compiled_graphs: list[fx.GraphModule]) -> None:
    model = network(READS["paper"], block=4)
    assert_equal_to_eager(model, (tokens(2, 5),), "inductor", 1e-9)
    compiled = torch.compile(model, backend="attnres", fullgraph=True)
    for length in (5, 7, 9, 1):
        assert relative(compiled(tokens(2, length)), model(tokens(2, length))) <= 1e-9
    assert all(len(mixes(graph)) == model.num_mixes() for graph in compiled_graphs)


@pytest.mark.parametrize("convention", [
    "empty", pytest.param("none", marks=pytest.mark.slow), "zeros", pytest.param("cumulative", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["cat-2", "list", "sigmoid", "l2", "eps-outside"])
def test_neither_a_mix_nor_a_near_miss_is_converted(
    name: str, convention: str, compiled_graphs: list[fx.GraphModule]
) -> None:
    model = network(READS[name], sublayers=8, block=4, convention=convention)
    assert_equal_to_eager(model, (tokens(),), "aot_eager", TOLERANCES.get(name, 1e-9))
    with pytest.raises(HandWrittenMixError):
        attnres_fx.convert(network(READS[name], sublayers=8, block=4, convention=convention), (tokens(),))


@pytest.mark.parametrize("kind", handwritten.KINDS)
def test_members_of_the_family_keep_their_meaning(kind: str, compiled_graphs: list[fx.GraphModule]) -> None:
    torch.manual_seed(1)
    rows = tuple(torch.randn(3, 4, 16, dtype=torch.float64) for _ in range(3))
    assert_equal_to_eager(NearMiss(kind).double(), rows, "aot_eager", 1e-9)
    assert mixes(compiled_graphs[0]) == ([3] if handwritten.KINDS[kind] else [])


@pytest.mark.slow
def test_inkling2_of_transformers(compiled_graphs: list[fx.GraphModule]) -> None:
    model, ids = models.inkling2(), models.token_ids()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="attnres", options={"downstream": "aot_eager"}, fullgraph=True)
    ours, theirs = compiled(ids, use_cache=False).logits, plain(ids, use_cache=False).logits
    assert relative(ours, theirs) <= 1e-5
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, mine), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if wanted.grad is not None and wanted.grad.norm() > 1e-6:
            assert relative(mine.grad, wanted.grad) <= 1e-4, name
    assert mixes(compiled_graphs[0]) == [2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    report = attnres_fx.analyze(model, (ids,), {"use_cache": False})
    assert not report.streams
    assert [mix.num_sources for mix in report.mixes] == mixes(compiled_graphs[0])
    with torch.no_grad():
        assert relative(compiled.generate(ids, max_new_tokens=3, do_sample=False).double(),
                        plain.generate(ids, max_new_tokens=3, do_sample=False).double()) == 0
