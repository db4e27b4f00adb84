"""Inference of a converted model with ``torch.compile``: one compilation, any length."""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_fx


def main() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False, bos_token_id=None, eos_token_id=None)).eval()
    attnres_fx.convert(model, torch.randint(128, (1, 16)), num_blocks=2)
    torch.nn.init.normal_(model.attnres.stream.query, std=0.1)  # stands for trained queries

    fast = torch.compile(model, backend="attnres", dynamic=True)
    outputs = []
    with torch.inference_mode():
        for length in (16, 33, 64, 128):
            ids = torch.randint(128, (1, length))
            begin = time.perf_counter()
            logits = fast(ids).logits
            taken = time.perf_counter() - begin
            difference = (logits - model(ids).logits).abs().max().item()  # beside the eager call of the same model
            print(f"{length:4} tokens  {taken * 1e3:9.1f} ms  largest difference from eager {difference:.1e}")
            outputs.append(logits)
    return outputs


if __name__ == "__main__":
    main()
