"""The operators that write into given tensors: native and reference, against their functional siblings, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.files_entered import files_entered
from support.into_calls import BASES, Call, arena, check, make
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from attnres_fx.runtime.cpu import build, native
from attnres_fx.runtime.into import INTO
from attnres_fx.runtime.operators import VARIANTS, operator_of

NATIVE = pytest.mark.skipif(build.compiler() is None and not build.is_built(),
                            reason="no C++ compiler here, and no library built before")
WRITING = [pytest.param("", marks=NATIVE, id="native"), pytest.param("_reference", id="reference")]
TYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _loaded() -> None:
    native.ensure()


def test_every_forward_has_its_sibling() -> None:
    assert set(INTO) == {operator_of(base, variant) for base in BASES for variant in VARIANTS}
    for functional, into in INTO.items():
        ours, theirs = into._schema, functional._schema
        assert ours.name.replace("_into", "") == theirs.name
        given = [(argument.name, str(argument.type)) for argument in ours.arguments if not argument.kwarg_only]
        assert given == [(argument.name, str(argument.type)) for argument in theirs.arguments]
        written = [argument for argument in ours.arguments if argument.kwarg_only]
        assert written and all(argument.is_write for argument in written)
        assert not any(argument.is_write for argument in ours.arguments if not argument.kwarg_only) and not ours.returns


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("count, shape", [(2, (512,)), (4, (1, 512)), (9, (2, 3, 40)), (33, (2, 1000)), (3, (5, 1))])
@pytest.mark.parametrize("variant", WRITING)
@pytest.mark.parametrize("base", BASES)
def test_the_same_bits(base: str, variant: str, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for normalize in (False, True):
        check(make(base, count, shape, dtype, normalize=normalize, early=normalize), variant)
    check(make(base, count, shape, dtype, queries=1 if base in ("mix_phase2", "mix_norm") else 5, early=True, bare=True),
          variant)
    check(make(base, count, shape, dtype, delta=False), variant)


@pytest.mark.parametrize("count", [1, 2, 24, 25, 49, 64])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("variant", WRITING)
def test_the_partial_sum_in_place(variant: str, early: bool, count: int) -> None:
    """Sources enough for several groups of a sweep; one source alone is for the reference, unless there is an early mix."""
    for dtype in (*TYPES, torch.float16, torch.float64):
        check(make("mix_norm", count, (3, 1000), dtype, early=early), variant)


@NATIVE
def test_in_place_on_several_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(make("mix_norm", 9, (64, 520), torch.bfloat16))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", WRITING)
def test_no_positions_and_several_dtypes(variant: str, base: str) -> None:
    check(make(base, 3, (0, 8)), variant)
    call = make(base, 3, (4, 8), delta=False)
    sources = next(argument for argument in call.arguments if isinstance(argument, list))
    sources[0] = sources[0].bfloat16()
    check(call, variant)


class _Seen(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@NATIVE
@pytest.mark.parametrize("base", BASES)
def test_native_kernels_answer_and_autograd_hears_of_it(base: str) -> None:
    """No Python on the way, nothing but the operator, and the versions of what was written go up."""
    call = make(base, 4, (2, 16), early=True)
    written = arena(call.functional())
    outputs = call.named(written.outputs)
    operator = INTO[operator_of(base)]
    assert not {"into.py", "operators.py"} & files_entered(lambda: operator(*call.arguments, **outputs))
    for variant in ("", "_reference"):
        before = [tensor._version for tensor in written.outputs]
        with torch.no_grad():
            call.into(variant, outputs)
        assert all(tensor._version > old for tensor, old in zip(written.outputs, before, strict=True))
    seen = _Seen()
    with seen:
        operator(*call.arguments, **outputs)
    assert seen.names == [operator.name()]


def spoilt(call: Call, change: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """The outputs, with one after the other changed."""
    made = [torch.empty_like(tensor) for tensor in call.functional()]
    return [call.named([change(tensor) if i == place else tensor for i, tensor in enumerate(made)])
            for place in range(len(made))]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", WRITING)
def test_refuses_what_it_cannot_write(variant: str, base: str) -> None:
    call = make(base, 3, (4, 8), early=True)
    for change, message in (
        (lambda tensor: tensor.new_empty((3, *tensor.shape[1:])), "has the shape"),
        (lambda tensor: tensor.new_empty((1, *tensor.shape)), "has the shape"),
        (lambda tensor: tensor.half(), "has the dtype"),
        (lambda tensor: tensor.new_empty((*tensor.shape, 2))[..., 0], "contiguous"),
        (lambda tensor: tensor.to("meta"), "the device"),
    ):
        for outputs in spoilt(call, change):
            with pytest.raises(ValueError, match=message):
                call.into(variant, outputs)
            if message in ("has the shape", "has the dtype"):
                with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
                    call.into(variant, outputs)


def overlapping() -> list[tuple[str, Call, dict[str, Any]]]:
    """Calls that would read what they have written: (name, call, outputs)."""
    cases = []
    whole = torch.randn(3, 4, 8)
    for base in ("mix", "mix_phase2", "mix_norm", "mix_phase1"):
        call = make(base, 3, (4, 8), early=base == "mix_norm")
        lists = [argument for argument in call.arguments if isinstance(argument, list)]
        made = [torch.empty_like(tensor) for tensor in call.functional("_reference")]
        for name, place, target in (("first source", 0, whole[1]), ("half a row", 1, whole.view(-1)[12:44].view(4, 8)),
                                    ("transposed", 2, whole[1])):
            sources = list(lists[0])
            sources[place] = whole[1] if name != "transposed" else whole[1].view(8, 4).t()
            arguments = [sources if argument is lists[0] else argument for argument in call.arguments]
            key, index = ("partial_out", 1) if name == "transposed" and base == "mix_norm" else (None, 0)
            outputs = call.named([target if i == index else tensor for i, tensor in enumerate(made)])
            cases.append((f"{base}: {name} {key or ''}", Call(base, arguments), outputs))
        if base == "mix_norm":
            cases.append(("mix_norm: twice", call, call.named([made[0], made[0]])))
        if base == "mix_phase1":
            cases.append(("mix_phase1: twice", call, call.named([made[0], made[0].view(-1)[:4]])))
    gaps = torch.randn(4, 2, 8)
    call = make("mix", 2, (4, 8))
    cases.append(("mix: in the gaps", Call("mix", [[call.arguments[0][0], gaps[:, 0]], *call.arguments[1:]]),
                  {"mixed_out": gaps.view(-1)[8:40].view(4, 8)}))
    return cases


@NATIVE
@pytest.mark.parametrize("name, call, outputs", [pytest.param(*case, id=case[0]) for case in overlapping()])
def test_refuses_to_write_over_what_it_reads(name: str, call: Call, outputs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="overlaps"):
        call.into("", outputs)


@pytest.mark.parametrize("variant", WRITING)
def test_refuses_what_is_missing_or_too_much(variant: str) -> None:
    for delta in (False, True):
        call = make("mix_norm", 3, (4, 8), delta=delta)
        normed = torch.empty(4, 8)
        with pytest.raises(ValueError, match="writes"):
            call.into(variant, {"normed_out": normed, "partial_out": None if delta else torch.empty(4, 8)})
    call = make("mix_phase1", 3, (4, 8), queries=2)
    rows, lse = [torch.empty(4, 8) for _ in range(3)], [torch.empty(4) for _ in range(3)]
    for outputs in ((rows[:1], lse[:2]), (rows, lse[:1]), (rows, lse)):
        with pytest.raises(ValueError):
            call.into(variant, {"mixed_out": outputs[0], "lse_out": outputs[1]})
    call.arguments[3] = -1.0
    with pytest.raises(ValueError, match="eps"):
        call.into(variant, {"mixed_out": rows[:2], "lse_out": lse[:2]})


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", WRITING)
def test_refuses_to_drop_gradients(variant: str, base: str) -> None:
    call = make(base, 3, (4, 8), early=True)
    wanted = call.functional(variant)
    outputs = call.named([torch.empty_like(tensor) for tensor in wanted])
    lists = [argument for argument in call.arguments if isinstance(argument, list)]
    query = next(argument for argument in call.arguments if isinstance(argument, Tensor) and argument.ndim <= 2
                 and argument.shape[-1] == 8)
    for leaf in (lists[0][1], query):
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match=r"_into\S* writes into .* no gradient"):
            call.into(variant, outputs)
        with torch.no_grad():
            call.into(variant, outputs)
        leaf.requires_grad_(False)
    written = [tensor for given in outputs.values() for tensor in (given if isinstance(given, list) else [given])]
    assert all(torch.equal(tensor, other) for tensor, other in zip(written, wanted, strict=True))
    with forward_ad.dual_level():
        call.into(variant, outputs)
        lists[0][0] = forward_ad.make_dual(lists[0][0], torch.ones(4, 8))
        with pytest.raises(RuntimeError, match="no gradient"):
            call.into(variant, outputs)


@pytest.mark.parametrize("variant", WRITING)
def test_refuses_transforms(variant: str) -> None:
    call = make("mix", 2, (4, 8))
    sources, *rest = call.arguments

    def written(row: Tensor) -> Tensor:
        out = torch.zeros(4, 8)
        Call("mix", [[row, sources[1]], *rest]).into(variant, {"mixed_out": out})
        return out.sum()

    for transform in (torch.func.grad(written), torch.func.vmap(written)):
        with pytest.raises(RuntimeError, match="no gradient"):
            transform(sources[0] if transform.__name__ != "vmap" else sources[0].expand(2, 4, 8))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", WRITING)
def test_the_operator(variant: str, base: str) -> None:
    for given in ({"early": True}, {"delta": False, "bare": True}):
        call = make(base, 3, (4, 8), **given)
        outputs = call.named([torch.empty_like(tensor) for tensor in call.functional()])
        torch.library.opcheck(INTO[operator_of(base, variant)], (*call.arguments,), outputs,
                              test_utils=("test_schema", "test_faketensor"))


@NATIVE
@pytest.mark.parametrize("base", BASES)
def test_in_a_compiled_graph(base: str) -> None:
    """Through auto_functionalized_v2 and Inductor, into views of one buffer that the graph makes."""
    call = make(base, 3, (4, 8), early=True)
    wanted = call.functional()
    operator = INTO[operator_of(base)]

    def run(arguments: list[Any]) -> list[Tensor]:
        buffer = torch.empty(sum(tensor.numel() for tensor in wanted))
        parts, end = [], 0
        for tensor in wanted:
            parts.append(buffer[end : end + tensor.numel()].view(tensor.shape))
            end += tensor.numel()
        operator(*arguments, **call.named(parts))
        return [part.clone() for part in parts]

    with torch.no_grad():
        made = torch.compile(run, fullgraph=True)(call.arguments)
    assert all(torch.equal(tensor, other) for tensor, other in zip(made, wanted, strict=True))


def test_where_no_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for every device, taken by hand."""
    from attnres_fx.runtime import into

    monkeypatch.setattr(native, "ensure", lambda: False)
    for family in into._FAMILIES:
        call = make(family.base, 3, (4, 8), early=True)
        placed = arena(call.functional("_reference"))
        into.native_or(into.partial(into._reference, family), f"{family.base}_into", *call.arguments,
                       **call.named(placed.outputs))
        assert all(map(torch.equal, placed.outputs, call.functional("_reference")))
