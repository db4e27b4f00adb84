"""Hand-written attention residuals become mix nodes with the same values and gradients; anything else stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import handwritten, models
from support.handwritten import Banked, NearMiss, Network, Packed, Read, SeveralQueries, Site, WithWeights
from support.passes import prepared, recognize
from torch import Tensor, fx, nn

from attnres_fx.passes._compat.inductor import run_aot_eager
from attnres_fx.passes.find.detect import detect
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.edit import copy_graph_module
from attnres_fx.passes.graph.record import Record, record_of
from attnres_fx.passes.graph.vocabulary import base_of, is_mix
from attnres_fx.passes.recognize.depth_reads import depth_reads
from attnres_fx.passes.recognize.replace import Recognized

READS = {read.name: read for read in handwritten.READS}
NEAR_MISSES = {read.name: read for read in handwritten.NEAR_MISSES}


class Recognizing:
    """A backend that recognises on a copy of the graph and runs the result."""

    def __init__(self, downstream: str = "eager", prepared: bool = True) -> None:
        self.downstream, self.prepared = downstream, prepared
        self.graphs: list[fx.GraphModule] = []
        self.found: list[list[Recognized]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        before = [node.format_node() for node in gm.graph.nodes]
        own = prepared(gm) if self.prepared else copy_graph_module(gm)
        self.found.append(recognize(own, inputs))
        own.graph.lint()
        self.graphs.append(own)
        assert [node.format_node() for node in gm.graph.nodes] == before
        return run_aot_eager(own, inputs) if self.downstream == "aot" else own.forward

    @property
    def sources(self) -> list[int]:
        return [entry.num_sources for entry in self.found[0]]

    def options(self, index: int = 0) -> tuple[Any, ...]:
        """(eps, logit scale, normalised values, output factor) of one mix."""
        args = self.found[0][index].node.args
        return tuple(args[3:])


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(3))


def rows(count: int = 3, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape or (2, 5, 16), generator=generator, dtype=dtype) for _ in range(count)]


def observe(function: Callable[..., Any], model: nn.Module, args: Sequence[Tensor]) -> list[Tensor]:
    """All outputs, and the gradients of all parameters and inputs."""
    own = [arg.detach().clone().requires_grad_() if arg.is_floating_point() else arg for arg in args]
    leaves = [*model.parameters(), *(arg for arg in own if arg.is_floating_point())]
    torch.manual_seed(0)
    output = function(*own)
    outputs = list(output) if isinstance(output, tuple) else [output]
    slopes = [torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape) for value in outputs]
    loss = sum((value * slope).sum() for value, slope in zip(outputs, slopes))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    found = [torch.full((), -1.0) if grad is None else grad for grad in grads]  # of no parameter's shape
    return [value.detach() for value in outputs] + found


def check(model: nn.Module, *args: Tensor, tolerance: float = 1e-10, **settings: Any) -> Recognizing:
    """Compile with recognition and compare with eager: values and all gradients, missing ones included."""
    torch._dynamo.reset()
    backend = Recognizing(**settings)
    wanted = observe(model, model, args)
    found = observe(torch.compile(model, backend=backend, fullgraph=True), model, args)
    assert len(backend.graphs) == 1
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(scale, 1e-4))
    return backend


def network(read: Read, **settings: Any) -> Network:
    torch.manual_seed(1)
    return Network(read, **{"sublayers": 4, **settings}).double()


# ------------------------------------------------------------------------------------------------ what is recognised


@pytest.mark.parametrize("name", READS)
def test_every_spelling_becomes_mix_nodes(name: str) -> None:
    read = READS[name]
    # A softmax in float32 is the model's own rounding, which the operator does not make in float64.
    backend = check(network(read), tokens(), tolerance=1e-5 if read.softmax == "float" else 1e-10)
    # exp(x - max(x)) of a lone source is 1 whatever its score is: nothing says that it is a mix.
    assert backend.sources == ([2, 2, 3, 3] if read.softmax == "exp" else [1, 2, 2, 3, 3])
    left = {"softmax", "exp", "stack", "einsum"}
    if read.softmax != "exp":
        assert not [node for node in backend.graphs[0].graph.nodes if node.name.split("_")[0] in left]


@pytest.mark.parametrize("name", ["paper", "upcast", "axis-2-matmul", "list", "exponentials"])
def test_float32_agrees_to_rounding(name: str) -> None:
    check(network(READS[name]).float(), tokens(), tolerance=2e-5)


@pytest.mark.parametrize("name", ["paper", "cat-2", "list-scaled"])
@pytest.mark.parametrize("prepared", [True, False])
def test_through_aot_and_without_normalization(name: str, prepared: bool) -> None:
    check(network(READS[name]), tokens(), tolerance=1e-5 if name == "cat-2" else 1e-10, downstream="aot", prepared=prepared)


@pytest.mark.parametrize(("convention", "block", "sources"), [
    ("empty", 2, [1, 2, 2, 3, 3, 4, 4]),
    ("empty", 4, [1, 2, 2, 2, 2, 3, 3]),
    ("twice", 2, [2, 3, 3, 4, 4, 5, 5]),
    ("from-one", 4, [1, 1, 1, 2, 2, 2, 2]),
    ("none", 1, [1, 2, 3, 4, 5, 6, 7]),
    ("none", 3, [1, 2, 2, 2, 3, 3, 3]),
    ("zeros", 3, [2, 2, 2, 3, 3, 3, 4]),
    ("cumulative", 2, [1, 2, 2, 3, 3, 4, 4]),
])
def test_conventions_keep_their_own_meaning(convention: str, block: int, sources: list[int]) -> None:
    model = network(READS["rsqrt"], sublayers=6, block=block, convention=convention)
    assert check(model, tokens()).sources == sources


@pytest.mark.parametrize("style", handwritten.LOOSE)
def test_further_spellings(style: str) -> None:
    # Of one source, the score of a lone source that is scaled by a parameter, or lost in an exponential, proves nothing.
    first = [] if style in {"logsumexp", "temperature", "two-queries"} else [1]
    assert check(handwritten.Loose(style).double(), *rows(1)).sources == [*first, 2, 3, 4]


def test_without_output_mix() -> None:
    assert check(network(READS["paper"], output=False), tokens()).sources == [1, 2, 2, 3]


@pytest.mark.parametrize("style", ["copied", "scatter", "grown", "split"])
def test_banks_become_lists_of_their_rows(style: str) -> None:
    backend = check(Banked(style).double(), *rows(1))
    assert backend.sources == [1, 2, 3, 4, 5]
    names = {str(node.target) for node in backend.graphs[0].graph.nodes}
    assert not any("setitem" in name or "scatter" in name or "cat" in name for name in names)


def test_bank_written_in_place_without_gradient() -> None:
    torch._dynamo.reset()
    model, backend = Banked("setitem").double(), Recognizing()
    (x,) = rows(1)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x), rtol=0, atol=1e-12)
    assert backend.sources == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("form", ["whole", "count", "unbound"])
def test_packed_tensors(axis: int, form: str) -> None:
    read = Read("packed", axis=axis, total="matmul")
    packed = torch.stack(rows(), axis)
    backend = check(Packed(read, count=2 if form == "count" else None, unbound=form == "unbound").double(), packed)
    assert backend.sources == [2 if form == "count" else 3]
    assert sum("unbind" in str(node.target) for node in backend.graphs[0].graph.nodes) == 1


def test_weights_that_are_read_elsewhere_stay() -> None:
    backend = check(WithWeights().double(), *rows())
    assert backend.sources == [3]
    names = [node.name for node in backend.graphs[0].graph.nodes]
    assert any("weights" in name or "softmax" in name for name in names)


@pytest.mark.parametrize("attention", [False, True])
def test_several_queries_are_one_mix(attention: bool) -> None:
    backend = check(SeveralQueries(attention=attention).double(), *rows())
    assert backend.sources == [3]
    assert backend.options() == (1e-6, 0.25 if attention else 1.0, attention, 1.0)
    assert list(backend.found[0][0].node.args[1].meta["example_value"].shape) == [3, 16]  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "options"), [
    ("scaled", (1e-6, 0.37, False, 1.0)),
    ("inverse-root", (1e-6, 0.25, False, 1.0)),
    ("divide", (1e-5, 1.0, False, 1.0)),
    ("default-eps", (torch.finfo(torch.float64).eps, 1.0, False, 1.0)),
    ("l2-eps-inside", (1e-6 / 16, 0.25, False, 1.0)),
])
def test_numbers_are_read_from_the_graph(name: str, options: tuple[Any, ...]) -> None:
    assert check(network(READS[name]), tokens()).options(1) == options


def test_default_eps_is_that_of_the_traced_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gm, _ = capture(network(READS["default-eps"]).to(dtype), (tokens(),), {})
        assert recognize(prepared(gm))[1].node.args[3] == torch.finfo(torch.float32).eps


def test_places_and_records() -> None:
    backend = check(network(READS["paper"]), tokens())
    assert [entry.module for entry in backend.found[0]] == [f"sites.{index}" for index in range(4)] + ["output"]
    for entry in backend.found[0]:
        assert entry.source.split(":")[0].endswith("handwritten.py")
        assert record_of(entry.node) == Record("mix")
        assert is_mix(entry.node) and "nn_module_stack" in entry.node.meta
    assert not recognize(backend.graphs[0])


def test_leaves_no_trace() -> None:
    gm, _ = capture(network(READS["paper"]), (tokens(),), {})
    gm = prepared(gm)
    state = torch.get_rng_state()
    with torch.no_grad(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(recognize(gm)) == 5
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ sizes and dtypes


@pytest.mark.parametrize("name", ["paper", "divide", "axis-minus-2-bmm", "upcast", "list", "exponentials-axis-2"])
def test_symbolic_sizes_stay_symbolic(name: str) -> None:
    torch._dynamo.reset()
    model, backend = network(READS[name]), Recognizing()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 7), (5, 20)):
            ids = tokens(batch, length)
            torch.testing.assert_close(compiled(ids), model(ids), rtol=0, atol=1e-11)
    assert len(backend.graphs) == 1 and len(backend.found[0]) >= 4


def test_symbolic_width_that_was_settled_later() -> None:
    torch._dynamo.reset()
    model, backend = Banked("grown").double(), Recognizing()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((2, 5, 16), (3, 7, 16)):
        (x,) = rows(1, *shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-11)
    assert len(backend.graphs) == 1 and backend.sources == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1)])
@pytest.mark.parametrize("name", ["paper", "rsqrt", "axis-minus-2-bmm", "list"])
def test_single_positions(shape: tuple[int, int], name: str) -> None:
    assert check(network(READS[name]), tokens(*shape)).sources == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_no_worse_than_eager(dtype: torch.dtype) -> None:
    for name in ("paper", "upcast", "cat-2"):
        model = network(READS[name]).to(dtype)
        with torch.no_grad():
            torch._dynamo.reset()
            backend = Recognizing()
            found = torch.compile(model, backend=backend, fullgraph=True)(tokens())
            eager, exact = model(tokens()), model.double()(tokens())
        assert found.dtype == dtype and len(backend.found[0]) == 5
        assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max()


class Upcast(nn.Module):
    """Stored rows in bfloat16, a running sum in float32, a result in float32 or narrowed."""

    def __init__(self, narrow: bool) -> None:
        super().__init__()
        self.site, self.narrow = Site(16, Read("upcast", axis=2, norm=handwritten.norm_rsqrt, total="matmul")), narrow

    def forward(self, first: Tensor, second: Tensor, partial: Tensor) -> Tensor:
        stored = torch.stack([first, second], dim=2)
        states = torch.cat([stored, partial.unsqueeze(2)], dim=2).float()
        mixed = self.site.read.read_stacked(states, self.site.query, self.site.gain)
        return mixed.to(first.dtype) if self.narrow else mixed


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("partial", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_keep_the_result_dtype(narrow: bool, partial: torch.dtype) -> None:
    first, second, third = rows(dtype=torch.bfloat16)
    backend = check(Upcast(narrow), first, second, third.to(partial), tolerance=2e-2 if narrow else 1e-2)
    assert backend.sources == [3]
    if partial == torch.bfloat16 and narrow:
        assert all(source.meta["example_value"].dtype == torch.bfloat16
                   for source in backend.found[0][0].node.args[0])  # type: ignore[union-attr]


def test_under_autocast() -> None:
    torch._dynamo.reset()
    model, backend = network(READS["paper"]).float(), Recognizing()

    def call(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ids)

    with torch.no_grad():
        found, wanted = torch.compile(call, backend=backend, fullgraph=True)(tokens()), call(tokens())
    assert found.dtype == wanted.dtype and len(backend.found[0]) == 5
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(("model", "shape"), [
    (WithWeights(512), (4, 512, 512)),
    (SeveralQueries(256, attention=True), (4, 512, 256)),
    (SeveralQueries(256), (3, 700, 256)),
])
def test_large_tensors_are_confirmed_at_fewer_positions(model: nn.Module, shape: tuple[int, ...]) -> None:
    sources = [torch.empty(1, 1, 1).expand(*shape) for _ in range(5)]
    with torch.no_grad():
        gm, _ = capture(model, sources, {})
    assert [entry.num_sources for entry in recognize(prepared(gm))] == [5]


class ChangedLater(nn.Module):
    """A source that is changed in place after the read copied it."""

    def __init__(self) -> None:
        super().__init__()
        self.site = Site(16, READS["rsqrt"])

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        own = first * 2
        mixed = self.site([own, second])
        own.mul_(3)
        return mixed + own


def test_sources_changed_in_place_after_the_read() -> None:
    assert check(ChangedLater().double(), *rows(2)).sources == [2]


@pytest.mark.parametrize("decomposed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exported_graphs(decomposed: bool) -> None:
    for name in ("paper", "upcast", "axis-minus-2-bmm", "cat-permuted", "list"):
        model = network(READS[name], sublayers=2)
        program = torch.export.export(model, (tokens(),), strict=False)
        program = program.run_decompositions() if decomposed else program
        gm = copy_graph_module(program.graph_module)
        assert [entry.num_sources for entry in recognize(gm)] == [1, 2, 2]
        program.graph_module.graph = gm.graph
        with torch.no_grad():
            torch.testing.assert_close(program.module()(tokens()), model(tokens()), rtol=0, atol=1e-11)


# --------------------------------------------------------------------------------------------------- near misses


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_as_they_are(name: str) -> None:
    backend = check(network(NEAR_MISSES[name]), tokens())
    # The normalised lone source of "l2" has weight 1: as a mix of one source it is the same identity.
    assert all(sources == 1 for sources in backend.sources)


@pytest.mark.parametrize("kind", handwritten.KINDS)
def test_members_of_the_family_are_fused_and_others_left_alone(kind: str) -> None:
    backend = check(NearMiss(kind).double(), *rows())
    assert backend.sources == ([3] if handwritten.KINDS[kind] else [])


def test_options_of_family_members() -> None:
    assert check(NearMiss("doubled").double(), *rows()).options() in {(1e-6, 1.0, False, 2.0), (1e-6, 1.0, False, 1.0)}
    assert check(NearMiss("normalised-values").double(), *rows()).options() == (1e-6, 1.0, True, 1.0)
    assert check(NearMiss("scaled-in-place").double(), *rows()).options() == (1e-6, 0.25, False, 1.0)


# ------------------------------------------------------------------------------------------------ ordinary models


@pytest.mark.parametrize("name", models.CASES)
def test_ordinary_models_hold_no_mix(name: str) -> None:
    model, args, kwargs = models.CASES[name].build()
    gm, _ = capture(model, args, kwargs)
    gm = prepared(gm)
    assert not depth_reads(gm.graph)
    assert not recognize(gm)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1)])
def test_attention_over_one_key_is_no_mix_of_one_source(implementation: str, shape: tuple[int, int]) -> None:
    model = models.llama()
    model.config._attn_implementation = implementation
    gm, _ = capture(model, (models.token_ids(*shape),), {"use_cache": False})
    gm = prepared(gm)
    assert not depth_reads(gm.graph)
    assert not recognize(gm)


def test_inkling2_of_transformers() -> None:
    model = models.inkling2()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

    backend = check(Logits(), models.token_ids(), tolerance=1e-4)
    # One read a branch but for the first attention, and one at the output; three queries before full attention.
    assert backend.sources == [2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert all(backend.options(index) == (1e-6, 32**-0.5, True, 1.0) for index in range(12))
    queries = [entry.node.args[1].meta["example_value"].dim() for entry in backend.found[0]]  # type: ignore[union-attr]
    assert queries.count(2) == 2


# ---------------------------------------------------------------------------------- what detection needs to know


def _free_streams(gm: fx.GraphModule) -> list[int]:
    """Layers of the streams that nothing forbids to convert: no obstacle, and no value in a depth read."""
    read = {source for found in depth_reads(gm.graph) for source in found.sources}
    return [stream.num_layers for stream in detect(gm.graph)
            if not stream.obstacles and not any(base_of(value) in read for value in stream.values)]


@pytest.mark.parametrize(("name", "convention"), [
    *((name, "empty") for name in ("paper", "rsqrt", "upcast", "cat-2", "list", "exponentials", *NEAR_MISSES)),
    *((name, convention) for name in ("list", "sigmoid", "eps-outside") for convention in ("none", "zeros", "cumulative")),
])
def test_partial_sums_are_no_streams_recognised_or_not(name: str, convention: str) -> None:
    read = READS.get(name) or NEAR_MISSES[name]
    gm, _ = capture(network(read, sublayers=8, block=4, convention=convention), (tokens(),), {})
    gm = prepared(gm)
    assert _free_streams(gm) == []
    recognize(gm)
    assert _free_streams(gm) == []


@pytest.mark.parametrize("kind", handwritten.KINDS)
def test_near_misses_are_depth_reads(kind: str) -> None:
    gm, _ = capture(NearMiss(kind), rows(dtype=torch.float32), {})
    (found,) = depth_reads(prepared(gm).graph)
    assert len(found.sources) == 3


@pytest.mark.parametrize("first, later, expected", [
    ((1e-3, 1.0), (1e-1, 1.0), [1, 1, 1]), ((1e-3, 1.0), (1e-3, 2.0), [1, 0])], ids=["eps", "scale"])
def test_a_number_that_a_call_changes_is_compiled_anew(
    first: tuple[float, float], later: tuple[float, float], expected: list[int]
) -> None:
    """Dynamo makes a number that has changed an input of the graph; eps and logit scale are constants of the operator,
    and guarded."""
    def function(early: Tensor, rows: Tensor, query: Tensor, eps: float, scale: float) -> Tensor:
        stacked = torch.stack([early, rows])
        keys = stacked * torch.rsqrt(stacked.pow(2).mean(-1, keepdim=True) + eps)
        weights = ((keys * query).sum(-1) * scale).softmax(0)
        return (weights.unsqueeze(-1) * stacked).sum(0)

    found: list[int] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        own = prepared(gm)
        found.append(len(recognize(own)))
        return own.forward

    generator = torch.Generator().manual_seed(0)
    tensors = [0.03 * torch.randn(2, 5, 24, generator=generator) for _ in range(2)] + [torch.randn(24, generator=generator)]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=keep, fullgraph=True)
    for numbers in (first, later, tuple(2 * two - one for one, two in zip(first, later))):
        torch.testing.assert_close(compiled(*tensors, *numbers), function(*tensors, *numbers))
    # A scale that is not a constant is not recognised, and needs no guard.
    assert found == expected
