r"""Patterns (regular expressions and combinations of them) to automata over the bytes of UTF-8.

Python's own parser reads regular expressions, so that what is generated is what `re.fullmatch` accepts. outlines-core
0.2.14 was tried first: its automata drop what follows a match without completing another, it determinises the
unanchored pattern too, which takes exponential time for bounded repetitions such as [0-9]{0,14} twice, and nothing
limits it.
"""

import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 40_000
MAX_WORK = 300_000
_TOP = 0x10FFFF
_LEAF = -1
_JSON_STRING = 1 << 20
"""A flag besides those of `re`: the pattern comes from a JSON schema, and its characters are inside a JSON string."""
_ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_ESCAPED = ((0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\")), (0x7F, 0x7F), (0xFEFF, 0xFEFF))
"""Characters that are written as escapes in such a string, or not at all; U+FEFF is a space in JavaScript only."""
Ranges = tuple[tuple[int, int], ...]
"""Code points or bytes: disjoint closed intervals in order."""
Pattern = str | tuple[Any, ...]
"""A regular expression, or ("text", text), ("searched", regular expression of a JSON schema inside a string),
("characters", ranges), ("join", *patterns), ("either", *patterns), ("repeat", low, high or None, pattern), or
("members", comma, ((pattern, is_required), ...)): the members in order, with a comma between two of them; those that
are not required may be missing. Parts are cached by their id, so they must live as long as the whole pattern."""
K = TypeVar("K", bound=Hashable)
_sre: Any = import_module("re._parser")


def too_large(limit: str) -> ValueError:
    return ValueError(
        f"the constraint is too large: its automaton takes more than {limit}. Use smaller bounds on repetitions and"
        " lengths, fewer options or fewer parts."
    )


@dataclass(kw_only=True)
class Work:
    """Counts steps of one or two microseconds. Raises ValueError for a constraint that needs more than MAX_WORK."""

    steps: int = 0

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_WORK:
            raise too_large(f"{MAX_WORK} steps to build")


def determinise(pattern: Pattern) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return a table (states, 256) of next states, and which are final. The start is first, the dead state last.

    Raises ValueError for what an automaton cannot match (anchors, look-arounds, back references) or a too large one.
    """
    nfa = _Nfa()
    end = nfa.state(())
    try:
        start = nfa.closure(nfa.build(pattern, end))
    except RecursionError as error:
        raise ValueError("the constraint is nested too deeply to be an automaton. Flatten it.") from error
    sets, table = explore(start, frozenset(), lambda items: _moves(items, nfa))
    return table, np.array([*((_LEAF, end) in items for items in sets), False])


def explore(start: K, dead: K, follow: Callable[[K], tuple[Sequence[K], Any]]) -> tuple[list[K], NDArray[np.int32]]:
    """Find all states that are reached from a start: a list of them, and a table of the numbers of their next states.

    The dead state is not in the list; its row is the last of the table. `follow` returns the next states of a state,
    and for each of them the number of adjacent columns that lead to it.
    """
    number, states, rows = {dead: -1, start: 0}, [start], []
    for state in states:  # grows while it is walked
        following, widths = follow(state)
        for new in following:
            if number.setdefault(new, len(states)) == len(states):
                states.append(new)
        rows.append(np.repeat(np.array([number[one] for one in following], np.int32), widths))
        if len(states) > MAX_STATES:
            raise too_large(f"{MAX_STATES} states")
    table = np.stack([*rows, np.full_like(rows[0], -1)])
    return states, np.where(table < 0, np.int32(len(states)), table)


Item = tuple[int, int]
"""(node of a character's trie, state after the character), or (leaf, state) for the end."""


def _moves(items: frozenset[Item], nfa: "_Nfa") -> tuple[list[frozenset[Item]], NDArray[np.int64]]:
    """Return the sets of items that the bytes lead to, and the number of adjacent bytes that lead to each set."""
    moves = [
        (low, high, frozenset([(child, target)]) if child != _LEAF else nfa.closure(target))
        for node, target in items
        if node != _LEAF
        for low, high, child in nfa.states[node]
    ]
    cuts = sorted({0, 256}.union(edge for low, high, _ in moves for edge in (low, high + 1)))
    place = {cut: i for i, cut in enumerate(cuts)}
    following: list[set[Item]] = [set() for _ in cuts[1:]]
    for low, high, reached in moves:
        for i in range(place[low], place[high + 1]):
            following[i] |= reached
    nfa.spend(1 + sum(map(len, following)))
    return list(map(frozenset, following)), np.diff(cuts)


@dataclass(kw_only=True)
class _Nfa(Work):
    """Thompson's construction from the end to the start, so that equal continuations share their states.

    This makes the determinised automaton minimal, or nearly so, for constants, bounded lengths and JSON.
    """

    states: list[Any] = field(default_factory=list)
    """(trie, state after it) for a state that reads, a frozenset of states for a fork, () for the end; and nodes of
    tries, each with its edges (first byte, last byte, child). Equal contents are one state."""
    number: dict[Any, int] = field(default_factory=dict)
    built: dict[tuple[int, int], int] = field(default_factory=dict)
    parsed: dict[tuple[str, int], Pattern] = field(default_factory=dict)
    tries: dict[Ranges, int] = field(default_factory=dict)
    closures: dict[int, frozenset[Item]] = field(default_factory=dict)

    def state(self, content: Any) -> int:
        self.spend(1)
        if content not in self.number:
            self.number[content] = len(self.states)
            self.states.append(content)
        return self.number[content]

    def fork(self, states: Iterable[int]) -> int:
        following = frozenset(states)
        return next(iter(following)) if len(following) == 1 else self.state(following)

    def closure(self, state: int) -> frozenset[Item]:
        """Return the items that are reached from a state without reading a byte."""
        if state not in self.closures:
            seen, stack, items = {state}, [state], set()
            while stack:
                content = self.states[at := stack.pop()]
                if isinstance(content, frozenset):
                    stack += content - seen
                    seen |= content
                else:
                    items.add(content or (_LEAF, at))
            self.spend(len(seen))
            self.closures[state] = frozenset(items)
        return self.closures[state]

    def build(self, pattern: Pattern, end: int) -> int:
        """Return the state from which a pattern leads to `end`."""
        key = (id(pattern), end)
        if key not in self.built:
            self.built[key] = self._build(pattern, end)
        return self.built[key]

    def _build(self, pattern: Pattern, end: int) -> int:
        self.spend(1)
        kind, *parts = ("matched", pattern) if isinstance(pattern, str) else pattern
        if kind in ("matched", "searched"):
            key = parts[0], _JSON_STRING if kind == "searched" else 0
            if key not in self.parsed:  # one object for equal regular expressions, and it must live on
                self.parsed[key] = self.regex(*key)
            return self.build(self.parsed[key], end)
        if kind == "characters":
            return self.read(parts[0], end)
        if kind == "repeat":
            return self.repeat(end, *parts)
        if kind == "either":
            return self.fork([self.build(part, end) for part in parts])
        if kind == "members":
            return self.members(end, *parts)
        for part in reversed(parts[0] if kind == "text" else parts):
            end = self.read(((ord(part), ord(part)),), end) if kind == "text" else self.build(part, end)
        return end

    def members(self, end: int, comma: Pattern, members: Sequence[tuple[Pattern, bool]]) -> int:
        """Build from the last member to the first.

        From `rest` at least one of the members built so far is read. `after` is the state after an earlier member: a
        comma and `rest`, or the end if none of them is required.
        """
        rest, after, may_end = self.fork(()), end, [end]
        for member, is_required in reversed(members):
            here = self.build(member, after)
            rest = here if is_required else self.fork((here, rest))
            may_end = [] if is_required else may_end
            after = self.fork((self.build(comma, rest), *may_end))
        return self.fork((rest, *may_end))

    def repeat(self, end: int, low: int, high: int | None, inner: Pattern) -> int:
        start = end
        if high is None:
            start = len(self.states)  # a loop equals no other state: its number is needed before its content is known
            self.states.append(None)
            self.states[start] = frozenset((self.build(inner, start), end))
        num_optional = 0 if high is None else high - low
        for i in range(low + num_optional):
            self.spend(1)
            before = self.build(inner, start)
            if before == start:
                break  # the pattern reads nothing, so repeating it changes nothing
            start = self.fork((before, end)) if i < num_optional else before
        return start

    def read(self, characters: Ranges, end: int) -> int:
        if characters not in self.tries:
            self.spend(4 * len(characters))
            self.tries[characters] = self.trie([part for low, high in characters for part in _utf8(low, high)])
        return self.state((self.tries[characters], end))

    def trie(self, sequences: Sequence[Ranges]) -> int:
        """Return the node from which one of the sequences is read. Their first intervals are equal or disjoint."""
        behind: dict[tuple[int, int], list[Ranges]] = {}
        for sequence in sequences:
            behind.setdefault(sequence[0], []).append(sequence[1:])
        return self.state(tuple((*first, self.trie(rest) if rest[0] else _LEAF) for first, rest in behind.items()))

    def regex(self, pattern: str, flags: int) -> Pattern:
        self.spend(len(pattern))
        try:
            with warnings.catch_warnings():  # about what a later syntax may mean
                warnings.simplefilter("ignore")
                parsed = _sre.parse(pattern)
            return self.sequence(parsed, flags | parsed.state.flags)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"the regular expression cannot be an automaton: {error}; got {pattern!r:.200}. The whole text is"
                " matched: leave out ^, $, \\b, look-arounds, back references and the flags i and a."
            ) from error

    def sequence(self, parsed: Any, flags: int) -> Pattern:
        return ("join", *(self.element(str(op), argument, flags) for op, argument in parsed))

    def element(self, op: str, argument: Any, flags: int) -> Pattern:
        if op == "SUBPATTERN":
            _, added, removed, inner = argument
            return self.sequence(inner, (flags | added) & ~removed)
        if op == "BRANCH":
            return ("either", *(self.sequence(option, flags) for option in argument[1]))
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = argument
            return ("repeat", low, None if high is _sre.MAXREPEAT else high, self.sequence(inner, flags))
        characters = self.characters(op, argument, flags)
        if not flags & _JSON_STRING:
            return ("characters", characters)
        escapes = [_ESCAPES[c] for c in _ESCAPES if any(low <= ord(c) <= high for low, high in characters)]
        raw = _without(_union([*_without(characters), *_ESCAPED]))
        return ("either", ("characters", raw), *(("text", "\\" + letter) for letter in escapes))

    def characters(self, op: str, argument: Any, flags: int, *, is_negated: bool = False) -> Ranges:
        """Return the code points that an element stands for."""
        if flags & (re.IGNORECASE | re.ASCII | re.LOCALE):
            raise re.error("the flags i, a and L are not supported")
        if op == "ANY":
            ends = ((10, 10), (13, 13), (0x2028, 0x2029)) if flags & _JSON_STRING else ((10, 10),)
            return _without(() if flags & re.DOTALL else ends)
        if op in ("LITERAL", "NOT_LITERAL", "RANGE"):
            interval = argument if op == "RANGE" else (argument, argument)
            return _without((interval,)) if op == "NOT_LITERAL" else (interval,)
        if op == "CATEGORY":
            category = _category(str(argument))
            # \d and \w are ASCII in JSON schema, but not in validators in Python: allow only what fits both.
            is_ascii = flags & _JSON_STRING and not is_negated and "NOT" not in str(argument)
            return tuple((a, min(b, 0x7F)) for a, b in category if a <= 0x7F) if is_ascii else category
        if op == "IN":
            is_negated = str(argument[0][0]) == "NEGATE"
            members = [self.characters(str(o), a, flags, is_negated=is_negated) for o, a in argument[is_negated:]]
            self.spend(sum(map(len, members)) // 8)
            union = _union([interval for member in members for interval in member])
            return _without(union) if is_negated else union
        raise re.error(f"it uses {op.lower()}")


def _union(intervals: Iterable[tuple[int, int]]) -> Ranges:
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


def _utf8(low: int, high: int) -> Iterator[Ranges]:
    """Cut an interval of code points into parts whose encodings are all combinations of intervals of bytes."""
    cuts = [edge for edge in (0x80, 0x800, 0xD800, 0xE000, 0x10000) if low < edge <= high]
    for size in (64, 64**2, 64**3) if low >= 0x80 else ():  # within one lead byte, or from its first to its last
        if low // size != high // size:
            cuts += [edge for edge in (low + -low % size, high + 1 - (high + 1) % size) if low < edge <= high]
    if cuts:
        yield from _utf8(low, cuts[0] - 1)
        yield from _utf8(cuts[0], high)
    elif not 0xD800 <= low < 0xE000:  # surrogates have no encoding
        yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))


@cache
def _category(name: str) -> Ranges:
    r"""Ask the regular expression engine itself what \d, \s and \w are."""
    letter = name.removeprefix("CATEGORY_")
    symbol = letter.removeprefix("NOT_")[0].lower()  # DIGIT, SPACE, WORD
    every = "".join(map(chr, range(_TOP + 1)))
    inside = _union([(m.start(), m.end() - 1) for m in re.finditer(rf"\{symbol}+", every)])
    return _without(inside) if letter.startswith("NOT_") else inside
