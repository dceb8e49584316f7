"""Finite automata over bytes and over tokens: what constrained decoding walks on.

A regular expression becomes a minimal automaton over bytes (`redraft.sampling.regex`), and that one an automaton
over the tokens of a vocabulary. Tokens that act alike in every state form a class, so what is stored and searched grows
with the automaton and not with the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from redraft.sampling.regex import determinise
from redraft.sampling.token_bytes import LeadingSpace

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ByteAutomaton:
    """A minimal deterministic automaton over bytes. State 0 is the start; no match lies behind the last."""

    table: Ints
    """(states, 256): the next state."""
    is_final: Bools
    """(states,)"""

    def __and__(self, other: "ByteAutomaton") -> "ByteAutomaton":
        """Accept what both accept: the states are the reachable pairs."""
        width = len(other.table)
        codes, rows, frontier = np.zeros(0, np.int64), [], np.zeros(1, np.int64)
        while len(frontier):
            codes = np.concatenate([codes, frontier])
            rows.append(self.table[frontier // width] * width + other.table[frontier % width])
            frontier = np.setdiff1d(rows[-1], codes)
        order = np.argsort(codes)
        table = order[np.searchsorted(codes, np.concatenate(rows), sorter=order)]
        return _minimal(table, self.is_final[codes // width] & other.is_final[codes % width])


def after_space(automaton: ByteAutomaton, leading_space: LeadingSpace) -> ByteAutomaton:
    """Accept the bytes of tokens whose text an automaton accepts, given what the tokenizer does with a first space."""
    if leading_space == "text":
        return automaton
    dead = len(automaton.table) - 1
    start = automaton.table[0].copy() if leading_space == "stripped" else np.full(256, dead, np.int64)
    start[ord(" ")] = 0
    # The new start is put first, so every other state moves up by one.
    table = np.concatenate([start[None], automaton.table]) + 1
    return _minimal(table, np.append(automaton.is_final[0], automaton.is_final))


def from_regex(pattern: str) -> ByteAutomaton:
    """Build the automaton of the texts that a regular expression matches as a whole (`regex.determinise`)."""
    table, is_final = determinise(pattern)
    return _minimal(table, is_final)


def _minimal(table: Ints, is_final: Bools) -> ByteAutomaton:
    """Merge the states that no text tells apart (Moore's refinement, on hashes); the dead state becomes the last."""
    dead = len(table)  # one dead state more does no harm: it is merged with any other
    table = np.concatenate([table, np.full((1, 256), dead, np.int64)])
    is_final = np.append(is_final, False)
    _, columns = np.unique(_hash(table.T), return_index=True)  # bytes that act alike
    group = is_final.astype(np.int64)
    while True:
        refined = np.unique(_hash(np.column_stack([group[table[:, columns]], group])), return_inverse=True)[1]
        if refined.max() == group.max():
            break
        group = refined
    if group[0] == group[dead]:
        raise ValueError("nothing satisfies the constraint: its parts exclude each other. Loosen one of them.")
    first = np.unique(group, return_index=True)[1]
    middle = [g for g in range(len(first)) if g not in (group[0], group[dead])]
    order = np.array([group[0], *middle, group[dead]])
    return ByteAutomaton(table=np.argsort(order)[group[table[first[order]]]], is_final=is_final[first[order]])


def _hash(rows: Ints) -> NDArray[np.uint64]:
    """Hash each row to 64 bits; equal rows have equal hashes, and others do so with probability 2^-64."""
    weights = np.random.default_rng(0).integers(1 << 63, size=rows.shape[1], dtype=np.uint64)
    mixed: NDArray[np.uint64] = ((rows.astype(np.uint64) + np.uint64(1)) * (weights * 2 + 1)).sum(axis=1)
    return mixed


@dataclass(frozen=True, kw_only=True)
class TokenAutomaton:
    """A deterministic automaton over classes of tokens. State 0 is the start, the last state is dead.

    Where there is an end token, it leads from final states to the last state but one, and only it continues from there.
    """

    table: Ints
    """(states, classes + 1): the next state; the last class is that of tokens that fit nowhere."""
    class_of: Ints
    """(vocab,)"""
    is_final: Bools
    """(states,)"""
    has_end: bool

    @property
    def dead(self) -> int:
        return len(self.table) - 1

    @property
    def num_classes(self) -> int:
        return int(self.table.shape[1]) - 1

    @cached_property
    def tokens_by_class(self) -> tuple[Ints, Ints]:
        """All tokens ordered by class, and where each class begins."""
        order = np.argsort(self.class_of, kind="stable")
        return order, np.searchsorted(self.class_of[order], np.arange(self.num_classes + 2))

    @cached_property
    def edges(self) -> "Edges":
        """The pairs of states that some token joins."""
        state, token_class = np.nonzero(self.table[:-1, :-1] != self.dead)
        to = self.table[state, token_class]
        order = np.argsort(state * len(self.table) + to, kind="stable")
        state, to, token_class = state[order], to[order], token_class[order]
        starts = np.flatnonzero(np.diff(state * len(self.table) + to, prepend=-1))
        # Equal sets of classes are one label: their logits are reduced once for all edges that carry it.
        weights = np.random.default_rng(1).integers(1 << 63, size=self.num_classes, dtype=np.uint64)
        digest = np.add.reduceat(weights[token_class], starts)
        _, first, label = np.unique(digest, return_index=True, return_inverse=True)
        ends = np.append(starts[1:], len(state))
        members = [token_class[starts[edge] : ends[edge]] for edge in first]
        from_states, state_starts = np.unique(state[starts], return_index=True)
        return Edges(
            to=to[starts],
            label=label,
            from_states=from_states,
            state_starts=state_starts,
            label_members=np.concatenate(members),
            label_starts=np.cumsum([0, *map(len, members[:-1])]),
        )


@dataclass(frozen=True, kw_only=True)
class Edges:
    """The joined pairs of states ordered by the first, each with a label: the set of classes that lead across."""

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

    Raises ValueError if no sequence of tokens spells a match.
    """
    usable = np.array([i for i, piece in enumerate(token_bytes) if piece and i != eos_token_id], np.int64)
    pieces = [token_bytes[i] or b"" for i in usable]
    row_of, functions = _token_functions(automaton, pieces)
    kept = _live_states(functions, automaton.is_final)
    if not len(kept):
        raise ValueError(_unspellable(automaton, pieces))
    # Tokens may reach fewer states than bytes do: number what is left, and merge classes that are now alike.
    num_states = len(kept)
    renumber = np.full(len(automaton.table), num_states, np.int64)
    renumber[kept] = np.arange(num_states)
    functions = renumber[functions[:, kept]]
    _, first, merged = np.unique(_hash(functions), return_index=True, return_inverse=True)
    functions = functions[first]
    is_used = (functions != num_states).any(axis=1)
    has_end = eos_token_id is not None
    num_classes = int(is_used.sum()) + has_end
    dead = num_states + has_end
    table = np.full((dead + 1, num_classes + 1), dead, np.int64)
    table[:num_states, : is_used.sum()] = np.where(functions == num_states, dead, functions)[is_used].T
    class_of = np.full(len(token_bytes), num_classes, np.int64)
    number = np.where(is_used, np.cumsum(is_used) - 1, num_classes)
    class_of_row = np.append(number[merged], num_classes)  # the last for row -1
    class_of[usable] = class_of_row[row_of]
    is_final = np.append(automaton.is_final[kept], [True] * has_end + [False])
    if eos_token_id is not None:
        table[is_final, num_classes - 1] = num_states
        class_of[eos_token_id] = num_classes - 1
    return TokenAutomaton(table=table, class_of=class_of, is_final=is_final, has_end=has_end)


def _token_functions(automaton: ByteAutomaton, pieces: list[bytes]) -> tuple[Ints, Ints]:
    """Find what each token does to each state: rows (functions, states), and each token's row, -1 if it fits nowhere.

    All tokens advance byte by byte together; those that act alike so far share one row.
    """
    table, dead = automaton.table, len(automaton.table) - 1
    text = np.frombuffer(b"".join(pieces), np.uint8)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    starts = np.cumsum(lengths) - lengths
    row_of, found, num_found = np.full(len(pieces), -1, np.int64), [np.zeros((0, dead + 1), np.int64)], 0
    alive, current, rows = np.arange(len(pieces)), np.zeros(len(pieces), np.int64), np.arange(dead + 1)[None]
    depth = 0
    while len(alive):
        moves, current = np.unique(current * 256 + text[starts[alive] + depth], return_inverse=True)
        rows = table[rows[moves // 256], (moves % 256)[:, None]]
        _, first, merged = np.unique(_hash(rows), return_index=True, return_inverse=True)
        rows, current, depth = rows[first], merged[current], depth + 1
        fits = (rows != dead).any(axis=1)[current]
        has_ended = lengths[alive] == depth
        ended, place = np.unique(current[fits & has_ended], return_inverse=True)
        row_of[alive[fits & has_ended]] = num_found + place
        found.append(rows[ended])
        num_found += len(ended)
        goes_on = fits & ~has_ended
        alive, current = alive[goes_on], current[goes_on]
    return row_of, np.concatenate(found)


def _live_states(functions: Ints, is_final: Bools) -> Ints:
    """Return the states on some path of tokens from the start to a final state, in order; none if there is no path."""
    is_joined = np.zeros((len(is_final), len(is_final)), np.bool_)
    is_joined[np.arange(len(is_final)), functions] = True
    state, to = np.nonzero(is_joined)
    is_start = np.arange(len(is_final)) == 0
    is_live = _closure(is_start, state, to) & _closure(is_final, to, state)
    return np.flatnonzero(is_live & is_live[0])


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
