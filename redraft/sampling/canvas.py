"""The canvas: tokens and what each of them is."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Status(IntEnum):
    """What a position is. The token does not say it: a mask token in a prompt is an ordinary token."""

    GIVEN = 0
    """Prompt or infilling context; never changes."""
    NOISE = 1
    """Not decided yet."""
    DRAFT = 2
    """Shown but not decided: may still change."""
    COMMITTED = 3
    """Decided by the sampler."""
    PAD = 4
    """Fills a batch of rows of unequal length; seen by nobody."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A batch of rows, padded on the right."""

    tokens: Int[Tensor, "batch seq"]
    status: UInt8[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]
    """Probability of each placed token when it was placed; 0 where the sampler placed none."""

    @property
    def is_noise(self) -> Bool[Tensor, "batch seq"]:
        """Positions that are not decided yet."""
        return self.status == Status.NOISE

    @property
    def is_draft(self) -> Bool[Tensor, "batch seq"]:
        """Positions that are shown but may still change."""
        return self.status == Status.DRAFT

    def place(
        self,
        where: Bool[Tensor, "batch seq"],
        tokens: Int[Tensor, "batch seq"],
        confidence: Float[Tensor, "batch seq"],
        *,
        status: Status = Status.COMMITTED,
    ) -> "Canvas":
        """Put tokens down, decided or as drafts."""
        return Canvas(
            tokens=torch.where(where, tokens, self.tokens),
            status=torch.where(where, int(status), self.status),
            confidence=torch.where(where, confidence, self.confidence),
        )

    def reopen(self, where: Bool[Tensor, "batch seq"], noise: Int[Tensor, "batch seq"]) -> "Canvas":
        """Turn positions back into noise."""
        return self.place(where, noise, torch.zeros_like(self.confidence), status=Status.NOISE)

    def settle(self, where: Bool[Tensor, "batch seq"]) -> "Canvas":
        """Commit the drafts among these positions as they are."""
        return self.place(where & self.is_draft, self.tokens, self.confidence)

    def columns(self, at: Int[Tensor, "batch width"]) -> "Canvas":
        """Take some columns of each row."""
        return Canvas(**{name: values.gather(1, at) for name, values in vars(self).items()})

    def with_columns(self, at: Int[Tensor, "batch width"], part: "Canvas") -> "Canvas":
        """Replace some columns of each row."""
        return Canvas(**{name: values.scatter(1, at, getattr(part, name)) for name, values in vars(self).items()})


def build_canvas(
    rows: list[Tensor], is_noise: list[Tensor], *, noise_token_id: int, device: torch.device | str = "cpu"
) -> Canvas:
    """Lay rows of unequal length into one canvas; positions of `is_noise` become noise, the others are given."""
    pairs = list(zip(rows, is_noise, strict=True))
    tokens = [torch.where(noise, noise_token_id, row) for row, noise in pairs]
    status = [torch.where(noise, int(Status.NOISE), int(Status.GIVEN)).to(torch.uint8) for _, noise in pairs]
    whole = pad_sequence(tokens, batch_first=True, padding_value=noise_token_id).to(device)
    padded = pad_sequence(status, batch_first=True, padding_value=int(Status.PAD)).to(device)
    return Canvas(tokens=whole, status=padded, confidence=torch.zeros(whole.shape, device=device))
