"""``verify`` and ``depth_weights``: check a converted model against its definition, and look at its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_fx.analysis import as_args
from attnres_fx.conversion import plans_of
from attnres_fx.passes._compat import pytree
from attnres_fx.passes._dynamo import unwrap
from attnres_fx.passes.capture import capture
from attnres_fx.passes.finish import finish
from attnres_fx.passes.graph import copy_graph_module
from attnres_fx.passes.lower import assign, lower_marked, markers_of, prepare
from attnres_fx.passes.oracle import OracleInterpreter
from attnres_fx.passes.plan import StreamPlan
from attnres_fx.passes.streams import Stream
from attnres_fx.passes.vocabulary import is_mix
from attnres_fx.runtime.errors import NotConvertedError
from attnres_fx.runtime.mix import depth_weights as weights_of

# Largest relative deviation that rounding explains, by the dtype of the model. Models round inside (Hugging Face norms
# go through float32), so that float64 does not give 1e-15.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Verification(float):
    """The relative deviation from the plain network at zero queries, with what else was checked.

    ``zero_query`` is the number itself; ``zero_query_sum`` the same with every mix multiplied by its number of sources,
    which must vanish but for rounding (under "paper" norms see the stream divided by that, and their eps weighs more).
    ``random_query`` is the relative deviation from the definition (Eq. 5-6 re-summed from the recorded layer outputs) with
    random queries and gains, which a wrong block boundary, swapped rows or a lost gain would raise. ``tolerance`` is the
    largest deviation that rounding explains; ``exact_start`` says whether zero queries should reproduce the plain network;
    ``passed`` is the verdict.
    """

    zero_query: float
    zero_query_sum: float
    random_query: float
    tolerance: float
    exact_start: bool
    passed: bool
    notes: tuple[str, ...]

    @staticmethod
    def of(zero: float, zero_sum: float, random: float, tolerance: float, exact: bool, notes: Sequence[str]) -> Verification:
        """Weigh the deviations."""
        result = Verification(zero)
        result.zero_query, result.zero_query_sum, result.random_query = zero, zero_sum, random
        result.tolerance, result.exact_start, result.notes = tolerance, exact, tuple(notes)
        result.passed = random <= tolerance and zero_sum <= tolerance
        return result

    def __str__(self) -> str:
        lines = [
            f"zero queries, against the plain network: relative deviation {self.zero_query:.1e}"
            + ("" if self.zero_query == self.zero_query_sum else f" ({self.zero_query_sum:.1e} as sums)"),
            f"random queries and gains, against Eq. 5-6 by definition: relative deviation {self.random_query:.1e} "
            f"(rounding explains up to {self.tolerance:.0e})",
            *self.notes,
            "passed" if self.passed else "FAILED",
        ]
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True)
class _Traced:
    """A converted model's graph with its markers, the values of its inputs, and where the parameters are among them."""

    gm: fx.GraphModule
    inputs: list[Any]

    def run(self, gm: fx.GraphModule, replaced: Mapping[str, Tensor], seed: int) -> Any:
        """Run ``gm`` on copies of the inputs, some replaced by name, with a fixed random state; changes nothing."""
        return _isolated(lambda values: gm(*values), self._values(replaced), seed)

    def interpret(self, interpreter: fx.Interpreter, replaced: Mapping[str, Tensor], seed: int) -> Any:
        return _isolated(lambda values: interpreter.run(*values, enable_io_processing=False), self._values(replaced), seed)

    def _values(self, replaced: Mapping[str, Tensor]) -> list[Any]:
        names = [node.name for node in self.gm.graph.nodes if node.op == "placeholder"]
        values = [replaced.get(name, value) for name, value in zip(names, self.inputs)]
        return [v.detach().clone() if isinstance(v, Tensor) else v for v in values]


def _isolated(call: Any, values: list[Any], seed: int) -> Any:
    devices = [v.device.index for v in values if isinstance(v, Tensor) and v.device.type == "cuda"]
    with torch.no_grad(), torch.random.fork_rng(sorted({d for d in devices if d is not None})):
        torch.manual_seed(seed)
        return call(values)


def verify(model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None, *, seed: int = 0) -> Verification:
    """Check a converted model on ``model(*args, **kwargs)``, with functional parameters: the model is not changed.

    Two oracles: at zero queries the rewritten graph against the plain residual network; with random queries and gains
    against the definition, evaluated outside the rewrite. Returns a float, the first relative deviation, that carries the
    rest and prints as a few lines.

    Raises: NotConvertedError for a plain model; SitesChangedError and its kin where the graph is not the converted one.
    """
    model = unwrap(model)
    plans = plans_of(model)
    if isinstance(model, fx.GraphModule):
        from attnres_fx.exported_verification import verify_program  # which builds on this file
        from attnres_fx.graph_modules import program_of

        return verify_program(program_of(model, as_args(args), kwargs or {}, plans), seed=seed)
    gm, inputs = capture(model, as_args(args), kwargs or {})
    if not markers_of(gm):
        raise NotConvertedError("this call of the model does not reach a converted stream",
                                remedy="verify with the inputs that the model is used with")
    traced = _Traced(gm, inputs)
    plain = _without_markers(gm)
    rewritten, _ = lower_marked(gm)
    marked = prepare(gm)
    assignments = assign(marked)

    generator = torch.Generator().manual_seed(seed)
    at_zero: dict[str, Tensor] = {}
    at_random: dict[str, Tensor] = {}
    by_name = {node.name: value for node, value in zip(_placeholders(gm), inputs)}
    for assignment in assignments:
        query = by_name[assignment.query.name]
        at_zero[assignment.query.name] = torch.zeros_like(query)
        at_random[assignment.query.name] = _normal(query, generator) * (2.0 / query.shape[-1] ** 0.5)
        if assignment.key_gain is not None:
            gain = by_name[assignment.key_gain.name]
            at_zero[assignment.key_gain.name] = torch.ones_like(gain)
            at_random[assignment.key_gain.name] = 1 + 0.3 * _normal(gain, generator)

    expected = traced.run(plain, {}, seed)
    zero = zero_sum = deviation(traced.run(rewritten, at_zero, seed), expected)
    paper = any(plan.mix_scale == "paper" for plan in plans)
    if paper:
        zero_sum = deviation(traced.run(lower_marked(_as_sums(gm))[0], at_zero, seed), expected)
    parameters = [(a.stream, a.plan, at_random[a.query.name],
                   None if a.key_gain is None else at_random[a.key_gain.name]) for a in assignments]
    oracle = OracleInterpreter(_without_markers(marked, erase_in_place=True), parameters)
    random = deviation(traced.run(rewritten, at_random, seed), traced.interpret(oracle, at_random, seed))
    streams = [assignment.stream for assignment in assignments]
    tolerance = max(_ROUNDING.get(dtype, 1e-4) for dtype in _dtypes(model))
    exact = not paper or all(stream.function_preserving for stream in streams)
    return Verification.of(zero, zero_sum, random, tolerance, exact, _notes(paper, streams))


def _as_sums(gm: fx.GraphModule) -> fx.GraphModule:
    """The marked graph with every plan under ``mix_scale="sum"``."""
    gm = copy_graph_module(gm)
    for marker in markers_of(gm):
        query, key_gain, text = marker.args
        marker.args = (query, key_gain, replace(StreamPlan.from_json(str(text)), mix_scale="sum").to_json())
    return gm


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    own = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and not name.startswith("attnres.")}
    return own or {torch.float32}


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _without_markers(gm: fx.GraphModule, erase_in_place: bool = False) -> fx.GraphModule:
    """The plain network of a marked graph."""
    gm = gm if erase_in_place else copy_graph_module(gm)
    for marker in markers_of(gm):
        gm.graph.erase_node(marker)
    return finish(gm)


def deviation(result: Any, reference: Any) -> float:
    """The largest relative deviation among the floating-point tensors of two outputs of one structure."""
    largest = 0.0
    for ours, theirs in zip(pytree.tree_leaves(result), pytree.tree_leaves(reference), strict=True):
        if not isinstance(ours, Tensor) or not ours.is_floating_point() or ours.numel() == 0:
            continue
        a, b = ours.double(), theirs.double()
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)):
            return float("inf")
        a, b = a[finite], b[finite]
        scale = b.norm()
        distance = float((a - b).norm() / scale) if scale > 0 else float((a - b).norm())
        largest = max(largest, distance)
    return largest


def _notes(paper: bool, streams: Sequence[Stream]) -> list[str]:
    notes = []
    for stream in streams:
        if not paper:
            continue
        if stream.function_preserving:
            notes.append(f"stream '{stream.name}' is mixed as a mean: its norms see it divided by the number of sources, "
                         "which changes nothing but the weight of their eps; mix_scale='sum' avoids that")
        else:
            position, node = stream.raw_readers[0]
            reader = "the model's output" if node.op == "output" else f"'{node.name}'"
            notes.append(f"stream '{stream.name}' is not function-preserving under mix_scale='paper': {reader} reads "
                         f"position {position} without a norm, and sees a mean; mix_scale='sum' starts exactly")
    return notes


def depth_weights(
    model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None, *, seed: int = 0
) -> dict[str, Tensor]:
    """The softmax weights of a converted model on ``model(*args, **kwargs)``, averaged over all tokens.

    Returns, per stream name, a tensor [L+1, N+1]: row p is the mix at position p; column 0 is the embedding b_0, column n
    block n, complete or as its partial sum so far; 0 where a position does not read that source. Rows sum to one.

    Raises: NotConvertedError for a plain model.
    """
    model = unwrap(model)
    plans = {plan.name: plan for plan in plans_of(model)}
    if isinstance(model, fx.GraphModule):
        from attnres_fx.graph_modules import recorded  # which builds on this file

        rewritten, inputs = recorded(model, as_args(args), kwargs or {})
        gm = rewritten
    else:
        gm, inputs = capture(model, as_args(args), kwargs or {})
        rewritten, _ = lower_marked(gm)
    collector = _WeightCollector(rewritten, plans)
    _Traced(gm, inputs).interpret(collector, {}, seed)
    return collector.weights


class _WeightCollector(fx.Interpreter):
    """Runs a rewritten graph and keeps the weights of every mix."""

    def __init__(self, gm: fx.GraphModule, plans: Mapping[str, StreamPlan]) -> None:
        super().__init__(gm)
        self.weights: dict[str, Tensor] = {}
        for name, plan in plans.items():
            table = torch.zeros(plan.num_layers + 1, plan.num_blocks + 1, dtype=torch.float64)
            table[0, 0] = 1.0
            self.weights[name] = table

    def run_node(self, n: fx.Node) -> Any:
        record = n.meta.get("attnres")
        if is_mix(n) and record is not None:
            sources, query, key_gain, eps, logit_scale, *_ = self.fetch_args_kwargs_from_env(n)[0]
            weights = weights_of(sources, query, key_gain, eps=eps, logit_scale=logit_scale)
            mean = weights.flatten(1).double().mean(1).cpu()
            self.weights[record["stream"]][record["position"], : len(mean)] = mean
        return super().run_node(n)
