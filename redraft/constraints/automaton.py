"""Finite automata over bytes and over tokens: what constrained decoding walks on.

A regular expression becomes a minimal automaton over bytes (`redraft.constraints.regex`), and that one an automaton
over the tokens of a vocabulary. Tokens that act alike in every state form a class, so what is stored and searched grows
with the automaton and not with the vocabulary.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft.constraints.regex import Pattern, determinise, explore, too_large
from redraft.constraints.token_bytes import LeadingSpace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MAX_WORK = 200_000_000
"""States that tokens are followed through, some nanoseconds each."""
MAX_LOOKS = 500_000
"""Looks at a state while equal ones are merged, some microseconds each."""


@dataclass(frozen=True, kw_only=True)
class ByteAutomaton:
    """A minimal deterministic automaton over bytes. State 0 is the start; no match lies behind the last."""

    table: NDArray[np.int32]
    """(states, 256): the next state."""
    is_final: Bools
    """(states,)"""

    def __and__(self, other: "ByteAutomaton") -> "ByteAutomaton":
        """Accept what both accept: the states are the reachable pairs. Raises ValueError where they are too many."""
        width = len(other.table)
        columns, column_of = _alike(np.concatenate([self.table, other.table]))
        ours, theirs = self.table[:, columns].astype(np.int64) * width, other.table[:, columns]
        codes, table = explore(0, lambda code: ((ours[code // width] + theirs[code % width]).tolist(), 1))
        first, second = np.divmod(codes, width)
        return _minimal(table[:, column_of], self.is_final[first] & other.is_final[second])


def after_space(automaton: ByteAutomaton, leading_space: LeadingSpace) -> ByteAutomaton:
    """Accept the bytes of tokens whose text an automaton accepts, given what the tokenizer does with a first space."""
    if leading_space == "text":
        return automaton
    dead = len(automaton.table) - 1
    start = automaton.table[0].copy() if leading_space == "stripped" else np.full(256, dead, np.int32)
    start[ord(" ")] = 0
    # The new start is put first, so every other state moves up by one.
    table = np.concatenate([start[None], automaton.table]) + 1
    return _minimal(table, np.append(automaton.is_final[0], automaton.is_final))


def from_pattern(pattern: Pattern) -> ByteAutomaton:
    """Build the automaton of the texts that a pattern matches as a whole (`regex.determinise`)."""
    return _minimal(*determinise(pattern))


def _minimal(table: NDArray[np.int32], is_final: Bools) -> ByteAutomaton:
    """Merge the states that no text tells apart; the dead state becomes the last."""
    dead = len(table)  # one dead state more does no harm: it is merged with any other
    columns, column_of = _alike(table)
    narrow = np.concatenate([table[:, columns], np.full((1, len(columns)), dead, np.int32)])
    is_final = np.append(is_final, False)
    group = _equivalent(narrow, is_final)
    if group[0] == group[dead]:
        raise ValueError("nothing satisfies the constraint: its parts exclude each other. Loosen one of them.")
    first = np.unique(group, return_index=True)[1]  # a state of each group
    order = np.argsort(np.where(np.arange(len(first)) == group[dead], dead, first))
    renumbered = np.argsort(order)[group].astype(np.int32)[narrow[first[order]]]
    return ByteAutomaton(table=renumbered[:, column_of], is_final=is_final[first[order]])


def _equivalent(table: NDArray[np.int32], is_final: Bools) -> Ints:
    """Group the states that no text tells apart (Hopcroft's refinement, many groups at a time).

    A round splits groups by how their states lead to what was split off in the round before. The largest part of a
    group keeps its number, so that a state is split off a logarithmic number of times.
    """
    num_states, num_columns = table.shape
    transitions = np.argsort(table, axis=None, kind="stable")
    begins = np.searchsorted(table.ravel()[transitions], np.arange(num_states + 1)).tolist()
    group = is_final.astype(np.int64)
    members = [set(np.flatnonzero(group == number).tolist()) for number in range(2)]
    moved, work = list(members[1]), 0
    while moved:
        into = np.sort(np.concatenate([transitions[begins[state] : begins[state + 1]] for state in moved]))
        states, starts = np.unique(into // num_columns, return_index=True)
        work += len(states)
        if work > MAX_LOOKS:
            raise too_large(f"{MAX_LOOKS} steps to shrink")
        ways = np.split(into % num_columns * num_states + group[table.flat[into]], starts[1:])
        parts: dict[int, dict[bytes, list[int]]] = {}
        for state, number, way in zip(states.tolist(), group[states].tolist(), ways, strict=False):
            parts.setdefault(number, {}).setdefault(way.tobytes(), []).append(state)
        moved = []
        for number, by_way in parts.items():
            split: list[Collection[int]] = [*by_way.values()]
            largest = max(split, key=len)
            if len(largest) > len(members[number]) - sum(map(len, split)):
                others = members[number].difference(*split)
                split = [others, *(part for part in split if part is not largest)]
            for part in filter(None, split):
                group[list(part)] = len(members)
                members[number].difference_update(part)
                members.append(set(part))
                moved += part
    return group


def _alike(table: NDArray[np.int32]) -> tuple[Ints, Ints]:
    """Return one column of each kind, and the kind of each column."""
    kinds: dict[bytes, int] = {}
    kind_of = np.array([kinds.setdefault(column.tobytes(), len(kinds)) for column in table.T])
    return np.unique(kind_of, return_index=True)[1], kind_of


@dataclass(frozen=True, kw_only=True)
class TokenAutomaton:
    """A deterministic automaton over classes of tokens. State 0 is the start, the last state is dead.

    Where there is an end token, it leads from final states to the last state but one, and only it continues from there.
    """

    state: Ints
    """The transitions between states that are not dead, ordered by state and class: from where,"""
    token_class: Ints
    """by which class of tokens,"""
    to: Ints
    """and where to."""
    class_of: Ints
    """(vocab,): the last class is that of tokens that fit nowhere."""
    is_final: Bools
    """(states,)"""
    num_classes: int
    """Without the last."""
    has_end: bool

    @property
    def num_states(self) -> int:
        return len(self.is_final)

    @property
    def dead(self) -> int:
        return self.num_states - 1

    @property
    def num_texts(self) -> int:
        """The number of the states before the end token."""
        return self.dead - self.has_end

    @cached_property
    def tokens_by_class(self) -> tuple[Ints, Ints]:
        """All tokens ordered by class, and where each class begins."""
        return _ordered(self.class_of, self.num_classes + 2)

    @cached_property
    def _by_class(self) -> tuple[Ints, Ints]:
        return _ordered(self.token_class, self.num_classes + 2)

    @cached_property
    def _begins(self) -> Ints:
        return np.searchsorted(self.state, np.arange(self.num_states + 1))

    def leaving(self, state: int) -> tuple[Ints, Ints]:
        """Return the classes that lead on from a state, in order, and where to."""
        inside = slice(self._begins[state], self._begins[state + 1])
        return self.token_class[inside], self.to[inside]

    def next(self, state: int, token_class: int) -> int:
        classes, to = self.leaving(state)
        return int(to[classes == token_class].min(initial=self.dead))

    def before(self, after: NDArray[Any], token_class: int) -> NDArray[Any]:
        """Return for each state what `after` holds for the state behind a class of tokens."""
        order, starts = self._by_class
        inside = order[starts[token_class] : starts[token_class + 1]]
        found = np.full_like(after, after[self.dead])
        found[self.state[inside]] = after[self.to[inside]]
        return found

    def before_any(self, after: NDArray[Any], scores: Floats | None = None, is_sum: bool = False) -> NDArray[Any]:
        """Return for each state the best over the classes that lead on of their score and what `after` holds behind.

        With `is_sum` and scores the log of the sum over them, else the largest.
        """
        (to, label, from_states, state_starts), (members, starts) = self._edges
        reduce = np.maximum.reduceat if scores is None or not is_sum else _logsumexp
        ways = after[to] if scores is None else after[to] + reduce(scores[members], starts)[label]
        found = np.full_like(after, after[self.dead])
        found[from_states] = reduce(ways, state_starts)
        return found

    @cached_property
    def _edges(self) -> tuple[tuple[Ints, Ints, Ints, Ints], tuple[Ints, Ints]]:
        """The pairs of states that some token joins, and labels: the sets of classes that lead across.

        Of each edge, ordered by where it leaves, where it leads and its label; the states that have edges, and where
        the edges of each begin. The classes of the labels, one label after the other, and where each label begins.
        """
        order = np.argsort(self.state * self.num_states + self.to, kind="stable")
        state, to, token_class = self.state[order], self.to[order], self.token_class[order]
        starts = np.flatnonzero(np.diff(state * self.num_states + to, prepend=-1))
        # Equal sets of classes are one label: their logits are reduced once for all edges that carry it.
        label_of: dict[bytes, int] = {}
        sets = [members.tobytes() for members in np.split(token_class, starts[1:])]
        label = np.array([label_of.setdefault(members, len(label_of)) for members in sets])
        members = np.frombuffer(b"".join(label_of), np.int64)
        label_starts = np.cumsum([0, *map(len, label_of)])[:-1] // 8
        return (to[starts], label, *np.unique(state[starts], return_index=True)), (members, label_starts)


def _ordered(values: Ints, num: int) -> tuple[Ints, Ints]:
    order = np.argsort(values, kind="stable")
    return order, np.searchsorted(values[order], np.arange(num))


def _logsumexp(values: Floats, starts: Ints) -> Floats:
    best = np.maximum.reduceat(values, starts)
    best[best == -np.inf] = 0.0
    shares = np.exp(values - np.repeat(best, np.diff(starts, append=len(values))))
    with np.errstate(divide="ignore"):
        total: Floats = best + np.log(np.add.reduceat(shares, starts))
    return total


def over_tokens(
    automaton: ByteAutomaton, token_bytes: Sequence[bytes | None], *, eos_token_id: int | None
) -> TokenAutomaton:
    """Lift an automaton to a vocabulary; tokens without bytes are never used.

    Raises ValueError if no sequence of tokens spells a match, and where the tokens do too many different things.
    """
    pieces = {i: piece for i, piece in enumerate(token_bytes) if piece and i != eos_token_id}
    row_of, rows = _token_functions(automaton, pieces)
    used = dict.fromkeys(row_of.values())
    is_live = _live_states(automaton.is_final, *(_joined([rows[row][side] for row in used]) for side in (0, 1)))
    if not is_live[0]:
        raise ValueError(_unspellable(automaton, pieces.values()))
    # Tokens may reach fewer states than bytes do: number what is left. Tokens that act alike there are one class.
    number = (np.cumsum(is_live) - 1).astype(np.int32)
    classes: dict[Row, int] = {}
    class_of_row: dict[int, int] = {}
    for row in used:  # ordered by their first token, and so are the classes
        state, to = (_joined([side]) for side in rows[row])
        is_left = is_live[state] & is_live[to]
        if is_left.any():
            left = number[state[is_left]].tobytes(), number[to[is_left]].tobytes()
            class_of_row[row] = classes.setdefault(left, len(classes))
    has_end = eos_token_id is not None
    is_final = np.append(automaton.is_final[is_live], [True] * has_end + [False])
    class_of = np.full(len(token_bytes), len(classes) + has_end)
    class_of[[*row_of]] = [class_of_row.get(row, len(classes) + has_end) for row in row_of.values()]
    if eos_token_id is not None:  # it leads from every end to one state more
        ends = np.flatnonzero(is_final).astype(np.int32)
        class_of[eos_token_id] = len(classes)
        classes[ends.tobytes(), np.full_like(ends, is_live.sum()).tobytes()] = len(classes)
    state, to = (_joined([left[side] for left in classes]) for side in (0, 1))
    token_class = np.repeat(np.arange(len(classes)), [len(states) // 4 for states, _ in classes])
    order = np.lexsort((token_class, state))
    return TokenAutomaton(
        state=state[order],
        token_class=token_class[order],
        to=to[order],
        class_of=class_of,
        is_final=is_final,
        num_classes=len(classes),
        has_end=has_end,
    )


Row = tuple[bytes, bytes]
"""What a token does to the states in which it fits: they, and where it leads from each, as numbers of 32 bits."""


def _joined(parts: Sequence[bytes]) -> Ints:
    return np.frombuffer(b"".join(parts), np.int32).astype(np.int64)


def _token_functions(automaton: ByteAutomaton, pieces: Mapping[int, bytes]) -> tuple[dict[int, int], list[Row]]:
    """Find what tokens do to states: the row of each, and the rows. Beginnings of tokens that act alike share one."""
    columns, column_of = _alike(automaton.table)
    table, in_columns = np.ascontiguousarray(automaton.table[:, columns].T), bytes(column_of.tolist())
    dead, work = len(automaton.table) - 1, 0
    everywhere = np.arange(dead, dtype=np.int32).tobytes()
    rows, moves, row_of = [(everywhere, everywhere)], dict[tuple[int, int], int](), dict[int, int]()
    number = {rows[0]: 0}
    for token, piece in pieces.items():
        row = 0
        for column in piece.translate(in_columns):
            if (row, column) not in moves:
                states, targets = (np.frombuffer(side, np.int32) for side in rows[row])
                to = table[column][targets]
                work += len(to) + 1000
                if work > MAX_WORK:
                    raise too_large("allowed with this vocabulary")
                following = states[to != dead].tobytes(), to[to != dead].tobytes()
                moves[row, column] = number.setdefault(following, len(rows))
                if len(number) > len(rows):
                    rows.append(following)
            row = moves[row, column]
        row_of[token] = row
    return row_of, rows


def _live_states(is_final: Bools, state: Ints, to: Ints) -> Bools:
    """Tell the states on some path of tokens from the start to a final state."""
    state, to = np.divmod(np.unique(state * len(is_final) + to), len(is_final))
    return _closure(np.arange(len(is_final)) == 0, state, to) & _closure(is_final, to, state)


def _closure(seed: Bools, state: Ints, to: Ints) -> Bools:
    """Add everything that steps lead to."""
    is_in, count = seed.copy(), 0
    while count < (count := int(is_in.sum())):
        is_in[to[is_in[state]]] = True
    return is_in


def _unspellable(automaton: ByteAutomaton, pieces: Iterable[bytes]) -> str:
    """Say which bytes a vocabulary lacks."""
    needed = {int(byte) for byte in np.nonzero((automaton.table[:-1] != len(automaton.table) - 1).any(axis=0))[0]}
    missing = sorted(needed - set(b"".join(pieces)))
    names = ", ".join(repr(chr(byte)) if 32 <= byte < 127 else f"0x{byte:02X}" for byte in missing[:8])
    lacks = f"no token holds the bytes {names}" if missing else "its tokens do not fit together"
    return f"this vocabulary spells no text that satisfies the constraint: {lacks}. Loosen the constraint."
