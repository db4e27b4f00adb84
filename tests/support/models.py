"""Tiny real transformers for the tests, built from their configurations with deterministic random weights.

What is known of each model (residual additions a stream, norm placement) was counted by reading its source. Weights are
drawn so that every branch contributes at the scale of the stream: zero or 1e-2 initialisations would hide mistakes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch
from torch import Tensor, nn

from support import reference

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

# State-space parameters whose range is part of the architecture.
_KEPT = {"A_log", "D", "dt_bias"}
_DECODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
            "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A model and what is known of it: layers of each stream in graph order, and the norm placement of all of them."""

    build: Callable[[], Built]
    layers: tuple[int, ...]
    placement: str = "pre"
    terms: int = 1
    streams: tuple[str, ...] = field(default=("stream",))


def randomize(model: nn.Module, seed: int = 0, gain: float = 0.8) -> nn.Module:
    """Deterministic weights under which every branch counts."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if last in _KEPT or not parameter.is_floating_point():
                continue
            drawn = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(0.7 * drawn)
            elif parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if parameter.dim() == 3 else parameter.numel() // parameter.shape[0]
                parameter.copy_(gain * drawn / fan_in**0.5)
            elif last.endswith("bias"):
                parameter.copy_(0.05 * drawn)
            else:
                parameter.copy_(1 + 0.05 * drawn)
    return model


def set_norm_eps(model: nn.Module, value: float = 1e-30) -> nn.Module:
    """Set the eps of every norm module: with ~0, scale invariance is exact."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for name, held in list(vars(module).items()):
                if "eps" in name and isinstance(held, float):
                    setattr(module, name, value)
    return model


def token_ids(batch: int = 2, length: int = 9, seed: int = 1, high: int = 60) -> Tensor:
    return torch.randint(3, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def hugging_face(name: str, **settings: Any) -> nn.Module:
    """A model of transformers by class name, from a configuration alone, in eval mode with random weights."""
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return randomize(cls(cls.config_class(**settings)).eval())


def nanogpt(num_sublayers: int = 6, **settings: Any) -> Any:
    """A :class:`reference.NanoGPT` in eval mode."""
    return randomize(reference.NanoGPT(num_sublayers, **settings).eval())


def llama(num_layers: int = 3, **settings: Any) -> Any:
    return hugging_face("LlamaForCausalLM", **{**_DECODER, "num_hidden_layers": num_layers, "intermediate_size": 64,
                                               "num_key_value_heads": 2, **settings})


def inkling2() -> nn.Module:
    """A language model of transformers that spells attention residuals out: several queries, normalised values."""
    return hugging_face(
        "Inkling2ForCausalLM", hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, vocab_size=64, unpadded_vocab_size=60, d_rel=4,
        rel_extent=16, sliding_window_size=8, max_position_embeddings=64, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_layers_per_attn_res_block=2, pad_token_id=0, eos_token_id=2,
        layer_types=["hybrid_sliding", "hybrid_sliding", "hybrid"] * 2)


def exact_norms(model: nn.Module) -> nn.Module:
    """Replace norms that compute in float32 whatever the dtype by ``nn.RMSNorm``, so that float64 is float64."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def _nanogpt() -> Built:
    return nanogpt(6), (token_ids(),), {}


def _llama() -> Built:
    return llama(), (token_ids(),), {"use_cache": False}


def _gpt2() -> Built:
    model = hugging_face("GPT2LMHeadModel", n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=64,
                         bos_token_id=1, eos_token_id=2)
    return model, (token_ids(),), {"use_cache": False}


def _gpt_neox() -> Built:
    model = hugging_face("GPTNeoXForCausalLM", **{**_DECODER, "num_hidden_layers": 4}, intermediate_size=64)
    return model, (token_ids(),), {"use_cache": False}


def _t5() -> Built:
    model = hugging_face("T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3,
                         num_heads=4, vocab_size=64, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return model, (), {"input_ids": token_ids(), "decoder_input_ids": token_ids(length=7, seed=2), "use_cache": False}


def _vit() -> Built:
    model = hugging_face("ViTModel", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
                         image_size=16, patch_size=8)
    return model, (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),), {}


def _mixtral() -> Built:
    model = hugging_face("MixtralForCausalLM", **_DECODER, intermediate_size=32, num_key_value_heads=2,
                         num_local_experts=4, num_experts_per_tok=2)
    model.set_experts_implementation("batched_mm")  # the grouped product has no float64 kernel
    return model, (token_ids(),), {"use_cache": False}


def _mamba2() -> Built:
    attention = {"num_attention_heads", "max_position_embeddings"}
    settings = {key: value for key, value in _DECODER.items() if key not in attention}
    model = hugging_face("Mamba2ForCausalLM", **settings, num_heads=8, head_dim=8, expand=2, state_size=8, n_groups=1,
                         chunk_size=8)
    return model, (token_ids(),), {"use_cache": False}


def bert() -> Built:
    """A post-norm encoder, which is refused."""
    return hugging_face("BertModel", **_DECODER, intermediate_size=64), (token_ids(),), {}


CASES: dict[str, Case] = {
    "nanogpt": Case(_nanogpt, (6,)),
    "llama": Case(_llama, (6,)),
    "gpt2": Case(_gpt2, (6,)),
    "gpt_neox": Case(_gpt_neox, (4,), "parallel", terms=2),
    "t5": Case(_t5, (6, 9), streams=("encoder", "decoder")),
    "vit": Case(_vit, (6,)),
    "mixtral": Case(_mixtral, (6,)),
    "mamba2": Case(_mamba2, (3,)),
}


def to_dtype(built: Built, dtype: torch.dtype) -> Built:
    """The model and the floating-point inputs in ``dtype``."""
    model, args, kwargs = built

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return model.to(dtype), tuple(cast(a) for a in args), {key: cast(value) for key, value in kwargs.items()}


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in tensors_of(part)] if isinstance(output, (list, tuple)) else []


def relative(ours: Any, theirs: Any) -> float:
    """The largest relative deviation among the floating-point tensors of two outputs."""
    pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
    assert pairs, "nothing to compare"
    return max(float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-300))
               for a, b in pairs)
