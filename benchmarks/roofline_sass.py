"""Counts the instructions of a Triton kernel in its compiled code (sm_90a), without a GPU.

A kernel of the row operations is a loop over blocks of columns with something before and after it. Its main loop is the
shortest with an exponential for each number that a lane holds: another such loop serves temperatures so low that sums
need a maximum. Where there is no exponential it is the loop with the most loads. Before and after it a program runs the
shortest way through the code: each other loop once, and no branch that is seldom taken. `product_statistics` has loops
within loops; `_count_product` finds the way through each.
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gasp_fast.benchmarking.ahead_of_time import WARP, compile_for_hopper

REGISTERS = 65536  # of a multiprocessor
RESIDENT_WARPS = 64
SHARED_BYTES = 227 << 10


@dataclass(frozen=True)
class KernelCode:
    """Instructions of one warp, and what limits the programs that run at once."""

    loop: int  # of one pass of the main loop
    outside: int  # once a program
    warps: int  # a program
    resident: int  # programs on a multiprocessor


@dataclass(frozen=True)
class Way:
    """A way through the code."""

    instructions: int = 0
    waits: int = 0  # for loads whose results are needed at once

    def __add__(self, other: Way) -> Way:
        return Way(self.instructions + other.instructions, self.waits + other.waits)


@dataclass(frozen=True)
class ProductCode:
    """What one warp of `product_statistics` does."""

    width: Way  # for one pass over a part of the width: loads and tensor cores
    piece: Way  # for a piece of the columns, each row with one match or none
    part: Way  # for each part of a frame in a block, beside its pieces
    end: Way  # where a part ends: its statistics are written
    block: Way  # for a block of columns, beside its products and parts
    program: Way  # once a program
    warps: int
    resident: int


@dataclass(frozen=True)
class Listing:
    """Disassembled code of a kernel, and what limits the programs that run at once."""

    code: tuple[tuple[int, str], ...]  # address and instruction
    registers: int  # a thread
    shared: int  # bytes a program
    warps: int  # a program
    numbers_a_lane: int  # of a tile

    @property
    def resident(self) -> int:
        """Programs on a multiprocessor."""
        by_registers = REGISTERS // (max(32, -(-self.registers // 8) * 8) * 32 * self.warps)
        by_shared = SHARED_BYTES // self.shared if self.shared else by_registers
        return max(1, min(by_registers, by_shared, RESIDENT_WARPS // self.warps, 32))


def compile_launch(kernel: Any, tile: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> KernelCode:
    """The code of a row kernel as it is launched with these arguments."""
    return _count_row_kernel(_listing(kernel, tile, arguments, constants))


def compile_product(kernel: Any, tile: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ProductCode:
    """The code of `product_statistics` as it is launched with these arguments."""
    return _count_product(_listing(kernel, tile, arguments, constants), constants["PIECES"])


def _listing(kernel: Any, tile: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Listing:
    compiled = compile_for_hopper(kernel, tile, arguments, constants)
    numbers_a_lane = tile.rows * tile.columns // (WARP * tile.warps)
    return Listing(compiled.code, compiled.registers, compiled.shared, tile.warps, numbers_a_lane)


@dataclass(frozen=True)
class _Loop:
    first: int  # addresses
    last: int
    body: list[str]

    def count(self, instruction: str) -> int:
        return sum(instruction in text for text in self.body)

    def holds(self, other: _Loop) -> bool:
        return self is not other and self.first <= other.first and other.last <= self.last


@functools.cache
def _count_row_kernel(listing: Listing) -> KernelCode:
    code, loops = listing.code, _loops(listing.code)
    softmax = [loop for loop in loops if loop.count("MUFU.EX2") >= max(1, listing.numbers_a_lane)]
    main = min(softmax, key=lambda loop: len(loop.body), default=None)
    if main is None:
        main = max(loops, key=lambda loop: (loop.count("LDG"), -len(loop.body)), default=_Loop(0, -1, []))
    outside = len(code)
    if main.body:
        outside = len(_shortest(code, code[0][0], main.first)) + len(_shortest(code, main.last, None))
    return KernelCode(len(main.body), outside, listing.warps, listing.resident)


@functools.cache
def _count_product(listing: Listing, pieces: int) -> ProductCode:
    """Each piece has one loop over the matches of its rows. The ways between these loops are those of the pieces."""
    code, loops = listing.code, _loops(listing.code)

    def least(found: list[_Loop]) -> _Loop:
        return min(found, key=lambda loop: len(loop.body))

    products = least([loop for loop in loops if loop.count("HGMMA")])
    matches = [loop for loop in loops if loop.count("STG") and not any(loop.holds(inner) for inner in loops)]
    if len(matches) != pieces:
        raise ValueError(f"product_statistics: {len(matches)} loops over matches, but {pieces} pieces: not as expected")
    parts = least([loop for loop in loops if all(loop.holds(inner) for inner in matches)])
    blocks = least([loop for loop in loops if loop.holds(parts) and loop.holds(products)])

    def way(start: int, end: int) -> list[str]:
        return _shortest(code, start, end)

    between = [way(a.last, b.first) for a, b in pairwise(matches)]
    piece = min(between, key=len)
    exponentials, numbers = sum("MUFU.EX2" in text for text in piece), listing.numbers_a_lane // pieces
    if not numbers <= exponentials < 2 * numbers:
        raise ValueError(f"product_statistics: {exponentials} exponentials for {numbers} similarities: not as expected")
    written = max(address for address, text in code if matches[-1].last < address < parts.last and "STG" in text)
    short = way(matches[-1].last, parts.last)
    long = way(matches[-1].last, written) + way(written, parts.last)
    part = _path(way(parts.first, matches[0].first)) + _path(short)
    return ProductCode(
        width=_path(products.body),
        piece=_path(piece) + _path(matches[0].body),
        part=Way(max(0, part.instructions - len(piece)), max(0, part.waits - _path(piece).waits)),
        end=Way(max(0, len(long) - len(short)), max(0, _path(long).waits - _path(short).waits)),
        block=_path(way(blocks.first, products.first)) + _path(way(products.last, parts.first)),
        program=_path(way(code[0][0], blocks.first)),
        warps=listing.warps,
        resident=listing.resident,
    )


def _path(texts: list[str]) -> Way:
    """Counts waits: a register is read that a load has not filled yet. All earlier loads have then ended, too."""
    waits, pending = 0, set[str]()
    for text in texts:
        used = re.findall(r"\bU?R\d+\b", text)
        load = re.search(r"\bLDG\b\S*\s+(R\d+)", text)
        if pending.intersection(used[1:] if load else used):
            waits, pending = waits + 1, set()
        if load:
            pending.add(load[1])
    return Way(len(texts), waits)


def _shortest(code: Sequence[tuple[int, str]], start: int, end: int | None) -> list[str]:
    """The instructions on the shortest way from after one address to another, or to the end of the program.

    A program that ends inside a loop has only conditional ends; the last of them counts.
    """
    follows = dict(zip((address for address, _ in code), (address for address, _ in code[1:]), strict=False))
    text, meets = dict(code), _meeting_points(code)
    came_from: dict[int, int] = {start: start}
    queue = deque([start])
    while queue:
        address = queue.popleft()
        if address == end or (end is None and text[address].startswith("EXIT")):
            return _way_to(address, came_from, text)
        for following in sorted(_successors(address, text[address], follows, meets)):
            if following not in came_from:
                came_from[following] = address
                queue.append(following)
    ends = [address for address in came_from if "EXIT" in text[address]]
    if end is not None or not ends:
        raise ValueError("the end of a way through the code is not reached")
    return _way_to(max(ends), came_from, text)


def _way_to(address: int, came_from: dict[int, int], text: dict[int, str]) -> list[str]:
    way = []
    while came_from[address] != address:
        way.append(text[address])
        address = came_from[address]
    return way[::-1]


def _successors(address: int, text: str, follows: dict[int, int], meets: dict[str, int]) -> set[int]:
    jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    meeting = re.search(r"\bBSYNC\b.*?(B\d+)", text)
    target = int(jump[1], 16) if jump else meets.get(meeting[1]) if meeting else None
    # Backward branches are not taken: each loop runs once.
    found = {target} if target is not None and target > address and target in follows else set()
    conditional = text.startswith("@") or (jump is not None and re.search(r"BRA(\.\w+)*\s+!?U?P\d", text) is not None)
    if address in follows and (not found or conditional or meeting):
        found.add(follows[address])
    return found


def _meeting_points(code: Sequence[tuple[int, str]]) -> dict[str, int]:
    """Where divergent threads of each barrier continue together."""
    points = (re.search(r"\bBSSY\b.*?(B\d+),\s*`?\(?.*?0x([0-9a-f]+)", text) for _, text in code)
    return {match[1]: int(match[2], 16) for match in points if match}


def _loops(code: Sequence[tuple[int, str]]) -> list[_Loop]:
    """Every backward branch; the branch to itself at the end of a program is none."""
    loops = []
    for last, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < last:
            first = int(target[1], 16)
            loops.append(_Loop(first, last, [text for address, text in code if first <= address <= last]))
    return loops
