"""The cache of committed thoughts, and the answers that the sampling loop decodes after it."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.latent.denoiser import LatentDenoiser
from redraft.latent.objective import answer_input
from redraft.latent.sequence import KeysValues, LatentInputs, TokenInputs
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings
from redraft.sampling.batch import denoise
from redraft.sampling.canvas import Canvas, Status
from redraft.sampling.policies import Blocks
from redraft.sampling.sampler import Sampler


@dataclass
class ThoughtCache:
    """Keys and values of what is committed, and which of them each row may see."""

    keys_values: KeysValues
    is_valid: Bool[Tensor, "rows keys"]

    def add(self, keys_values: KeysValues, is_valid: Bool[Tensor, "rows new"]) -> None:
        """Append new positions and which rows may see them."""
        pairs = zip(self.keys_values, keys_values, strict=True)
        self.keys_values = [(torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)) for (k, v), (new_k, new_v) in pairs]
        self.is_valid = torch.cat([self.is_valid, is_valid], dim=1)

    def rows(self, index: Int[Tensor, "n"] | slice) -> "ThoughtCache":
        """Take some rows."""
        return ThoughtCache([(k[index], v[index]) for k, v in self.keys_values], self.is_valid[index])

    def mask(self, new: Bool[Tensor, "queries queries"]) -> Bool[Tensor, "rows 1 queries keys"]:
        """All that is valid in the cache, and `new` among the new positions."""
        seen = self.is_valid[:, None].expand(-1, len(new), -1)
        return torch.cat([seen, new.expand(len(seen), -1, -1)], dim=2)[:, None]


@dataclass(frozen=True, kw_only=True)
class AnswerDenoiser(Denoiser):
    """The answer decoder behind the interface of `Denoiser`: answers in, logits out, given the thoughts in `cache`.

    The rows of a query are those of the cache: each decides one token in a step, so that all end together.
    """

    cache: ThoughtCache

    def __call__(self, query: Query, *, wrapped: Any = None) -> Float[Tensor, "n vocab"]:
        """Predict positions of answers, each from the tokens before it."""
        rows, length = query.input_ids.shape
        width = int((query.where % length).max()) + 1  # sync: all after the position that is asked for is noise
        ids, positions = answer_input(self.model, query.input_ids[:, :width])
        tokens = TokenInputs(ids=ids, positions=positions, is_null=torch.zeros_like(ids, dtype=torch.bool))
        causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        output = self.model(tokens, no_latents(rows, self.model), self.cache.mask(causal), self.cache.keys_values)
        return self.model.token_logits(output.tokens[query.where // length, query.where % length])


def write_answers(model: LatentDenoiser, cache: ThoughtCache) -> Int[Tensor, "rows answer"]:
    """Write the likeliest answers, token by token."""
    rows, count, device = len(cache.is_valid), model.config.answer_tokens, model.device
    status = torch.full((rows, count), int(Status.NOISE), dtype=torch.uint8, device=device)
    tokens = torch.zeros((rows, count), dtype=torch.int64, device=device)
    canvas = Canvas(tokens=tokens, status=status, confidence=torch.zeros((rows, count), device=device))
    # Uniform noise: with noise of mask tokens, the mask token id would be excluded from the answers.
    sampler = Sampler(frontier=Blocks(size=1), noise="uniform")
    settings = DiffusionSettings(mask_token_id=0, process="autoregressive", block_size=1, shift_logits=True)
    decoder = AnswerDenoiser(model=model, settings=settings, cache=cache)
    for step in denoise(decoder, canvas, sampler, row_keys=torch.arange(rows, device=device)):
        canvas = step.canvas
    return canvas.tokens


def no_tokens(rows: int, device: torch.device) -> TokenInputs:
    """Return inputs without tokens."""
    empty = torch.zeros(rows, 0, dtype=torch.int64, device=device)
    return TokenInputs(ids=empty, positions=empty, is_null=empty.bool())


def no_latents(rows: int, model: LatentDenoiser) -> LatentInputs:
    """Return inputs without latents."""
    empty = torch.zeros(rows, 0, model.config.latent_dim, dtype=model.dtype, device=model.device)
    return LatentInputs(z_t=empty, x_0=empty, t=empty[..., 0], positions=empty[..., 0].long())
