"""``attnres.json``: what a converted model is, beside its parameters; written with a digest, and checked when it is read.

The plans of the streams fix what the parameters mean. A file that contradicts itself, the parameters beside it, or the
digest of both is refused: a partition edited by hand would run, but compute another function.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnres_fx.converted import original_class, plans_of
from attnres_fx.formats.files import PARAMETER_FILE, PLAN_FILE, read_json
from attnres_fx.passes.rewrite.plan import FORMAT, StreamPlan
from attnres_fx.runtime.errors import CheckpointFileError, OptionError
from attnres_fx.runtime.parameters import CONTAINER
from attnres_fx.version import VERSION

PREFIX = f"{CONTAINER}."
DIGEST = "digest"
_BELONG = f"{PLAN_FILE} and {PARAMETER_FILE} must belong together"
_PLAN_FIELDS = {"name": str, "owner": str, "num_layers": int, "width": int, "boundaries": list, "sites": list,
                "eps": float, "mix_scale": str, "key_gain": bool}


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is a model of Hugging Face transformers (which is not imported to find out)."""
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")
               for cls in type(model).__mro__)


def expected_parameters(plans: Sequence[StreamPlan]) -> dict[str, tuple[int, int]]:
    """The keys of the parameters in a ``state_dict``, and their shapes [L+1, d]."""
    return {f"{PREFIX}{plan.name}.{part}": (plan.num_layers + 1, plan.width)
            for plan in plans for part in ("query", *(("key_gain",) if plan.key_gain else ()))}


def own_parameters(state: Mapping[str, Any], plans: Sequence[StreamPlan]) -> dict[str, torch.Tensor]:
    """The parameters of attention residuals in a ``state_dict``.

    Raises: OptionError where another tool (an adapter) has put copies in their place.
    """
    ours = {key: value for key, value in state.items() if key.startswith(PREFIX)}
    strange = sorted(set(ours) ^ set(expected_parameters(plans)))
    if strange:
        raise OptionError(
            f"the parameters at model.attnres are not those of the conversion ('{strange[0]}'), as under adapters of PEFT",
            remedy="merge the adapters first (merged = model.merge_and_unload()), or save them with PEFT's save_pretrained")
    return ours


def describe(
    model: nn.Module, parameters: Mapping[str, torch.Tensor], *, aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The content of ``attnres.json`` for a converted model with these parameters."""
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in parameters.values()})
    if len(dtypes) != 1:
        raise CheckpointFileError(f"the new parameters have several dtypes: {', '.join(dtypes)}",
                                  remedy="bring model.attnres to one dtype before saving")
    versions: dict[str, str] = {}
    if is_pretrained(model):
        versions["transformers"] = importlib.metadata.version("transformers")
    content = {**description_of(plans_of(model), dtypes[0], original_class(type(model)).__name__, **versions),
               **({"aliases": dict(aliases)} if aliases else {})}
    return signed(content, parameters)


def description_of(plans: Sequence[StreamPlan], param_dtype: str, model_class: str, **versions: str) -> dict[str, Any]:
    """The content of ``attnres.json``, from its parts, without its digest."""
    return {"format": FORMAT, "attnres_fx": VERSION, "torch": torch.__version__, **versions,
            "model_class": model_class, "param_dtype": param_dtype, "streams": [asdict(plan) for plan in plans]}


def signed(content: Mapping[str, Any], parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """``content`` with the digest of itself and of the parameters."""
    return {**content, DIGEST: _digest(content, parameters)}


def check_digest(content: Mapping[str, Any], parameters: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise CheckpointFileError if ``content`` or the parameters are not those of which its digest was taken.

    Files of earlier versions have none.
    """
    if DIGEST in content and content[DIGEST] != _digest(content, parameters):
        raise CheckpointFileError(
            f"'{name}' or the parameters beside it have been changed since they were written (its digest differs)",
            remedy=f"restore the files; if the change is meant, remove the entry \"{DIGEST}\"")


def _digest(content: Mapping[str, Any], parameters: Mapping[str, torch.Tensor]) -> str:
    plain = {key: value for key, value in content.items() if key != DIGEST}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for key in sorted(parameters):
        tensor = parameters[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def read_plans(directory: Path) -> tuple[dict[str, Any], list[StreamPlan]]:
    """The content of ``attnres.json`` in ``directory``, checked except for its digest, and its plans."""
    if not directory.exists():
        raise CheckpointFileError(f"there is no file or directory '{directory}'")
    path = directory / PLAN_FILE
    if not path.is_file():
        raise CheckpointFileError(f"'{directory}' has no {PLAN_FILE}, so it does not contain a converted model",
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
        raise CheckpointFileError(f"'{name}' has aliases that are not an object")
    for stream in streams:
        for field, kind in _PLAN_FIELDS.items():
            if not isinstance(stream.get(field), kind) or (kind is int and isinstance(stream[field], bool)):
                raise CheckpointFileError(f"'{name}' has a stream whose '{field}' is missing or of a wrong type")
    try:
        plans = [StreamPlan.from_dict(stream) for stream in streams]
    except (CheckpointFileError, IndexError) as error:
        raise CheckpointFileError(f"'{name}' has a stream that cannot be read: {error}") from error
    names = [plan.name for plan in plans]
    twice = next((each for index, each in enumerate(names) if each in names[:index]), None)
    if twice is not None:
        raise CheckpointFileError(f"'{name}' has two streams that are named '{twice}'")
    return content, plans


def check_parameters(
    plans: Sequence[StreamPlan], parameters: Mapping[str, torch.Tensor], dtype: torch.dtype, path: Path
) -> None:
    """Check the tensors of ``attnres.safetensors`` against the plans: keys, shapes, dtypes, and no NaN."""
    expected = expected_parameters(plans)
    for key, shape in expected.items():
        if key not in parameters:
            raise CheckpointFileError(f"'{path}' lacks '{key}'", remedy=_BELONG)
        check_like(parameters[key], shape, dtype, key, path, f"{PLAN_FILE} says")
        _check_numbers(parameters[key], f"'{key}' in '{path}'")
    extra = sorted(set(parameters) - set(expected))
    if extra:
        raise CheckpointFileError(f"'{path}' contains '{extra[0]}', which {PLAN_FILE} does not mention", remedy=_BELONG)


def check_like(
    tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, key: str, path: Path, wanted: str
) -> None:
    """Raise CheckpointFileError unless ``tensor`` has this shape and dtype; ``wanted`` says what requires it."""
    if tuple(tensor.shape) != shape:
        raise CheckpointFileError(f"'{key}' in '{path}' has shape {list(tensor.shape)}; {wanted} {list(shape)}")
    if tensor.dtype != dtype:
        raise CheckpointFileError(f"'{key}' in '{path}' is {str(tensor.dtype)[6:]}; {wanted} {str(dtype)[6:]}",
                                  remedy="bring the model to the dtype of the file before loading")


def _check_numbers(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise CheckpointFileError(f"{name} contains NaN or infinite values, so every result would be NaN",
                                  remedy="initialise it (model.attnres.reset_parameters()), or go back to an earlier state")


def same_memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """A key that two names of one tensor share; None for a tensor without memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return None
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def aliases_of(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Tied tensors: every additional name of a tensor, with its first name."""
    first: dict[Any, str] = {}
    aliases = {}
    for key, tensor in state.items():
        identity = same_memory(tensor)
        if identity is not None and first.setdefault(identity, key) != key:
            aliases[key] = first[identity]
    return aliases


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
