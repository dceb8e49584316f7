"""Samplers: a combination of policies, and how tokens are drawn."""

from dataclasses import dataclass, field
from typing import Literal

from redraft.errors import check_count, check_types
from redraft.layouts import Layout
from redraft.models.denoiser import Denoiser
from redraft.sampling import policies
from redraft.sampling.budget import Budget
from redraft.sampling.caching import ApproximatePlanner, ExactPlanner, Planner
from redraft.sampling.constrain import TextConstraint
from redraft.sampling.guidance import Guide

CacheKind = Literal["none", "exact", "prefix", "dual"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A combination of policies, and how tokens are drawn."""

    steps: int | None = None
    """Denoising steps for a whole row, shared evenly by its blocks (rounded up); None: one for each of its tokens."""
    steps_per_block: int | None = None
    """Steps for each block instead."""
    frontier: policies.Frontier = field(default_factory=policies.WholeCanvas)
    score: policies.Score = field(default_factory=policies.Confidence)
    unmask: policies.Unmask = field(default_factory=policies.Quota)
    revise: policies.Revise | None = None
    stop: policies.Stop = field(default_factory=policies.Filled)
    cache: CacheKind = "none"
    refresh: int | None = None
    """Steps after which an approximate cache is filled anew inside a block; by default only when a block opens."""
    layout: Layout | None = None
    """Attention; by default the model's own."""
    is_grid_from_prompt: bool = False
    """Whether the layout's blocks begin at each row's prompt end instead of position 0 (BD3LM)."""
    noise: Literal["mask", "uniform"] = "mask"
    """What noise looks like: the mask token, or any token of the vocabulary."""
    cfg_scale: float = 0.0
    """Classifier-free guidance; 0 for none."""
    budget: Budget = field(default_factory=Budget)
    guides: tuple[Guide, ...] = ()
    """Changes to the logits before the draw: rewards, logits processors, one's own."""
    constraint: TextConstraint | None = None
    """What the new text must be, whatever is decided in whatever order."""
    anneal: policies.Anneal | None = None
    """What the logits are divided by as a block goes on; `temperature` divides the draw alone, after it."""
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_count("steps", self.steps)
        check_count("steps_per_block", self.steps_per_block)
        if self.temperature < 0:
            raise ValueError(
                f"temperature must not be negative; got {self.temperature}. Use 0 for the likeliest token."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a share of the mass in (0, 1]; got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {self.top_k}. Leave it out for the whole vocabulary.")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh must be at least 1 step; got {self.refresh}.")

    def planner(self, denoiser: Denoiser) -> Planner | None:
        """Choose how keys and values are kept. Raises ValueError for a cache that the attention does not allow."""
        layout, shift = self.layout or denoiser.settings.layout, denoiser.settings.shift_logits
        if self.cache == "none":
            return None
        if self.cache == "exact":
            if layout.block_size is None:
                raise ValueError(
                    "cache 'exact' needs block-causal attention, and this model attends to everything. Use 'prefix' "
                    "or 'dual' (approximate), or 'none'."
                )
            return ExactPlanner(layout=layout, shift=shift)
        if layout.block_size is not None:
            raise ValueError(
                f"cache {self.cache!r} approximates full attention, and this model is block-causal. Use 'exact'."
            )
        return ApproximatePlanner(is_dual=self.cache == "dual", shift=shift, refresh=self.refresh)
