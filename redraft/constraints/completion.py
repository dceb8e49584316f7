"""Complete a canvas under a constraint, although its tokens are decided in any order.

A constraint becomes an automaton over the tokens of a vocabulary. A step of decoding goes over the canvas twice. From
right to left it computes, for every position and state, the weight of the best completion (or of all completions) that
agrees with the decided tokens. From left to right it then chooses tokens by these weights. After DINGO (arXiv
2505.23061), which does so for left-to-right blocks; here decided tokens may be anywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.constraints.automaton import Bools, Floats, TokenAutomaton
from redraft.constraints.kinds import TokenLimits

MAX_TAILS = 8
"""Number of canvas lengths for which a constraint remembers which states can be completed."""
_LOWEST = -1e9  # for tokens that the model rules out: where nothing else satisfies the constraint they are used


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledConstraint:
    """A constraint over a vocabulary. It runs on the CPU, on logits that were reduced to classes on their device."""

    automaton: TokenAutomaton
    limits: TokenLimits

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
        if not self._fillable(length)[0, 0]:
            raise ValueError(self._why_not(length))
        self._weigh(self._classes(tokens, is_noise), {})

    @torch.no_grad()
    def complete(
        self,
        tokens: Int[Tensor, "seq"],
        is_noise: Bool[Tensor, "seq"],
        where: Int[Tensor, "n"],
        logits: Float[Tensor, "n vocab"],
        *,
        u: Float[Tensor, "n"] | None = None,
    ) -> Int[Tensor, "n"]:
        """Propose tokens for the open positions `where` (ascending) of one row, so that the whole can be completed.

        Without `u` the most probable joint completion under independent positions; with `u`, one number in [0, 1) for
        each position, an exact draw from the product of softmax(logits) restricted to what can be completed. Any subset
        may be committed. Noise elsewhere may become anything. Where such noise is before an open position, a draw
        takes the state with the most mass after it: the result is valid, but no longer an exact draw.

        Raises ValueError if there is no completion, which `check` at the start rules out.
        """
        automaton, spans, is_draw = self.automaton, self.limits.spans, u is not None
        places: list[int] = where.tolist()  # sync: one transfer each of positions, scores and tokens
        scores = dict(zip(places, self._class_scores(logits, is_draw).double().cpu().numpy(), strict=True))
        draws = {} if u is None else dict(zip(places, u.tolist(), strict=True))
        classes = self._classes(tokens, is_noise)
        state, first, beta = self._weigh(classes, scores, is_draw=is_draw)
        walk: dict[int, tuple[int, float]] = {}
        for i in range(first, max(places, default=-1) + 1):
            known = classes[i]
            if known is None:
                leaving, to = automaton.leaving(state)
                weights = beta[i + 1][to] + (scores[i][leaving] if i in scores else 0.0)
                chosen, rest = _choose(weights, draws.get(i))
                known = int(leaving[chosen])
                walk[i] = known, rest
            state = automaton.next(state, known)
        chosen_tokens = [
            where.new_tensor(spans[place]) if place in spans else self._token(*walk[place], of_place, is_draw).to(where)
            for place, of_place in zip(places, logits, strict=True)
        ]
        return torch.stack(chosen_tokens)

    def _classes(self, tokens: Int[Tensor, "seq"], is_noise: Bool[Tensor, "seq"]) -> list[int | None]:
        """Return the class of each decided token, None for noise."""
        decided = [None if noise else token for token, noise in zip(tokens.tolist(), is_noise.tolist(), strict=True)]
        for place, token in self.limits.spans.items():
            decided[place] = token if decided[place] in (None, token) else -1
        return [None if token is None else self._class(token) for token in decided]

    def _class(self, token: int) -> int:
        class_of = self.automaton.class_of
        return int(class_of[token]) if 0 <= token < len(class_of) else self.automaton.num_classes

    def _weigh(
        self, classes: Sequence[int | None], scores: Mapping[int, Floats], *, is_draw: bool = False
    ) -> tuple[int, int, dict[int, Floats]]:
        """Weigh the completions from each state at each boundary, from the last known position back to the first noise.

        The weight is the log of the best completion's score, or of the sum over completions. Return the state at the
        first noise, its position, and the weights.
        """
        first = classes.index(None) if None in classes else len(classes)
        state = 0
        for known in classes[:first]:
            state = self.automaton.next(state, -1 if known is None else known)
        end = 1 + max((i for i, known in enumerate(classes) if known is not None or i in scores), default=-1)
        beta = {end: np.where(self._fillable(len(classes))[end], 0.0, -np.inf)}
        for i in reversed(range(first, end)):
            beta[i] = self._before(i, beta[i + 1], classes[i], scores.get(i), is_draw=is_draw)
        if beta[first][state] == -np.inf:
            raise ValueError(
                f"no text of {len(classes)} tokens with the {len(classes) - classes.count(None)} given ones satisfies"
                " the constraint. Change the given tokens, the length or the constraint."
            )
        return state, first, beta

    def _before(
        self, boundary: int, after: Floats, known: int | None, scores: Floats | None = None, *, is_draw: bool = False
    ) -> Floats:
        """Weigh the states at a boundary by the weights at the next one and the class, or the scores, between."""
        if known is not None:  # only this class may stand here
            scores = np.where(np.arange(self.automaton.num_classes) == known, 0.0, -np.inf)
        before = self.automaton.before(after, scores, is_sum=is_draw and known is None and scores is not None)
        before[~self._allowed(boundary)] = -np.inf
        return before

    def _allowed(self, boundary: int) -> Bools:
        """Tell the states in which `boundary` tokens may leave the text, given the bounds on its length."""
        allowed = np.ones(self.automaton.num_states, np.bool_)
        allowed[:-2] = self.limits.max_tokens is None or boundary <= self.limits.max_tokens
        allowed[-2] = boundary > self.limits.min_tokens  # the state behind the end token
        return allowed

    @cached_property
    def _fillable(self) -> Callable[[int], Bools]:
        """Tell for each boundary and state whether the rest of a canvas without decided tokens can be completed."""
        return lru_cache(MAX_TAILS)(self._tail)

    def _tail(self, length: int) -> Bools:
        spans = self.limits.spans
        tail = np.full((length + 1, self.automaton.num_states), False)
        tail[length] = self.automaton.is_final & self._allowed(length) & (length >= self.limits.min_tokens)
        after = np.where(tail[length], 0.0, -np.inf)
        for i in reversed(range(length)):
            after = self._before(i, after, self._class(spans[i]) if i in spans else None)
            tail[i] = after == 0
        return tail

    def _class_scores(self, logits: Float[Tensor, "n vocab"], is_draw: bool) -> Float[Tensor, "n classes"]:
        """Reduce logits to one score per class: its largest logit, or for a draw the log of the sum of exponentials."""
        class_of = torch.from_numpy(self.automaton.class_of).to(logits.device)
        logits = logits[:, : len(class_of)].float()
        empty = logits.new_zeros((len(logits), self.automaton.num_classes + 1))
        if is_draw:
            largest = logits.amax(dim=1, keepdim=True).clamp_(min=_LOWEST)
            sums = empty.index_add(1, class_of, (logits - largest).exp_())[:, :-1]
            # One scale for all classes is fast. Where it makes the sum of some class vanish, each class gets its own.
            if (sums > 1e-25).all():  # sync
                return sums.log() + largest
        best = (empty + _LOWEST).scatter_reduce_(1, class_of.expand(len(logits), -1), logits, "amax")
        if is_draw:
            shares = (logits - best.index_select(1, class_of)).exp_()
            # Each sum holds a 1, but for classes that the model rules out altogether.
            best = best + empty.index_add(1, class_of, shares).clamp_(min=1).log_()
        return best[:, :-1]

    def _token(self, token_class: int, rest: float, logits: Float[Tensor, "vocab"], is_draw: bool) -> Int[Tensor, ""]:
        """Pick the best token of a class, or the one on which the draw falls."""
        order, starts = self.automaton.tokens_by_class
        tokens = torch.from_numpy(order[starts[token_class] : starts[token_class + 1]]).to(logits.device)
        inside = logits[tokens].float().clamp(min=_LOWEST)
        if not is_draw:
            return tokens[inside.argmax()]
        ends = (inside - inside.max()).double().exp().cumsum(0)
        return tokens[torch.searchsorted(ends, rest * ends[-1], right=True).clamp(max=len(ends) - 1)]

    def _why_not(self, length: int) -> str:
        """Make the error for a canvas of the wrong length, with lengths that fit if nothing is given."""
        automaton, limits, possible = self.automaton, self.limits, []
        # 0 for the states from which n more tokens lead to an end of the text
        can_end = np.where([*automaton.is_final[:-2], False, False], 0.0, -np.inf)
        for n in range(length + automaton.num_states + 1):
            if can_end[0] == 0 and n >= limits.min_tokens and (limits.max_tokens is None or n <= limits.max_tokens):
                possible.append(n)
            if not (can_end == 0).any() or (len(possible) > 2 and possible[-3] > length):
                break
            can_end = automaton.before(can_end)
        highest = "any number of" if limits.max_tokens is None else limits.max_tokens
        bounds = f" of {limits.min_tokens} to {highest} tokens" if limits != TokenLimits() else ""
        if not possible:
            return f"no text{bounds} in this vocabulary satisfies the constraint. Loosen it."
        if length < possible[0]:
            shortest = f"the shortest text{bounds} that satisfies the constraint has {possible[0]} tokens; got {length}"
            return f"the canvas is too short: {shortest}. Set max_new_tokens to at least {possible[0]}."
        near = ", ".join(str(n) for n in sorted(sorted(possible, key=lambda n: abs(n - length))[:3]))
        misfit = f"no text{bounds} that satisfies the constraint fills a canvas of {length} tokens"
        return f"{misfit}; lengths near it that do are {near}. Use one of them, an end token or other spans."


def _choose(weights: Floats, draw: float | None) -> tuple[int, float]:
    """Take the best, or invert the cumulative distribution; also return where the draw falls in the chosen share."""
    if draw is None:
        return int(weights.argmax()), 0.0
    ends = np.exp(weights - weights.max()).cumsum()
    target = draw * ends[-1]
    chosen = min(int(np.searchsorted(ends, target, side="right")), int(np.searchsorted(ends, ends[-1])))
    begin = ends[chosen - 1] if chosen else 0.0
    return chosen, float(min(max((target - begin) / (ends[chosen] - begin), 0.0), 1.0))
