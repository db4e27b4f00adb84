"""The least arena for a few storages, by branch and bound: what the planner is held to."""

from __future__ import annotations

from collections.abc import Sequence

Piece = tuple[int, int, int]  # size, first step, last step


def most_live(pieces: Sequence[Piece]) -> int:
    """The largest sum of sizes that live in one step."""
    steps = {first for _, first, _ in pieces}
    return max((sum(size for size, first, last in pieces if first <= step <= last) for step in steps), default=0)


def exact_arena(pieces: Sequence[Piece], known: int) -> int:
    """The least arena of all layouts, or ``known``, an arena that some layout has, if none is smaller.

    Some best layout comes of pieces that are set down one by one, in the order of their offsets, each upon the highest
    of those below it that live with it.
    """
    least, best = most_live(pieces), known
    offsets: dict[int, int] = {}

    def live_together(a: int, b: int) -> bool:
        return pieces[a][1] <= pieces[b][2] and pieces[b][1] <= pieces[a][2]

    def hopeless(left: Sequence[int]) -> bool:
        for step in {pieces[index][1] for index in left}:
            here = [i for i in range(len(pieces)) if pieces[i][1] <= step <= pieces[i][2]]
            top = max((offsets[i] + pieces[i][0] for i in here if i in offsets), default=0)
            if top + sum(pieces[i][0] for i in here if i not in offsets) >= best:
                return True
        return False

    def search(lowest: int, arena: int) -> None:
        nonlocal best
        left = [index for index in range(len(pieces)) if index not in offsets]
        if not left:
            best = min(best, arena)
            return
        if arena >= best or hopeless(left):
            return
        choices: dict[tuple[int, Piece], int] = {}  # of equal pieces one is enough
        for index in left:
            offset = max((offsets[i] + pieces[i][0] for i in offsets if live_together(i, index)), default=0)
            if offset >= lowest:
                choices.setdefault((offset, pieces[index]), index)
        for (offset, piece), index in sorted(choices.items(), key=lambda item: (item[0][0], -item[0][1][0])):
            if best == least:
                return
            offsets[index] = offset
            search(offset, max(arena, offset + piece[0]))
            del offsets[index]

    search(0, 0)
    return best
