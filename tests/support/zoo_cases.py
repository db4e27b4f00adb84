"""Real architectures with known answers: the table behind ``make test-zoo``.

Every model is tiny, built from its configuration with random weights, and deterministic. Layers of each stream, norm
placement and whether every reader is scale-invariant were read off the modelling code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from support import models, reference

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

# Settings under which configurations of many families come out tiny; a configuration takes those it knows.
_TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers",
                     "num_decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 64),
    "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "vocab_size": 128, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "sliding_window": 8, "image_size": 32,
    "patch_size": 8, "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_mel_bins": 16,
    "max_source_positions": 32, "type_vocab_size": 2, "use_cache": False, "moe_layer_freq": 1, "first_k_dense_replace": 1,
}


def tiny_config(cls: Any, settings: dict[str, Any]) -> Any:
    """The tiny configuration of a family."""
    known = {field.name for field in dataclasses.fields(cls)} - set(getattr(cls, "attribute_map", None) or {})
    return cls(**{**{key: value for key, value in _TINY.items() if key in known}, **settings})


def ids(length: int = 12, seed: int = 1) -> Tensor:
    return models.token_ids(2, length, seed, high=90)


def _inputs(kind: str, config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    match kind:
        case "text":
            return (ids(),), {"use_cache": False}
        case "encoder":
            return (ids(),), {}
        case "encoder-decoder":
            return (), {"input_ids": ids(), "decoder_input_ids": ids(10, 2), "use_cache": False}
        case "pixels":
            return (torch.randn(2, 3, config.image_size, config.image_size, generator=generator),), {}
        case "wave":
            return (torch.randn(2, 2000, generator=generator),), {}
        case "spectrum":
            spectrum = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
            return (), {"input_features": spectrum, "decoder_input_ids": ids(10), "use_cache": False}
    raise ValueError(kind)


@dataclass(frozen=True)
class ZooCase:
    """A model and its answer. ``rewritable``: at zero queries the paper's mix preserves the function. ``by_value``: the
    stream can be a value.
    """

    build: Callable[[], Built]
    layers: tuple[int, ...]
    placement: str = "pre"
    family: str = "decoder"
    rewritable: bool = True
    convertible: bool = True
    refusal: str = ""
    by_value: bool = True


def _hugging_face(name: str, kind: str, settings: dict[str, Any]) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        transformers.logging.set_verbosity_error()
        cls = getattr(transformers, name)
        torch.manual_seed(0)
        config = tiny_config(cls.config_class, settings)
        model = models.randomize(cls(config).eval())
        if hasattr(model, "set_experts_implementation") and "num_experts_per_tok" in vars(config):
            model.set_experts_implementation("batched_mm")  # the grouped product has no float64 kernel
        args, kwargs = _inputs(kind, config)
        return model, args, kwargs

    return build


def _hf(name: str, layers: tuple[int, ...] = (6,), kind: str = "text", settings: dict[str, Any] | None = None,
        **facts: Any) -> ZooCase:
    return ZooCase(_hugging_face(name, kind, settings or {}), layers, **facts)


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` behind an embedding."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(96, 64), nn.Linear(64, 96)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
        norm = nn.LayerNorm(64) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, 3, norm=norm, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


def _torch_encoder(norm_first: bool) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        # The fused fast path of evaluation hides the additions from every tracer.
        torch.backends.mha.set_fastpath_enabled(False)
        return models.randomize(TorchEncoder(norm_first).eval()), (ids(),), {}

    return build


def _nanogpt() -> Built:
    return models.nanogpt(6, width=64, vocabulary=96), (ids(),), {}


class ParallelBlock(reference.Block):
    """Attention and MLP side by side: one addition with two terms."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        return self.attn(h) + self.mlp(h) + x


class ParallelGPT(reference.NanoGPT):
    block = ParallelBlock


def _parallel() -> Built:
    torch.manual_seed(0)
    return models.randomize(ParallelGPT(6, width=64, vocabulary=96).eval()), (ids(),), {}


def _x_transformers(**settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        from x_transformers import Decoder, TransformerWrapper

        torch.manual_seed(0)
        layers = Decoder(dim=64, depth=3, heads=4, attn_dim_head=16, **settings)
        model = TransformerWrapper(num_tokens=96, max_seq_len=64, attn_layers=layers)
        return models.randomize(model.eval()), (ids(),), {}

    return build


def _deepstack() -> Built:
    """Features of the vision tower are added to the rows of image tokens after each of the first layers."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    model = Qwen3VLTextModel(tiny_config(Qwen3VLTextConfig, {"rope_parameters": rope}))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 2:5] = True
    features = [torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    return models.randomize(model.eval()), (), {"input_ids": ids(), "visual_pos_masks": mask, "use_cache": False,
                                                "deepstack_visual_embeds": features}


_WAVE = {"conv_dim": [32, 32, 32], "conv_stride": [5, 4, 4], "conv_kernel": [10, 8, 8], "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3}
_MAMBA2 = {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 8}
_POST: dict[str, Any] = {"placement": "post", "rewritable": False, "convertible": False, "refusal": "post-norm"}

_LANES: dict[str, Any] = {"placement": "hyper", "family": "lanes and gates", "rewritable": False, "convertible": False,
                          "refusal": "hyper-connections"}

ZOO: dict[str, ZooCase] = {
    "gpt2": _hf("GPT2LMHeadModel"),
    "llama": _hf("LlamaForCausalLM"),
    "mistral": _hf("MistralForCausalLM"),
    "qwen3": _hf("Qwen3ForCausalLM"),
    "phi3": _hf("Phi3ForCausalLM"),
    "opt": _hf("OPTForCausalLM", settings={"word_embed_proj_dim": 64}),
    "bloom": _hf("BloomForCausalLM"),
    "stablelm": _hf("StableLmForCausalLM"),
    "granite": _hf("GraniteForCausalLM", settings={"residual_multiplier": 0.5}),
    "gemma2": _hf("Gemma2ForCausalLM", placement="sandwich"),
    "gemma3": _hf("Gemma3ForCausalLM", placement="sandwich"),
    "glm4": _hf("Glm4ForCausalLM", placement="sandwich"),
    "olmo2": _hf("Olmo2ForCausalLM", placement="branch", rewritable=False),
    "exaone4": _hf("Exaone4ForCausalLM", placement="branch", rewritable=False),
    "gpt_neox": _hf("GPTNeoXForCausalLM", (3,), placement="parallel"),
    "gptj": _hf("GPTJForCausalLM", (3,), settings={"rotary_dim": 8}, placement="parallel"),
    "phi": _hf("PhiForCausalLM", (3,), placement="parallel"),
    "falcon": _hf("FalconForCausalLM", (3,), placement="parallel"),
    "cohere": _hf("CohereForCausalLM", (3,), placement="parallel"),
    "mixtral": _hf("MixtralForCausalLM", family="mixture of experts"),
    "qwen3_moe": _hf("Qwen3MoeForCausalLM", family="mixture of experts"),
    "gpt_oss": _hf("GptOssForCausalLM", family="mixture of experts"),
    "mamba": _hf("MambaForCausalLM", (3,), family="state space"),
    "mamba2": _hf("Mamba2ForCausalLM", (3,), settings=_MAMBA2, family="state space"),
    "jamba": _hf("JambaForCausalLM", family="state space"),
    "bert": _hf("BertModel", kind="encoder", family="encoder", **_POST),
    "roberta": _hf("RobertaModel", kind="encoder", family="encoder", **_POST),
    "modernbert": _hf("ModernBertModel", kind="encoder", family="encoder"),
    "vit": _hf("ViTModel", kind="pixels", family="vision"),
    "dinov2": _hf("Dinov2Model", kind="pixels", family="vision"),
    "wav2vec2": _hf("Wav2Vec2Model", (7,), kind="wave", settings=_WAVE, family="audio", **_POST),
    "t5": _hf("T5ForConditionalGeneration", (6, 9), kind="encoder-decoder", family="encoder-decoder"),
    "bart": _hf("BartForConditionalGeneration", (6, 9), kind="encoder-decoder", family="encoder-decoder", **_POST),
    "whisper": _hf("WhisperForConditionalGeneration", (6, 9), kind="spectrum", settings={"decoder_start_token_id": 1},
                   family="encoder-decoder"),
    "qwen3_vl_text": ZooCase(_deepstack, (6,), family="injected features", by_value=False),
    "x_transformers_reinject": ZooCase(_x_transformers(reinject_input=True), (6,), family="injected features",
                                       by_value=False, rewritable=False),
    "deepseek_v4": _hf("DeepseekV4ForCausalLM", **_LANES),
    "x_transformers_lanes": ZooCase(_x_transformers(num_residual_streams=2), (6,), **_LANES),
    "x_transformers_gru": ZooCase(_x_transformers(gate_residual=True), (6,), placement="gated", family="lanes and gates",
                                  rewritable=False, convertible=False, refusal="a gated recurrent cell"),
    "x_transformers": ZooCase(_x_transformers(), (6,), family="other libraries"),
    "torch_encoder_pre": ZooCase(_torch_encoder(True), (6,), family="other libraries"),
    "torch_encoder_post": ZooCase(_torch_encoder(False), (6,), family="other libraries", **_POST),
    "nanogpt": ZooCase(_nanogpt, (6,), family="hand-written"),
    "parallel_gpt": ZooCase(_parallel, (3,), placement="parallel", family="hand-written"),
}
