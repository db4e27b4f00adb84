"""Graph breaks: what cut a graph, in the user's words, and the switch or the change that avoids it.

Dynamo reports what it cannot trace; what the user did is often something else, such as using another tool's hooks.
"""

from __future__ import annotations

import re

from attnres_fx.runtime.errors import GraphBreakError, Place

# What is true of every graph break.
_ONE_GRAPH = "The module that owns a converted stream runs as one graph, eagerly too: parts of it would run without mixes"
_GENERAL = ("make the line traceable (torch.compile(model, fullgraph=True) of the plain model stops there too), take it out "
            "of the module that owns the stream, or make it one operator with torch.library.custom_op")
_CAPTURE = "compile with fullgraph=True, which captures it, or set torch._dynamo.config."

# A pattern in Dynamo's message or in the file that it stopped at, and what to do; the first that fits is used.
_KNOWN: tuple[tuple[str, str], ...] = (
    (r"accelerate/hooks\.py",
     "accelerate moves the weights of this model during the call (cpu_offload, disk_offload, a device_map over "
     "several devices), which no graph can hold. Load the model whole on one device, and take the hooks off with "
     "accelerate.hooks.remove_hook_from_submodules(model)"),
    (r"ao/nn/(quantized|intrinsic)|quantize_dynamic",
     "the modules of torch.ao.quantization (quantize_dynamic) cannot be traced. Quantize the converted model with torchao: "
     "torchao.quantization.quantize_(model, Int8DynamicActivationInt8WeightConfig())"),
    (r"PagedAttentionCache|continuous_batching",
     "the paged cache of generate_batch is written by code that is kept out of graphs. Call model.generate, for steps of "
     "one size with cache_implementation='static'"),
    (r"distributed/fsdp/_fully_shard/",
     "fully_shard on single layers gathers weights in hooks between them, which no graph can hold. Call "
     "fully_shard(model) on the whole model alone: it is gathered once per call"),
    (r"use_orig_params=False",
     "wrap with FullyShardedDataParallel(model, use_orig_params=True), or call torch.distributed.fsdp.fully_shard(model)"),
    (r"nn/parallel/distributed\.py",
     "convert the model first, then wrap it: DistributedDataParallel(attnres_fx.convert(model, ...))"),
    (r"nn/parallel/data_parallel\.py",
     "DataParallel copies the model at every call. Use DistributedDataParallel, around the converted model"),
    (r"functorch tracing",
     "transforms of torch.func go around a compiled function, not around a converted model: "
     "torch.compile(torch.func.grad(loss), backend='attnres')"),
    (r"ContextVar",
     "a variable of the context cannot be read within a graph: read it around the call of the model, and hand it in"),
    (r"[Cc]ould not (guard on|extract) .*data-dependent|GuardOnDataDependent",
     "a size that depends on the data decides what is computed. Trace the model with inputs that leave this part out (of a "
     "vision-language model: text alone), and convert the stream of the rest; the part itself runs as it is"),
    (r"[Dd]ata-dependent (branch|jump)|dynamic control flow",
     "write the branch with torch.where or torch.cond, or take it out of the module that owns the stream"),
    (r"capture_scalar_outputs", _CAPTURE + "capture_scalar_outputs = True"),
    (r"capture_dynamic_output_shape_ops|Dynamic shape operator", _CAPTURE + "capture_dynamic_output_shape_ops = True"),
    (r"logging/__init__\.py|getLogger", "get the logger outside of the forward, once for the module"),
    (r"`_warnings\.warn`|qualname: warn,|logging\.Logger|builtin operator `print`",
     "leave messages out of the forward, or have Dynamo pass over them: "
     "torch._dynamo.config.ignore_logging_functions.update({print, warnings.warn, logging.Logger.warning})"),
    (r"`?torch\.compiler\.disable`?\(\)d|Skip (calling|inlining)",
     "the function is kept out of graphs by torch.compiler.disable: remove the decorator, or make the function one "
     "operator with torch.library.custom_op"),
    (r"[Cc]ontext manager", "enter the context (a lock, a timer) around the call of the model"),
    (r"flex_attention", "call flex_attention on a GPU, or under torch.no_grad(), or choose attn_implementation='sdpa'"),
)


def known_remedy(said: str, source: str) -> str:
    """What to do about a graph break of a known kind, by what Dynamo ``said`` and the file it stopped at; else ""."""
    return next((known for pattern, known in _KNOWN if re.search(pattern, f"{said}\n{source}")), "")


def explain_break(
    said: str, source: str = "", *, what: str = "the model", node: str = "", module: str = "", otherwise: str = ""
) -> GraphBreakError:
    """The error for a graph break that cuts ``what``, out of what Dynamo ``said`` (its reason, its explanation and hints)
    and the ``file:line`` that it stopped at. ``otherwise`` is another way out.
    """
    lines = [line.strip() for line in said.split("Developer debug context")[0].splitlines() if line.strip()]
    reason = lines[0] if lines else "no reason is known"
    explanation = next((line.removeprefix("Explanation:").strip() for line in lines if line.startswith("Explanation:")), "")
    text = f"a graph break cuts {what}: {reason.rstrip('.')}. " + (f"{explanation.rstrip('.')}. " if explanation else "")
    place = Place(node, module, source) if node or module or source else None
    return GraphBreakError(text + _ONE_GRAPH, place=place,
                           remedy=(known_remedy(said, source) or _GENERAL) + (f"; or {otherwise}" if otherwise else ""))
