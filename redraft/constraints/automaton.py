"""Finite automata over bytes and over tokens, for constrained decoding.

A regular expression becomes an automaton over bytes (`redraft.constraints.regex`), and that one an automaton over the
tokens of a vocabulary. Tokens that lead from every state to the same next state form a class, so what is stored and
searched grows with the automaton and not with the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from redraft.constraints.regex import Pattern, Work, determinise, explore
from redraft.constraints.token_bytes import LeadingSpace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_MERGE_WORK = 20_000


@dataclass(frozen=True, kw_only=True)
class ByteAutomaton:
    """A deterministic automaton over bytes. The first state is the start; the last is dead: it leads to no match."""

    table: NDArray[np.int32]
    """(states, 256): the next state."""
    is_final: Bools
    """(states,)"""

    def __and__(self, other: "ByteAutomaton") -> "ByteAutomaton":
        """Accept what both accept: the states are the reachable pairs. Raises ValueError where they are too many."""
        width = len(other.table)
        columns, column_of = _distinct_columns(np.concatenate([self.table, other.table]))
        ours, theirs = self.table[:, columns].astype(np.int64), other.table[:, columns]

        def follow(pair: int) -> tuple[list[int], int]:
            first, second = ours[pair // width], theirs[pair % width]
            is_dead = (first == len(ours) - 1) | (second == width - 1)
            return np.where(is_dead, -1, first * width + second).tolist(), 1

        pairs, table = explore(0, -1, follow)
        first, second = np.divmod(pairs, width)
        return _merged(table[:, column_of], np.append(self.is_final[first] & other.is_final[second], False))


def after_space(automaton: ByteAutomaton, leading_space: LeadingSpace) -> ByteAutomaton:
    """Accept the bytes of tokens whose text an automaton accepts, given what the tokenizer does with a first space."""
    if leading_space == "text":
        return automaton
    dead = len(automaton.table) - 1
    start = automaton.table[0].copy() if leading_space == "stripped" else np.full(256, dead, np.int32)
    start[ord(" ")] = 0
    # The new start is put first, so every other state moves up by one.
    table = np.concatenate([start[None], automaton.table]) + 1
    return _merged(table, np.append(automaton.is_final[0], automaton.is_final))


def from_pattern(pattern: Pattern) -> ByteAutomaton:
    """Build the automaton of the texts that a pattern matches as a whole (`regex.determinise`)."""
    return _merged(*determinise(pattern))


def _merged(table: NDArray[np.int32], is_final: Bools) -> ByteAutomaton:
    """Merge equivalent states, by Moore's refinement: split each group until all its states move to the same groups.

    A large automaton is left as it is where that takes many rounds: it comes from long texts or bounded repetitions,
    which are built with hardly any equal states.
    """
    columns = _distinct_columns(table)[0]
    group, num_groups = is_final.astype(np.int64), 0
    for _ in range(_MERGE_WORK // len(table)):
        moves = np.column_stack([group, group[table[:, columns]]])
        first, group = np.unique(moves, axis=0, return_index=True, return_inverse=True)[1:]
        group = group.ravel()
        if len(first) == num_groups:
            first[group[-1]] = len(table) - 1  # the dead state stays the last
            order = np.argsort(first)
            table, is_final = np.argsort(order)[group].astype(np.int32)[table[first[order]]], is_final[first[order]]
            break
        num_groups = len(first)
    return ByteAutomaton(table=table, is_final=is_final)


def _distinct_columns(table: NDArray[np.int32]) -> tuple[Ints, Ints]:
    """Return the index of one column of each kind, and the kind of each column."""
    kinds: dict[bytes, int] = {}
    kind_of = np.array([kinds.setdefault(column.tobytes(), len(kinds)) for column in table.T])
    return np.unique(kind_of, return_index=True)[1], kind_of


@dataclass(frozen=True, kw_only=True)
class TokenAutomaton:
    """A deterministic automaton over classes of tokens. The first state is the start, the last is dead.

    The last but one is the state after the end token; the end token leads to it from all final states, itself included.
    An edge joins two states that are not dead; its label is the set of classes that lead from one to the other. Equal
    sets are one label, so that the scores of its classes are reduced once for all edges with it.
    """

    state: Ints
    """State that each edge leaves, in ascending order."""
    to: Ints
    """State that each edge leads to."""
    label: Ints
    """Number of each edge's label."""
    labels: list[Ints]
    """The classes of each label, in order."""
    class_of: Ints
    """(vocab,): the last class is that of tokens that fit nowhere."""
    is_final: Bools
    """(states,)"""
    num_classes: int
    """Without the last."""

    @property
    def num_states(self) -> int:
        return len(self.is_final)

    @cached_property
    def tokens_by_class(self) -> tuple[Ints, Ints]:
        """All tokens ordered by class, and where each class begins."""
        order = np.argsort(self.class_of, kind="stable")
        return order, np.searchsorted(self.class_of[order], np.arange(self.num_classes + 2))

    def edges(self, state: int) -> slice:
        return slice(*np.searchsorted(self.state, [state, state + 1]))

    def leaving(self, state: int) -> tuple[Ints, Ints]:
        """Return the classes that lead on from a state, in order, and where to."""
        to, sets = self.to[self.edges(state)], [self.labels[label] for label in self.label[self.edges(state)]]
        classes = np.concatenate([np.empty(0, np.int64), *sets])
        order = np.argsort(classes)
        return classes[order], np.repeat(to, [*map(len, sets)])[order]

    def next(self, state: int, token_class: int) -> int:
        classes, to = self.leaving(state)
        return int(to[classes == token_class].min(initial=self.num_states - 1))

    def can_end(self) -> bool:
        """Whether some tokens lead from the start to a final state."""
        seen, stack = {0}, [0]
        while stack and not self.is_final[stack[-1]]:
            following = set(self.to[self.edges(stack.pop())].tolist()) - seen
            seen |= following
            stack += following
        return bool(stack)

    def before(self, after: Floats, scores: Floats | None = None, *, is_sum: bool = False) -> Floats:
        """Weigh each state: the largest, over its edges and their classes, of a class' score plus its target's `after`.

        Without scores all classes are equally good. With `is_sum` the log of the sum over classes, not the largest.
        """
        reduce = _logsumexp if is_sum else np.maximum.reduceat
        members, label_begins, states, begins = self._layout
        ways = after[self.to]
        if scores is not None:
            ways += reduce(scores[members], label_begins)[self.label]
        before = np.full_like(after, -np.inf)
        before[states] = reduce(ways, begins)
        return before

    @cached_property
    def _layout(self) -> tuple[Ints, Ints, Ints, Ints]:
        """The labels in one array, and where each begins; the states with edges, and where the edges of each begin."""
        begins = np.cumsum([0, *map(len, self.labels)])[:-1]
        return np.concatenate(self.labels), begins, *np.unique(self.state, return_index=True)


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

    Raises ValueError if no sequence of tokens spells a match, and if the tokens act on the states in too many ways.
    """
    pieces = {i: piece for i, piece in enumerate(token_bytes) if piece and i != eos_token_id}
    row_of = _rows(automaton, pieces)
    # Tokens with equal rows are interchangeable: they are one class. Classes are ordered by their first token.
    classes = [row for row in dict.fromkeys(row_of.values()) if row]
    end = len(automaton.table) - 1  # the state behind the end token; the dead state moves up by one
    is_final = np.append(automaton.is_final[:-1], [True, False])
    if eos_token_id is not None:
        ends = np.flatnonzero(is_final).astype(np.int32)
        row_of[eos_token_id] = np.stack([ends, np.full_like(ends, end)]).tobytes()
        classes.append(row_of[eos_token_id])
    number = {row: i for i, row in enumerate(classes)}
    class_of = np.full(len(token_bytes), len(classes))
    class_of[[*row_of]] = [number.get(row, len(classes)) for row in row_of.values()]
    moves = [np.frombuffer(row, np.int32).reshape(2, -1) for row in classes]
    # Sort the moves of all classes by (state, target): the classes between the same two states make one edge, and equal
    # sets of classes one label.
    state, to = np.concatenate([np.empty((2, 0), np.int64), *moves], axis=1)
    token_class = np.repeat(np.arange(len(classes)), [move.shape[1] for move in moves])
    order = np.lexsort((to, state))
    state, to = state[order], to[order]
    begins = np.flatnonzero(np.diff(state * len(is_final) + to, prepend=-1))
    label_of: dict[bytes, int] = {}
    sets = np.split(token_class[order], begins[1:])
    label = np.array([label_of.setdefault(one.tobytes(), len(label_of)) for one in sets])
    labels = [np.frombuffer(one, np.int64) for one in label_of]
    lifted = TokenAutomaton(
        state=state[begins],
        to=to[begins],
        label=label,
        labels=labels,
        class_of=class_of,
        is_final=is_final,
        num_classes=len(classes),
    )
    if end == 0 or not lifted.can_end():
        raise ValueError(_unspellable(automaton, pieces))
    return lifted


def _rows(automaton: ByteAutomaton, pieces: Mapping[int, bytes]) -> dict[int, bytes]:
    """Return a row for each token: the states in which it fits, then the state it leads to from each, as int32.

    Thousands of tokens times thousands of states would be too much to follow one by one. Tokens share the row of their
    common prefix, and prefixes with equal rows (all runs of letters in a text without bound) share their continuations:
    the loop looks up one byte after the other, and only a new pair of row and byte is computed.
    """
    columns, column_of = _distinct_columns(automaton.table)
    table, in_columns = np.ascontiguousarray(automaton.table[:, columns].T), bytes(column_of.tolist())
    dead, work = len(automaton.table) - 1, Work()
    everywhere = np.tile(np.arange(dead, dtype=np.int32), (2, 1)).tobytes()
    rows, behind, row_of = {everywhere: everywhere}, dict[tuple[bytes, int], bytes](), dict[int, bytes]()
    for token, piece in pieces.items():
        row = everywhere
        for column in piece.translate(in_columns):
            if (row, column) not in behind:
                states, targets = np.frombuffer(row, np.int32).reshape(2, -1)
                work.spend(1 + len(targets) // 1000)
                moved = np.stack([states, table[column][targets]])
                following = moved[:, moved[1] != dead].tobytes()
                behind[row, column] = rows.setdefault(following, following)
            row = behind[row, column]
        row_of[token] = row
    return row_of


def _unspellable(automaton: ByteAutomaton, pieces: Mapping[int, bytes]) -> str:
    """Say which bytes a vocabulary lacks."""
    needed = {int(byte) for byte in np.nonzero((automaton.table[:-1] != len(automaton.table) - 1).any(axis=0))[0]}
    missing = sorted(needed - set(b"".join(pieces.values())))
    names = ", ".join(repr(chr(byte)) if 32 <= byte < 127 else f"0x{byte:02X}" for byte in missing[:8])
    lacks = f"no token holds the bytes {names}" if missing else "its parts exclude each other, or tokens do not fit"
    return f"this vocabulary spells no text that satisfies the constraint: {lacks}. Loosen the constraint."
