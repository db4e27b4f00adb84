"""One line: a plain model is converted while it is compiled. Build the optimizer after the first call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    plain_model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False, bos_token_id=None, eos_token_id=None))
    ids = torch.arange(65).repeat(4, 1) * 7 % 128

    model = torch.compile(plain_model, backend="attnres", options={"num_blocks": 8})  # no import of attnres_fx

    model(ids[:, :-1])  # the first call converts: from here on the queries are parameters of the model
    print("new parameters:", [name for name, _ in plain_model.named_parameters() if name.startswith("attnres.")])
    optimizer = torch.optim.AdamW(plain_model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}  loss {loss.item():.4f}  norm of the queries "
              f"{plain_model.attnres.stream.query.norm().item():.3f}")
    return losses


if __name__ == "__main__":
    main()
