"""Partition: where blocks close, and what every position reads."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_fx.passes.rewrite.partition import partition, sources_at
from attnres_fx.runtime.errors import AttnResError, PartitionError


@pytest.mark.parametrize("num_layers, given_arguments, closing", [
    (6, {"num_blocks": 1}, (6,)),
    (6, {"num_blocks": 2}, (3, 6)),  # odd S
    (6, {"num_blocks": 3}, (2, 4, 6)),  # even S
    (7, {"num_blocks": 2}, (4, 7)),  # S does not divide L: the last block is short
    (7, {"num_blocks": 3}, (3, 6, 7)),
    (7, {"num_blocks": 5}, (2, 4, 6, 7)),  # num_blocks is an upper bound
    (12, {"num_blocks": 8}, (2, 4, 6, 8, 10, 12)),
    (3, {"num_blocks": 8}, (1, 2, 3)),  # fewer layers than blocks
    (1, {"num_blocks": 8}, (1,)),
    (24, {}, (3, 6, 9, 12, 15, 18, 21, 24)),  # eight blocks by default
    (5, {"layers_per_block": 1}, (1, 2, 3, 4, 5)),  # Full
    (5, {"layers_per_block": 3}, (3, 5)),
    (5, {"layers_per_block": 5}, (5,)),
    (5, {"layers_per_block": 99}, (5,)),
    (6, {"boundaries": (1, 4, 6)}, (1, 4, 6)),
    (6, {"boundaries": [2]}, (2, 6)),  # the last one may be left out
    (6, {"boundaries": []}, (6,)),
    (54, {"layers_per_block": 6}, tuple(range(6, 55, 6))),  # 27 transformer layers, 3 per block
    (186, {"layers_per_block": 24}, (24, 48, 72, 96, 120, 144, 168, 186)),  # 93 transformer layers, 12 per block
])
def test_closing_positions(num_layers: int, given_arguments: dict[str, Any], closing: tuple[int, ...]) -> None:
    assert partition(num_layers, **given_arguments) == closing


@pytest.mark.parametrize("num_layers, size, output", [
    (54, 6, 10), (186, 24, 9), (6, 2, 4), (7, 2, 5), (5, 5, 2), (5, 9, 2)])
def test_sources_at_the_output(num_layers: int, size: int, output: int) -> None:
    assert len(sources_at(partition(num_layers, layers_per_block=size), num_layers)) == output


def test_sources_by_hand() -> None:
    """L=7, S=3: [b0 | b0 p | b0 p | b0 b1 | b0 b1 p | b0 b1 p | b0 b1 b2 | b0 b1 b2 b3]."""
    found = [sources_at((3, 6, 7), position) for position in range(8)]
    assert [len(f) for f in found] == [1, 2, 2, 2, 3, 3, 3, 4]
    assert [f.blocks for f in found] == [0, 0, 0, 1, 1, 1, 2, 3]
    assert [f.partial for f in found] == [False, True, True, False, True, True, False, False]


@given(st.integers(1, 200), st.integers(1, 220))
def test_blocks_are_even_and_complete(num_layers: int, num_blocks: int) -> None:
    closing = partition(num_layers, num_blocks=num_blocks)
    sizes = [end - start for start, end in zip((0, *closing), closing)]
    assert len(closing) <= num_blocks and closing[-1] == num_layers
    assert len(set(sizes[:-1])) <= 1 and all(1 <= sizes[-1] <= size for size in sizes)
    assert sizes[0] == -(-num_layers // num_blocks)
    for done in range(num_layers + 1):
        stored = sum(1 for end in closing if end <= done)
        found = sources_at(closing, done)
        assert (found.blocks, found.partial) == (stored, done > 0 and done not in closing)
        assert len(found) == 1 + stored + found.partial


@pytest.mark.parametrize("given_arguments, word", [
    ({"num_blocks": 2, "layers_per_block": 3}, "num_blocks and layers_per_block"),
    ({"num_blocks": 2, "boundaries": [3]}, "num_blocks and boundaries"),
    ({"layers_per_block": 2, "boundaries": [3]}, "layers_per_block and boundaries"),
    ({"num_blocks": 2, "layers_per_block": 3, "boundaries": [3]}, "together"),
    ({"num_blocks": 0}, "num_blocks is 0"),
    ({"num_blocks": -1}, "num_blocks is -1"),
    ({"num_blocks": 2.0}, "num_blocks is 2.0"),
    ({"num_blocks": True}, "num_blocks is True"),
    ({"layers_per_block": 0}, "layers_per_block is 0"),
    ({"layers_per_block": "2"}, "layers_per_block is '2'"),
    ({"boundaries": [0, 6]}, "boundaries"),
    ({"boundaries": [3, 3]}, "increas"),
    ({"boundaries": [4, 2, 6]}, "increas"),
    ({"boundaries": [2, 7]}, "6 layers"),
    ({"boundaries": [-2, 6]}, "increas"),
])
def test_arguments_that_do_not_fit(given_arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(PartitionError, match=word) as caught:
        partition(6, **given_arguments)
    assert isinstance(caught.value, (AttnResError, ValueError)) and "What to do:" in str(caught.value)


def test_no_layers() -> None:
    with pytest.raises(PartitionError, match="0 layers"):
        partition(0)


@pytest.mark.parametrize("boundaries", [[2.5, 6], [True, 6], ["2", 6]])
def test_boundaries_that_are_no_whole_numbers(boundaries: list[Any]) -> None:
    with pytest.raises(PartitionError):
        partition(6, boundaries=boundaries)
