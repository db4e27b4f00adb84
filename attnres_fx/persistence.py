"""``save`` and ``load``: converted models on disk, without pickles, bit-equal after reading.

A saved model is a directory: the ordinary weights, ``attnres.safetensors`` with the new parameters under their keys in
``state_dict``, and ``attnres.json`` with the plans, which fix what the parameters mean. Loading needs no tracing: the
plans say which modules own the streams.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnres_fx
from attnres_fx.conversion import attach, plans_of
from attnres_fx.files import (
    CONFIG_FILE,
    PARAMETER_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
    json_text,
    read_json,
    read_tensors,
    read_weights,
    whole_directory,
    write_tensors,
)
from attnres_fx.passes._compat import unwrap
from attnres_fx.passes.plan import FORMAT, StreamPlan
from attnres_fx.runner import is_converted_class, original_class
from attnres_fx.runtime.errors import AlreadyConvertedError, CheckpointFileError, OptionError
from attnres_fx.runtime.parameters import AttnRes

PREFIX = "attnres."
_PLAN_FIELDS = {"name": str, "owner": str, "num_layers": int, "width": int, "boundaries": list, "sites": list,
                "eps": float, "mix_scale": str, "key_gain": bool}


def save(model: nn.Module, path: Any, *, overwrite: bool = False) -> None:
    """Write the converted ``model`` to the directory ``path``, whole or not at all.

    A Hugging Face model is written as its ``save_pretrained`` writes it. Of any other model the directory holds
    ``model.safetensors`` (parameters and buffers, tied ones once) and no code: :func:`load` is given the model to fill.

    Args:
        overwrite: replace an earlier directory of this function; any other non-empty directory is refused.

    Raises: NotConvertedError for a plain model; CheckpointFileError if the directory cannot be written.
    """
    model = unwrap(model)
    plans_of(model)
    with whole_directory(Path(path), overwrite=overwrite) as directory:
        if is_pretrained(model):
            model.save_pretrained(directory)  # type: ignore[operator]
            return
        state = tensors_of(model)
        ours = {key: value for key, value in state.items() if key.startswith(PREFIX)}
        plain = {key: value for key, value in state.items() if not key.startswith(PREFIX)}
        aliases = aliases_of(plain)
        write_tensors(directory / WEIGHTS_FILE, {key: value for key, value in plain.items() if key not in aliases})
        write_tensors(directory / PARAMETER_FILE, ours)
        (directory / PLAN_FILE).write_text(json_text(describe(model, ours, aliases=aliases)), encoding="utf-8")


def load(
    path: Any,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The converted model that :func:`save`, ``save_pretrained`` or ``attnres transform`` wrote to ``path``.

    Args:
        path: a directory with ``attnres.json``; or a ``.pt2`` file, of which the program's module is returned (open
            only files that you trust: programs of ``torch.export`` may hold pickles; directories never do).
        model: the plain model to fill and convert, or a callable without arguments that builds it. A Hugging Face
            directory needs none; there it may be the class, for one that transformers does not have.
        device: where to put the model; the CPU if None.
        kwargs: for ``from_pretrained`` of a Hugging Face model (``attn_implementation=...``).

    Raises: CheckpointFileError, naming file and key, if anything is missing, damaged or does not fit.
    """
    location = Path(path)
    if location.is_file() and location.suffix == ".pt2":
        from attnres_fx.exported import load_module

        if model is not None or kwargs:
            raise OptionError("a .pt2 file holds its own model", remedy="call load(path) without model= and options")
        return load_module(location, device)
    description, plans = read_plans(location)
    parameters = read_tensors(location / PARAMETER_FILE)
    dtype = getattr(torch, description["param_dtype"])
    made = _plain_model(location, description, model, kwargs)
    if isinstance(getattr(made, "attnres", None), AttnRes) or is_converted_class(type(made)):
        raise AlreadyConvertedError("the model to fill is converted already", remedy="pass the plain model")
    check_parameters(plans, parameters, dtype, location / PARAMETER_FILE)
    for plan in plans:
        try:
            made.get_submodule(plan.owner)
        except AttributeError:
            raise CheckpointFileError(f"'{location / PLAN_FILE}' converts '{plan.owner}', which is not there",
                                      remedy="build the model that was saved") from None
    if not (location / CONFIG_FILE).is_file() or isinstance(model, nn.Module) or _is_factory(model):
        fill(made, read_weights(location), description.get("aliases", {}), location)
    attach(made, plans, dtype)
    with torch.no_grad():
        own = made.state_dict()
        for key, value in parameters.items():
            own[key].copy_(value)
    return made if device is None else made.to(device)


def _plain_model(
    location: Path, description: Mapping[str, Any], model: Any, kwargs: dict[str, Any]
) -> nn.Module:
    """The plain model, filled already if transformers builds it."""
    from attnres_fx.pretrained import build_plain

    if isinstance(model, nn.Module):
        made: Any = unwrap(model)
    elif isinstance(model, type) and hasattr(model, "from_pretrained"):
        return build_plain(location, model, **kwargs)
    elif model is not None:
        made = model()
    elif (location / CONFIG_FILE).is_file():
        return build_plain(location, **kwargs)
    else:
        raise CheckpointFileError(
            f"'{location}' holds the weights of a model of your own ({description.get('model_class', 'no class')}) "
            "and not its code", remedy="pass the plain model, or a function that builds it: load(path, model=...)")
    if not isinstance(made, nn.Module):
        raise OptionError(f"model= gave a {type(made).__name__} and no nn.Module",
                          remedy="pass the plain model, or a function that builds it")
    if kwargs:
        raise OptionError(f"unknown option {next(iter(kwargs))!r}",
                          remedy="options for from_pretrained need a Hugging Face directory, read without model=")
    return made


def _is_factory(model: Any) -> bool:
    return model is not None and not hasattr(model, "from_pretrained")


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is a model of Hugging Face transformers (which is not imported to find out)."""
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")
               for cls in type(model).__mro__)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of ``model``, refusing what is not a tensor."""
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointFileError(f"'{key}' in the model's state_dict is a {type(value).__name__} and no tensor",
                                      remedy="keep such state (get_extra_state) out of the model, or save it yourself")
        if value.is_meta:
            raise CheckpointFileError(f"'{key}' has no data (it is on the meta device)", remedy="fill the model first")
    return state


def same_memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """What two names of one tensor have in common; None for a tensor without memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return None
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def aliases_of(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Tied tensors: every further name of a tensor, with its first name."""
    first: dict[Any, str] = {}
    aliases = {}
    for key, tensor in state.items():
        identity = same_memory(tensor)
        if identity is not None and first.setdefault(identity, key) != key:
            aliases[key] = first[identity]
    return aliases


def describe(
    model: nn.Module, parameters: Mapping[str, torch.Tensor], *, aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The content of ``attnres.json`` for a converted model."""
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in parameters.values()})
    if len(dtypes) != 1:
        raise CheckpointFileError(f"the new parameters have several dtypes: {', '.join(dtypes)}",
                                  remedy="bring model.attnres to one dtype before saving")
    versions: dict[str, str] = {}
    if is_pretrained(model):
        versions["transformers"] = importlib.metadata.version("transformers")
    return {**description_of(plans_of(model), dtypes[0], original_class(type(model)).__name__, **versions),
            **({"aliases": dict(aliases)} if aliases else {})}


def description_of(plans: list[StreamPlan], param_dtype: str, model_class: str, **versions: str) -> dict[str, Any]:
    """The content of ``attnres.json``, from its parts."""
    return {"format": FORMAT, "attnres_fx": attnres_fx.__version__, "torch": torch.__version__, **versions,
            "model_class": model_class, "param_dtype": param_dtype, "streams": [asdict(plan) for plan in plans]}


def read_plans(directory: Path) -> tuple[dict[str, Any], list[StreamPlan]]:
    """The content of ``attnres.json`` in ``directory``, checked, and its plans."""
    if not directory.exists():
        raise CheckpointFileError(f"there is no file or directory '{directory}'")
    path = directory / PLAN_FILE
    if not path.is_file():
        raise CheckpointFileError(f"'{directory}' has no {PLAN_FILE}, so that it holds no converted model",
                                  remedy="convert the model and save it with attnres_fx.save, or run attnres transform")
    return check_description(read_json(path), str(path))


def check_description(content: dict[str, Any], name: str) -> tuple[dict[str, Any], list[StreamPlan]]:
    """Check the content of an ``attnres.json``; ``name`` is for the message."""
    if content.get("format") != FORMAT:
        raise CheckpointFileError(f"'{name}' has format {content.get('format')!r}; this attnres_fx reads {FORMAT}",
                                  remedy="read it with the version that wrote it (its field 'attnres_fx')")
    streams, dtype = content.get("streams"), content.get("param_dtype")
    if not isinstance(streams, list) or not streams or not all(isinstance(stream, dict) for stream in streams):
        raise CheckpointFileError(f"'{name}' lists no streams")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CheckpointFileError(f"'{name}' has an unknown param_dtype {dtype!r}")
    if not isinstance(content.get("aliases", {}), dict):
        raise CheckpointFileError(f"'{name}' has aliases that are no object")
    for stream in streams:
        for field, kind in _PLAN_FIELDS.items():
            if not isinstance(stream.get(field), kind):
                raise CheckpointFileError(f"'{name}' has a stream whose '{field}' is missing or of a wrong type")
    try:
        return content, [StreamPlan.from_dict(stream) for stream in streams]
    except (CheckpointFileError, IndexError) as error:
        raise CheckpointFileError(f"'{name}' has a stream that cannot be read: {error}") from error


def check_parameters(
    plans: list[StreamPlan], parameters: Mapping[str, torch.Tensor], dtype: torch.dtype, path: Path
) -> None:
    """Hold the tensors of ``attnres.safetensors`` to the plans: keys, shapes, dtypes."""
    expected = {f"{PREFIX}{plan.name}.{part}": (plan.num_layers + 1, plan.width)
                for plan in plans for part in ("query", *(("key_gain",) if plan.key_gain else ()))}
    for key, shape in expected.items():
        if key not in parameters:
            raise CheckpointFileError(f"'{path}' lacks '{key}'",
                                      remedy=f"{PLAN_FILE} and {PARAMETER_FILE} must belong together")
        _check_like(parameters[key], shape, dtype, key, path, f"{PLAN_FILE} says")
    extra = sorted(set(parameters) - set(expected))
    if extra:
        raise CheckpointFileError(f"'{path}' holds '{extra[0]}', which {PLAN_FILE} does not know",
                                  remedy=f"{PLAN_FILE} and {PARAMETER_FILE} must belong together")


def _check_like(
    tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, key: str, path: Path, wanted: str
) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointFileError(f"'{key}' in '{path}' has shape {list(tensor.shape)}; {wanted} {list(shape)}")
    if tensor.dtype != dtype:
        raise CheckpointFileError(f"'{key}' in '{path}' is {str(tensor.dtype)[6:]}; {wanted} {str(dtype)[6:]}",
                                  remedy="bring the model to the dtype of the file before loading")


def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str], directory: Path) -> None:
    """Copy ``tensors`` into ``model``, strictly, and tie what was tied. Nothing is changed if anything does not fit."""
    path = directory / WEIGHTS_FILE
    state = tensors_of(model)
    own_aliases = aliases_of(state)
    content = {**tensors, **{alias: tensors[kept] for alias, kept in aliases.items() if kept in tensors}}
    for alias, kept in own_aliases.items():  # files of others name a tied tensor once
        if alias not in content and kept in content:
            content[alias] = content[kept]
        elif kept not in content and alias in content:
            content[kept] = content[alias]
    missing, extra = [key for key in state if key not in content], [key for key in content if key not in state]
    if missing or extra:
        what = f"lacks the model's '{missing[0]}'" if missing else f"holds '{extra[0]}', which the model has not"
        raise CheckpointFileError(f"'{path}' {what}", remedy="build the model that was saved")
    for key, value in content.items():
        _check_like(value, tuple(state[key].shape), state[key].dtype, key, path, "the model has")
    for alias, kept in own_aliases.items():
        if not torch.equal(content[alias], content[kept]):
            raise CheckpointFileError(f"'{path}' has two values for '{alias}' and '{kept}', which the model ties",
                                      remedy="build the model without the tie, as it was saved")
    with torch.no_grad():
        for key, value in content.items():
            state[key].copy_(value)
    tie(model, aliases)


def tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Make every alias the same object as the tensor that it names."""
    for alias, kept in aliases.items():
        with contextlib.suppress(AttributeError):
            owner, name = model.get_submodule(alias.rpartition(".")[0]), alias.rpartition(".")[2]
            source = model.get_submodule(kept.rpartition(".")[0])
            target = getattr(source, kept.rpartition(".")[2])
            for table in (owner._parameters, owner._buffers):
                if name in table and table[name] is not target:
                    table[name] = target
