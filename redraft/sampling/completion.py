"""A canvas completed under a constraint, its tokens decided in any order.

A constraint becomes an automaton over the tokens of a vocabulary. A step of decoding is a walk over the canvas from the
right to the left: for every position and state the weight of the best way (or of all ways) to a full match through
what is decided and what is open; and a walk back that takes it. After DINGO (arXiv 2505.23061), which does so for
left-to-right blocks; here decided tokens may lie anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.sampling.automaton import Bools, Floats, TokenAutomaton, segment_logsumexp

_LANES = 8
_LOWEST = -1e9  # for tokens that the model rules out: the constraint is harder than the model's zeros


MAX_TAILS = 8
"""The most lengths of a canvas for which a constraint keeps what can be filled."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on the number of tokens before the end, and tokens fixed at positions."""

    min_tokens: int = 0
    max_tokens: int | None = None
    spans: Mapping[int, int] = field(default_factory=dict)

    def __contains__(self, num_tokens: int) -> bool:
        return num_tokens >= self.min_tokens and (self.max_tokens is None or num_tokens <= self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class CompiledConstraint:
    """A constraint over a vocabulary. Its walks run on the CPU, on logits that were reduced where they are."""

    automaton: TokenAutomaton
    limits: Limits
    _tails: dict[int, Bools] = field(default_factory=dict, repr=False)
    _on_device: dict[torch.device, tuple[Tensor | None, Tensor]] = field(default_factory=dict, repr=False)

    def check(self, tokens: Int[Tensor, "seq"], is_noise: Bool[Tensor, "seq"]) -> None:
        """Raise ValueError with the reason if no completion of the canvas satisfies the constraint.

        `tokens` is the part of the canvas that holds the new text; what is not noise is decided already.
        """
        length = len(tokens)
        if self.limits.spans and max(self.limits.spans) >= length:
            raise ValueError(
                f"the canvas must hold the spans, up to position {max(self.limits.spans)};"
                f" got {length} tokens. Lengthen it."
            )
        if not self._tail(length)[0, 0]:
            raise ValueError(self._why_not(length))
        row = self._row(tokens, is_noise, [])
        if self._backward(row, {})[row.first][row.state] == -np.inf:
            raise ValueError(
                f"the given tokens must leave a text of {length} tokens that satisfies the constraint;"
                f" got {int((~is_noise).sum())} given, and none. Change them, the length or the constraint."
            )

    @torch.no_grad()
    def complete(
        self,
        tokens: Int[Tensor, "seq"],
        is_noise: Bool[Tensor, "seq"],
        where: Int[Tensor, "n"],
        logits: Float[Tensor, "n vocab"],
        *,
        temperature: float = 0.0,
        u: Float[Tensor, "n"] | None = None,
    ) -> Int[Tensor, "n"]:
        """Propose tokens for the open positions `where` (ascending) of one row, so that the whole can be completed.

        At temperature 0 the most probable joint completion under independent positions; else an exact draw from the
        product of softmax(logits / temperature) restricted to what can be completed, one number u in [0, 1) a position.
        Any subset may be committed. Noise elsewhere may become anything. Where such noise lies before an open position,
        a draw walks over it on the state with the most mass behind it: valid, but no longer exact.

        Raises ValueError if there is no completion, which `check` at the start rules out.
        """
        if temperature > 0 and u is None:
            raise ValueError(f"a temperature of {temperature} needs random numbers u; got None.")
        places: list[int] = where.tolist()  # sync: one transfer each of positions, scores and tokens
        scores = self._class_scores(logits, temperature).double().cpu().numpy()
        row = self._row(tokens, is_noise, places)
        beta = self._backward(row, dict(zip(places, self._label_scores(scores, temperature), strict=True)), temperature)
        if beta[row.first][row.state] == -np.inf:
            raise ValueError("no completion of the canvas satisfies the constraint. Call check before the first step.")
        draws = [None] * len(places) if u is None or temperature == 0 else u.tolist()
        open_at = {place: (scores[i], draws[i]) for i, place in enumerate(places)}
        walk = self._forward(row, open_at, beta)
        chosen = []
        for i, place in enumerate(places):
            if place in self.limits.spans:
                chosen.append(where.new_tensor(self.limits.spans[place]))
            else:
                chosen.append(self._token(walk[place], logits[i], temperature).to(where))
        return torch.stack(chosen)

    def _row(self, tokens: Int[Tensor, "seq"], is_noise: Bool[Tensor, "seq"], places: list[int]) -> "_Row":
        """Sort the positions of a row, and walk over what is decided at its start."""
        classes: list[int | None] = [None] * len(tokens)
        none = self.automaton.num_classes
        for i, (token, noise) in enumerate(zip(tokens.tolist(), is_noise.tolist(), strict=True)):
            fixed = self.limits.spans.get(i)
            if not noise or fixed is not None:
                agrees = noise or fixed is None or fixed == token
                classes[i] = self._class(token if fixed is None else fixed) if agrees else none
        state, first = 0, 0
        while first < len(classes) and (known := classes[first]) is not None:
            state, first = self.automaton.next(state, known), first + 1
        ends = [i for i, known in enumerate(classes) if known is not None] + places
        return _Row(classes=classes, first=first, state=state, end=max([first, *(i + 1 for i in ends)]))

    def _class(self, token: int) -> int:
        class_of = self.automaton.class_of
        return int(class_of[token]) if 0 <= token < len(class_of) else self.automaton.num_classes

    def _allowed(self, boundary: int) -> Bools:
        """Tell the states in which `boundary` tokens may leave the text, given the bounds on its length."""
        automaton, limits = self.automaton, self.limits
        states = np.arange(automaton.num_states)
        is_end = states == (automaton.dead - 1 if automaton.has_end else -1)
        is_text = states < automaton.dead - automaton.has_end
        may_end = boundary > limits.min_tokens
        may_go_on = limits.max_tokens is None or boundary <= limits.max_tokens
        allowed: Bools = (is_end & may_end) | (is_text & may_go_on)
        return allowed

    def _tail(self, length: int) -> Bools:
        """Tell for each boundary and state whether the rest of a canvas without decided tokens can be filled."""
        if length not in self._tails:
            tail = np.zeros((length + 1, self.automaton.num_states), np.bool_)
            is_long_enough = length >= self.limits.min_tokens
            tail[length] = self.automaton.is_final & self._allowed(length) & is_long_enough
            edges = self.automaton.edges
            for i in reversed(range(length)):
                if i in self.limits.spans:
                    tail[i] = self.automaton.before(tail[i + 1], self._class(self.limits.spans[i]))
                else:
                    tail[i] = edges.before(tail[i + 1])
                tail[i] &= self._allowed(i)
            while len(self._tails) >= MAX_TAILS:
                self._tails.pop(next(iter(self._tails)))
            self._tails[length] = tail
        return self._tails[length]

    def _backward(self, row: "_Row", labels: Mapping[int, Floats], temperature: float = 0.0) -> dict[int, Floats]:
        """Weigh what lies behind each state at each boundary, from the end of what is known to the first open position.

        The weight is the log of the best completion's score, or of the sum over completions at a temperature.
        """
        edges = self.automaton.edges
        beta = {row.end: np.where(self._tail(len(row.classes))[row.end], 0.0, -np.inf)}
        for i in reversed(range(row.first, row.end)):
            after, known = beta[i + 1], row.classes[i]
            if known is not None:
                before = self.automaton.before(after, known)
            else:
                before = edges.before(after, labels.get(i), is_sum=temperature > 0)
            before[~self._allowed(i)] = -np.inf
            beta[i] = before
        return beta

    def _forward(
        self, row: "_Row", open_at: Mapping[int, tuple[Floats, float | None]], beta: Mapping[int, Floats]
    ) -> dict[int, tuple[int, float]]:
        """Walk from the first open position on: the class at each, and where inside it the draw falls."""
        state = row.state
        walk = {place: (known, 0.0) for place in open_at if (known := row.classes[place]) is not None}
        for i in range(row.first, max(open_at, default=-1) + 1):
            known = row.classes[i]
            if known is None:
                classes, to = self.automaton.leaving(state)
                scores, draw = open_at.get(i, (None, None))
                chosen, rest = _choose(beta[i + 1][to] + (0.0 if scores is None else scores[classes]), draw)
                known = int(classes[chosen])
                walk[i] = (known, rest)
            state = self.automaton.next(state, known)
        return walk

    def _class_scores(self, logits: Float[Tensor, "n vocab"], temperature: float) -> Float[Tensor, "n classes"]:
        """Reduce logits to the best, or to the log of the sum, of each class."""
        usable, lane_of = self._vocabulary(logits.device)
        logits = logits[:, : len(lane_of)] if usable is None else logits.index_select(1, usable)
        logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
        num_lanes = (self.automaton.num_classes + 1) * _LANES
        if temperature > 0:
            largest = logits.amax(dim=1, keepdim=True).clamp_(min=_LOWEST)
            sums = logits.new_zeros((len(logits), num_lanes)).index_add_(1, lane_of, (logits - largest).exp_())
            sums = sums.view(len(logits), -1, _LANES).sum(dim=2)[:, :-1]
            if (sums > 1e-25).all():  # sync: else some class has nearly no mass, and its own scale
                return sums.log_() + largest
        best = logits.new_full((len(logits), num_lanes), _LOWEST)
        best = best.scatter_reduce_(1, lane_of.expand(len(logits), -1), logits, "amax")
        if temperature > 0:
            shares = (logits - best.index_select(1, lane_of)).exp_()
            # Each sum holds a 1, but for lanes that the model rules out altogether.
            best = best + torch.zeros_like(best).index_add_(1, lane_of, shares).clamp_(min=1).log_()
        lanes = best.view(len(logits), -1, _LANES)[:, :-1]
        return lanes.logsumexp(dim=2) if temperature > 0 else lanes.amax(dim=2)

    def _vocabulary(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Return the tokens to look at, None for all, and where their logits go; few are gathered, not all read.

        A class is reduced in lanes first: a sum into one place would wait for itself.
        """
        if device not in self._on_device:
            class_of = self.automaton.class_of
            usable = np.flatnonzero(class_of != self.automaton.num_classes)
            is_few = 2 * len(usable) < len(class_of)
            classes = class_of[usable] if is_few else class_of
            lane_of = classes * _LANES + np.arange(len(classes)) % _LANES
            kept = torch.from_numpy(usable).to(device) if is_few else None
            self._on_device[device] = kept, torch.from_numpy(lane_of).to(device)
        return self._on_device[device]

    def _label_scores(self, scores: Floats, temperature: float) -> Floats:
        edges = self.automaton.edges
        reduce = segment_logsumexp if temperature > 0 else np.maximum.reduceat
        reduced: Floats = reduce(scores[:, edges.label_members], edges.label_starts, axis=1)
        return reduced

    def _token(self, chosen: tuple[int, float], logits: Float[Tensor, "vocab"], temperature: float) -> Int[Tensor, ""]:
        """Pick the best token of a class, or the one on which the draw falls."""
        order, starts = self.automaton.tokens_by_class
        token_class, rest = chosen
        is_large = starts[token_class + 1] - starts[token_class] > len(order) // 8
        if temperature == 0 and is_large and self._class(likeliest := int(logits.argmax())) == token_class:
            return torch.tensor(likeliest)  # reading all in order is faster than gathering a part
        tokens = torch.from_numpy(order[starts[token_class] : starts[token_class + 1]]).to(logits.device)
        inside = _tempered(logits[tokens], temperature)
        if temperature == 0:
            return tokens[inside.argmax()]
        ends = (inside - inside.max()).double().exp().cumsum(0)
        return tokens[torch.searchsorted(ends, rest * ends[-1], right=True).clamp(max=len(ends) - 1)]

    def _why_not(self, length: int) -> str:
        """Say which lengths would do, for a canvas of which nothing is given."""
        automaton, limits, possible = self.automaton, self.limits, []
        is_text = np.arange(automaton.num_states) < automaton.dead - automaton.has_end
        can_end = automaton.is_final & is_text  # by n more tokens
        for n in range(length + automaton.num_states + 1):
            if n in limits and can_end[0]:
                possible.append(n)
            if not can_end.any() or (len(possible) > 2 and possible[-3] > length):
                break
            can_end = automaton.edges.before(can_end)
        most = "any number of" if limits.max_tokens is None else limits.max_tokens
        bounds = f" of {limits.min_tokens} to {most} tokens" if limits != Limits() else ""
        if not possible:
            return f"no text{bounds} in this vocabulary satisfies the constraint. Loosen it."
        if length < possible[0]:
            return (
                f"the canvas is too short: the shortest text{bounds} that satisfies the constraint has"
                f" {possible[0]} tokens; got {length}. Set max_new_tokens to at least {possible[0]}."
            )
        near = ", ".join(str(n) for n in sorted(sorted(possible, key=lambda n: abs(n - length))[:3]))
        return (
            f"no text{bounds} that satisfies the constraint fills a canvas of {length} tokens;"
            f" lengths near it that do are {near}. Use one of them, an end token or other spans."
        )


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row as the walks see it."""

    classes: list[int | None]
    """The class of each decided token, None for noise."""
    first: int
    """The first position that is noise,"""
    state: int
    """and the state there."""
    end: int
    """Behind the last position that is decided or open."""


def _tempered(logits: Float[Tensor, "*shape"], temperature: float) -> Float[Tensor, "*shape"]:
    return (logits.float() / (temperature or 1.0)).clamp(min=_LOWEST)


def _choose(weights: Floats, draw: float | None) -> tuple[int, float]:
    """Take the best, or invert the cumulative distribution; return also where inside its share the draw falls."""
    if draw is None:
        return int(weights.argmax()), 0.0
    ends = np.exp(weights - weights.max()).cumsum()
    target = draw * ends[-1]
    chosen = min(int(np.searchsorted(ends, target, side="right")), int(np.searchsorted(ends, ends[-1])))
    begin = ends[chosen - 1] if chosen else 0.0
    return chosen, float(min(max((target - begin) / (ends[chosen] - begin), 0.0), 1.0))
