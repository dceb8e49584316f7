"""What has been committed, as keys and values, and the answers that are read off it."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from redraft.latent.denoiser import LatentDenoiser
from redraft.latent.objective import masked_process
from redraft.latent.sequence import KeysValues, Latents, Tokens


@dataclass
class Cache:
    """Keys and values of what is committed, and which of them each row may see."""

    keys_values: KeysValues = field(default_factory=list)
    is_valid: Tensor | None = None

    def add(self, keys_values: KeysValues, is_valid: Bool[Tensor, "rows new"]) -> None:
        """Append new positions and which rows may see them."""
        if self.is_valid is None:
            self.keys_values, self.is_valid = keys_values, is_valid
            return
        pairs = zip(self.keys_values, keys_values, strict=True)
        self.keys_values = [(torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)) for (k, v), (new_k, new_v) in pairs]
        self.is_valid = torch.cat([self.is_valid, is_valid], dim=1)

    def __len__(self) -> int:
        """Count the rows."""
        assert self.is_valid is not None
        return len(self.is_valid)

    def rows(self, index: Int[Tensor, "n"] | slice) -> "Cache":
        """Take some rows."""
        assert self.is_valid is not None
        return Cache([(k[index], v[index]) for k, v in self.keys_values], self.is_valid[index])

    def mask(self, own: Bool[Tensor, "rows queries queries"]) -> Bool[Tensor, "rows 1 queries keys"]:
        """All that is valid in the cache, and `own` among the new positions."""
        assert self.is_valid is not None
        seen = self.is_valid[:, None].expand(-1, own.shape[1], -1)
        return torch.cat([seen, own], dim=2)[:, None]


def write_autoregressive(model: LatentDenoiser, cache: Cache) -> Int[Tensor, "rows answer"]:
    """Write the likeliest answer token by token."""
    rows, device = len(cache), model.device
    ids = torch.full((rows, 1), model.config.eos_token_id, dtype=torch.int64, device=device)
    own = torch.ones(rows, 1, 1, dtype=torch.bool, device=device)
    for index in range(model.config.answer_tokens):
        tokens = _answer_tokens(model, ids[:, -1:], first=index)
        hidden = model(tokens, no_latents(rows, model), cache.mask(own), cache.keys_values)
        cache.add(hidden.keys_values, own[:, 0])
        ids = torch.cat([ids, model.token_logits(hidden.tokens).argmax(-1)], dim=1)
    return ids[:, 1:]


def write_masked(model: LatentDenoiser, cache: Cache) -> Int[Tensor, "rows answer"]:
    """Write the likeliest answer, the surest position first."""
    rows, count, device = len(cache), model.config.answer_tokens, model.device
    ids = masked_process(model).prior(torch.zeros(rows, count, device=device))
    own = torch.ones(rows, count, count, dtype=torch.bool, device=device)
    is_open = torch.ones(rows, count, dtype=torch.bool, device=device)
    for _ in range(count):
        tokens = _answer_tokens(model, ids, first=0)
        hidden = model(tokens, no_latents(rows, model), cache.mask(own), cache.keys_values).tokens
        logits = model.token_logits(hidden).float()
        logits[..., model.config.mask_token_id] = -torch.inf
        sure, best = logits.softmax(-1).max(-1)
        surest = sure.masked_fill(~is_open, -1).argmax(1, keepdim=True)
        ids = ids.scatter(1, surest, best.gather(1, surest))
        is_open = is_open.scatter(1, surest, False)
    return ids


def _answer_tokens(model: LatentDenoiser, ids: Tensor, *, first: int) -> Tokens:
    positions = model.config.answer_position + first + torch.arange(ids.shape[1], device=ids.device)
    return Tokens(ids=ids, positions=positions.expand_as(ids), is_null=torch.zeros_like(ids, dtype=torch.bool))


def no_tokens(rows: int, device: torch.device) -> Tokens:
    """Stand for no tokens."""
    empty = torch.zeros(rows, 0, dtype=torch.int64, device=device)
    return Tokens(ids=empty, positions=empty, is_null=empty.bool())


def no_latents(rows: int, model: LatentDenoiser) -> Latents:
    """Stand for no latents."""
    empty = torch.zeros(rows, 0, model.config.latent_dim, dtype=model.dtype, device=model.device)
    return Latents(z_t=empty, x_0=empty, t=empty[..., 0], positions=empty[..., 0].long())
