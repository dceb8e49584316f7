"""The denoiser of thoughts: a transformer over [prompt | clean blocks | noisy blocks | answer].

The mask is `layouts.two_copy_mask` over block numbers: the prompt is block 0, thoughts are blocks 1 ... B in a clean
and in a noisy copy, and the answer comes after them, each of its tokens as a block. So one pass trains every block
given the true blocks before it, and sampling can cache the keys and values of committed blocks.
"""

import math
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from redraft.latent.sequence import DenoiserOutput, KeysValues, LatentInputs, TokenInputs
from redraft.processes.gaussian import GaussianDiffusion

FIXED = {"schedule": "flow", "shift": 1.0, "parametrization": "x0", "answer": "autoregressive", "adapts_times": False}
"""Entries of earlier checkpoints, with the only values that are still supported."""


@no_type_check  # mypy does not know that transformers' __init__ takes any entry
class LatentDenoiserConfig(PreTrainedConfig):
    """Shape, process and limits of a denoiser; saved as its config.json.

    `can_guide`: whether prompts were withheld in its training.
    """

    model_type = "redraft-latent-denoiser"

    vocab_size: int = 64
    prompt_tokens: int = 16
    answer_tokens: int = 0
    max_blocks: int = 2
    num_latents: int = 2
    latent_dim: int = 16
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    weighting: str = "inverse-t"
    smallest_t: float = 0.2
    eos_token_id: int = 1
    stage: str = "denoiser"
    can_guide: bool = True

    @property
    def process(self) -> GaussianDiffusion:
        """The noise the denoiser was trained on."""
        return GaussianDiffusion(weighting=self.weighting, smallest_t=self.smallest_t)

    def latent_positions(self, block: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape latents"]:
        """Return the positions of the latents of blocks, which count from 1; a noisy copy shares its clean one's."""
        first = self.prompt_tokens + (block - 1) * self.num_latents
        return first[..., None] + torch.arange(self.num_latents, device=block.device)

    @property
    def answer_position(self) -> int:
        """The position of the answer's first token."""
        return self.prompt_tokens + self.max_blocks * self.num_latents


class LatentDenoiser(PreTrainedModel):
    """Pre-norm transformer; scale, shift and gate of every layer follow each position's time (adaLN, arXiv 2212.09748).

    The map from time to modulation is shared by all layers, each of which adds a table of its own (arXiv 2310.00426).
    """

    config_class = LatentDenoiserConfig

    def __init__(self, config: LatentDenoiserConfig) -> None:
        super().__init__(config)
        for name, value in FIXED.items():
            if getattr(config, name, value) != value:
                raise ValueError(f"config.json: {name} must be {value!r}; others were removed. Train the model again.")
        if config.hidden_size % (2 * config.num_heads):
            raise ValueError(f"hidden_size must be a multiple of {2 * config.num_heads}; got {config.hidden_size}.")
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.null_prompt = nn.Parameter(0.02 * torch.randn(width))
        self.into = nn.Linear(2 * config.latent_dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulate = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(_Layer(width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(width)
        self.out = nn.Linear(width, config.latent_dim)
        self.stop = nn.Linear(width, 1)
        self.post_init()
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        nn.init.normal_(self.embed.weight, std=0.1)  # it is also the head
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            layer.start(branches=2 * config.num_layers)

    def forward(
        self,
        tokens: TokenInputs,
        latents: LatentInputs,
        mask: Bool[Tensor, "batch 1 queries keys"],
        past: KeysValues | None = None,
    ) -> DenoiserOutput:
        """Run [tokens | latents], in this order of queries; the keys of `past` come before theirs."""
        embedded = torch.where(tokens.is_null[..., None], self.null_prompt, self.embed(tokens.ids))
        hidden = torch.cat([embedded, self.into(torch.cat([latents.z_t, latents.x_0], dim=-1))], dim=1)
        t = torch.cat([torch.zeros_like(tokens.positions, dtype=latents.t.dtype), latents.t], dim=1)
        modulation = self.modulate(self.time(_time_features(t, self.config.hidden_size).to(hidden.dtype)))
        turns = _rotary(
            torch.cat([tokens.positions, latents.positions], dim=1), self.config.hidden_size // self.config.num_heads
        )
        computed: KeysValues = []
        for i, layer in enumerate(self.layers):
            hidden, keys_values = layer(hidden, modulation, turns, mask, None if past is None else past[i])
            computed.append(keys_values)
        hidden = self.norm(hidden)
        split = tokens.ids.shape[1]
        return DenoiserOutput(tokens=hidden[:, :split], latents=hidden[:, split:], keys_values=computed)

    def token_logits(self, hidden: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape vocab"]:
        """Predict answer tokens; the head is the embedding."""
        return F.linear(hidden, self.embed.weight)

    def stop_logit(self, hidden: Float[Tensor, "batch latents width"]) -> Float[Tensor, "batch"]:
        """Return the log-odds that the thoughts end with a block, from its clean states."""
        return self.stop(hidden[:, -1])[:, 0]


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        gates_open = torch.tensor([0.0, 0.0, 1.0]).repeat(2)[:, None]
        self.table = nn.Parameter(gates_open.repeat(1, width))  # shift, scale, gate of attention, then of the MLP

    def start(self, *, branches: int) -> None:
        """Initialise weights by the width (the library's 0.02 is for wider layers) and the number of branches."""
        for linear, sharing in ((self.qkv, 1), (self.up, 1), (self.proj, branches), (self.down, branches)):
            nn.init.normal_(linear.weight, std=(sharing * linear.in_features) ** -0.5)

    def forward(
        self, x: Tensor, modulation: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor, past: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation + self.table.flatten()).chunk(6, dim=-1)
        attended, keys_values = self._attend(_norm(x) * (1 + scale_1) + shift_1, turns, mask, past)
        x = x + gate_1 * attended
        return x + gate_2 * self.down(F.gelu(self.up(_norm(x) * (1 + scale_2) + shift_2))), keys_values

    def _attend(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor, past: Any) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_width)).permute(2, 0, 3, 1, 4)  # (B, H, S, W)
        q, k = _turn(q, turns), _turn(k, turns)
        new = (k, v)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2)), new


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of 1000 t at geometric frequencies; float32."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = 1000 * t.float()[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _rotary(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (batch, 1, seq, width) that turn queries and keys by their positions (RoPE, 2104.09864)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = (positions[..., None] * rates).repeat(1, 1, 2)[:, None]
    return angles.cos(), angles.sin()


def _turn(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * turns[0].to(x) + torch.cat([-second, first], dim=-1) * turns[1].to(x)
