"""Sources: turn what a user names on the command line into a model and example inputs.

A source is a Hugging Face checkpoint directory, a ``.pt2`` program of ``torch.export``, or ``package.module:factory``
(or ``path/to/file.py:factory``), where ``factory()`` returns a model, ``(model, args)`` or ``(model, args, kwargs)``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickletools
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from attnres_fx.formats.description import is_pretrained
from attnres_fx.formats.directory import load
from attnres_fx.formats.files import CONFIG_FILE, PICKLE_SUFFIXES, PLAN_FILE, first_line
from attnres_fx.formats.huggingface import build_plain
from attnres_fx.formats.program import Program, open_program
from attnres_fx.runtime.errors import AttnResError, CheckpointFileError, OptionError
from attnres_fx.runtime.parameters import streams_of

TOKENS = 16


class Source(NamedTuple):
    """An opened source: the model and example inputs; ``kind`` is "huggingface", "exported" or "factory".

    ``program`` is the opened ``.pt2`` of an exported one, whose ``model`` is its module.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str
    program: Program | None = None

    @property
    def converted(self) -> bool:
        """Whether the source is an Attention-Residuals model already."""
        return bool(self.program.plans) if self.program else streams_of(self.model) is not None


def open_source(source: str) -> Source:
    """Open ``source``. Raises CheckpointFileError or another AttnResError, in one sentence, if it cannot be used."""
    path = Path(source)
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        if path.suffix == ".pt2":
            program = open_program(path)
            return Source(program.module, program.args, program.kwargs, "exported", program)
        raise _explain_file(path)
    module, colon, factory = source.rpartition(":")
    if colon and factory.replace(".", "a").isidentifier() and module:
        return _open_factory(module, factory)
    raise CheckpointFileError(f"there is no file or directory '{source}'",
                              remedy="give a Hugging Face checkpoint directory, a .pt2 file, or module:factory")


def _open_directory(path: Path) -> Source:
    if (path / PLAN_FILE).is_file():
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointFileError(f"'{path}' has the weights of a model of your own, but not its code",
                                      remedy="give module:factory, whose factory returns load(path, model=...)")
        model = load(path)
    else:
        model = build_plain(path)
    return Source(model, (), example_inputs(model), "huggingface")


def _explain_file(path: Path) -> AttnResError:
    """Why a file that is not a ``.pt2`` is not a source."""
    head = path.open("rb").read(4)
    if zipfile.is_zipfile(path) or head[:1] == b"\x80" or path.suffix in PICKLE_SUFFIXES:
        what = "a pickled state_dict without its model" if _holds_tensors_alone(path) else "a pickled model"
        return CheckpointFileError(
            f"'{path}' looks like {what}, which is not opened: unpickling runs code, and a state_dict has no forward",
            remedy="build the model in a factory and give module:factory, or save the model with safetensors "
                   "(save_pretrained) or torch.export.save")
    if path.suffix == ".safetensors":
        return CheckpointFileError(f"'{path}' is a bare state_dict, which has no forward",
                                   remedy=f"give the directory with its {CONFIG_FILE}, or build the model in a factory "
                                          "and give module:factory")
    return CheckpointFileError(f"'{path}' is not a model that attnres_fx can read",
                               remedy="give a Hugging Face checkpoint directory, a .pt2 file, or module:factory")


def _holds_tensors_alone(path: Path) -> bool:
    """Whether a pickle names nothing but tensors and containers, found by reading its opcodes without running them."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
                data = archive.read(name) if name is not None else b""
        else:
            data = path.read_bytes()
        names = [str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name in ("GLOBAL", "INST")]
    except Exception:  # a damaged pickle: pickletools raises nearly anything
        return False
    plain = ("torch._utils ", "torch ", "collections OrderedDict", "torch.storage ", "torch.serialization ")
    return bool(names) and all(name.startswith(plain) for name in names)


def function_named(name: str) -> Any:
    """What ``module:name`` or ``path/to/file.py:name`` names. Raises CheckpointFileError if there is no such thing."""
    module, _, path = name.rpartition(":")
    found: Any = _import(module) if module else None
    for part in path.split("."):
        if not hasattr(found, part):
            raise CheckpointFileError(f"'{module}' has no '{path}'", remedy="give the name of a function in that module")
        found = getattr(found, part)
    return found


def _open_factory(module: str, factory: str) -> Source:
    name = f"{module}:{factory}"
    made = function_named(name)
    if not callable(made) or isinstance(made, nn.Module):
        raise CheckpointFileError(f"'{name}' is a {type(made).__name__}, not a function",
                                  remedy="give a function without arguments that returns the model")
    try:
        result = made()
    except AttnResError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise CheckpointFileError(f"the factory '{name}' raised {type(error).__name__}: {first_line(error)}") from error
    model, args, kwargs = _unpack(result, name)
    if not args and not kwargs:
        if is_pretrained(model):
            kwargs = example_inputs(model)
        elif _needs_arguments(model):
            raise CheckpointFileError(f"the factory '{name}' returned only a model, but its forward needs inputs",
                                      remedy="return (model, args) or (model, args, kwargs)")
    return Source(model, args, kwargs, "factory")


def _import(module: str) -> Any:
    """The module of a factory: by file if it is one, else by name, with the working directory importable."""
    path = Path(module)
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise CheckpointFileError(f"there is no file '{module}'")
            folder = str(path.resolve().parent)
            if folder not in sys.path:
                sys.path.insert(0, folder)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = loaded
            spec.loader.exec_module(loaded)
            return loaded
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(module)
    except AttnResError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise CheckpointFileError(f"there is no module '{module}', nor a file or directory of this name",
                                      remedy="run where it can be imported, or give path/to/file.py:factory") from error
        raise CheckpointFileError(f"'{module}' cannot be imported: {first_line(error)}") from error
    except Exception as error:  # the user's module may raise anything
        what = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointFileError(f"'{module}' cannot be imported: {what}") from error


def _unpack(result: Any, name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if isinstance(result, nn.Module):
        return result, (), {}
    if isinstance(result, tuple) and 2 <= len(result) <= 3 and isinstance(result[0], nn.Module):
        args = (result[1],) if isinstance(result[1], torch.Tensor) else result[1]
        kwargs = result[2] if len(result) == 3 else {}
        if isinstance(args, Mapping) and len(result) == 2:
            args, kwargs = (), args
        if isinstance(args, (tuple, list)) and isinstance(kwargs, Mapping):
            return result[0], tuple(args), dict(kwargs)
    what = f"a state_dict ({len(result)} entries)" if isinstance(result, Mapping) else f"a {type(result).__name__}"
    raise CheckpointFileError(f"the factory '{name}' returned {what}",
                              remedy="return the model (an nn.Module), (model, args) or (model, args, kwargs)")


def _needs_arguments(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
               for p in parameters)


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Small inputs for a Hugging Face model, from its config: what it is traced and verified on."""
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs: dict[str, Any]
    if name == "input_ids":
        inputs = {name: _token_ids(config, generator)}
    elif name in ("pixel_values", "input_features", "input_values"):
        inputs = {name: torch.randn(_feature_shape(config, name), generator=generator).to(dtype)}
    else:
        raise OptionError(f"no example inputs are known for {type(model).__name__}, whose main input is '{name}'",
                          remedy="give module:factory, with a factory that returns (model, args, kwargs)")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _token_ids(config, generator)
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "use_cache" in parameters or (open_ended and hasattr(config.get_text_config(), "use_cache")):
        inputs["use_cache"] = False
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def _token_ids(config: Any, generator: torch.Generator) -> torch.Tensor:
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_target_positions")]
    length = min([TOKENS, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])
    vocabulary: Any = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", 2)
    special = {getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    usable = [token for token in range(min(vocabulary, 4096)) if token not in special] or [0]
    picked = torch.randint(len(usable), (2, length), generator=generator)
    return torch.tensor(usable)[picked]


def _feature_shape(config: Any, name: str) -> tuple[int, ...]:
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return 2, int(getattr(vision, "num_channels", 3)), int(height), int(width)
    mels: Any = getattr(config, "num_mel_bins", None)
    if name == "input_features":
        if mels is not None and hasattr(config, "max_source_positions"):
            return 2, int(mels), 2 * int(config.max_source_positions)
        features: int = getattr(config, "feature_projection_input_dim", mels or 80)
        return 2, 4 * TOKENS, features
    if mels is not None and hasattr(config, "max_length"):
        return 2, int(config.max_length), int(mels)
    return 2, 4000
