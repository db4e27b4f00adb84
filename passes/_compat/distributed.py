"""Every touch of private interfaces of torch.distributed: which wrapper adds up the gradient of which parameter.

Written against torch 2.13. ``tests/attnres_fx/test_parallel.py`` runs each wrapper.
"""

from __future__ import annotations

import sys
import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def in_parallel() -> bool:
    """Whether this process is one of several that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def calling_modules() -> list[nn.Module]:
    """The modules whose methods are running, innermost first: the ``self`` of every frame on the stack.

    The locals of other frames are not read: Python would keep alive what they name, such as a caller's loss.
    """
    found: dict[int, nn.Module] = {}
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(owner, nn.Module):
            found.setdefault(id(owner), owner)
        frame = frame.f_back
    return list(found.values())


def not_in_buckets() -> AbstractContextManager[Any]:
    """Have Dynamo not cut graphs into the buckets of a DistributedDataParallel that is running.

    Cut at a symbolic size, the pieces of a graph hand on fake tensors: the position of a stream is such a size.
    """
    from torch.nn.parallel import DistributedDataParallel

    if DistributedDataParallel._get_active_ddp_module() is None:
        return nullcontext()
    patch: AbstractContextManager[Any] = torch._dynamo.config.patch(optimize_ddp=False)
    return patch


def reduces(module: nn.Module, parameter: Tensor) -> bool | None:
    """Whether ``module`` adds up the gradient of ``parameter`` over several processes; None if it does so for no gradient.

    DistributedDataParallel keeps a list of its parameters. FSDP's first form leaves out a set. With ``fully_shard``, every
    group names the modules and attributes that receive the whole parameters during a call.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(module, DistributedDataParallel):
        return _holds(module._module_parameters, parameter) if module.process_group.size() > 1 else None
    if isinstance(module, FullyShardedDataParallel):
        known: Any = module
        if known.world_size == 1:
            return None
        return not _holds(known._ignored_params, parameter) and (
            not known._use_orig_params or _holds(module.parameters(), parameter))
    if isinstance(module, FSDPModule):
        groups = [group for part in module.modules() if isinstance(part, FSDPModule) for group in _groups(part)]
        groups = [group for group in groups if group.mesh_info.mesh.size() > 1]
        if not groups:
            return None
        return any(_holds(_whole(param), parameter) for group in groups for param in group.fsdp_params)
    return None


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether a parameter below ``module`` is a distributed tensor of its own, and not only by fully_shard."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    params = [param for part in module.modules() if isinstance(part, FSDPModule) for group in _groups(part)
              for param in group.fsdp_params]
    if any(param.is_dtensor for param in params):
        return True
    sharded = {id(param.sharded_param) for param in params}
    return any(isinstance(parameter, DTensor) and id(parameter) not in sharded for parameter in module.parameters())


def wrapper_name(module: nn.Module) -> str:
    """The users' name for a wrapper that reduces gradients. ``fully_shard`` generates a class for every model."""
    from torch.distributed.fsdp import FSDPModule

    return "fully_shard" if isinstance(module, FSDPModule) else type(module).__name__


def _holds(parameters: Any, parameter: Tensor) -> bool:
    return any(each is parameter for each in parameters)


def _groups(module: Any) -> list[Any]:
    """The parameter groups of a module that ``fully_shard`` was called on: several from torch 2.13, one before."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def _whole(param: Any) -> list[Any]:
    """The current values of the attributes that a sharded parameter is put into, shared ones included."""
    info = param._module_info
    places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names)]
    return [getattr(module, name, None) for module, name in places]
