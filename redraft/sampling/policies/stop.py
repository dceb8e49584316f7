"""Stopping: which rows are done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from redraft.sampling.canvas import Canvas, Status

Stop = Callable[[Canvas, Canvas], Bool[Tensor, "batch"]]
"""(canvas, tail) -> which rows are done. Only decided tokens count: drafts may still change.

The tail holds the columns of each row that this step could decide, and the next undecided position behind them.
Everything before these columns was decided in earlier steps, and the stop has looked at it then.
"""


def filled(canvas: Canvas, tail: Canvas) -> Bool[Tensor, "batch"]:
    """End a row when everything is decided."""
    return ~(tail.is_noise | tail.is_draft).any(dim=1)


@dataclass(frozen=True, kw_only=True)
class EndOfSequence:
    """A row is done when it is filled, or when a committed end token has everything before it decided."""

    eos_token_ids: tuple[int, ...]

    def __call__(self, canvas: Canvas, tail: Canvas) -> Bool[Tensor, "batch"]:
        has_all_before = _has_all_before(tail)
        is_eos = torch.zeros_like(has_all_before)
        for eos_token_id in self.eos_token_ids:
            is_eos |= tail.tokens == eos_token_id
        is_end = is_eos & (tail.status == Status.COMMITTED) & has_all_before
        return is_end.any(dim=1) | has_all_before.all(dim=1)


@dataclass(frozen=True, kw_only=True)
class Enough:
    """A row is done when its first `num_tokens` new tokens are decided, or by another rule.

    What follows them in the canvas is there for the model to look at.
    """

    num_tokens: int
    otherwise: Stop

    def __call__(self, canvas: Canvas, tail: Canvas) -> Bool[Tensor, "batch"]:
        num_new = ((canvas.status == Status.COMMITTED) & _has_all_before(canvas)).sum(dim=1)
        return (num_new >= self.num_tokens) | self.otherwise(canvas, tail)


@dataclass(frozen=True, kw_only=True)
class StopStrings:
    """A row is done when the decided text from its first new token on holds one of the strings, or by another rule."""

    strings: tuple[str, ...]
    decode: Callable[[Int[Tensor, "given"], Int[Tensor, "new"]], Sequence[str]]
    """The texts of new tokens after those given: without special tokens, and with them."""
    otherwise: Stop

    def __call__(self, canvas: Canvas, tail: Canvas) -> Bool[Tensor, "batch"]:
        is_new = (canvas.status == Status.COMMITTED) & _has_all_before(canvas)
        is_given = canvas.status == Status.GIVEN
        has_string = []
        for tokens, given, new in zip(canvas.tokens.cpu(), is_given.cpu(), is_new.cpu(), strict=True):  # sync: text
            texts = self.decode(tokens[given], tokens[new])
            has_string.append(any(string in text for text in texts for string in self.strings))
        return torch.tensor(has_string, device=canvas.tokens.device) | self.otherwise(canvas, tail)


def _has_all_before(canvas: Canvas) -> Bool[Tensor, "batch seq"]:
    """Mark the positions up to which everything is decided."""
    return ~(canvas.is_noise | canvas.is_draft).long().cummax(dim=1).values.bool()
