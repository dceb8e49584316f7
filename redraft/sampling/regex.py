"""Regular expressions to automata over the bytes of UTF-8.

Python's own parser reads the pattern, so that what is generated is what `re.fullmatch` accepts. outlines-core 0.2.14
was tried first: its automata drop what follows a match without completing another, it determinises the unanchored
pattern too, which takes exponential time for bounded repetitions such as [0-9]{0,14} twice, and nothing limits it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 20_000
_TOP = 0x10FFFF
_LEAF = -1
Ranges = tuple[tuple[int, int], ...]
"""Code points or bytes: disjoint closed intervals in order."""
_sre: Any = import_module("re._parser")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")


def determinise(pattern: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return a table (states, 256) of next states and which are final; state 0 is the start, the last one is dead.

    Raises ValueError for what automata cannot do (anchors, look-arounds, back references) or would do too largely.
    """
    try:
        parsed = _sre.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refused(pattern, str(error)) from error
    nfa = _Nfa(pattern=pattern)
    start = nfa.state()
    end = nfa.sequence(parsed, start, parsed.state.flags)
    number, sets, rows = {frozenset(nfa.closure(start)): 0}, [frozenset(nfa.closure(start))], []
    for items in sets:  # grows while it is walked
        row = np.full(256, -1, np.int64)
        for low, high, following in _moves(items, nfa):
            if following not in number:
                number[following] = len(sets)
                sets.append(following)
            row[low : high + 1] = number[following]
        rows.append(row)
        if len(sets) > MAX_STATES:
            raise _refused(pattern, f"it takes more than {MAX_STATES} states; use smaller bounds on repetitions")
    table = np.stack([*rows, np.full(256, -1)])
    table[table == -1] = len(sets)
    return table, np.array([(_LEAF, end) in items for items in sets] + [False])


def _refused(pattern: str, reason: str) -> ValueError:
    shown = repr(pattern if len(pattern) <= 200 else pattern[:200] + "...")
    return ValueError(
        f"the regular expression cannot be an automaton: {reason}; got {shown}. The whole text is matched: leave out"
        " ^, $, \\b, look-arounds, back references and the flags i and a."
    )


Item = tuple[int, int]
"""(node of a character's trie, state behind the character), or (leaf, state) for a state that reads nothing."""


def _moves(items: frozenset[Item], nfa: "_Nfa") -> list[tuple[int, int, frozenset[Item]]]:
    """Cut the bytes into intervals on which a set of items moves alike."""
    moves = [
        (low, high, frozenset([(child, target)]) if child != _LEAF else nfa.closure(target))
        for node, target in items
        if node != _LEAF
        for low, high, child in _trie_node(node)
    ]
    cuts = sorted({edge for low, high, _ in moves for edge in (low, high + 1)})
    place = {cut: i for i, cut in enumerate(cuts)}
    following: list[set[Item]] = [set() for _ in cuts]
    for low, high, reached in moves:
        for i in range(place[low], place[high + 1]):
            following[i] |= reached
    return [(cuts[i], cuts[i + 1] - 1, frozenset(reached)) for i, reached in enumerate(following) if reached]


@dataclass(frozen=True, kw_only=True)
class _Nfa:
    """Thompson's construction; a state reads one character, or leads on without reading."""

    pattern: str
    free: list[list[int]] = field(default_factory=list)
    reads: list[Item | None] = field(default_factory=list)
    closures: dict[int, frozenset[Item]] = field(default_factory=dict)

    def state(self) -> int:
        if len(self.free) > 20 * MAX_STATES:
            raise _refused(self.pattern, "its repetitions are too many")
        self.free.append([])
        self.reads.append(None)
        return len(self.free) - 1

    def closure(self, state: int) -> frozenset[Item]:
        """Follow what reads nothing."""
        if state not in self.closures:
            seen, stack = {state}, [state]
            while stack:
                for to in self.free[stack.pop()]:
                    if to not in seen:
                        seen.add(to)
                        stack.append(to)
            items = [self.reads[s] or (_LEAF, s) for s in seen if self.reads[s] or not self.free[s]]
            self.closures[state] = frozenset(items)
        return self.closures[state]

    def sequence(self, parsed: Any, start: int, flags: int) -> int:
        """Add a parsed pattern behind a state; return the state behind it."""
        for op, argument in parsed:
            start = self.element(str(op), argument, start, flags)
        return start

    def element(self, op: str, argument: Any, start: int, flags: int) -> int:
        if op == "SUBPATTERN":
            _, added, removed, inner = argument
            return self.sequence(inner, start, (flags | added) & ~removed)
        if op == "BRANCH":
            end = self.state()
            for option in argument[1]:
                begin = self.state()
                self.free[start].append(begin)
                self.free[self.sequence(option, begin, flags)].append(end)
            return end
        if op in _REPEATS:
            least, most, inner = argument
            return self.repeat(least, most, inner, start, flags)
        characters = self.characters(op, argument, flags)
        end = self.state()
        if self.reads[start] is not None or self.free[start]:
            begin = self.state()
            self.free[start].append(begin)
            start = begin
        if characters:
            self.reads[start] = (_trie(characters), end)
        else:
            self.reads[start] = (_intern(()), end)
        return end

    def repeat(self, least: int, most: Any, inner: Any, start: int, flags: int) -> int:
        for _ in range(least):
            start = self.sequence(inner, start, flags)
        if most is _sre.MAXREPEAT:
            loop, end = self.state(), self.state()
            self.free[start].append(loop)
            begin = self.state()
            self.free[loop] += [begin, end]
            self.free[self.sequence(inner, begin, flags)].append(loop)
            return end
        end = self.state()
        for _ in range(most - least):
            begin = self.state()
            self.free[start] += [begin, end]
            start = self.sequence(inner, begin, flags)
        self.free[start].append(end)
        return end

    def characters(self, op: str, argument: Any, flags: int) -> Ranges:
        """Return the code points that an element stands for."""
        if flags & (re.IGNORECASE | re.ASCII | re.LOCALE):
            raise _refused(self.pattern, "the flags i, a and L are not supported")
        if op == "ANY":
            return _without(((10, 10),)) if not flags & re.DOTALL else _without(())
        if op == "LITERAL":
            return ((argument, argument),)
        if op == "NOT_LITERAL":
            return _without(((argument, argument),))
        if op == "RANGE":
            return (argument,)
        if op == "CATEGORY":
            return _category(str(argument))
        if op == "IN":
            members = [self.characters(str(o), a, flags) for o, a in argument if str(o) != "NEGATE"]
            union = _union([interval for member in members for interval in member])
            return _without(union) if str(argument[0][0]) == "NEGATE" else union
        raise _refused(self.pattern, f"it uses {op.lower()}")


def _union(intervals: Sequence[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _without(ranges: Ranges) -> Ranges:
    edges = [-1, *(edge for low, high in ranges for edge in (low, high)), _TOP + 1]
    return tuple((a + 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True) if a + 1 <= b - 1)


@cache
def _category(name: str) -> Ranges:
    r"""Ask the regular expression engine itself what \d, \s and \w are."""
    letter = name.removeprefix("CATEGORY_")
    symbol = letter.removeprefix("NOT_")[0].lower()  # DIGIT, SPACE, WORD
    every = "".join(map(chr, range(_TOP + 1)))
    inside = _union([(m.start(), m.end() - 1) for m in re.finditer(rf"\{symbol}+", every)])
    return _without(inside) if letter.startswith("NOT_") else inside


_NODES: list[tuple[tuple[int, int, int], ...]] = []
_NODE_OF: dict[tuple[tuple[int, int, int], ...], int] = {}


def _intern(node: tuple[tuple[int, int, int], ...]) -> int:
    """Number a trie node (first byte, last byte, child); equal ones are one."""
    if node not in _NODE_OF:
        _NODE_OF[node] = len(_NODES)
        _NODES.append(node)
    return _NODE_OF[node]


def _trie_node(number: int) -> tuple[tuple[int, int, int], ...]:
    return _NODES[number]


@cache
def _trie(characters: Ranges) -> int:
    """Return the trie of the UTF-8 encodings of code points; surrogates have none."""
    edges: list[tuple[int, int, int]] = []
    # Plain ASCII; then by number of bytes: what the first byte adds, the least and the largest code point.
    edges += [(low, high, _LEAF) for low, high in _clipped(characters, 0, 0x7F)]
    for extra, lead, least, largest in ((1, 0xC0, 0x80, 0x7FF), (2, 0xE0, 0x800, 0xFFFF), (3, 0xF0, 0x10000, _TOP)):
        inside = [
            r for a, b in ((0, 0xD7FF), (0xE000, _TOP)) for r in _clipped(_clipped(characters, a, b), least, largest)
        ]
        edges += [(lead + a, lead + b, child) for a, b, child in _split(tuple(inside), extra)]
    return _intern(tuple(edges))


def _clipped(ranges: Ranges, low: int, high: int) -> Ranges:
    return tuple((max(a, low), min(b, high)) for a, b in ranges if a <= high and b >= low)


def _split(ranges: Ranges, extra: int) -> list[tuple[int, int, int]]:
    """Split numbers of `extra` further bytes (6 bits each) by their leading part."""
    if extra == 0:
        return [(a, b, _LEAF) for a, b in ranges]
    size = 64**extra
    below: dict[int, list[tuple[int, int]]] = {}
    whole: list[tuple[int, int]] = []
    for a, b in ranges:
        for head in {a // size, b // size}:
            below.setdefault(head, []).append(
                (max(a, head * size) - head * size, min(b, head * size + size - 1) - head * size)
            )
        if b // size - a // size > 1:
            whole.append((a // size + 1, b // size - 1))
    parts = [(head, head, tuple(sorted(inside))) for head, inside in below.items()]
    parts += [(a, b, ((0, size - 1),)) for a, b in whole]
    edges = [(a, b, _continuation(inside, extra - 1)) for a, b, inside in sorted(parts)]
    joined: list[tuple[int, int, int]] = []
    for a, b, child in edges:
        if joined and joined[-1][2] == child and joined[-1][1] + 1 == a:
            joined[-1] = (joined[-1][0], b, child)
        else:
            joined.append((a, b, child))
    return joined


@cache
def _continuation(ranges: Ranges, extra: int) -> int:
    return _intern(tuple((0x80 + a, 0x80 + b, child) for a, b, child in _split(ranges, extra)))
