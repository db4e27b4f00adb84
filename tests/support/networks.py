"""Random residual networks with a known answer, for property tests.

A :class:`Spec` is plain data that hypothesis draws; :class:`Network` builds it. Every layer knows its branch as a function
of its input, so that the network can be run as an Attention-Residuals network by ``reference.attention_residuals`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support import opaque_norms as fused

# How an addition is spelled. Each takes the stream and the branch's output.
SPELLINGS = ("x + f", "f + x", "torch.add", "alpha", "iadd", "add_", "addcmul", "stack", "sub", "f += x", "fused",
             "fused in place", "sum", "subtract", "addmm", "baddbmm")
# What a branch does. "plain" reads the stream raw; "mixer" has no contraction.
BRANCHES = ("pre", "plain", "rms", "hand_rms", "sandwich", "parallel_left", "parallel_right", "parallel_inner", "dropout",
            "layer_scale", "rezero", "constant", "mixer", "nested", "broadcast", "half", "shared", "flat", "permuted",
            "attention", "fan_out", "in_place", "turned", "turned_bare", "sliced", "padded", "channels", "channels_last",
            "flipped", "multiplied", "divided", "true_divided")
# How features are added to the stream in front of a layer: whole, by rows, by a mask, in place, or the first value again.
INJECTIONS = ("sum", "row", "masked", "written", "index_add", "first")
# What may stand on the stream and forbid a rewrite, with the error class that names it.
OBSTACLES = {"scale": "ScaledStreamError", "multiply": "ScaledStreamError", "divide": "ScaledStreamError",
             "true_divide": "ScaledStreamError", "norm": "PostNormError", "gate": "GatedStreamError",
             "tanh": "StreamOperationError", "mutation": "MutatedStreamError", "lanes": "GatedStreamError",
             "cell": "GatedStreamError", "overwrite": "MutatedStreamError", "first value": "ScaledStreamError",
             "long skip": "StreamOperationError"}
NO_CONTRACTION = {"mixer"}


@dataclass(frozen=True)
class LayerSpec:
    branch: str
    spelling: str


@dataclass(frozen=True)
class Spec:
    """A network: its layers, what may stand between them, and what else reads the stream."""

    layers: tuple[LayerSpec, ...]
    obstacle: str | None = None
    obstacle_at: int = 0
    position_table: bool = False
    read_hidden: bool = False
    final_norm: bool = True
    grouped: bool = False
    seed: int = 0
    injection: str | None = None
    injection_at: int = 0
    turned_start: bool = False  # the first value of the stream is a transposed view
    checkpointed: bool = False  # every layer under torch.utils.checkpoint, in inference too

    @property
    def late(self) -> bool:
        """Whether the value of the stream without the injected features has a reader, or another layout than they."""
        before = self.layers[self.injection_at - 1].branch
        return self.read_hidden or before in ("flat", "permuted")

    @property
    def obstructed(self) -> bool:
        return self.obstacle is not None


def normal_spec(spec: Spec) -> Spec:
    """Obstacle or injection, not both, stand between two layers; what comes from further back skips a layer at least."""
    least = 3 if spec.obstacle == "long skip" else 1
    if spec.obstacle is not None and len(spec.layers) > least:
        return replace(spec, injection=None, obstacle_at=least + spec.obstacle_at % (len(spec.layers) - least))
    least = 2 if spec.injection == "first" else 1
    if spec.injection is not None and len(spec.layers) > least:
        # What is added to matrices is added in a layout of its own, as "flat" does.
        layers = tuple(replace(each, spelling="sum") if each.spelling == "addmm" else each for each in spec.layers)
        return replace(spec, layers=layers, obstacle=None,
                       injection_at=least + spec.injection_at % (len(spec.layers) - least))
    return replace(spec, obstacle=None, injection=None)


class HandRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """One residual addition."""

    def __init__(self, spec: LayerSpec, width: int, shared: nn.Module) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.norm: nn.Module = HandRMSNorm(width) if spec.branch == "hand_rms" else (
            nn.RMSNorm(width) if spec.branch == "rms" else nn.LayerNorm(width))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.other, self.out_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.scale, self.alpha = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.rand(()) + 0.5)
        self.shared = shared if spec.branch == "shared" else None
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.wide, self.pointwise = nn.Linear(width, width + 4), nn.Conv1d(width, width, 1)
        self.bare, self.picture = nn.Linear(width, width, bias=False), nn.Conv2d(width, width, 1)

    def parts(self, x: Tensor) -> list[Tensor]:
        """The outputs that are added to the stream, as functions of the layer's input."""
        kind = self.spec.branch
        h = x if kind == "plain" else self.norm(x)
        if kind.startswith("parallel") or kind == "fan_out":
            return [self.down(torch.tanh(self.up(h))), self.other(h)]
        if kind == "mixer":
            return [torch.sin(h) * self.scale]
        if kind == "shared":
            assert self.shared is not None
            return [self.shared(h)]
        if kind == "nested":
            h = self.inner[0](h)
            h = h + self.inner[1](F.layer_norm(h, (self.width,)))
            return [self.down(torch.tanh(self.up(h)))]
        if kind == "attention":
            q, k = self.other(h), self.inner[0](h)
            scores = (q @ k.transpose(-1, -2)) * self.width**-0.5
            return [scores.softmax(-1) @ self.inner[1](h)]
        # What a branch gives may lie in any order, and have gaps.
        match kind:
            case "turned":
                return [self.down(torch.tanh(self.up(h.transpose(0, 1)))).transpose(0, 1)]
            case "turned_bare":
                return [self.bare(torch.tanh(h.transpose(0, 1).contiguous())).transpose(0, 1)]
            case "sliced":
                return [self.wide(h)[..., 2:-2]]
            case "padded":
                return [F.pad(self.other(h), (0, 3))[..., :-3]]
            case "channels":
                return [self.pointwise(h.transpose(-1, -2)).transpose(-1, -2)]
            case "channels_last":
                pictures = h.transpose(-1, -2).unsqueeze(-1).contiguous(memory_format=torch.channels_last)
                return [self.picture(pictures).squeeze(-1).transpose(-1, -2)]
            case "flipped":
                return [self.other(h) + 0.3 * torch.tanh(h.flip(1))]
        f = self.down(F.gelu(self.up(h), approximate="tanh"))
        if kind == "sandwich":
            f = self.out_norm(f)
        elif kind == "dropout":
            f = F.dropout(f, 0.1, training=False)
        elif kind == "layer_scale":
            f = f * self.scale
        elif kind == "rezero":
            f = self.alpha * f
        elif kind == "constant":
            f = 0.5 * f
        elif kind == "multiplied":
            f = torch.multiply(f, 0.5)
        elif kind == "divided":
            f = torch.divide(f, 2.5)
        elif kind == "true_divided":
            f = torch.true_divide(self.scale * f, 1.5)
        elif kind == "in_place":
            f.mul_(3)  # nothing reads the result of the call, everything its target
        elif kind == "broadcast":
            f = f.mean(1, keepdim=True)
        elif kind == "half":
            f = f.float()
        return [f]

    def forward(self, x: Tensor) -> Tensor:
        kind = self.spec.branch
        if kind == "flat":
            flat = x.reshape(-1, self.width)
            return self.add(flat, self.parts(flat)).view(x.shape)
        if kind == "permuted":
            turned = x.transpose(0, 1)
            return self.add(turned, self.parts(turned)).transpose(0, 1)
        return self.add(x, self.parts(x))

    def add(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        kind = self.spec.branch
        if kind == "parallel_left" or kind == "fan_out":
            return x + parts[0] + parts[1]
        if kind == "parallel_right":
            return parts[0] + (x + parts[1])
        if kind == "parallel_inner":
            return (parts[0] + parts[1]) + x
        (f,) = parts
        same = f.shape == x.shape and f.dtype == x.dtype
        spelling = self.spec.spelling if same else "x + f"
        match spelling:
            case "f + x":
                return f + x
            case "torch.add":
                return torch.add(x, f)
            case "alpha":
                return torch.add(x, f / 2, alpha=2)
            case "iadd":
                y = x.clone()
                y += f
                return y
            case "add_":
                return x.clone().add_(f)
            case "f += x":
                f += x
                return f
            case "fused":
                return fused.rms_with_sum(f, self.scale, 1e-6, x)[1]
            case "fused in place":
                y, normed = x.clone(), f.clone()
                fused.in_place(normed, y, self.scale, 1e-6)
                return y
            case "addcmul":
                return torch.addcmul(x, f, torch.ones_like(f))
            case "stack":
                return torch.stack([x, f]).sum(0)
            case "sub":
                return x - (-f)
            case "subtract":
                return torch.subtract(x, -f)
            case "sum":
                return sum([x, f])  # type: ignore[return-value]
            case "addmm":
                one = torch.eye(self.width, dtype=x.dtype)
                return torch.addmm(x.reshape(-1, self.width), f.reshape(-1, self.width), one).view(x.shape)
            case "baddbmm" if x.dim() == 3:
                return torch.baddbmm(x, f, torch.eye(self.width, dtype=x.dtype).expand(len(x), -1, -1))
            case _:
                return x + f


class Group(nn.Module):
    """Some layers within a module of their own."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Network(nn.Module):
    """A stack of layers between an embedding and a head."""

    def __init__(self, spec: Spec, width: int = 8, vocabulary: int = 17) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec, self.width = spec, width
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(5, width))
        shared = nn.Linear(width, width)
        layers = [Layer(layer, width, shared) for layer in spec.layers]
        whole = spec.read_hidden or spec.obstructed or spec.injection is not None
        half = len(layers) // 2 if spec.grouped and not whole else 0
        self.groups = nn.ModuleList([Group(layers[:half])] if half else [])
        self.layers = nn.ModuleList(layers[half:])
        self.all_layers = layers
        self.stream_norm, self.gate = nn.LayerNorm(width), nn.Linear(width, width)
        self.features, self.cell = nn.Embedding(vocabulary, width), nn.GRUCell(width, width)
        self.register_buffer("mask", torch.arange(15).view(3, 5) % 4 == 1)
        self.register_buffer("columns", torch.tensor([0, 3, 3]))
        self.register_buffer("lanes", torch.tensor([[0.9, 0.2], [-0.1, 1.1]]))
        self.final, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids.t()).transpose(0, 1) if self.spec.turned_start else self.embedding(ids)
        return x + self.positions[: ids.shape[1]] if self.spec.position_table else x

    def injected(self, ids: Tensor) -> Tensor:
        """What the injection adds to the stream, whole."""
        e = self.features(ids)
        match self.spec.injection:
            case "row":
                return e[:1, :1].expand_as(e)
            case "masked" | "written":
                return e * self.mask.unsqueeze(-1)
            case "index_add":
                return torch.zeros_like(e).index_add(1, self.columns, e[:, :3])
            case "first":
                return self.embed(ids)
            case _:
                return e

    def inject(self, x: Tensor, x0: Tensor, ids: Tensor) -> Tensor:
        e = self.features(ids)
        match self.spec.injection:
            case "row":
                return x + e[:1, :1]
            case "masked":
                return torch.where(self.mask.unsqueeze(-1), x + e, x)
            case "written":
                x = x.clone()
                x[self.mask] = x[self.mask] + e.flatten(0, 1)[1::4]
                return x
            case "index_add":
                return x.index_add(1, self.columns, e[:, :3])
            case "first":
                return x + x0
            case _:
                return x + e

    def on_stream(self, x: Tensor, hidden: list[Tensor]) -> Tensor:
        match self.spec.obstacle:
            case "lanes":
                return (self.lanes @ x.unflatten(-1, (2, -1))).flatten(-2)
            case "cell":
                return self.cell(self.gate(self.stream_norm(x)).flatten(0, 1), x.flatten(0, 1)).view_as(x)
            case "overwrite":
                x = x.clone()
                x[:, 0] = 0.5
                return x
            case "first value":
                return 0.9 * x + 0.2 * hidden[0]
            case "long skip":
                return x + 0.5 * hidden[1]
            case "scale":
                return 0.9 * x
            case "multiply":
                return torch.multiply(x, 0.9)
            case "divide":
                return torch.divide(x, 1.1)
            case "true_divide":
                return torch.true_divide(x, 1.1)
            case "norm":
                return self.stream_norm(x)
            case "gate":
                return torch.sigmoid(self.gate(x)) * x
            case "tanh":
                return torch.tanh(x)
            case _:
                return x

    def finish(self, x: Tensor, hidden: list[Tensor]) -> list[Tensor]:
        logits = self.head(self.final(x) if self.spec.final_norm else x)
        return [logits, *hidden] if self.spec.read_hidden else [logits]

    def forward(self, ids: Tensor) -> list[Tensor]:
        x = self.embed(ids)
        hidden = [x]
        for group in self.groups:
            x = group(x)
        for index, layer in enumerate(self.layers):
            if self.spec.obstructed and index == self.spec.obstacle_at:
                if self.spec.obstacle == "mutation":
                    x.mul_(1.5)
                x = self.on_stream(x, hidden)
            if self.spec.injection is not None and index == self.spec.injection_at:
                x = self.inject(x, hidden[0], ids)
            x = checkpoint(layer, x, use_reentrant=False) if self.spec.checkpointed else layer(x)
            hidden.append(x)
        return self.finish(x, hidden)

    def output(self, index: int, x: Tensor, ids: Tensor) -> Tensor:
        """What layer ``index`` adds to the stream at the mix ``x``: its branch, and the features that are injected by it."""
        spec = self.spec
        if spec.injection is None or index != spec.injection_at - (not spec.late):
            return self.branch(index, x)
        e = self.injected(ids)
        return self.branch(index, x + e if spec.late else x) + e

    def branch(self, index: int, x: Tensor) -> Tensor:
        """The output of layer ``index`` at input ``x``, all parts summed, in the shape of ``x``."""
        layer = self.all_layers[index]
        if layer.spec.branch == "permuted":
            return sum(layer.parts(x.transpose(0, 1))).transpose(0, 1)  # type: ignore[union-attr]
        if layer.spec.branch == "flat":
            return sum(layer.parts(x.reshape(-1, self.width))).view(x.shape)  # type: ignore[union-attr]
        total = torch.zeros_like(x)
        for part in layer.parts(x):
            total = total + part.to(x.dtype)
        return total
