"""Where constraints meet the loop: the proposals of a step become one completion of each row."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.constraints.completion import CompiledConstraint
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.propose import Proposal


@dataclass(frozen=True, kw_only=True)
class Constrained:
    """A constraint on the new text of every row: what was not given, up to `num_tokens` tokens."""

    compiled: CompiledConstraint
    num_tokens: int | None = None
    at_start: CompiledConstraint | None = None
    """Where no text stands before the new one, if that makes a difference."""
    silent: frozenset[int] = frozenset()
    """Tokens without a text."""

    def check(self, canvas: Canvas) -> None:
        """Raise ValueError with the reason if a row cannot satisfy the constraint."""
        for row, (text, compiled) in enumerate(self._rows(canvas)):
            if len(text) and int(text[-1] - text[0]) != len(text) - 1:  # sync: before the first step
                raise ValueError(f"a constraint needs new text in one piece; got several in row {row}. Use one hole.")
            compiled.check(canvas.tokens[row, text], canvas.is_noise[row, text])

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
        """Propose tokens of which every subset may be committed, and at a temperature, if asked, the best ones too.

        Drafts are proposed as they are: an edit of some drafts and not of others could break what holds; to make a
        draft noise again breaks nothing.
        """
        num_columns = canvas.tokens.shape[1]
        row_of, column = where // num_columns, where % num_columns
        is_noise = canvas.is_noise[row_of, column]
        drafts = torch.where(is_noise, proposal.x_0, canvas.tokens[row_of, column])  # and what no constraint speaks of
        rows = list(self._rows(canvas))

        def completed(logits: Float[Tensor, "n vocab"], temperature: float) -> Int[Tensor, "n"]:
            x_0 = drafts.clone()
            for row, (text, compiled) in enumerate(rows):
                mine = ((row_of == row) & torch.isin(column, text) & is_noise).nonzero()[:, 0]
                if len(mine):
                    known = canvas.tokens[row, text], canvas.is_noise[row, text]
                    numbers = None if u is None else u[mine]
                    x_0[mine] = compiled.complete(
                        *known, column[mine] - text[0], logits[mine], temperature=temperature, u=numbers
                    )
            return x_0

        best = completed(proposal.logits, 0.0) if with_best or temperature == 0 else None
        if best is not None and temperature == 0:
            x_0 = best
        else:
            x_0 = completed(_cut(proposal.logits.float() / temperature, top_k=top_k, top_p=top_p), 1.0)
        return replace(proposal, x_0=x_0, confidence=proposal.probability_of(x_0), best=best)

    def _rows(self, canvas: Canvas) -> Iterator[tuple[Int[Tensor, "new"], CompiledConstraint]]:
        """Return the places of each row's new text, and what holds for it."""
        for tokens, status in zip(canvas.tokens, canvas.status, strict=True):
            text = ((status != Status.GIVEN) & (status != Status.PAD)).nonzero()[: self.num_tokens, 0]
            before = tokens[: text[0]].tolist() if len(text) and self.at_start else []  # sync: the walk is on the CPU
            yield text, self.at_start if self.at_start and self.silent.issuperset(before) else self.compiled


def _cut(logits: Float[Tensor, "n vocab"], *, top_k: int | None, top_p: float | None) -> Float[Tensor, "n vocab"]:
    """Rule out all but the k best tokens, and then all that lie beyond the first p of the mass."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(mass.cumsum(dim=-1) - mass >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, index, ordered)
    return logits
