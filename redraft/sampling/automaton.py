"""Finite automata over bytes and over tokens: what constrained decoding walks on.

A regular expression becomes a minimal automaton over bytes (`redraft.sampling.regex`), and that one an automaton
over the tokens of a vocabulary. Tokens that act alike in every state form a class, so what is stored and searched grows
with the automaton and not with the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft.sampling.regex import MAX_STATES, Pattern, determinise, too_large
from redraft.sampling.token_bytes import LeadingSpace

Ints = NDArray[np.int64]
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
        ours, theirs = self.table[:, columns].astype(np.int64), other.table[:, columns]
        number, codes, rows = {0: 0}, [0], []
        for code in codes:  # grows while it is walked
            rows.append(ours[code // width] * width + theirs[code % width])
            for following in rows[-1].tolist():
                if number.setdefault(following, len(codes)) == len(codes):
                    codes.append(following)
            if len(codes) > MAX_STATES:
                raise too_large(f"{MAX_STATES} states")
        pairs = np.array(codes)
        order = np.argsort(pairs)
        table = order[np.searchsorted(pairs, np.stack(rows), sorter=order)]
        is_final = self.is_final[pairs // width] & other.is_final[pairs % width]
        return _minimal(table[:, column_of], is_final)


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


def _minimal(table: Ints | NDArray[np.int32], is_final: Bools) -> ByteAutomaton:
    """Merge the states that no text tells apart; the dead state becomes the last."""
    dead = len(table)  # one dead state more does no harm: it is merged with any other
    columns, column_of = _alike(table)
    narrow = np.concatenate([table[:, columns], np.full((1, len(columns)), dead)])
    is_final = np.append(is_final, False)
    group = _equivalent(narrow, is_final)
    if group[0] == group[dead]:
        raise ValueError("nothing satisfies the constraint: its parts exclude each other. Loosen one of them.")
    first = np.unique(group, return_index=True)[1]
    middle = [g for g in range(len(first)) if g not in (group[0], group[dead])]
    order = np.array([group[0], *middle, group[dead]])
    renumbered = np.argsort(order)[group[narrow[first[order]]]].astype(np.int32)
    return ByteAutomaton(table=renumbered[:, column_of], is_final=is_final[first[order]])


def _equivalent(table: Ints, is_final: Bools) -> Ints:
    """Group the states that no text tells apart: Moore's refinement by the groups that a state leads to.

    A round looks only at states that lead to what was split off in the round before, and the largest part of a group
    keeps its number, so that a state is split off a logarithmic number of times.
    """
    transitions = np.argsort(table, axis=None, kind="stable")
    begins = np.searchsorted(table.ravel()[transitions], np.arange(len(table) + 1)).tolist()
    leads_from = transitions // table.shape[1]
    group = is_final.astype(np.int32)
    members, sign_of = [set(np.flatnonzero(group == number).tolist()) for number in range(2)], [b"", b""]
    dirty, work = list(range(len(table))), 0
    while dirty:
        work += len(dirty)
        if work > MAX_LOOKS:
            raise too_large(f"{MAX_LOOKS} steps to shrink")
        parts: dict[int, dict[bytes, list[int]]] = {}
        for state, number, row in zip(dirty, group[dirty].tolist(), group[table[dirty]], strict=True):
            parts.setdefault(number, {}).setdefault(row.tobytes(), []).append(state)
        moved: list[int] = []
        for number, part in parts.items():
            # States that were not looked at are as they were. They are listed only if they are not the largest part.
            num_others = len(members[number]) - sum(map(len, part.values()))
            largest = max(part, key=lambda sign: len(part[sign]))
            if len(part[largest]) > num_others + len(part.get(sign_of[number], ())):
                others = members[number].difference(*part.values())
                part.setdefault(sign_of[number], []).extend(others)
                sign_of[number] = largest
            for sign in [sign for sign in part if part[sign] and sign != sign_of[number]]:
                group[part[sign]] = len(members)
                members[number].difference_update(part[sign])
                members.append(set(part[sign]))
                sign_of.append(sign)
                moved += part[sign]
        spans = [leads_from[begins[state] : begins[state + 1]] for state in moved]
        dirty = np.unique(np.concatenate(spans)).tolist() if spans else []
    return np.unique(group, return_inverse=True)[1]


def _alike(table: Ints | NDArray[np.int32]) -> tuple[Ints, Ints]:
    """Return one column of each kind, and the kind of each column."""
    _, first, kind = np.unique(_hash(table.T), return_index=True, return_inverse=True)
    return first, kind


def _hash(rows: Ints | NDArray[np.int32]) -> NDArray[np.uint64]:
    """Hash each row to 64 bits; equal rows have equal hashes, and others do so with probability 2^-64."""
    mixed: NDArray[np.uint64] = (rows.astype(np.uint64) + np.uint64(1)) @ _weights(0, rows.shape[1])
    return mixed


@lru_cache(maxsize=8)
def _weights(seed: int, num: int) -> NDArray[np.uint64]:
    weights: NDArray[np.uint64] = np.random.default_rng(seed).integers(1 << 63, size=num, dtype=np.uint64)
    return weights * 2 + 1


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
        place = int(np.searchsorted(classes, token_class))
        return int(to[place]) if place < len(classes) and classes[place] == token_class else self.dead

    def before(self, after: NDArray[Any], token_class: int) -> NDArray[Any]:
        """Return for each state what `after` holds for the state behind a class of tokens."""
        order, starts = self._by_class
        inside = order[starts[token_class] : starts[token_class + 1]]
        found = np.full_like(after, after[self.dead])
        found[self.state[inside]] = after[self.to[inside]]
        return found

    @cached_property
    def edges(self) -> "Edges":
        """The pairs of states that some token joins."""
        order = np.argsort(self.state * self.num_states + self.to, kind="stable")
        state, to, token_class = self.state[order], self.to[order], self.token_class[order]
        starts = np.flatnonzero(np.diff(state * self.num_states + to, prepend=-1))
        # Equal sets of classes are one label: their logits are reduced once for all edges that carry it.
        weights = np.random.default_rng(1).integers(1 << 63, size=self.num_classes, dtype=np.uint64)
        digest = np.add.reduceat(weights[token_class], starts)
        _, first, label = np.unique(digest, return_index=True, return_inverse=True)
        ends = np.append(starts[1:], len(state))
        members = [token_class[starts[edge] : ends[edge]] for edge in first]
        from_states, state_starts = np.unique(state[starts], return_index=True)
        return Edges(
            state=state[starts],
            to=to[starts],
            label=label,
            from_states=from_states,
            state_starts=state_starts,
            label_members=np.concatenate([token_class[:0], *members]),
            label_starts=np.cumsum([0, *map(len, members)])[:-1],
        )


def _ordered(values: Ints, num: int) -> tuple[Ints, Ints]:
    order = np.argsort(values, kind="stable")
    return order, np.searchsorted(values[order], np.arange(num))


@dataclass(frozen=True, kw_only=True)
class Edges:
    """The joined pairs of states ordered by the first, each with a label: the set of classes that lead across."""

    state: Ints
    to: Ints
    label: Ints
    from_states: Ints
    """The states that have edges."""
    state_starts: Ints
    """Where the edges of each of them begin."""
    label_members: Ints
    """The classes of each label, one label after the other."""
    label_starts: Ints


def over_tokens(
    automaton: ByteAutomaton, token_bytes: Sequence[bytes | None], *, eos_token_id: int | None
) -> TokenAutomaton:
    """Lift an automaton to a vocabulary; tokens without bytes are never used.

    Raises ValueError if no sequence of tokens spells a match, and where the tokens do too many different things.
    """
    usable = np.array([i for i, piece in enumerate(token_bytes) if piece and i != eos_token_id], np.int64)
    pieces = [token_bytes[i] or b"" for i in usable]
    row_of, rows, state, to = _token_functions(automaton, pieces)
    is_live = _live_states(automaton.is_final, state, to)
    if not is_live[0]:
        raise ValueError(_unspellable(automaton, pieces))
    # Tokens may reach fewer states than bytes do: number what is left, and merge rows that are now alike.
    is_left = is_live[state] & is_live[to]
    number = np.cumsum(is_live) - 1
    rows, state, to = rows[is_left], number[state[is_left]], number[to[is_left]]
    num_states = int(is_live.sum())
    sums = np.concatenate([[0], np.cumsum(_weights(1, num_states)[state] * _weights(2, num_states)[to])])
    begins = np.searchsorted(rows, np.arange(row_of.max(initial=-1) + 2))
    digest = np.append(sums[begins[1:]] - sums[begins[:-1]], 0)[row_of]  # of each token, 0 where nothing is left
    # Classes are numbered by their first token.
    _, first, kind = np.unique(digest, return_index=True, return_inverse=True)
    fits = digest[first] != 0
    order = np.argsort(np.where(fits, first, len(usable)))
    num_classes, has_end = int(fits.sum()), eos_token_id is not None
    class_of = np.full(len(token_bytes), num_classes + has_end, np.int64)
    class_of[usable] = np.where(fits, np.argsort(order), num_classes + has_end)[kind]
    chosen = [slice(begins[row], begins[row + 1]) for row in row_of[first[order[:num_classes]]]]
    state, to = (np.concatenate([values[:0], *(values[one] for one in chosen)]) for values in (state, to))
    token_class = np.repeat(np.arange(num_classes), [one.stop - one.start for one in chosen])
    is_final = np.append(automaton.is_final[is_live], [True] * has_end + [False])
    if eos_token_id is not None:
        ends = np.flatnonzero(is_final)
        state, to = np.append(state, ends), np.append(to, np.full(len(ends), num_states))
        token_class = np.append(token_class, np.full(len(ends), num_classes))
        class_of[eos_token_id] = num_classes
    order = np.lexsort((token_class, state))
    return TokenAutomaton(
        state=state[order],
        token_class=token_class[order],
        to=to[order],
        class_of=class_of,
        is_final=is_final,
        num_classes=num_classes + has_end,
        has_end=has_end,
    )


def _token_functions(automaton: ByteAutomaton, pieces: list[bytes]) -> tuple[Ints, Ints, Ints, Ints]:
    """Find what tokens do to states: the row of each, -1 if it fits nowhere, and the rows as (row, state, next state).

    All tokens advance byte by byte together; those that act alike so far share one row.
    """
    dead, work = len(automaton.table) - 1, 0
    columns, column_of = _alike(automaton.table)
    table = np.ascontiguousarray(automaton.table[:, columns].T)
    text = column_of[np.frombuffer(b"".join(pieces), np.uint8)]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    starts = np.cumsum(lengths) - lengths
    everywhere = np.arange(dead, dtype=np.int32).tobytes()
    rows, row_of = {(everywhere, everywhere): 0}, np.full(len(pieces), -1, np.int64)
    listed = [*rows]
    alive, current, depth = np.arange(len(pieces)), np.zeros(len(pieces), np.int64), 0
    while len(alive):
        moves, place = np.unique(current * len(columns) + text[starts[alive] + depth], return_inverse=True)
        reached = np.full(len(moves), -1, np.int64)
        for i, (row, column) in enumerate(zip(*np.divmod(moves, len(columns)), strict=True)):
            states, targets = listed[row]
            to = table[column][np.frombuffer(targets, np.int32)]
            work += len(to) + 1000
            if work > MAX_WORK:
                raise too_large("allowed with this vocabulary")
            fits = to != dead
            if not fits.all():
                states, to = np.frombuffer(states, np.int32)[fits].tobytes(), to[fits]
            if len(to):
                key = (states, to.tobytes())
                reached[i] = rows.setdefault(key, len(rows))
                if len(rows) > len(listed):
                    listed.append(key)
        current, depth = reached[place], depth + 1
        has_ended = lengths[alive] == depth
        row_of[alive[has_ended]] = current[has_ended]
        goes_on = (current >= 0) & ~has_ended
        alive, current = alive[goes_on], current[goes_on]
    used, row_of = np.unique(np.append(row_of, -1), return_inverse=True)
    kept = [listed[row] for row in used[1:]]
    state, to = (np.frombuffer(b"".join(row[side] for row in kept), np.int32).astype(np.int64) for side in (0, 1))
    return row_of[:-1] - 1, np.repeat(np.arange(len(kept)), [len(row[0]) // 4 for row in kept]), state, to


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


def _unspellable(automaton: ByteAutomaton, pieces: list[bytes]) -> str:
    """Say which bytes a vocabulary lacks."""
    needed = {int(byte) for byte in np.nonzero((automaton.table[:-1] != len(automaton.table) - 1).any(axis=0))[0]}
    missing = sorted(needed - set(b"".join(pieces)))
    names = ", ".join(repr(chr(byte)) if 32 <= byte < 127 else f"0x{byte:02X}" for byte in missing[:8])
    lacks = f"no token holds the bytes {names}" if missing else "its tokens do not fit together"
    return f"this vocabulary spells no text that satisfies the constraint: {lacks}. Loosen the constraint."
