"""Constraints in the loop: the proposals of a step become one completion of each row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.propose import Proposal


class Completion(Protocol):
    """What the sampler needs of a constraint on one text; `constraints.completion.CompiledConstraint` is one."""

    def check(self, tokens: Tensor, is_noise: Tensor) -> None:
        """Raise ValueError with the reason if no completion of the (seq,) new tokens satisfies the constraint."""

    def complete(self, tokens: Tensor, is_noise: Tensor, where: Tensor, logits: Tensor, *, u: Tensor | None) -> Tensor:
        """Propose tokens (n,) at the places (n,): the most probable that fit together, or a draw by u (n,)."""


@dataclass(frozen=True, kw_only=True)
class TextConstraint:
    """A constraint on the new text of every row: what was not given, up to `num_tokens` tokens."""

    completion: Callable[[Int[Tensor, "given"]], Completion]
    """The constraint on a text, given the tokens before it: some tokenizers drop a space at the start."""
    num_tokens: int | None = None

    def check(self, canvas: Canvas) -> None:
        """Raise ValueError with the reason if a row cannot satisfy the constraint."""
        for row, (text, completion) in enumerate(self._rows(canvas)):
            if len(text) and int(text[-1] - text[0]) != len(text) - 1:  # sync: before the first step
                raise ValueError(f"a constraint needs new text in one piece; got several in row {row}. Use one hole.")
            completion.check(canvas.tokens[row, text], canvas.is_noise[row, text])

    def __call__(
        self,
        proposal: Proposal,
        canvas: Canvas,
        where: Int[Tensor, "n"],
        *,
        u: Float[Tensor, "n"] | None,
        temperature: float,
        top_k: int | None = None,
        top_p: float | None = None,
        with_best: bool = False,
    ) -> Proposal:
        """Propose tokens of which every subset may be committed; `with_best` adds the most probable to those drawn.

        Drafts are proposed unchanged: an edit of some drafts and not of others could break the constraint. Turning a
        draft back into noise cannot.
        """
        row_of, column = torch.unravel_index(where, canvas.tokens.shape)
        is_noise = canvas.is_noise[row_of, column]
        x_0 = torch.where(
            is_noise, proposal.x_0, canvas.tokens[row_of, column]
        )  # drafts, and places outside of the text
        best = x_0.clone() if with_best or u is None else None
        logits = None if u is None else _cut(proposal.logits.float() / temperature, top_k=top_k, top_p=top_p)
        for row, (text, completion) in enumerate(self._rows(canvas)):
            mine = ((row_of == row) & torch.isin(column, text) & is_noise).nonzero()[:, 0]
            state = canvas.tokens[row, text], canvas.is_noise[row, text], column[mine] - text[:1]
            if len(mine) and best is not None:
                best[mine] = completion.complete(*state, proposal.logits[mine], u=None)
            if len(mine) and u is not None and logits is not None:
                x_0[mine] = completion.complete(*state, logits[mine], u=u[mine])
        x_0 = best if u is None and best is not None else x_0
        return replace(proposal, x_0=x_0, confidence=proposal.probability_of(x_0), best=best)

    def _rows(self, canvas: Canvas) -> Iterator[tuple[Int[Tensor, "new"], Completion]]:
        """Yield the positions of each row's new text, and the constraint on it."""
        for tokens, status in zip(canvas.tokens, canvas.status, strict=True):
            text = ((status != Status.GIVEN) & (status != Status.PAD)).nonzero()[: self.num_tokens, 0]
            yield text, self.completion(tokens[: text[0]] if len(text) else tokens)


def _cut(logits: Float[Tensor, "n vocab"], *, top_k: int | None, top_p: float | None) -> Float[Tensor, "n vocab"]:
    """Set all but the k largest logits to -inf, and then all outside of the nucleus of mass p."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        logits = logits.scatter(-1, index, ordered.masked_fill(mass.cumsum(dim=-1) - mass >= top_p, -torch.inf))
    return logits
