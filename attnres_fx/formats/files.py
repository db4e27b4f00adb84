"""Files on disk: JSON and safetensors are read with one clear error per fault, outputs are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_fx.runtime.errors import CheckpointFileError

if TYPE_CHECKING:
    import torch

PLAN_FILE = "attnres.json"
PARAMETER_FILE = "attnres.safetensors"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})

_FLAT_LIST = re.compile(r"\[[^\[\]{}\"]*(?:\"[^\"\\\[\]]*\"[^\[\]{}\"]*)*\]")


def first_line(error: BaseException) -> str:
    """The message of another library's error, cut to its first line and without colour codes."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises CheckpointFileError if it is missing, unreadable or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointFileError(f"there is no file '{path}'") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFileError(f"'{path}' is not readable JSON: {first_line(error)}",
                                  remedy="the file is damaged; restore it or write it again") from error
    if not isinstance(content, dict):
        raise CheckpointFileError(f"'{path}' is a JSON {type(content).__name__}, not an object")
    return content


def json_text(content: Mapping[str, Any]) -> str:
    """JSON for people: indented, keys in the order given, lists of plain values on one line."""
    spread = json.dumps(content, indent=2)
    compact = _FLAT_LIST.sub(
        lambda found: re.sub(r"\s*\n\s*", " ", found.group()).replace("[ ", "[").replace(" ]", "]"), spread)
    return (compact if json.loads(compact) == json.loads(spread) else spread) + "\n"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises CheckpointFileError if it is missing, truncated or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointFileError(f"there is no file '{path}'")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointFileError(f"'{path}' is not a complete safetensors file: {first_line(error)}",
                                  remedy="it is truncated or of another format; copy it or write it again") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file (into a place that :func:`whole_file` or :func:`whole_directory` gave)."""
    from safetensors.torch import save_file

    # Clones, since safetensors refuses tensors that share memory, and views of larger ones.
    save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, path,
              metadata={"format": "pt"})


def weight_files(directory: Path) -> dict[str, list[str] | None]:
    """The weight files of a checkpoint directory, each with the keys that an index assigns to it (None without index).

    Raises CheckpointFileError where there is none, or where a file that the index names is missing.
    """
    index_path = directory / INDEX_FILE
    if (directory / WEIGHTS_FILE).is_file():
        return {WEIGHTS_FILE: None}
    if not index_path.is_file():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointFileError(
                f"'{directory}' has pickled weights ('{pickles[0]}'), which are not opened, since unpickling runs code",
                remedy="load them where you trust them and save with safetensors (model.save_pretrained)")
        raise CheckpointFileError(f"'{directory}' has no weights",
                                  remedy=f"it needs '{WEIGHTS_FILE}' or '{INDEX_FILE}'")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointFileError(f"'{index_path}' has no 'weight_map' from keys to files")
    files: dict[str, list[str] | None] = {}
    for key, name in weight_map.items():
        if Path(name).name != name:
            raise CheckpointFileError(f"'{index_path}' names a file outside of its directory: '{name}'")
        if name != PARAMETER_FILE:
            kept = files.setdefault(name, [])
            assert kept is not None
            kept.append(key)
    return files


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint directory, sharded or not, without the parameters of attention residuals."""
    tensors: dict[str, torch.Tensor] = {}
    for name, keys in weight_files(directory).items():
        shard = read_tensors(directory / name)
        absent = [key for key in keys or () if key not in shard]
        if absent:
            raise CheckpointFileError(f"'{directory / name}' lacks '{absent[0]}', which '{INDEX_FILE}' places there")
        tensors.update(shard)
    return tensors


@contextmanager
def whole_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; it becomes ``path`` if the block succeeds; otherwise it is removed."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise _exists(path)
    _make_parents(path)
    _clean(path)
    partial = _beside(path)
    try:
        with _writing(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``path`` to fill; it becomes ``path`` if the block succeeds; otherwise it is removed.

    An empty directory at ``path`` is replaced. A full one is replaced only if ``overwrite`` and if it was written here.
    """
    check_directory(path, overwrite=overwrite)
    _make_parents(path)
    _clean(path)
    partial = _beside(path)
    try:
        with _writing(path):
            partial.mkdir()
            yield partial
            retired = _beside(path)
            if path.exists():
                path.rename(retired)
            try:
                partial.rename(path)
            except OSError:
                if retired.exists():
                    retired.rename(path)
                raise
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staging_in(target: Path) -> Iterator[Path]:
    """A directory within ``target``, created if necessary, to fill with files that are then moved there."""
    with _writing(target):
        target.mkdir(parents=True, exist_ok=True)
        inner = target / "attnres"
        _clean(inner)
        staging = _beside(inner)
        try:
            staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise errors of the file system as our own."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error)
        raise CheckpointFileError(f"'{path}' cannot be written: {first_line(error)}",
                                  remedy="make room on the disk" if full else "give a place that can be written") from error


def check_directory(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, what :func:`whole_directory` would refuse at ``path``."""
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            return
        if overwrite and (path / PLAN_FILE).is_file():
            return
        if overwrite:
            raise CheckpointFileError(f"'{path}' exists, was not written by attnres_fx, and is not overwritten",
                                      remedy="give another name, or remove it yourself")
        raise _exists(path)
    if path.exists() or path.is_symlink():
        raise CheckpointFileError(f"'{path}' exists and is not a directory", remedy="give another name")


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointFileError(f"'{path}' cannot be written: {first_line(error)}",
                                  remedy="give another name") from error


def _exists(path: Path) -> CheckpointFileError:
    return CheckpointFileError(f"'{path}' exists already",
                               remedy="give another name, or overwrite it with overwrite=True (--force)")


def _beside(path: Path) -> Path:
    """A fresh name in the directory of ``path`` (so that a rename is atomic) with the same suffix."""
    return path.absolute().parent / f".{path.stem}-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{path.suffix}"


def _clean(path: Path) -> None:
    """Remove what processes of this machine that no longer run left behind when writing to ``path``."""
    name = re.compile(re.escape(f".{path.stem}-{_host()}-") + r"(\d+)-[0-9a-f]{8}" + re.escape(path.suffix))
    parent = path.absolute().parent
    for left in parent.iterdir() if parent.is_dir() else ():
        found = name.fullmatch(left.name)
        if found is not None and not _runs(int(found.group(1))):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _runs(process: int) -> bool:
    """Whether a process of this machine runs; one that may not be signalled counts as running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
