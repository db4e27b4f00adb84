"""Checkpoints of Hugging Face transformers: write those of converted models, and build models from directories.

``save_pretrained`` of a converted model writes the ordinary checkpoint, and beside it ``attnres.json`` and
``attnres.safetensors``. Two things keep such a directory from being read as a plain model. In its config.json
``transformers_weights``, by which a checkpoint names its weight file, is replaced by a sentence that says what
to do; ``from_pretrained`` of every class refuses it with that sentence. And the weights always come as shards with an index,
which lists the new parameters too: ``Trainer`` can then resume from the directory with nothing missing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnres_fx.converted import plans_of
from attnres_fx.formats.description import PREFIX, describe, own_parameters
from attnres_fx.formats.files import (
    CONFIG_FILE,
    PARAMETER_FILE,
    PLAN_FILE,
    first_line,
    json_text,
    read_json,
    read_weights,
    staging_in,
    whole_directory,
    write_tensors,
)
from attnres_fx.runtime.errors import AttnResError, CheckpointFileError, OptionError

GUARD_KEY = "transformers_weights"
GUARD = "this directory holds an Attention-Residuals model, not the plain one; load it with attnres_fx.load(directory)"


def save_converted(
    model: nn.Module,
    base: type[nn.Module],
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    """``save_pretrained`` of a converted model, with the signature of transformers.

    The files are made in a directory within and moved once all exist, config.json first, so that the directory never reads
    as the plain model.

    Raises: OptionError for what a converted model cannot do (pushing to the hub, adapters, distributed checkpoints).
    """
    if push_to_hub:
        raise OptionError("a converted model cannot be pushed to the hub by save_pretrained",
                          remedy="save it to a directory and upload that with huggingface_hub.upload_folder")
    if kwargs.get("distributed_checkpoint"):
        raise OptionError("a converted model cannot be saved as a distributed checkpoint",
                          remedy="call save_pretrained without distributed_checkpoint=True")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise OptionError("a converted model with adapters cannot be saved by save_pretrained",
                          remedy="merge the adapters first")
    target = Path(save_directory)
    if target.is_file():
        raise CheckpointFileError(f"'{target}' is a file, not a directory", remedy="give another name")
    everything = dict(model.state_dict() if state_dict is None else state_dict)
    plain = {key: value for key, value in everything.items() if not key.startswith(PREFIX)}
    # A filtered state_dict may have been given; the parameters still belong to the model.
    ours = own_parameters(everything if len(plain) < len(everything) else model.state_dict(), plans_of(model))
    here = getattr(model, "should_save_on_this_rank", lambda main: main)(is_main_process)
    if not here:  # other ranks help to gather shards, but write nothing
        base.save_pretrained(model, save_directory, is_main_process, plain, False, *args, **kwargs)  # type: ignore[attr-defined]
        return
    fresh = not target.exists()
    try:
        with staging_in(target) as staging:
            base.save_pretrained(model, staging, is_main_process, plain, False, *args, **kwargs)  # type: ignore[attr-defined]
            _write_ours(staging, model, ours)
            _guard(staging / CONFIG_FILE)
            _index(staging, sorted(ours))
            _move_in(staging, target)
    finally:
        if fresh and target.exists() and not any(target.iterdir()):
            target.rmdir()


def _write_ours(directory: Path, model: nn.Module, ours: Mapping[str, torch.Tensor]) -> None:
    """The two files that mark a checkpoint as that of a converted model."""
    write_tensors(directory / PARAMETER_FILE, ours)
    (directory / PLAN_FILE).write_text(json_text(describe(model, ours)), encoding="utf-8")


def _guard(path: Path) -> None:
    """Put the sentence into config.json, and into the configs nested in it, which the Auto classes may pick instead."""
    config = read_json(path)

    def mark(part: dict[str, Any]) -> None:
        for value in part.values():
            if isinstance(value, dict) and "model_type" in value:
                mark(value)
        part[GUARD_KEY] = GUARD

    mark(config)
    path.write_text(json_text(config), encoding="utf-8")


def without_guard(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as it was for the plain model."""
    cleaned = {key: without_guard(value) if isinstance(value, dict) else value for key, value in config.items()}
    if cleaned.get(GUARD_KEY) == GUARD:
        del cleaned[GUARD_KEY]
    return cleaned


def _index(directory: Path, ours: list[str]) -> None:
    """Make the weights shards with an index that lists our parameters as well."""
    from safetensors import safe_open

    found = sorted(directory.glob("model*.safetensors.index*.json"))
    if found:
        path = found[0]
        weight_map = read_json(path)["weight_map"]
    else:
        single = next(path for path in sorted(directory.glob("model*.safetensors")))
        variant = single.name[len("model"):-len(".safetensors")]
        path = directory / f"model.safetensors.index{variant}.json"
        shard = single.with_name(f"model{variant}-00001-of-00001.safetensors")
        single.rename(shard)
        with safe_open(shard, "pt") as opened:
            weight_map = dict.fromkeys(opened.keys(), shard.name)
    weight_map.update(dict.fromkeys(ours, PARAMETER_FILE))
    # A sentence where from_pretrained wants a dictionary: it then also fails for callers who pass a config of their own.
    path.write_text(json_text({"metadata": GUARD, "weight_map": dict(sorted(weight_map.items()))}), encoding="utf-8")


_WEIGHTS = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")


def _move_in(staging: Path, target: Path) -> None:
    """Move the finished files into ``target``, and drop weights of an earlier save that they do not replace."""
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name != CONFIG_FILE, name))
    for path in list(target.iterdir()):
        if _WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()
    for name in names:
        (staging / name).replace(target / name)


def class_of(directory: Path) -> type[nn.Module]:
    """The class of transformers that config.json names. Raises CheckpointFileError."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointFileError(f"'{directory}' has no {CONFIG_FILE}",
                                  remedy="give a Hugging Face checkpoint directory, a .pt2 file, or module:factory")
    names = read_json(path).get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointFileError(f"'{path}' names no architecture",
                                  remedy="add the name of the model's class as \"architectures\"")
    try:
        import transformers
    except ImportError as error:
        raise CheckpointFileError(f"'{directory}' is a Hugging Face checkpoint, and transformers is not installed",
                                  remedy="pip install 'attnres-fx[transformers]'") from error
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointFileError(
            f"'{path}' names the architecture '{names[0]}', unknown to transformers {transformers.__version__}",
            remedy="build the model yourself: load(directory, model=...), or module:factory on the command line")
    return found


def build_plain(directory: Path, cls: type[nn.Module] | None = None, **kwargs: Any) -> nn.Module:
    """The plain model of a checkpoint directory, in eval mode, its weights read from safetensors alone.

    ``kwargs`` go to ``from_pretrained``. Raises CheckpointFileError if files are damaged or weights are missing.
    """
    cls = cls or class_of(directory)
    path = directory / CONFIG_FILE
    content = without_guard(read_json(path))
    tensors = read_weights(directory)
    try:
        config = cls.config_class.from_dict(content)  # type: ignore[attr-defined]
        model, info = cls.from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=tensors, output_loading_info=True, **{**kwargs, "ignore_mismatched_sizes": True})
    except AttnResError:
        raise
    except TypeError as error:
        unknown = next((name for name in kwargs if f"'{name}'" in str(error)), None)
        if unknown is None:
            raise _not_loaded(directory, cls, error) from error
        raise OptionError(f"{cls.__name__} takes no {unknown!r}: {first_line(error)}",
                          remedy="options of load go to from_pretrained of that class; leave this one out") from error
    except Exception as error:  # transformers raises everything from KeyError to its own classes on a wrong config
        raise _not_loaded(directory, cls, error) from error
    mismatched = sorted(info["mismatched_keys"])  # requested, since transformers by itself reports only that there are some
    if mismatched:
        key, found, wanted = mismatched[0]
        raise CheckpointFileError(f"'{key}' in '{directory}' has shape {list(found)}; {CONFIG_FILE} asks for {list(wanted)}",
                                  remedy=f"{CONFIG_FILE} and the weights must belong together")
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointFileError(f"the weights in '{directory}' lack {len(missing)} keys of {cls.__name__}, the first "
                                  f"'{missing[0]}'", remedy=f"{CONFIG_FILE} and the weights must belong together")
    model.config.name_or_path = model.name_or_path = str(directory)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model


def _not_loaded(directory: Path, cls: type[nn.Module], error: Exception) -> CheckpointFileError:
    return CheckpointFileError(f"'{directory}' cannot be loaded as {cls.__name__}: {first_line(error)}",
                               remedy=f"{CONFIG_FILE} and the weights must belong together")


def write_beside(source: Path, out: Path, model: nn.Module, *, overwrite: bool = False, guard: bool = True) -> None:
    """Write to ``out`` a copy of the checkpoint ``source`` and the two files of the converted ``model``.

    With ``guard`` no class of transformers reads ``out`` as the plain model (see above): config.json and the index are
    changed, and a single weight file is named as a shard. Without it the copy is exact to the byte, and transformers reads
    it as the plain model.
    """
    ours = own_parameters(model.state_dict(), plans_of(model))
    with whole_directory(out, overwrite=overwrite) as partial:
        try:
            shutil.copytree(source, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", ".cache"))
        except (OSError, shutil.Error) as error:
            raise CheckpointFileError(f"'{source}' cannot be copied to '{out}': {first_line(error)}") from error
        _write_ours(partial, model, ours)
        if guard:
            _guard(partial / CONFIG_FILE)
            _index(partial, sorted(ours))
