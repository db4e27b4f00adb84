"""Partition: cut the layers of a stream into blocks (paper, section 3.2), and list the sources of every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnres_fx.runtime.errors import PartitionError

DEFAULT_NUM_BLOCKS = 8


def partition(
    num_layers: int,
    *,
    num_blocks: int | None = None,
    layers_per_block: int | None = None,
    boundaries: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The positions at which blocks close: increasing layer counts, the last of them L.

    At most one of the three may be given; none means ``num_blocks=8``. With ``num_blocks=N`` a block has
    S = ceil(L / N) layers and the last may be short, so that N is an upper bound. ``boundaries`` lists the closing
    positions themselves; L may be left out.

    Raises: PartitionError if two of the three are given or a value does not fit the stream.
    """
    given = [name for name, value in (("num_blocks", num_blocks), ("layers_per_block", layers_per_block),
                                      ("boundaries", boundaries)) if value is not None]
    if len(given) > 1:
        raise PartitionError(f"{' and '.join(given)} were given together", remedy="give one of them")
    if num_layers < 1:
        raise PartitionError(f"a stream of {num_layers} layers cannot be cut into blocks")
    if boundaries is not None:
        return _explicit(num_layers, boundaries)
    if layers_per_block is not None:
        size = _positive("layers_per_block", layers_per_block)
    else:
        blocks = _positive("num_blocks", DEFAULT_NUM_BLOCKS if num_blocks is None else num_blocks)
        size = -(-num_layers // blocks)
    return (*range(size, num_layers, size), num_layers)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PartitionError(f"{name} is {value!r}", remedy=f"give {name} as a whole number of 1 or more")
    return value


def _explicit(num_layers: int, boundaries: Sequence[int]) -> tuple[int, ...]:
    if any(isinstance(position, bool) or not isinstance(position, int) for position in boundaries):
        raise PartitionError(f"boundaries {list(boundaries)} are not whole numbers", remedy="list layer counts")
    positions = list(boundaries)
    if not positions or positions[-1] != num_layers:
        positions.append(num_layers)
    if positions[0] < 1 or any(a >= b for a, b in zip(positions, positions[1:])):
        raise PartitionError(
            f"boundaries {list(boundaries)} do not increase from 1 to the stream's {num_layers} layers",
            remedy="list the layer counts after which a block closes, each once, in increasing order",
        )
    return tuple(positions)


@dataclass(frozen=True)
class Sources:
    """What the mix at one position reads: the embedding b_0, ``blocks`` complete blocks, and perhaps the partial sum."""

    blocks: int
    partial: bool

    def __len__(self) -> int:
        return 1 + self.blocks + self.partial


def sources_at(boundaries: Sequence[int], position: int) -> Sources:
    """The sources of position ``position`` (after that many layers), Eq. 6: a block start sees no partial sum."""
    blocks = sum(boundary <= position for boundary in boundaries)
    return Sources(blocks, position > 0 and position not in boundaries)
