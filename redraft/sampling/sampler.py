"""Samplers: a combination of policies, and how tokens are drawn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from redraft.layouts import Layout
from redraft.models.settings import DiffusionSettings
from redraft.sampling import policies
from redraft.sampling.config import SamplingConfig, Share
from redraft.sampling.constrain import TextConstraint
from redraft.sampling.guidance import Guide
from redraft.sampling.presets import Preset, preset_from_name
from redraft.settings import Count, Natural, NonNegative, Settings


@dataclass(frozen=True, kw_only=True)
class Speculation(Settings):
    """How a causal model drafts the tokens that it then checks (`sampling.speculate`)."""

    num_drafts: Count
    source: Literal["every", "ahead", "lookup"] = "every"
    """every: masks after each number of drafts that may be accepted. ahead: masks after all drafts; where some were not
    accepted, the next round has none. lookup: what stood after the last tokens when they occurred before."""

    @property
    def num_groups(self) -> int:
        """Places from which masks draft."""
        return {"every": self.num_drafts + 1, "ahead": 1, "lookup": 0}[self.source]

    @property
    def num_asked(self) -> int:
        """Positions of a row that the head predicts in a forward: a run, then the drafts from each place."""
        return 1 + self.num_drafts + self.num_groups * self.num_drafts


@dataclass(frozen=True, kw_only=True)
class Sampler(Settings):
    """A combination of policies, and how tokens are drawn."""

    steps: Count | None = None
    """Denoising steps for a whole row, shared evenly by its blocks (rounded up); None: one for each of its tokens."""
    steps_per_block: Count | None = None
    """Steps for each block instead."""
    forwards: Count | None = None
    """Largest number of forwards. Every step commits at least its share of what is left, whatever the policies say."""
    frontier: policies.Frontier = field(default_factory=policies.Blocks)
    score: policies.Score = policies.confidence
    unmask: policies.Unmask = field(default_factory=policies.Quota)
    revise: policies.Revise | None = None
    stop: policies.Stop = policies.filled
    cache: Literal["none", "exact", "prefix", "dual"] = "none"
    layout: Layout | None = None
    """Attention; by default the model's own."""
    is_grid_from_prompt: bool = False
    """Whether the layout's blocks begin at each row's prompt end instead of position 0 (BD3LM)."""
    noise: Literal["mask", "uniform"] = "mask"
    """What noise looks like: the mask token, or any token of the vocabulary."""
    cfg_scale: float = 0.0
    """Classifier-free guidance; 0 for none."""
    guides: tuple[Guide, ...] = ()
    """Changes to the logits before the draw: rewards, logits processors, your own."""
    constraint: TextConstraint | None = None
    """What the new text must be, in whatever order its tokens are committed."""
    anneal: Callable[[policies.Window], Float[Tensor, "batch"]] | None = None
    """Divisor of each row's logits, step by step. Everything sees the result; `temperature` affects the draw alone."""
    temperature: NonNegative = 0.0
    top_p: Share | None = None
    top_k: Count | None = None
    lookahead: Natural = 0
    """Positions behind the text that its last step may look at."""
    speculation: Speculation | None = None
    """Decide several tokens of a causal model in one forward: those that its own drafts foretold."""
    num_listed: Natural = 0
    """Likeliest tokens that a step lists for each token that it places."""

    def layout_on(self, settings: DiffusionSettings) -> Layout:
        """Return the attention of its forwards: its own, or the one that the model was trained with."""
        return self.layout or settings.layout

    def kind_on(self, settings: DiffusionSettings) -> object:
        """Name what rows have in common that share forwards and slots."""
        return self.layout_on(settings), self.cache, bool(self.cfg_scale), self.speculation

    @property
    def needs_all_steps(self) -> bool:
        """Whether nothing in a block is final before its last step."""
        return self.revise is not None and self.revise.needs_all_steps


def build_sampler(
    config: SamplingConfig,
    settings: DiffusionSettings,
    *,
    eos_token_ids: tuple[int, ...] = (),
    decode: Callable[[Any, Any], Sequence[str]] | None = None,
) -> Sampler:
    """Build the combination of policies for a model. `decode` gives the texts that stop strings are looked for in."""
    preset, chosen = preset_from_name(config.preset), config.resolved()
    forwards = config.forwards
    if config.budget is not None:
        forwards = max(1, round(config.budget * config.max_new_tokens))
    frontier, layout = _blocks_and_layout(preset, config, settings)
    stop: policies.Stop = policies.filled
    if config.stop is not None and eos_token_ids:
        stop = policies.EndOfSequence(eos_token_ids=eos_token_ids)
    if isinstance(config.stop, tuple) and decode is not None:
        stop = policies.StopStrings(strings=config.stop, decode=decode, otherwise=stop)
    fields: dict[str, Any] = {"frontier": frontier, "score": policies.confidence} | preset.build(policies, chosen)
    if chosen.alg_temperature:
        fields["score"] = policies.GumbelScore(score=fields["score"], temperature=chosen.alg_temperature)
    cache = chosen.cache or "auto"
    if cache == "auto":
        cache = "none" if layout.block_size is None else "exact"
    return Sampler(
        steps=config.steps or forwards or config.max_new_tokens,
        steps_per_block=chosen.steps_per_block,
        forwards=forwards,
        stop=stop,
        cache=cache,
        layout=layout,
        speculation=_speculation(preset, config, settings),
        lookahead=frontier.in_flight - 1 if preset.blocks == "window" else 0,
        is_grid_from_prompt=preset.blocks == "prompt",
        cfg_scale=config.cfg_scale,
        temperature=chosen.temperature or 0.0,
        top_p=config.top_p,
        top_k=config.top_k,
        **fields,
    )


def _speculation(preset: Preset, config: SamplingConfig, settings: DiffusionSettings) -> Speculation | None:
    """Choose how many tokens are drafted. Raises ValueError for a model that cannot draft so many, or at all."""
    if preset.drafts is None:
        return None
    if config.cfg_scale or config.cache not in (None, "auto", "exact"):
        raise ValueError(
            f"preset {config.preset!r} needs the exact cache and no guidance; got cache={config.cache!r} and "
            f"cfg_scale={config.cfg_scale}. Leave them out."
        )
    num_drafts, block_size = config.resolved().block_size or 1, settings.block_size or 1
    if preset.drafts == "lookup":
        return Speculation(num_drafts=num_drafts, source="lookup")
    most = block_size - 1  # the first token of a block is the text's own
    if settings.is_autoregressive or settings.layout.has_order or most < 1:
        raise ValueError(
            f"preset {config.preset!r} needs a model that drafts blocks after a causal context, within full or causal; "
            "this one does not. Use preset 'lookup', whose drafts come from the text itself, or train one with "
            "--objective.kind block --objective.context causal."
        )
    if num_drafts > most and config.block_size is not None:
        raise ValueError(
            f"this model drafts at most {most} tokens (blocks of {block_size} in training); got block_size "
            f"{num_drafts}. Lower it."
        )
    return Speculation(num_drafts=min(num_drafts, most), source=preset.drafts)


def _blocks_and_layout(
    preset: Preset, config: SamplingConfig, settings: DiffusionSettings
) -> tuple[policies.Blocks, Layout]:
    """Choose the blocks that are decoded one after the other, and the attention."""
    default, of_model = config.resolved().block_size, settings.block_size
    if preset.blocks == "token":
        if not settings.is_causal:
            raise ValueError(
                f"preset {config.preset!r} needs a model whose committed text is causal; this one attends "
                f"{'in blocks' if of_model else 'to everything'}. Train one with --objective.kind block "
                "--objective.context causal, or with --objective.kind ar."
            )
        within = "full" if settings.layout.has_order else settings.layout.within
        speculation = _speculation(preset, config, settings)
        # What a round may decide and draft is open.
        in_flight = 1 if speculation is None else 2 * speculation.num_drafts + 1
        layout = replace(settings.layout, block_size=1, within=within)
        return policies.Blocks(size=1, on_grid=True, in_flight=in_flight), layout
    size = config.block_size or of_model or default
    if settings.context == "causal" and (size or 0) > (of_model or 0):
        raise ValueError(f"block_size must be at most that of the model's training, {of_model}; got {size}. Lower it.")
    if preset.blocks == "window":
        return policies.Blocks(size=1, on_grid=True, in_flight=size or 1), settings.layout
    if preset.blocks == "part":
        part = config.block_size or math.gcd(default or 0, of_model or 0)
        if of_model and of_model % part:
            raise ValueError(
                f"block_size of preset {config.preset!r} must divide the model's blocks of {of_model}; got {part}. "
                f"Use {math.gcd(part, of_model)}."
            )
        return policies.Blocks(size=part, on_grid=of_model is not None), settings.layout
    has_blocks = preset.blocks != "model" or of_model is not None
    layout = replace(settings.layout, block_size=size) if has_blocks else Layout()
    return policies.Blocks(size=size, on_grid=has_blocks and preset.blocks != "prompt"), layout
