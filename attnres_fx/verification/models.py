"""``verify`` and ``depth_weights``: check a converted model against its definition, and show its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnres_fx.converted import plans_of
from attnres_fx.graph_modules import program_of, recorded
from attnres_fx.passes._compat.dynamo import unwrap
from attnres_fx.passes.find.streams import Stream
from attnres_fx.passes.findings import find_marked
from attnres_fx.passes.graph.capture import capture
from attnres_fx.passes.graph.edit import copy_graph_module
from attnres_fx.passes.graph.record import record_of
from attnres_fx.passes.graph.vocabulary import is_mix
from attnres_fx.passes.rewrite.match import markers_of
from attnres_fx.passes.rewrite.oracle import OracleInterpreter
from attnres_fx.passes.rewrite.plan import StreamPlan
from attnres_fx.planning import as_args, weight_dtypes
from attnres_fx.runtime.errors import NotConvertedError
from attnres_fx.runtime.mix import depth_weights as weights_of
from attnres_fx.verification.programs import verify_program
from attnres_fx.verification.verdict import (
    Verification,
    as_sums,
    deviation,
    parameters_of,
    tolerance_for,
    trial_values,
)


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

    Raises: NotConvertedError for a plain model; SitesChangedError and similar errors if the graph is not the converted one.
    """
    model = unwrap(model)
    plans = plans_of(model)
    if isinstance(model, fx.GraphModule):
        return verify_program(program_of(model, as_args(args), kwargs or {}, plans), seed=seed)
    gm, inputs = capture(model, as_args(args), kwargs or {})
    if not markers_of(gm.graph):
        raise NotConvertedError("this call of the model does not reach a converted stream",
                                remedy="verify with the inputs that the model is used with")
    traced = _Traced(gm, inputs)
    found = find_marked(gm)
    rewritten = found.rewritten()
    by_name = {node.name: value for node, value in zip(_placeholders(gm), inputs)}
    generator = torch.Generator().manual_seed(seed)
    at_zero: dict[str, Tensor] = {}
    at_random: dict[str, Tensor] = {}
    for assignment in found.assignments:
        for node, kind in ((assignment.query, "query"), (assignment.key_gain, "key_gain")):
            if node is not None:
                at_zero[node.name], at_random[node.name] = trial_values(kind, by_name[node.name], generator)

    # The plain network as it was traced, before any pass.
    expected = traced.run(_without_markers(gm), {}, seed)
    zero = zero_sum = deviation(traced.run(rewritten, at_zero, seed), expected)
    paper = any(plan.mix_scale == "paper" for plan in plans)
    if paper:
        zero_sum = deviation(traced.run(as_sums(rewritten), at_zero, seed), expected)
    plain = found.plain()
    oracle = OracleInterpreter(plain.gm, parameters_of(plain, lambda node: at_random[node.name]))
    random = deviation(traced.run(rewritten, at_random, seed), traced.interpret(oracle, at_random, seed))
    streams = [assignment.stream for assignment in found.assignments]
    exact = not paper or all(stream.function_preserving for stream in streams)
    return Verification.of(zero, zero_sum, random, tolerance_for(weight_dtypes(model)), exact, _notes(paper, streams))


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _without_markers(gm: fx.GraphModule) -> fx.GraphModule:
    """The plain network of a marked graph."""
    plain = copy_graph_module(gm)
    for marker in markers_of(plain.graph):
        plain.graph.erase_node(marker)
    plain.recompile()
    return plain


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
        rewritten, inputs = recorded(model, as_args(args), kwargs or {})
        gm = rewritten
    else:
        gm, inputs = capture(model, as_args(args), kwargs or {})
        rewritten = find_marked(gm).rewritten()
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
        record = record_of(n)
        if is_mix(n) and record is not None:
            sources, query, key_gain, eps, logit_scale, *_ = self.fetch_args_kwargs_from_env(n)[0]
            weights = weights_of(sources, query, key_gain, eps=eps, logit_scale=logit_scale)
            mean = weights.flatten(1).double().mean(1).cpu()
            self.weights[str(record.stream)][record.position, : len(mean)] = mean
        return super().run_node(n)
