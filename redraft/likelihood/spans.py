"""Masked spans of texts, and how whole rows of them run through the model; the head runs at masked tokens alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.likelihood.masks import Masks
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings

TOKENS_PER_FORWARD = {"cpu": 2048}  # few, as a CPU's caches are small; other devices get more


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedSpan:
    """The last tokens of a text, under masks; all tokens before them are given. Compared by identity."""

    tokens: Int[Tensor, "seq"]
    masks: Masks
    context_len: int
    """Tokens that guidance hides; earlier blocks of the continuation stay."""

    @property
    def start(self) -> int:
        """Position of the first token of the span."""
        return len(self.tokens) - self.masks.is_masked.shape[1]

    def inputs(self, sample: int, settings: DiffusionSettings, *, hides_context: bool) -> Int[Tensor, "seq"]:
        """Return the text under the mask of a sample, as the model gets it; guidance hides the context.

        A causal model gets the tokens themselves: its causal attention hides them. Only the first token of a text,
        which has no left neighbour, is predicted from a mask token.
        """
        positions = torch.arange(len(self.tokens))
        is_hidden = self.is_scored(sample)
        if settings.is_causal:
            is_hidden = is_hidden & (positions == 0)
        if hides_context:
            is_hidden = is_hidden | (positions < self.context_len)
        return torch.where(is_hidden, settings.mask_token_id, self.tokens)

    def is_scored(self, sample: int) -> Bool[Tensor, "seq"]:
        """Mark the positions that a sample masks."""
        return F.pad(self.masks.is_masked[sample], (self.start, 0))


def tokens_per_forward(denoiser: Denoiser) -> int:
    """Bound the tokens of one forward pass."""
    return TOKENS_PER_FORWARD.get(denoiser.device.type, 16384)


def at_least_float32(logits: Tensor) -> Tensor:
    """Widen half precision, and keep float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


Sample = tuple[MaskedSpan, int]
"""A span and the number of one of its masks."""


@dataclass(frozen=True)
class WholeRows:
    """Runs each sample as a row of its own, padded to the longest."""

    denoiser: Denoiser
    spans: Sequence[MaskedSpan]
    hides_context: bool

    @property
    def max_tokens(self) -> int:
        """Bound of the tokens in one forward pass, with padding."""
        return tokens_per_forward(self.denoiser)

    def width(self, span: MaskedSpan) -> int:
        """Count the tokens of a row."""
        return len(span.tokens)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> Float[Tensor, "n vocab"]:
        """Predict the masked tokens, one sample after the other."""
        device, settings, pad = self.denoiser.device, self.denoiser.settings, torch.nn.utils.rnn.pad_sequence
        inputs = [span.inputs(sample, settings, hides_context=self.hides_context) for span, sample in samples]
        is_scored = pad([span.is_scored(sample) for span, sample in samples], batch_first=True)
        segment_ids = None
        if len({len(row) for row in inputs}) > 1:
            segment_ids = pad([torch.ones_like(row) for row in inputs], batch_first=True).to(device)
        query = Query(
            input_ids=pad(inputs, batch_first=True).to(device),
            where=is_scored.flatten().nonzero()[:, 0].to(device),
            segment_ids=segment_ids,
        )
        return at_least_float32(self.denoiser(query))
