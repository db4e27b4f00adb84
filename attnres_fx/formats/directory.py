"""``save`` and ``load``: converted models on disk, without pickles, bit-equal after reading.

A saved model is a directory: the ordinary weights, ``attnres.safetensors`` with the new parameters under their keys in
``state_dict``, and ``attnres.json`` with the plans, which fix what the parameters mean. Loading needs no tracing: the
plans say which modules own the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnres_fx.adapters import host_of
from attnres_fx.conversion import attach
from attnres_fx.converted import is_converted_class, plans_of
from attnres_fx.formats.description import (
    aliases_of,
    check_digest,
    check_like,
    check_parameters,
    describe,
    is_pretrained,
    own_parameters,
    read_plans,
    tie,
)
from attnres_fx.formats.files import (
    CONFIG_FILE,
    PARAMETER_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
    json_text,
    read_tensors,
    read_weights,
    whole_directory,
    write_tensors,
)
from attnres_fx.passes._compat.dynamo import unwrap
from attnres_fx.runtime.errors import AlreadyConvertedError, CheckpointFileError, OptionError
from attnres_fx.runtime.parameters import streams_of

# Options of from_pretrained that the directory itself decides, or makes pointless.
_READ_HERE = frozenset({
    "subfolder", "revision", "variant", "gguf_file", "use_safetensors", "config", "state_dict", "output_loading_info",
    "ignore_mismatched_sizes", "cache_dir", "force_download", "local_files_only", "token", "proxies", "from_tf", "from_flax",
    "weights_only", "adapter_kwargs", "pretrained_model_name_or_path"})


def save(model: nn.Module, path: Any, *, overwrite: bool = False) -> None:
    """Write the converted ``model`` to the directory ``path``, whole or not at all.

    A Hugging Face model is written as its ``save_pretrained`` writes it. For any other model the directory has
    ``model.safetensors`` (parameters and buffers, tied ones once) but no code: :func:`load` must be given the model to fill.

    Args:
        overwrite: replace an earlier directory of this function; any other non-empty directory is refused.

    Raises: NotConvertedError for a plain model; CheckpointFileError if the directory cannot be written.
    """
    model = unwrap(model)
    plans = plans_of(model)
    if host_of(model) is not model:
        raise OptionError("this model has adapters of PEFT, which attnres_fx.save does not write",
                          remedy="save the adapters, queries among them, with model.save_pretrained, and the converted base "
                                 "before it gets them; or save what model.merge_and_unload() returns")
    with whole_directory(Path(path), overwrite=overwrite) as directory:
        if is_pretrained(model):
            model.save_pretrained(directory)  # type: ignore[operator]
            return
        state = tensors_of(model)
        ours = own_parameters(state, plans)
        plain = {key: value for key, value in state.items() if key not in ours}
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

    Raises: CheckpointFileError, naming file and key, if anything is missing, damaged, changed or does not fit; OptionError
    for what would be ignored (subfolder, revision, variant, gguf_file, use_safetensors ...).
    """
    location = Path(path)
    if location.is_file() and location.suffix == ".pt2":
        from attnres_fx.formats.program import load_module

        if model is not None or kwargs:
            raise OptionError("a .pt2 file holds its own model", remedy="call load(path) without model= and options")
        return load_module(location, device)
    ignored = sorted(_READ_HERE & set(kwargs))
    if ignored:
        raise OptionError(f"load takes no {ignored[0]}: it reads this one directory, its config.json and its safetensors",
                          remedy="give the directory itself as path, and leave this out")
    description, plans = read_plans(location)
    parameters = read_tensors(location / PARAMETER_FILE)
    dtype = getattr(torch, description["param_dtype"])
    check_parameters(plans, parameters, dtype, location / PARAMETER_FILE)
    check_digest(description, parameters, str(location / PLAN_FILE))
    made = _plain_model(location, description, model, kwargs)
    if streams_of(made) is not None or is_converted_class(type(made)):
        raise AlreadyConvertedError("the model to fill is converted already", remedy="pass the plain model")
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
    """The plain model, already filled if transformers builds it."""
    from attnres_fx.formats.huggingface import build_plain

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
            f"'{location}' has the weights of a model of your own ({description.get('model_class', 'no class')}) "
            "but not its code", remedy="pass the plain model, or a function that builds it: load(path, model=...)")
    if not isinstance(made, nn.Module):
        raise OptionError(f"model= gave a {type(made).__name__}, not an nn.Module",
                          remedy="pass the plain model, or a function that builds it")
    if kwargs:
        raise OptionError(f"unknown option {next(iter(kwargs))!r}",
                          remedy="options for from_pretrained need a Hugging Face directory, read without model=")
    return made


def _is_factory(model: Any) -> bool:
    return model is not None and not hasattr(model, "from_pretrained")


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of ``model``, refusing what is not a tensor."""
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointFileError(f"'{key}' in the model's state_dict is a {type(value).__name__}, not a tensor",
                                      remedy="keep such state (get_extra_state) out of the model, or save it yourself")
        if value.is_meta:
            raise CheckpointFileError(f"'{key}' has no data (it is on the meta device)", remedy="fill the model first")
    return state


def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str], directory: Path) -> None:
    """Copy ``tensors`` into ``model``, strictly, and tie what was tied. Nothing is changed if anything does not fit."""
    path = directory / WEIGHTS_FILE
    state = tensors_of(model)
    own_aliases = aliases_of(state)
    content = {**tensors, **{alias: tensors[kept] for alias, kept in aliases.items() if kept in tensors}}
    for alias, kept in own_aliases.items():  # other tools' files name a tied tensor once
        if alias not in content and kept in content:
            content[alias] = content[kept]
        elif kept not in content and alias in content:
            content[kept] = content[alias]
    missing, extra = [key for key in state if key not in content], [key for key in content if key not in state]
    if missing or extra:
        what = f"lacks the model's '{missing[0]}'" if missing else f"contains '{extra[0]}', which the model does not have"
        raise CheckpointFileError(f"'{path}' {what}", remedy="build the model that was saved")
    for key, value in content.items():
        check_like(value, tuple(state[key].shape), state[key].dtype, key, path, "the model has")
    for alias, kept in own_aliases.items():
        if not torch.equal(content[alias], content[kept]):
            raise CheckpointFileError(f"'{path}' has two values for '{alias}' and '{kept}', which the model ties",
                                      remedy="build the model without the tie, as it was saved")
    with torch.no_grad():
        for key, value in content.items():
            state[key].copy_(value)
    tie(model, aliases)


