"""Models under adapters of PEFT: where their parameters are, and how PEFT comes to save them.

PEFT is not imported to find out whether it wraps a model. It saves those parts of a model that an adapter's configuration
names; the queries of a converted model are named there under ``modules_to_save``, so that they are trained, saved, loaded,
switched and merged with the adapter.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from attnres_fx.runtime.parameters import CONTAINER


def host_of(model: nn.Module) -> nn.Module:
    """The module that owns the parameters of a converted model: ``model``, or the model inside a PEFT wrapper.

    ``merge_and_unload`` and ``unload`` remove a wrapper; anything attached to it would be lost.
    """
    if not any(cls.__name__ in ("PeftModel", "PeftMixedModel") and cls.__module__.startswith("peft.")
               for cls in type(model).__mro__):
        return model
    wrapped: Any = model
    tuner = wrapped.base_model
    return tuner.model if hasattr(wrapped, "peft_config") and hasattr(tuner, "peft_config") else tuner


def train_with_adapters(model: nn.Module) -> None:
    """Make the queries of the converted ``model``, a wrapper of PEFT, a part of every adapter that it has."""
    wrapped: Any = model
    try:
        from peft.utils import set_additional_trainable_modules
    except ImportError:
        _warn("this release of PEFT offers no way to name them")
        return
    for name, config in wrapped.peft_config.items():
        if not hasattr(config, "modules_to_save"):
            _warn(f"the configuration of adapter '{name}' names no modules_to_save")
            continue
        config.modules_to_save = sorted({*(config.modules_to_save or ()), CONTAINER})
        set_additional_trainable_modules(model=model, peft_config=config, model_config=getattr(model, "config", None),
                                         adapter_name=name, activate_adapter=name in wrapped.active_adapters)


def _warn(why: str) -> None:
    warnings.warn(f"the queries are not part of the model's adapters: {why}. PEFT will neither save nor load them; save "
                  "model.attnres yourself, or convert the base model before it gets adapters", stacklevel=4)
