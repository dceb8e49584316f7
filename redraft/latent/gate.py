"""The gate of an autoencoder: how many blocks come back exactly, clean and from noised latents."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from redraft.latent.autoencoder import TextAutoencoder

GATE = {0.0: 0.99, 0.25: 0.95}
"""Share of blocks that must come back exactly, by relative noise on the latents."""
NOISE_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75)


@torch.no_grad()
def reconstruction(
    model: TextAutoencoder,
    ids: Int[Tensor, "blocks tokens"],
    mask: Bool[Tensor, "blocks tokens"],
    *,
    noise: float,
    generator: torch.Generator,
) -> float:
    """Return the share of blocks that come back exactly from latents with this relative noise."""
    exact = []
    for part, part_mask in zip(ids.split(512), mask.split(512), strict=True):
        latents = model.encode_normalized(part, part_mask)
        draws = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
        exact.append((model.decode(latents + noise * draws) == part).all(1))
    return float(torch.cat(exact).float().mean())


def measure_gate(
    model: TextAutoencoder, ids: Int[Tensor, "blocks tokens"], mask: Bool[Tensor, "blocks tokens"]
) -> dict[str, float]:
    """Measure `reconstruction` at every noise level, as config.json keeps it: {"0.25": 0.98, ...}."""
    generator = torch.Generator().manual_seed(0)
    return {f"{level:g}": reconstruction(model, ids, mask, noise=level, generator=generator) for level in NOISE_LEVELS}


def gate_failures(gate: dict[str, float] | None) -> list[str]:
    """Say which bounds of the gate a measurement misses; all of them where nothing was measured."""
    shares = {float(level): share for level, share in (gate or {}).items()}
    return [
        f"{100 * shares.get(level, 0.0):.1f} % of blocks exact at noise {level:g} (wanted {100 * bound:g} %)"
        for level, bound in GATE.items()
        if not shares.get(level, 0.0) >= bound  # a share that is NaN fails, too
    ]
