"""The loops of a kernel, found in the graph of its basic blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.parser import Block, Kernel, Symbol


@dataclass(frozen=True)
class Loop:
    """A natural loop.

    Attributes:
        head: the block by which it is entered.
        latches: the blocks from which it goes back to the head. They run once per iteration.
        blocks: all of its blocks.
    """

    head: int
    latches: frozenset[int]
    blocks: frozenset[int]


def successors(kernel: Kernel) -> list[tuple[int, ...]]:
    """Returns the blocks that may run after each block."""
    labels = {block.label: i for i, block in enumerate(kernel.blocks) if block.label}
    found: list[tuple[int, ...]] = []
    for i, block in enumerate(kernel.blocks):
        last = block.code[-1] if block.code else None
        following = (i + 1,) if i + 1 < len(kernel.blocks) else ()
        if last is None or not last.jumps:
            found.append(following)
            continue
        target = last.operands[-1] if last.operands else None  # a label, or a table of them
        names = kernel.tables.get(target.name, (target.name,)) if isinstance(target, Symbol) else ()
        jumped = tuple(labels[name] for name in names)
        found.append(jumped if last.guard is None else jumped + following)
    return found


def loops(kernel: Kernel) -> list[Loop]:
    """Returns the natural loops, those that begin first first.

    A single block that asks an mbarrier until it is complete is a wait, not a loop.
    """
    blocks, after = kernel.blocks, successors(kernel)
    before: list[list[int]] = [[] for _ in blocks]
    for i, targets in enumerate(after):
        for target in targets:
            before[target].append(i)
    dominators = _dominators(after, before)
    latches: dict[int, set[int]] = {}
    for i, targets in enumerate(after):
        for target in targets:
            if i in dominators and target in dominators[i]:
                latches.setdefault(target, set()).add(i)
    found = [Loop(head, frozenset(ends), _body(head, ends, before)) for head, ends in sorted(latches.items())]
    return [loop for loop in found if not _is_wait(loop, blocks)]


def _dominators(after: list[tuple[int, ...]], before: list[list[int]]) -> dict[int, set[int]]:
    """Returns, for each block that can be reached, the blocks through which every way to it leads, itself among them."""
    reached, waiting = {0}, [0]
    while waiting:
        for target in after[waiting.pop()]:
            if target not in reached:
                reached.add(target)
                waiting.append(target)
    found = {i: set(reached) for i in reached}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new = set.intersection(*(found[p] for p in before[i] if p in reached)) | {i}
            if new != found[i]:
                found[i], changed = new, True
    return found


def _body(head: int, latches: set[int], before: list[list[int]]) -> frozenset[int]:
    body, waiting = {head}, [*latches]
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting += before[block]
    return frozenset(body)


def _is_wait(loop: Loop, blocks: Sequence[Block]) -> bool:
    code = blocks[loop.head].code
    return loop.blocks == {loop.head} and any(i.opcode.startswith("mbarrier.try_wait") for i in code)
