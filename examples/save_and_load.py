"""Save a converted model and load it again, bit for bit: Hugging Face's own, and any other."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_fx


class Tower(nn.Module):
    """A pre-norm network of your own."""

    def __init__(self, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.norms[-1](x)


def main() -> list[bool]:
    torch.manual_seed(0)
    same = []
    with tempfile.TemporaryDirectory() as temporary:
        llama = LlamaForCausalLM(LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, bos_token_id=None, eos_token_id=None)).eval()
        ids = torch.randint(128, (1, 16))
        attnres_fx.convert(llama, ids, {"use_cache": False}, num_blocks=2)
        torch.nn.init.normal_(llama.attnres.stream.query, std=0.1)  # stands for training

        place = Path(temporary, "llama")
        attnres_fx.save(llama, place)  # the checkpoint as Hugging Face writes it, and two files of ours
        print("written:", ", ".join(sorted(path.name for path in place.iterdir())))
        again = attnres_fx.load(place).eval()
        same.append(torch.equal(llama(ids, use_cache=False).logits, again(ids, use_cache=False).logits))

        tower, x = Tower().eval(), torch.randn(2, 8, 32)
        attnres_fx.convert(tower, x, num_blocks=2)
        torch.nn.init.normal_(tower.attnres.stream.query, std=0.1)
        attnres_fx.save(tower, Path(temporary, "tower"))
        again = attnres_fx.load(Path(temporary, "tower"), model=Tower)  # no code is saved: say how the model is built
        same.append(torch.equal(tower(x), again.eval()(x)))
    print("bit-equal after loading:", same)
    return same


if __name__ == "__main__":
    main()
