"""Convert a model of Hugging Face transformers to Attention Residuals, and train only its queries.

With a checkpoint of your own, replace the configuration by ``AutoModelForCausalLM.from_pretrained(...)``.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_fx


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, bos_token_id=None, eos_token_id=None))
    ids = torch.arange(64).repeat(4, 1) * 7 % 128  # 0, 7, 14, ...: an easy text

    # "sum" starts exactly at the function that the weights were trained for; see docs/options.md.
    attnres_fx.convert(model, ids, num_blocks=4, mix_scale="sum")
    print(attnres_fx.verify(model, ids))

    model.requires_grad_(False)
    model.attnres.requires_grad_(True)
    optimizer = torch.optim.Adam(model.attnres.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss  # eager; compile with torch.compile(model, backend="attnres")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:2}  loss {loss.item():.4f}  norm of the queries "
                  f"{model.attnres.stream.query.norm().item():.3f}")

    weights = attnres_fx.depth_weights(model, ids)["stream"]
    print("weights of the output mix over the embedding and the blocks:", weights[-1].numpy().round(3))
    return losses


if __name__ == "__main__":
    main()
