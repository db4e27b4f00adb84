"""Models that are graphs already: of ``torch.fx.symbolic_trace``, ``torch.export`` and ``make_fx``."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models, reference
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import attnres_fx
from attnres_fx import errors


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


class Attention(nn.Module):
    """Causal self-attention in a style that ``symbolic_trace`` can follow: no loop over a value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.width, self.heads = width, heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.width, dim=2)
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = q.view(shape).transpose(1, 2), k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class DropsTheStream(Block):
    """Its dropout lies on the stream, and does nothing in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return self.mlp[3](x + self.mlp[2](self.mlp[1](self.mlp[0](self.ln_2(x)))))


class GPT(nn.Module):
    """nanoGPT, with tied weights."""

    def __init__(self, layers: int = 3, width: int = 16, block: type[nn.Module] = Block, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(64, width), nn.Embedding(64, width)
        self.h = nn.ModuleList(block(width, 2, dropout) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)
        self.lm_head.weight = self.wte.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(0, ids.size(1), device=ids.device))

    def forward(self, ids):  # type: ignore[no-untyped-def]  # torch.fx cannot pickle annotations that are strings
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def gpt(**settings: Any) -> Any:
    return models.randomize(GPT(**settings)).double().eval()


QUERY = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
AUTO = ({0: Dim.AUTO, 1: Dim.AUTO},)


def expected(model: Any, ids: Tensor, query: Tensor = QUERY) -> Tensor:
    """The logits by definition, in blocks of 3 layers, under "sum"."""
    layers: list[reference.LayerFunction] = []
    for block in model.h:
        layers.append(lambda x, b=block: b.attn(b.ln_1(x)))
        layers.append(lambda x, b=block: b.mlp(b.ln_2(x)))
    mixes = reference.attention_residuals(model.embed(ids), layers, query, None, [3, 6], mix_scale="sum")
    return model.lm_head(model.ln_f(mixes[-1]))


TRACERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "symbolic": lambda model, ids: fx.symbolic_trace(model),
    "export": lambda model, ids: torch.export.export(model, (ids,), dynamic_shapes=AUTO).module(),
    "export, strict": lambda model, ids: torch.export.export(model, (ids,), dynamic_shapes=AUTO, strict=True).module(),
    "make_fx": lambda model, ids: make_fx(model)(ids),
}


def converted(tracer: str, **settings: Any) -> tuple[Any, Any, Tensor]:
    """(the plain model, its converted graph with random queries, input)."""
    model, ids = gpt(**settings), models.token_ids(2, 5)
    graph = TRACERS[tracer](model, ids)
    attnres_fx.convert(graph, ids, num_blocks=2, mix_scale="sum")
    with torch.no_grad():
        graph.attnres.stream.query.copy_(QUERY)
    return model, graph, ids


@pytest.mark.parametrize("tracer", list(TRACERS))
def test_analyze(tracer: str) -> None:
    model, ids = gpt(), models.token_ids(2, 5)
    graph = TRACERS[tracer](model, ids)
    before = graph.code
    (stream,) = attnres_fx.analyze(graph, ids).streams
    assert (stream.num_layers, stream.width, stream.norm_placement) == (6, 16, "pre")
    assert stream.convertible and stream.function_preserving
    if tracer != "make_fx":  # which knows no modules
        assert [layer.module for layer in stream.layers] == ["h.0", "h.0", "h.1", "h.1", "h.2", "h.2"]
    assert graph.code == before


@pytest.mark.parametrize("tracer", ["symbolic", *(pytest.param(tracer, marks=pytest.mark.slow)
                                                  for tracer in ("export", "export, strict", "make_fx"))])
def test_convert(tracer: str) -> None:
    model, ids = gpt(), models.token_ids(2, 5)
    graph = TRACERS[tracer](model, ids)
    keys = list(graph.state_dict())
    assert attnres_fx.convert(graph, ids, num_blocks=2, mix_scale="sum") is graph
    assert [*keys, "attnres.stream.query", "attnres.stream.key_gain"] == list(graph.state_dict())
    assert not hasattr(model, "attnres")
    plain = model(ids)
    assert models.relative(graph(ids), plain) <= 1e-12
    with torch.no_grad():
        graph.attnres.stream.query.copy_(QUERY)
    assert models.relative(expected(model, ids), plain) > 0.3
    compiled = torch.compile(graph, backend="attnres", options={"downstream": "aot_eager"})
    for shape in ((2, 5), (3, 9)) if tracer != "make_fx" else ((2, 5),):
        other = models.token_ids(*shape)
        assert models.relative(graph(other), expected(model, other)) <= 1e-12
        assert models.relative(compiled(other), expected(model, other)) <= 1e-12
    check = attnres_fx.verify(graph, ids)
    assert check.passed and check.random_query <= 1e-12 and check <= 1e-12
    weights = attnres_fx.depth_weights(graph, ids)["stream"]
    assert weights.shape == (7, 3) and torch.allclose(weights.sum(1), torch.ones(7, dtype=torch.float64))
    assert [int((row > 0).sum()) for row in weights] == [1, 2, 2, 2, 3, 3, 3]
    with pytest.raises(errors.AlreadyConvertedError):
        attnres_fx.convert(graph, ids)
    report = attnres_fx.analyze(graph, ids)
    assert not report.streams and [mix.num_sources for mix in report.mixes] == [2, 2, 2, 3, 3, 3]


def _pickled(graph: Any) -> Any:
    stored = io.BytesIO()
    torch.save(graph, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


def _recompiled(graph: Any) -> Any:
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


# Whatever is done to a graph module: the rewritten graph is the graph.
WAYS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda graph: graph.forward,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": _pickled,
    "recompile": _recompiled,
    "symbolic_trace": fx.symbolic_trace,
    "Interpreter": lambda graph: fx.Interpreter(graph).run,
    "new GraphModule": lambda graph: fx.GraphModule(graph, graph.graph),
    "export": lambda graph: torch.export.export(graph, (models.token_ids(2, 5),)).module(),
    "aot_eager": lambda graph: torch.compile(graph, backend="aot_eager"),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_runs_the_mixes(way: str) -> None:
    model, graph, ids = converted("symbolic")
    made = WAYS[way](graph)
    assert models.relative(made(ids), expected(model, ids)) <= 1e-12
    if way in ("deepcopy", "pickle"):
        assert attnres_fx.verify(made, ids).passed


def test_training() -> None:
    """Gradients of queries, gains and shared weights are those of the definition."""
    model, graph, ids = converted("symbolic")
    other, query = copy.deepcopy(model), QUERY.clone().requires_grad_()
    expected(other, ids, query).square().mean().backward()
    for call in (graph, torch.compile(graph, backend="attnres", options={"downstream": "aot_eager"})):
        graph.zero_grad()
        call(ids).square().mean().backward()
        assert models.relative(graph.attnres.stream.query.grad, query.grad) <= 1e-10
        assert models.relative(model.wte.weight.grad, other.wte.weight.grad) <= 1e-10
        assert graph.attnres.stream.key_gain.grad[1:].norm(dim=-1).min() > 0


def test_dropout_of_a_branch_keeps_its_mode() -> None:
    model, graph, ids = converted("symbolic", dropout=0.5)
    for training in (False, True):
        model.train(training)
        graph.train(training)
        torch.manual_seed(1)
        value = graph(ids)
        torch.manual_seed(1)
        assert models.relative(value, expected(model, ids)) <= 1e-12
    assert models.relative(graph(ids), graph(ids)) > 1e-3


def test_dropout_on_the_stream_is_refused_in_either_mode() -> None:
    """A graph serves both modes: what drops nothing now must not be lost for training."""
    graph, ids = fx.symbolic_trace(gpt(block=DropsTheStream, dropout=0.5)), models.token_ids(2, 5)
    before = graph.code
    with pytest.raises(errors.StreamOperationError, match="Dropout"):
        attnres_fx.convert(graph, ids)
    assert graph.code == before and not hasattr(graph, "attnres")


def test_sizes_of_the_example_are_not_baked_in() -> None:
    """A branch that is the same for all sequences, in a batch of as many as there are heads, positions, or one."""

    class Shared(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x)).mean(0, keepdim=True)

    model = gpt(block=Shared)
    for batch in (2, 5):
        graph = fx.symbolic_trace(model)
        attnres_fx.convert(graph, models.token_ids(batch, 5), num_blocks=6, mix_scale="sum")
        for shape in ((2, 5), (5, 3), (1, 4)):
            ids = models.token_ids(*shape)
            assert models.relative(graph(ids), model(ids)) <= 1e-12


def test_keyword_inputs_and_wrong_inputs() -> None:
    model, ids = gpt(), models.token_ids(2, 5)
    graph = fx.symbolic_trace(model)
    attnres_fx.convert(graph, kwargs={"ids": ids}, num_blocks=2, mix_scale="sum")
    assert models.relative(graph(ids=ids), model(ids)) <= 1e-12
    assert attnres_fx.verify(graph, kwargs={"ids": ids}).passed
    for wrong in ((), (ids, ids), (ids.double(),)):
        with pytest.raises(errors.TracingError):
            attnres_fx.convert(fx.symbolic_trace(model), wrong)


def test_a_graph_inside_a_model() -> None:
    """It is rewritten as it is traced, as any other part of the model; also after its code is generated again."""
    plain, ids = gpt(), models.token_ids(2, 5)
    model: Any = nn.Sequential(fx.symbolic_trace(plain))
    attnres_fx.convert(model, ids, num_blocks=2, mix_scale="sum")
    with torch.no_grad():
        model.attnres.stream.query.copy_(QUERY)
    compiled = torch.compile(model, backend="attnres", options={"downstream": "aot_eager"})
    for call in (model, compiled):
        assert models.relative(call(ids), expected(plain, ids)) <= 1e-12
        model[0].recompile()
        assert models.relative(call(ids), expected(plain, ids)) <= 1e-12


def test_the_one_line_form_names_the_two_lines() -> None:
    """The forward of a graph module is generated again at will: a class swap would be lost silently."""
    graph = fx.symbolic_trace(gpt())
    with pytest.raises(Exception, match=r"convert first, then compile: attnres_fx\.convert"):
        torch.compile(graph, backend="attnres")(models.token_ids(2, 5))
    assert not hasattr(graph, "attnres")
