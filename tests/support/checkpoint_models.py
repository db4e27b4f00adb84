"""Small models on disk and in code, shared by the tests of saving, loading and the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A pre-norm MLP layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Own(nn.Module):
    """One's own model, with a tied head and a buffer."""

    def __init__(self, width: int = 16, depth: int = 4, vocabulary: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) * self.scale


def own_model(**sizes: int) -> Own:
    torch.manual_seed(0)
    return Own(**sizes).eval()


def own_with_inputs() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return own_model(), (ids(),)


def ids() -> torch.Tensor:
    return torch.arange(14).reshape(2, 7) + 3


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield transformers


def hugging_face(kind: str, **changes: Any) -> nn.Module:
    """A tiny random model of transformers."""
    torch.manual_seed(0)
    with quiet_transformers() as tf:
        shared = {"vocab_size": 64, "initializer_range": 0.3, **changes}
        match kind:
            case "llama":
                made = tf.LlamaForCausalLM(tf.LlamaConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                    **shared))
            case "gpt2":
                made = tf.GPT2LMHeadModel(tf.GPT2Config(
                    n_embd=32, n_layer=2, n_head=4, n_positions=12, bos_token_id=1, eos_token_id=2, **shared))
            case "t5":
                made = tf.T5ForConditionalGeneration(tf.T5Config(
                    d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, **changes))
            case "vit":
                made = tf.ViTForImageClassification(tf.ViTConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                    patch_size=4))
            case "bert":
                made = tf.BertModel(tf.BertConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64))
            case _:
                raise ValueError(kind)
    return made.eval()


def checkpoint(kind: str, folder: Path, **options: Any) -> Path:
    """The directory of a tiny random model of transformers."""
    hugging_face(kind).save_pretrained(folder, **options)
    return folder


def disturb(model: nn.Module) -> nn.Module:
    """Random queries and gains, so that a lost parameter shows; returns the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter += torch.randn(parameter.shape, generator=generator).to(parameter)
    return model
