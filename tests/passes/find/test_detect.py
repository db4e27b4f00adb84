"""Detect: streams are found by data flow, whatever the spelling, and nothing else is taken for one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models
from support.dominators import bypassed
from support.graphs import WIDTH, Step, Toy, fingerprint, toy_input, trace
from torch import Tensor, fx, nn

from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.findings import find_marked
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.context import Context
from attnres_fx.passes.graph.vocabulary import is_active_dropout, op_name
from attnres_fx.passes.prepare.normalize import normalize

BOTH = ("dynamo", "export")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def found(model: nn.Module, *args: Any, tracer: str = "dynamo") -> list[Stream]:
    gm, _ = trace(model, *args, tracer=tracer)
    normalize(gm.graph, Context())
    return detect(gm.graph)


def only(streams: list[Stream], num_layers: int, terms: int = 1, placement: str = "pre") -> Stream:
    """The one stream, convertible, of this many layers."""
    assert [stream.num_layers for stream in streams] == [num_layers]
    (stream,) = streams
    assert stream.refusal() is None and stream.norm_placement == placement
    assert all(len(layer.terms) == terms for layer in stream.layers)
    return stream


PARALLEL: dict[str, Step] = {
    "x + a + m": lambda m, x, i: x + m.branch(x, i) + m.other(x, i),
    "x + (a + m)": lambda m, x, i: x + (m.branch(x, i) + m.other(x, i)),
    "(a + x) + m": lambda m, x, i: (m.branch(x, i) + x) + m.other(x, i),
    "a + (m + x)": lambda m, x, i: m.branch(x, i) + (m.other(x, i) + x),
    "a + m + x": lambda m, x, i: m.branch(x, i) + m.other(x, i) + x,
    "m.add_(a); x + m": lambda m, x, i: x + m.other(x, i).add_(m.branch(x, i)),
    "stack": lambda m, x, i: torch.stack([x, m.branch(x, i), m.other(x, i)]).sum(0),
    "copies between": lambda m, x, i: (x + m.branch(x, i)).contiguous() + m.other(x, i),
}


@pytest.mark.parametrize("tracer", BOTH)
@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_branches_are_one_layer(name: str, tracer: str) -> None:
    """Additions with no reader between them are one layer, in every association."""
    stream = only(found(Toy(PARALLEL[name]), toy_input(), tracer=tracer), 3, terms=2, placement="parallel")
    assert [layer.form for layer in stream.layers] == ["x + f1(x) + f2(x)"] * 3
    assert stream.function_preserving


def test_a_reader_between_makes_two_layers() -> None:
    def step(m: Any, x: Tensor, i: int) -> Tensor:
        x = x + m.branch(x, i)
        return x + m.other(x, i)

    only(found(Toy(step), toy_input()), 6)


BRANCHES: dict[str, Step] = {
    "dropout": lambda m, x, i: x + F.dropout(m.branch(x, i), 0.3, training=True),
    "cast": lambda m, x, i: x + m.branch(x, i).double().float(),
    "bfloat16": lambda m, x, i: x + m.branch(x, i).bfloat16(),
    "constant": lambda m, x, i: x + 0.5 * m.branch(x, i),
    "learned scale": lambda m, x, i: x + m.scale * m.branch(x, i),
    "learned scalar": lambda m, x, i: m.branch(x, i) * m.scale[0] + x,
    "scale and dropout": lambda m, x, i: x + m.scale * F.dropout(0.5 * m.branch(x, i), 0.1, training=True),
    "broadcast": lambda m, x, i: x + m.branch(x, i).mean(1, keepdim=True),
}


@pytest.mark.parametrize("tracer", BOTH)
@pytest.mark.parametrize("name", BRANCHES)
def test_what_is_done_to_a_branch_stays_in_it(name: str, tracer: str) -> None:
    stream = only(found(Toy(BRANCHES[name]), toy_input(), tracer=tracer), 3)
    assert stream.function_preserving
    if "dropout" in name:  # the raw operand: with pass-throughs taken off, dropout would vanish
        graph_nodes = {node for layer in stream.layers for node in _ancestors(layer.terms[0], layer.skip)}
        assert sum(is_active_dropout(node) for node in graph_nodes) == 3


def _ancestors(node: fx.Node, stop: fx.Node) -> set[fx.Node]:
    seen, pending = set(), [node]
    while pending:
        current = pending.pop()
        if current not in seen and current is not stop:
            seen.add(current)
            pending += current.all_input_nodes
    return seen


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


NOISE: dict[str, Step] = {
    "gelu by hand": lambda m, x, i: x + m.second[i](_gelu_new(m.first[i](m.norms[i](x)))),
    "rotary": lambda m, x, i: x + m.second[i](_rotate(m.first[i](m.norms[i](x)))),
    "bias by hand": lambda m, x, i: x + (m.first[i](m.norms[i](x)) + m.scale),
    "mask": lambda m, x, i: x + m.second[i](torch.softmax(_scores(m.first[i](m.norms[i](x))), -1) @ m.norms[i](x)),
    "norm by hand": lambda m, x, i: x + m.first[i](x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale),
}


def _rotate(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * 0.5 + torch.cat((-right, left), dim=-1) * 0.8


def _scores(x: Tensor) -> Tensor:
    return x @ x.transpose(-1, -2) + torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9)


@pytest.mark.parametrize("tracer", BOTH)
@pytest.mark.parametrize("name", NOISE)
def test_other_additions_are_no_streams(name: str, tracer: str) -> None:
    assert only(found(Toy(NOISE[name]), toy_input(), tracer=tracer), 3).function_preserving


class EncoderDecoder(nn.Module):
    """Two streams: the decoder's layers read the encoder's output in one branch of three."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Toy(lambda m, x, i: x + m.branch(x, i), 4)
        self.encoder.head = nn.Identity()
        self.decoder = Toy(lambda m, x, i: x + m.branch(x, i), 3, seed=1)
        self.cross = nn.Linear(WIDTH, WIDTH)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(source)
        d = self.decoder
        x = d.embed(target)
        for i in range(3):
            x = x + d.branch(x, i)
            x = x + torch.softmax(d.norms[i](x) @ self.cross(memory).transpose(1, 2), -1) @ memory
            x = x + d.other(x, i)
        return d.head(d.norm(x))


@pytest.mark.parametrize("tracer", BOTH)
def test_encoder_and_decoder_are_two_streams(tracer: str) -> None:
    streams = found(EncoderDecoder(), toy_input(), toy_input(2, 3), tracer=tracer)
    assert [(s.num_layers, s.norm_placement, s.refusal()) for s in streams] == [(4, "pre", None), (9, "pre", None)]
    assert streams[0].values[0] is not streams[1].values[0]
    assert not set(streams[0].values) & set(streams[1].values)


NESTED: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "one": lambda m, u, i: u + m.other(u, i),
    "one, projected": lambda m, u, i: m.first[i](u + m.other(u, i)),
    "two, projected": lambda m, u, i: m.first[i](_twice(m, u, i)),
    "two": lambda m, u, i: _twice(m, u, i),
}


def _twice(m: Any, u: Tensor, i: int) -> Tensor:
    u = u + m.other(u, i)
    return u + m.other(u, i)


@pytest.mark.parametrize("name", NESTED)
def test_nested_residual_inside_a_branch(name: str) -> None:
    """An addition inside a branch belongs to it; the stream starts at the embedding and has its own layers alone."""
    streams = found(Toy(lambda m, x, i: x + NESTED[name](m, m.branch(x, i), i), 4), toy_input())
    main = max(streams, key=lambda s: s.num_layers)
    assert (main.num_layers, main.refusal(), main.function_preserving) == (4, None, True)
    (position_zero_reader,) = main.readers[0]
    assert op_name(position_zero_reader) == "layer_norm" and op_name(main.values[0]) == "linear"
    additions = [node for stream in streams if stream is not main for node in stream.values[1:]]
    assert not set(additions) & set(main.values)
    if name.startswith("one"):
        assert streams == (main,), "a single addition inside a branch is not a stream of its own"


@pytest.mark.parametrize("read", [
    lambda x: torch.zeros_like(x), lambda x: torch.zeros(x.shape[0], x.shape[1], WIDTH),
    lambda x: x.new_zeros(WIDTH), lambda x: x.new_ones(WIDTH), lambda x: x.new_full((WIDTH,), 0.5),
    lambda x: torch.ones_like(x), lambda x: torch.zeros(WIDTH, dtype=x.dtype, device=x.device),
], ids=["zeros_like", "shape", "new_zeros", "new_ones", "new_full", "ones_like", "dtype"])
def test_shape_and_dtype_are_no_raw_reads(read: Callable[[Tensor], Tensor]) -> None:
    """A mask that is made in the likeness of the stream does not read its values."""
    streams = found(Toy(lambda m, x, i: x + m.second[i](m.branch(x, i) * (1 - read(x)))), toy_input())
    assert only(streams, 3).function_preserving


def _two_dimensional(m: Any, x: Tensor, i: int) -> Tensor:
    """The second half works on a stream of rank two, and gives it back in rank three."""
    x = x + m.branch(x, i)
    shape = x.shape
    x = x.reshape(-1, x.shape[-1])
    return (x + m.other(x, i)).view(shape)


def _time_first(m: Any, x: Tensor, i: int) -> Tensor:
    """The second half works on a stream with the first two dimensions exchanged."""
    x = x + m.branch(x, i)
    x = x.transpose(0, 1)
    return (x + m.other(x, i)).transpose(0, 1)


@pytest.mark.parametrize("tracer", BOTH)
@pytest.mark.parametrize("step", [_two_dimensional, _time_first])
def test_layout_changes_on_the_stream(step: Step, tracer: str) -> None:
    stream = only(found(Toy(step), toy_input(), tracer=tracer), 6)
    assert stream.width == WIDTH and stream.function_preserving


OBSTACLES: dict[str, tuple[Step, str]] = {
    "post-norm": (lambda m, x, i: m.norms[i](x + m.first[i](x)), "norm"),
    "rms post-norm by hand": (lambda m, x, i: _rms(x + m.first[i](x)), "norm"),
    "deep norm": (lambda m, x, i: 1.5 * x + m.branch(x, i), "scale"),
    "learned skip": (lambda m, x, i: m.scale * x + m.branch(x, i), "scale"),
    "scaled sum": (lambda m, x, i: (x + m.branch(x, i)) * 0.7, "scale"),
    "halved": (lambda m, x, i: (x + m.branch(x, i)) / 2, "scale"),
    "highway": (lambda m, x, i: torch.sigmoid(m.second[i](x)) * x + m.branch(x, i), "gate"),
    "activation": (lambda m, x, i: torch.relu(x + m.branch(x, i)), "operation"),
    "dropout on the stream": (lambda m, x, i: F.dropout(x + m.branch(x, i), 0.2, training=True), "operation"),
    "set item": (lambda m, x, i: _masked(x + m.branch(x, i)), "mutation"),
    "a half in place": (lambda m, x, i: _half(x + m.branch(x, i)), "mutation"),
}


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _masked(x: Tensor) -> Tensor:
    x[:, 0] = 0.0
    return x


def _half(x: Tensor) -> Tensor:
    torch.hsplit(x, [1])[0].mul_(0.5)
    return x


@pytest.mark.parametrize("tracer", BOTH)
@pytest.mark.parametrize("name", OBSTACLES)
def test_operations_on_the_stream_are_obstacles(name: str, tracer: str) -> None:
    step, kind = OBSTACLES[name]
    streams = found(Toy(step, 4), toy_input(), tracer=tracer)
    assert streams, "a stream that cannot be rewritten is found for what it is"
    assert all(stream.refusal() is not None and not stream.function_preserving for stream in streams)
    assert sum(stream.num_layers for stream in streams) in (3, 4)
    kinds = {obstacle.kind for stream in streams for obstacle in stream.obstacles}
    assert kind in kinds
    if name in ("deep norm", "post-norm"):
        assert kinds == {kind}


def test_readers_of_every_position() -> None:
    class Watched(Toy):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            x = self.embed(x)
            states = [x]
            for i in range(3):
                x = x + self.branch(x, i)
                states.append(x.detach() if i == 1 else x)
            return self.head(self.norm(x)), states

    (stream,) = found(Watched(lambda m, x, i: x), toy_input())
    assert [sorted(op_name(reader) or reader.op for reader in readers) for readers in stream.readers] == [
        ["layer_norm", "output"], ["layer_norm", "output"], ["detach", "layer_norm"], ["layer_norm", "output"]]
    assert not stream.function_preserving
    assert {position for position, _ in stream.raw_readers} == {1, 2, 3}


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)),
    lambda: nn.LSTM(6, 8),
    lambda: nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1)),
])
def test_no_stream(make: Callable[[], nn.Module]) -> None:
    gm, _ = trace(make(), toy_input(), tracer="export")
    assert detect(gm.graph) == ()


def test_detection_changes_nothing_and_repeats() -> None:
    gm, _ = trace(Toy(_two_dimensional), toy_input())
    normalize(gm.graph, Context())
    before = fingerprint(gm)
    first, second = detect(gm.graph), detect(gm.graph)
    assert fingerprint(gm) == before
    assert [s.values for s in first] == [s.values for s in second]


@pytest.mark.parametrize("work", [lambda gm: detect(gm.graph), lambda gm: find_marked(gm).rewritten()])
def test_the_tracers_own_graph_is_never_changed(work: Callable[[fx.GraphModule], Any]) -> None:
    import attnres_fx
    from attnres_fx.backend import attnres

    model = models.nanogpt(4, width=16, heads=2)
    attnres_fx.convert(model, models.token_ids(2, 5), num_blocks=2)
    seen = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        before = fingerprint(gm)
        work(gm)
        compiled = attnres(gm, inputs, options={"downstream": "eager"})
        seen.append(fingerprint(gm) == before)
        return compiled

    torch.compile(model, backend=backend)(models.token_ids(2, 5))
    assert seen == [True]
    gm, _ = capture(model, (models.token_ids(2, 5),), {})
    before = fingerprint(gm)
    find_marked(gm).rewritten()
    assert fingerprint(gm) == before


class SpelledOut(nn.Module):
    """Block attention residuals by hand: stacked sources, a softmax over them, a weighted sum."""

    def __init__(self, num_layers: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))
        self.queries = nn.Parameter(torch.randn(num_layers + 1, WIDTH))

    def mix(self, sources: list[Tensor], query: Tensor) -> Tensor:
        values = torch.stack(sources)
        weights = torch.einsum("d,n...d->n...", query, nn.functional.rms_norm(values, (WIDTH,))).softmax(0)
        return torch.einsum("n...,n...d->...d", weights, values)

    def forward(self, x: Tensor) -> Tensor:
        blocks, partial = [x], None
        for index, layer in enumerate(self.layers):
            sources = blocks if partial is None else [*blocks, partial]
            output = layer(nn.functional.rms_norm(self.mix(sources, self.queries[index]), (WIDTH,)))
            partial = output if partial is None else partial + output
            if (index + 1) % self.size == 0:
                blocks, partial = [*blocks, partial], None
        return self.mix(blocks if partial is None else [*blocks, partial], self.queries[-1])


@pytest.mark.parametrize("num_layers, size", [(4, 4), (4, 2), (4, 3), (8, 4), (16, 2)])
def test_partial_sums_of_hand_written_mixes_are_no_streams(num_layers: int, size: int) -> None:
    """Within a block only the partial sum is on the chain; one value of it in a mix is enough evidence."""
    torch._dynamo.reset()
    model, x = SpelledOut(num_layers, size), torch.randn(2, 4, WIDTH)
    assert not any(stream.refusal() is None for stream in found(model, x))
    compiled = torch.compile(model, backend="attnres", options={"downstream": "eager"})
    torch.testing.assert_close(compiled(x), model(x))
    assert not hasattr(model, "attnres")


def test_a_way_around_a_value_is_seen_by_dominators() -> None:
    """A branch that reads the embedding as well leads around all values between; where none does, each value dominates."""
    (straight,) = found(Toy(lambda m, x, i: x + m.branch(x, i), 4), toy_input())
    assert bypassed(straight) == []
    first: list[Tensor] = []

    def step(m: Any, x: Tensor, i: int) -> Tensor:
        first[i:] = [x] if i == 0 else []
        return x + m.branch(x, i) + (m.second[i](first[0]) if i == 2 else 0.0)

    (shortcut,) = found(Toy(step, 4), toy_input())
    assert shortcut.num_layers == 4 and bypassed(shortcut) == [1, 2]


@pytest.mark.parametrize("split", [
    lambda x: x.chunk(2, -1), lambda x: x.tensor_split(2, -1), lambda x: x.split_with_sizes([4, 4], -1)])
def test_parts_of_the_stream_are_read_raw(split: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Halves of a value scale with it, by whatever operator they are made: their reader is none that norms."""
    (stream,) = found(Toy(lambda m, x, i: x + m.first[i](torch.cat(split(x)[::-1], -1)), 3), toy_input())
    assert not stream.function_preserving and {position for position, _ in stream.raw_readers} == {1, 2}
