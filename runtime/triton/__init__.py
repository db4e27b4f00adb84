"""Triton kernels of the mix, its two phases, and mix and norm in one. Importing this package does not import triton; calling
its functions does.

Their values are tested in Triton's interpreter and their resources in binaries compiled ahead of time; ``benchmarks/gpu.py``
checks and times them on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from attnres_fx.runtime.errors import KernelError

from .configs import MAX_WIDTH
from .recipes import device_guard, keep, recipes, signature

Check = Callable[..., Any]


def _nothing(*_: Any, **__: Any) -> None:
    """Skips checks: for arguments that were checked."""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def obstacle(device_type: str) -> KernelError | None:
    """Why the kernels cannot run on this kind of device, or None. Imports triton only if needed for the answer."""
    if not _installed():
        return KernelError("the Triton kernels need the package triton, which is not installed",
                           remedy="pip install 'attnres-fx[triton]', or compile with options={'kernels': 'auto'}")
    if device_type == "cuda":
        return None
    if device_type != "cpu":
        return KernelError(f"the Triton kernels do not run on devices of type '{device_type}'",
                           remedy="compile with options={'kernels': 'auto'}")
    refusal = KernelError(
        "Triton has no compiler for the CPU; there its kernels run only in its interpreter, slowly and for tests",
        remedy="compile with options={'kernels': 'auto'}, or start Python with TRITON_INTERPRET=1 in the environment")
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "on", "yes", "y"):
        return refusal
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    # Triton reads the variable when it is first imported.
    return None if isinstance(triton.language.sum, InterpretedFunction) else refusal


def serves(sources: Sequence[Tensor]) -> bool:
    """Whether ``attnres::mix`` on a GPU runs these kernels; where not, plain torch serves, which a warning says once."""
    if not sources or sources[0].shape[-1:].numel() > MAX_WIDTH:
        return False
    refusal = obstacle("cuda")
    if refusal is not None:
        _warn_once(str(refusal))
    return refusal is None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"attnres::mix runs as plain torch operations, several times slower: {reason}", stacklevel=2)


# The operators, each with the arguments of its namesake in runtime/: by a recipe if a similar call was launched before, else
# with all checks. They raise KernelError where the kernels cannot run. ``check`` is called with the arguments, and the
# outputs by name, before they are used; results are written to the tensors given for them, contiguous, else to new ones.


def mix(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any, mixed_out: Tensor | None = None,
    check: Check = _nothing,
) -> Tensor:
    """``attnres::mix``."""
    like = signature("mix", options, [*sources, query, key_gain, mixed_out])
    for recipe in recipes(like):
        output = recipe.empty(query.device)[0] if mixed_out is None else mixed_out
        with device_guard(query):
            recipe.launch(tuple(sources), query, key_gain, (output,) if query.ndim == 1 else output.unbind(0))
        return output
    check(sources, query, key_gain, *options, **_given(mixed_out=mixed_out))
    launched: list[Any] = []
    made: Tensor = _launcher(query).mix(sources, query, key_gain, *options, mixed_out=mixed_out, launched=launched)
    keep(like, launched, [made], sources, [query, key_gain])
    return made


def mix_backward(
    grad: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """``attnres::mix_backward``."""
    like = signature("mix_backward", options, [grad, *sources, query, key_gain])
    for recipe in recipes(like):
        count = len(sources)
        made = recipe.empty(query.device)
        gain_grad = None if key_gain is None else made[count + 1]
        with device_guard(query):
            recipe.launch((grad,) if query.ndim == 1 else grad.unbind(0), tuple(sources), query, key_gain,
                          tuple(made[:count]), made[count], gain_grad, (None,) * count)
        return made
    launched: list[Any] = []
    made = _launcher(query).mix_backward(grad, sources, query, key_gain, *options, launched=launched)
    keep(like, launched, made, [*sources, *(grad.unbind(0) if query.ndim == 2 else [grad])], [query, key_gain])
    return made


def mix_phase1(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any, mixed_out: list[Tensor] | None = None,
    lse_out: list[Tensor] | None = None, check: Check = _nothing,
) -> list[Tensor]:
    """``attnres::mix_phase1``."""
    outputs = [*(mixed_out or ()), *(lse_out or ())]
    like = signature("mix_phase1", (options, mixed_out is None, lse_out is None), [*sources, query, key_gain, *outputs])
    for recipe in recipes(like):
        made = outputs or recipe.empty(query.device)
        count = query.shape[0]
        with device_guard(query):
            recipe.launch(tuple(sources), query, key_gain, tuple(made[:count]), tuple(made[count:]))
        return made
    check(sources, query, key_gain, *options, **_given(mixed_out=mixed_out, lse_out=lse_out))
    launched: list[Any] = []
    made = _phases(query).mix_phase1(sources, query, key_gain, *options, mixed_out=mixed_out, lse_out=lse_out,
                                     launched=launched)
    if not outputs or len(outputs) == len(made):
        keep(like, launched, made, sources, [query, key_gain])
    return made


def mix_phase1_backward(
    grads: list[Tensor], sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """``attnres::mix_phase1_backward``."""
    made: list[Tensor] = _phases(query).mix_phase1_backward(grads, sources, query, key_gain, *options)
    return made


def mix_phase2(
    mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any,
    mixed_out: Tensor | None = None, check: Check = _nothing,
) -> Tensor:
    """``attnres::mix_phase2``."""
    like = signature("mix_phase2", options, [mixed, lse, *sources, query, key_gain, mixed_out])
    for recipe in recipes(like):
        output = recipe.empty(query.device)[0] if mixed_out is None else mixed_out
        with device_guard(query):
            recipe.launch(tuple(sources), query, key_gain, (output,), None, (mixed, lse))
        return output
    check(mixed, lse, sources, query, key_gain, *options, **_given(mixed_out=mixed_out))
    launched: list[Any] = []
    made: Tensor = _phases(query).mix_phase2(mixed, lse, sources, query, key_gain, *options, mixed_out=mixed_out,
                                             launched=launched)
    keep(like, launched, [made], [mixed, *sources], [lse, query, key_gain])
    return made


def mix_phase2_backward(
    grad: Tensor, mixed: Tensor, lse: Tensor, sources: list[Tensor], query: Tensor, key_gain: Tensor | None, *options: Any
) -> list[Tensor]:
    """``attnres::mix_phase2_backward``."""
    made: list[Tensor] = _phases(query).mix_phase2_backward(grad, mixed, lse, sources, query, key_gain, *options)
    return made


def mix_norm(
    sources: list[Tensor], query: Tensor, key_gain: Tensor | None, delta: Tensor | None, mixed: Tensor | None,
    lse: Tensor | None, weight: Tensor | None, bias: Tensor | None, *options: Any, normed_out: Tensor | None = None,
    partial_out: Tensor | None = None, check: Check = _nothing,
) -> list[Tensor]:
    """``attnres::mix_norm``."""
    given = (query, key_gain, delta, mixed, lse, weight, bias)
    like = signature("mix_norm", options, [*sources, *given, normed_out, partial_out])
    for recipe in recipes(like):
        outputs = [output for output in (normed_out, partial_out) if output is not None]
        made = outputs or recipe.empty(query.device)
        with device_guard(query):
            recipe.launch(tuple(sources), query, key_gain, (made[0],), None, (mixed, lse), delta,
                          None if delta is None else made[1], (weight, bias))
        return made
    check(sources, *given, *options, **_given(normed_out=normed_out, partial_out=partial_out))
    launched: list[Any] = []
    made = _fused(query).mix_norm(sources, *given, *options, normed_out=normed_out, partial_out=partial_out,
                                  launched=launched)
    if delta is None or (normed_out is None) == (partial_out is None):
        keep(like, launched, made, [*sources, delta, mixed], [query, key_gain, lse, weight, bias])
    return made


def mix_norm_backward(
    grad: Tensor, partial_grad: Tensor | None, sources: list[Tensor], query: Tensor, key_gain: Tensor | None,
    mixed: Tensor | None, lse: Tensor | None, weight: Tensor | None, bias: Tensor | None, *options: Any,
    check: Check = _nothing,
) -> list[Tensor]:
    """``attnres::mix_norm_backward``."""
    given = (query, key_gain, mixed, lse, weight, bias)
    like = signature("mix_norm_backward", options, [grad, partial_grad, *sources, *given])
    for recipe in recipes(like):
        made = recipe.empty(grad.device)
        found = iter(made)
        normed = next(found)
        early_grads = (None, None) if mixed is None else (next(found), next(found))
        source_grads = tuple([next(found) for _ in sources])
        query_grad = next(found)
        gain_grad, weight_grad, bias_grad = [None if t is None else next(found) for t in (key_gain, weight, bias)]
        with device_guard(grad):
            recipe.launch((grad,), tuple(sources), query, key_gain, source_grads, query_grad, gain_grad,
                          (*(None,) * (len(sources) - 1), partial_grad), None, (mixed, lse), early_grads, (weight, bias),
                          normed, (weight_grad, bias_grad))
        return made
    check(grad, partial_grad, sources, *given, *options)
    launched: list[Any] = []
    made = _fused(grad).mix_norm_backward(grad, partial_grad, sources, *given, *options, launched=launched)
    keep(like, launched, made, [grad, *sources, mixed], [partial_grad, query, key_gain, lse, weight, bias])
    return made


def _given(**outputs: Any) -> dict[str, Any]:
    """The outputs that are given."""
    return {name: output for name, output in outputs.items() if output is not None}


def _launcher(tensor: Tensor) -> Any:
    _demand(tensor)
    from . import launch

    return launch


def _phases(tensor: Tensor) -> Any:
    _demand(tensor)
    from . import phases

    return phases


def _fused(tensor: Tensor) -> Any:
    _demand(tensor)
    from . import launch_norm

    return launch_norm


def _demand(tensor: Tensor) -> None:
    """Raise KernelError where the kernels cannot run on the tensor's device."""
    refusal = obstacle(tensor.device.type)
    if refusal is not None:
        raise refusal
