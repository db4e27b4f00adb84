"""Attention residuals as people write them in eager PyTorch: the same read in many spellings, and near misses.

A read is put together from four choices: how sources are gathered, how keys are normalised, how logits are contracted and
how the sum is taken. :class:`Network` reads with one such choice, in the list and embedding conventions that the
paper's pseudocode allows, with a list, a bank with a valid count, or a packed tensor as its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[Tensor, "Tensor | None", float], Tensor]


# ------------------------------------------------------------------------------------------------ norms of the keys


def norm_functional(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), gain, eps)


def norm_rsqrt(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normed if gain is None else gain * normed


def norm_divide(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    normed = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return normed if gain is None else normed * gain


def norm_upcast(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    variance = wide.square().mean(-1, keepdim=True)
    normed = (wide * torch.rsqrt(variance + eps)).to(x.dtype)
    return normed if gain is None else gain * normed


def norm_sum(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """A root of a mean, written as a sum over the width."""
    normed = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    return normed if gain is None else normed * gain


def norm_default_eps(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), gain)


def norm_eps_outside(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    normed = x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps)
    return normed if gain is None else normed * gain


def norm_l2(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    normed = F.normalize(x, dim=-1)
    return normed if gain is None else normed * gain


def norm_l2_eps_inside(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps)
    return normed if gain is None else normed * gain


def norm_layer(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), gain, None, eps)


# ---------------------------------------------------------------------------------------------------- whole reads


@dataclass(frozen=True)
class Read:
    """One spelling of a read. ``axis`` is where stacked sources have the depth axis (positions have rank 2)."""

    name: str
    norm: Norm = norm_functional
    axis: int = 0
    logits: str = "linear"
    total: str = "einsum"
    gain: bool = True
    eps: float = 1e-6
    scale: float | None = None
    softmax: str = "softmax"
    gather: str = "stack"

    def __call__(self, sources: Sequence[Tensor], query: Tensor, gain: Tensor | None) -> Tensor:
        if self.total == "list":
            return self._listed(sources, query, gain)
        if self.gather == "cat":
            stacked = torch.cat([source.unsqueeze(self.axis) for source in sources], dim=self.axis)
        elif self.gather == "none":
            stacked = torch.cat([source[:, :, None] for source in sources], dim=2).permute(2, 0, 1, 3)
        else:
            stacked = torch.stack(list(sources), dim=self.axis)
        return self.read_stacked(stacked, query, gain)

    def read_stacked(self, stacked: Tensor, query: Tensor, gain: Tensor | None) -> Tensor:
        """The read of a tensor that has the depth axis at ``axis``."""
        keys = self.norm(stacked, gain, self.eps)
        weights = self._softmax(self._scaled(self._logits(keys, query)), -1 if self.axis == -2 else self.axis)
        return self._total(weights, stacked)

    def _logits(self, keys: Tensor, query: Tensor) -> Tensor:
        if self.logits == "linear":
            return F.linear(keys, query.view(1, -1)).squeeze(-1)
        if self.logits == "einsum":
            return torch.einsum("d,...d->...", query, keys)
        if self.logits == "matmul":
            return keys @ query
        if self.logits == "column":
            return torch.matmul(keys, query.unsqueeze(-1))[..., 0]
        return (keys * query).sum(dim=-1)

    def _scaled(self, logits: Tensor) -> Tensor:
        return logits if self.scale is None else logits * self.scale

    def _softmax(self, logits: Tensor, dim: int) -> Tensor:
        if self.softmax == "softmax":
            return logits.softmax(dim)
        if self.softmax == "float":
            return F.softmax(logits, dim=dim, dtype=torch.float32).to(logits.dtype)
        if self.softmax == "sigmoid":
            return logits.sigmoid()
        shifted = logits - logits.amax(dim, keepdim=True)
        raised = shifted.exp()
        return raised / raised.sum(dim, keepdim=True)

    def _total(self, weights: Tensor, stacked: Tensor) -> Tensor:
        if self.total == "einsum":
            letters = {0: ("nbt", "nbtd"), 1: ("bnt", "bntd"), 2: ("btn", "btnd"), -2: ("btn", "btnd")}[self.axis]
            return torch.einsum(f"{letters[0]},{letters[1]}->btd", weights, stacked)
        if self.total == "matmul":
            rows = stacked.movedim(self.axis, -2)
            return torch.matmul(weights.movedim(self.axis if self.axis >= 0 else -1, -1).unsqueeze(-2), rows).squeeze(-2)
        if self.total == "bmm":
            rows = stacked.movedim(self.axis, -2)
            flat = weights.movedim(self.axis if self.axis >= 0 else -1, -1).reshape(-1, 1, rows.shape[-2])
            return torch.bmm(flat, rows.reshape(-1, rows.shape[-2], rows.shape[-1])).view(*rows.shape[:-2], rows.shape[-1])
        if self.total == "products":
            along = self.axis if self.axis >= 0 else stacked.dim() + self.axis
            count = stacked.shape[along]
            return sum(weights.select(along, i).unsqueeze(-1) * stacked.select(along, i) for i in range(count))  # type: ignore[return-value]
        return (weights.unsqueeze(-1) * stacked).sum(dim=self.axis)

    def _listed(self, sources: Sequence[Tensor], query: Tensor, gain: Tensor | None) -> Tensor:
        keys = [self.norm(source, gain, self.eps) for source in sources]
        weights = self._softmax(torch.stack([self._scaled((key * query).sum(-1)) for key in keys], dim=-1), -1)
        mixed = weights[..., 0:1] * sources[0]
        for index in range(1, len(sources)):
            mixed = mixed + weights[..., index: index + 1] * sources[index]
        return mixed


READS = [
    Read("paper"),
    Read("no-gain", gain=False),
    Read("rsqrt", norm=norm_rsqrt, logits="einsum", total="sum"),
    Read("divide", norm=norm_divide, logits="product", total="matmul", eps=1e-5),
    Read("upcast", norm=norm_upcast, logits="matmul", total="products"),
    Read("sum-over-width", norm=norm_sum, axis=2, logits="column", total="sum"),
    Read("default-eps", norm=norm_default_eps, axis=1, total="matmul"),
    Read("axis-1", axis=1, norm=norm_rsqrt, gain=False, total="einsum", eps=1e-8),
    Read("axis-2-matmul", axis=2, logits="einsum", total="matmul"),
    Read("axis-minus-2-bmm", axis=-2, logits="matmul", total="bmm", norm=norm_divide),
    Read("cat-0", gather="cat", total="products", gain=False),
    Read("cat-2", gather="cat", axis=2, total="sum", norm=norm_upcast, softmax="float"),
    Read("cat-permuted", gather="none", total="einsum", norm=norm_rsqrt),
    Read("scaled", scale=0.37, norm=norm_rsqrt),
    Read("inverse-root", scale=16**-0.5, axis=2, total="matmul"),
    Read("list", total="list"),
    Read("list-rsqrt", total="list", norm=norm_rsqrt, gain=False, eps=1e-5),
    Read("list-scaled", total="list", norm=norm_divide, scale=0.5),
    Read("exponentials", softmax="exp", norm=norm_rsqrt),
    Read("exponentials-axis-2", softmax="exp", axis=2, total="matmul", gain=False),
    Read("l2-eps-inside", norm=norm_l2_eps_inside, gain=False),
]

NEAR_MISSES = [
    Read("sigmoid", softmax="sigmoid"),
    Read("eps-outside", norm=norm_eps_outside, eps=1e-2),
    Read("tiny-eps-outside", norm=norm_eps_outside, eps=1e-6),
    Read("l2", norm=norm_l2),
    Read("layer-norm", norm=norm_layer),
]


# ------------------------------------------------------------------------------------------------------ networks


class Sublayer(nn.Module):
    """A pre-norm branch that counts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Site(nn.Module):
    """The parameters of one read, and the read."""

    def __init__(self, width: int, read: Read) -> None:
        super().__init__()
        self.read = read
        self.query = nn.Parameter(torch.randn(width) * 0.5)
        self.gain = nn.Parameter(1 + 0.2 * torch.randn(width)) if read.gain else None

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        return self.read(sources, self.query, self.gain)


class Network(nn.Module):
    """A stack of sublayers, two a transformer layer, whose inputs are read by a softmax over depth.

    ``convention`` says how the list starts and when it grows: "empty" (nothing stored, the embedding is the first partial
    sum, layers counted from 0: Eq. 5-6), "twice" (the embedding stored and also the first partial sum), "from-one" (as
    "empty", layers counted from 1), "none" (the embedding stored and no partial sum yet: Eq. 5-6, any block size), "zeros"
    (as "none", but a cleared partial sum is a zero row of the softmax), "cumulative" (stored rows are the running
    stream). ``block`` counts sublayers; 1 with "none" is Full AttnRes.
    """

    def __init__(self, read: Read, *, width: int = 16, sublayers: int = 6, block: int = 2, convention: str = "empty",
                 output: bool = True, vocabulary: int = 13) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.sublayers = nn.ModuleList(Sublayer(width) for _ in range(sublayers))
        self.sites = nn.ModuleList(Site(width, read) for _ in range(sublayers))
        self.output = Site(width, read) if output else None
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.block, self.convention = block, convention

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = self._pairs(hidden) if self.convention in {"empty", "twice", "from-one"} else self._singles(hidden)
        return self.head(self.norm(hidden))

    def _pairs(self, hidden: Tensor) -> Tensor:
        blocks = [hidden] if self.convention == "twice" else []
        partial: Tensor | None = hidden
        for layer in range(len(self.sublayers) // 2):
            first, second = 2 * layer, 2 * layer + 1
            mixed = self.sites[first]([*blocks, partial])
            number = layer + 1 if self.convention == "from-one" else layer
            if number % max(self.block // 2, 1) == 0:
                blocks = [*blocks, partial]
                partial = None
            branch = self.sublayers[first](mixed)
            partial = branch if partial is None else partial + branch
            mixed = self.sites[second]([*blocks, partial])
            partial = partial + self.sublayers[second](mixed)
        assert partial is not None
        return partial if self.output is None else self.output([*blocks, partial])

    def _singles(self, hidden: Tensor) -> Tensor:
        blocks = [hidden]
        cleared = torch.zeros_like(hidden) if self.convention == "zeros" else None
        partial, stream = cleared, hidden
        for index, (site, sublayer) in enumerate(zip(self.sites, self.sublayers)):
            branch = sublayer(site(blocks if partial is None else [*blocks, partial]))
            partial = branch if partial is None else partial + branch
            stream = stream + branch
            if (index + 1) % self.block == 0:
                blocks = [*blocks, stream if self.convention == "cumulative" else partial]
                partial = cleared
        rows = blocks if partial is None else [*blocks, partial]
        return rows[-1] if self.output is None else self.output(rows)

    def num_mixes(self) -> int:
        """The reads in the network, those of one source included."""
        return len(self.sites) + (self.output is not None)


class Banked(nn.Module):
    """Full AttnRes over a bank [B, K, T, d] (or [T, K, d] rows) that is written in place and read up to a valid count.

    ``style`` says how: "setitem" (a bank of K rows; autograd refuses its later writes), "copied" (the same, read through a
    copy), "scatter" (written functionally), "grown" (concatenated), "split" (grown, bank and running sum added apart).
    """

    def __init__(self, style: str, *, width: int = 16, sublayers: int = 4, read: Read | None = None) -> None:
        super().__init__()
        self.read = read or Read("bank", norm=norm_rsqrt, axis=1, logits="einsum", total="einsum")
        self.sublayers = nn.ModuleList(Sublayer(width) for _ in range(sublayers))
        self.sites = nn.ModuleList(Site(width, self.read) for _ in range(sublayers + 1))
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        bank = x.new_zeros(x.shape[0], len(self.sublayers) + 1, *x.shape[1:])
        bank = self._write(bank, 0, x)
        prefix = x
        for index, sublayer in enumerate(self.sublayers):
            mixed = self._read(bank, index + 1, prefix, self.sites[index])
            prefix = sublayer(mixed)
            bank = self._write(bank, index + 1, prefix)
        return self._read(bank, len(self.sublayers) + 1, prefix, self.sites[-1])

    def _write(self, bank: Tensor, index: int, row: Tensor) -> Tensor:
        if self.style == "scatter":
            return torch.select_scatter(bank, row, 1, index)
        if self.style in {"grown", "split"}:
            return row.unsqueeze(1) if index == 0 else torch.cat([bank, row.unsqueeze(1)], dim=1)
        bank[:, index] = row
        return bank

    def _read(self, bank: Tensor, count: int, prefix: Tensor, site: Site) -> Tensor:
        if self.style != "split":
            rows = bank[:, :count].clone() if self.style == "copied" else bank[:, :count]
            return self.read.read_stacked(rows, site.query, site.gain)
        stored = bank[:, : count - 1]
        folded = (site.query.float() * site.gain.float()).to(bank.dtype)
        rows = torch.cat([stored, prefix.unsqueeze(1)], dim=1)
        inverse = torch.rsqrt(rows.pow(2).mean(-1) + 1e-5)
        weights = torch.softmax((rows @ folded) * inverse, dim=1)
        mixed = (weights[:, count - 1].unsqueeze(-1) * prefix)
        if count == 1:
            return mixed
        return mixed + torch.einsum("bnt,bntd->btd", weights[:, : count - 1], stored)


class Packed(nn.Module):
    """One read of a tensor [N, B, T, d] that comes from outside, whole or up to a valid count."""

    def __init__(self, read: Read, width: int = 16, count: int | None = None, unbound: bool = False) -> None:
        super().__init__()
        self.site, self.count, self.unbound = Site(width, read), count, unbound

    def forward(self, packed: Tensor) -> Tensor:
        read = self.site.read
        if self.unbound:
            return read(list(packed.unbind(read.axis)), self.site.query, self.site.gain)
        rows = packed if self.count is None else packed.narrow(read.axis, 0, self.count)
        return read.read_stacked(rows, self.site.query, self.site.gain)


class WithWeights(nn.Module):
    """A read that also returns its softmax weights."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, 1, bias=False)

    def forward(self, *sources: Tensor) -> tuple[Tensor, Tensor]:
        stacked = torch.stack(sources)
        weights = self.proj(self.norm(stacked)).squeeze(-1).softmax(0)
        return torch.einsum("n...,n...d->...d", weights, stacked), weights


class SeveralQueries(nn.Module):
    """Several queries reading the same sources at once, the queries' axis before the width; values raw or normalised."""

    def __init__(self, width: int = 16, queries: int = 3, attention: bool = False) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.attention = attention

    def forward(self, *sources: Tensor) -> tuple[Tensor, ...]:
        rows = torch.cat([source.unsqueeze(-2) for source in sources], dim=-2)
        keys = norm_rsqrt(rows, None, 1e-6)
        if self.attention:
            query = self.query.view(-1, rows.shape[-1]).expand(*rows.shape[:-2], -1, -1)
            return F.scaled_dot_product_attention(query, keys, keys, scale=rows.shape[-1] ** -0.5).unbind(-2)
        weights = torch.einsum("md,...nd->...mn", self.query, keys).softmax(-1)
        return torch.matmul(weights, rows).unbind(-2)


class NearMiss(nn.Module):
    """Reads of a list that are not quite the mix, or are another member of its family."""

    def __init__(self, kind: str, width: int = 16) -> None:
        super().__init__()
        self.kind = kind
        self.query = nn.Parameter(torch.randn(width))
        self.gain = nn.Parameter(1 + 0.2 * torch.randn(width))
        self.recency = nn.Parameter(torch.tensor(3.0))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.to_query = nn.Linear(width, width)

    def forward(self, *sources: Tensor) -> Tensor:
        rows = torch.stack(sources)
        values = rows
        query = self.query
        keys = norm_rsqrt(rows, self.gain, 1e-6)
        if self.kind == "normalised-values":
            keys = values = norm_rsqrt(rows, None, 1e-6)
        if self.kind == "gained-values":
            values = keys
        if self.kind == "raw-keys":
            keys = rows
        if self.kind == "frozen-keys":
            keys = keys.detach()
        if self.kind == "computed-query":
            query = self.to_query(sources[-1])
        logits = (keys * query).sum(-1)
        if self.kind == "recency":
            logits = torch.cat([logits[:-1], logits[-1:] + self.recency])
        if self.kind == "recency-in-place":
            logits[-1] += self.recency
        if self.kind == "temperature":
            logits = logits * self.temperature
        if self.kind == "scaled-in-place":
            logits.mul_(0.25)
        if self.kind == "bias":
            logits = logits + self.temperature
        if self.kind == "zero-row":
            logits = torch.cat([logits, torch.zeros_like(logits[:1])])
            weights = logits.softmax(0)[:-1]
        elif self.kind == "mean-of-others":
            weights = logits.softmax(0).roll(1, 0)
        elif self.kind == "softmax-over-time":
            weights = logits.softmax(-1)
        else:
            weights = logits.softmax(0)
        if self.kind == "dropout":
            weights = F.dropout(weights, 0.5, True)
        if self.kind == "doubled":
            return 2.0 * torch.einsum("nbt,nbtd->btd", weights, values)
        return torch.einsum("nbt,nbtd->btd", weights, values)


# kind -> whether it is a member of the operator's family
KINDS = {"normalised-values": True, "gained-values": True, "temperature": True, "doubled": True,
         "scaled-in-place": True, "raw-keys": False, "bias": False,
         "frozen-keys": False, "computed-query": False, "recency": False, "recency-in-place": False, "zero-row": False,
         "mean-of-others": False, "softmax-over-time": False, "dropout": False}


class Loose(nn.Module):
    """Full AttnRes in further spellings, its queries and gains the rows of one parameter each."""

    def __init__(self, style: str, width: int = 16, sublayers: int = 3) -> None:
        super().__init__()
        self.style = style
        self.query = nn.Parameter(0.5 * torch.randn(sublayers + 1, width))
        self.gain = nn.Parameter(1 + 0.2 * torch.randn(sublayers + 1, width))
        self.temperature = nn.Parameter(torch.tensor(0.8))
        self.projections = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(sublayers + 1))
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(sublayers + 1))
        self.sublayers = nn.ModuleList(Sublayer(width) for _ in range(sublayers))

    def forward(self, x: Tensor) -> Tensor:
        values, keys = [x], [norm_rsqrt(x, None, 1e-6)]
        for index, sublayer in enumerate(self.sublayers):
            values.append(sublayer(self._read(values, keys, index)))
            keys.append(norm_rsqrt(values[-1], None, 1e-6))
        return self._read(values, keys, len(self.sublayers))

    def _read(self, values: list[Tensor], keys: list[Tensor], index: int) -> Tensor:
        query, gain = self.query[index], self.gain[index]
        batch, length, width = values[0].shape
        match self.style:
            case "modules":
                scores = torch.cat([self.projections[index](self.norms[index](value)) for value in values], dim=-1)
                return sum(part.unsqueeze(-1) * value  # type: ignore[return-value]
                           for part, value in zip(scores.softmax(-1).unbind(-1), values))
            case "accumulated":
                keys = [norm_rsqrt(value, self.gain[index], 1e-6) for value in values]
                weights = torch.stack([(key * self.query[index]).sum(-1) for key in keys]).softmax(0)
                mixed = torch.zeros_like(values[0])
                for place, value in enumerate(values):
                    mixed = torch.addcmul(mixed, weights[place].unsqueeze(-1), value)
                return mixed
            case "cached-keys":
                weights = torch.stack([(key * self.query[index]).sum(-1) for key in keys], dim=-1).softmax(-1)
                return (weights.unsqueeze(-1) * torch.stack(values, dim=-2)).sum(-2)
            case "folded":
                stacked = torch.stack(values, dim=2)
                inverse = torch.rsqrt(stacked.square().mean(-1) + 1e-5)
                weights = torch.softmax((stacked @ (query * gain)) * inverse, dim=-1)
                return (weights.unsqueeze(-2) @ stacked).squeeze(-2)
            case "flat":
                stacked = torch.stack([value.reshape(batch * length, width) for value in values], dim=1)
                weights = (norm_rsqrt(stacked, gain, 1e-6) @ query).softmax(1)
                return torch.bmm(weights.unsqueeze(1), stacked).squeeze(1).view(batch, length, width)
            case "logsumexp":
                stacked = torch.stack(values)
                scores = (norm_rsqrt(stacked, gain, 1e-6) * query).sum(-1)
                return ((scores - scores.logsumexp(0)).exp()[..., None] * stacked).sum(0)
            case "temperature":
                stacked = torch.stack(values, dim=-2)
                scores = torch.einsum("btnd,d->btn", norm_rsqrt(stacked, gain, 1e-6), query) * self.temperature / width**0.5
                return torch.einsum("btn,btnd->btd", scores.softmax(-1), stacked)
            case _:  # two queries that read at once
                stacked = torch.stack(values, dim=2)
                weights = (norm_rsqrt(stacked, None, 1e-6) @ self.query[:2].t()).softmax(2)
                both = torch.einsum("btnm,btnd->btmd", weights, stacked)
                return both[:, :, 0] + both[:, :, 1]


LOOSE = ["modules", "accumulated", "cached-keys", "folded", "flat", "logsumexp", "temperature", "two-queries"]
