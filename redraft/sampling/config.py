"""The settings that Python, CLI and saved configs share, and the sampler they make."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from redraft.errors import MOST, check_count, check_types, unknown_name
from redraft.layouts import Layout
from redraft.models.settings import DiffusionSettings
from redraft.sampling import policies
from redraft.sampling.budget import Budget
from redraft.sampling.presets import PRESETS
from redraft.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to denoise: the settings of `generate`, `infill`, `redraft sample` and a checkpoint's saved defaults.

    What is None is set by the preset, or not used.
    """

    preset: str = "llada"
    """Named sampler, by default the checkpoint's own; `--preset ?` lists them with their sources and defaults."""
    max_new_tokens: int = 128
    """Tokens to generate."""
    steps: int | None = None
    """Denoising steps for the whole text; by default one per token."""
    steps_per_block: int | None = None
    """Denoising steps for each block, in place of steps."""
    block_size: int | None = None
    """Tokens per block, decoded from left to right; by default the model's own blocks, or the whole canvas at once."""
    temperature: float | None = None
    """Temperature of the draws; 0 takes the likeliest token."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this share of the mass, in (0, 1]."""
    top_k: int | None = None
    """Keep this many likeliest tokens."""
    alg_temperature: float | None = None
    """Temperature of the order in which tokens are decided (Dream's alg_temp)."""
    cfg_scale: float = 0.0
    """Classifier-free guidance: un + (scale + 1) (cond - un); 0 for none."""
    threshold: float | None = None
    """Decide every token whose probability reaches this (fast-dllm, sdar, llada2)."""
    factor: float | None = None
    """Decide the r surest while the r-th probability is at least 1 - factor / (r + 1) (fast-dllm)."""
    entropy_bound: float | None = None
    """Decide tokens together up to this entropy, in nats (eb)."""
    editing_threshold: float | None = None
    """Replace a draft where another token is more probable than this (llada2.1)."""
    max_post_steps: int | None = None
    """Passes of editing over a filled block at most (llada2.1)."""
    remasking: str | None = None
    """How drafts return to noise (remdm): cap, rescale, conf, loop."""
    eta: float | None = None
    """Strength of remasking, a probability (remdm)."""
    blocks_in_flight: int = 1
    """Unfinished blocks that are open at once."""
    budget: float | None = None
    """Share of the forwards that one token at a time would take, in (0, 1]: from fast to careful."""
    forwards: int | None = None
    """Forward passes for the whole text, at most."""
    seconds: float | None = None
    """Time for the whole text, kept to within one forward pass."""
    num_samples: int = 1
    """Texts for each prompt, from different noise."""
    cache: Literal["auto", "none", "exact", "prefix", "dual"] | None = None
    """Keys and values kept: none, exact (block-causal models), prefix or dual (approximate); auto: exact if it can."""
    refresh: int | None = None
    """Steps after which an approximate cache is filled anew; by default when a block opens."""
    seed: int = 0
    """Seed of the draws."""
    stop: str | tuple[str, ...] | None = "eos"
    """When a text ends early: eos (any end token of the model), strings that end it, or None for never."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, list | tuple):  # no strings: nothing but the end token stops
            object.__setattr__(self, "stop", tuple(self.stop) or "eos")
        check_types(self)
        if self.preset not in PRESETS:
            raise unknown_name("preset", self.preset, PRESETS)
        self._check_size()
        preset = PRESETS[self.preset]
        self._check_cost()
        for name in _OF_SOME:
            if getattr(self, name) is not None and name not in preset.takes:
                users = [other for other, its in PRESETS.items() if name in its.takes]
                raise ValueError(
                    f"{name} means nothing to preset {self.preset!r}; got {getattr(self, name)}. "
                    f"It is a setting of {', '.join(users)}."
                )
        if preset.attention != "grid":
            self._check_blocks()
        if isinstance(self.stop, str) and self.stop != "eos":
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.stop, tuple) and not all(self.stop):
            raise ValueError(f"a string that stops a text must not be empty; got {self.stop!r}.")
        self.sampler(DiffusionSettings(mask_token_id=0))  # the checks of its policies

    def _check_size(self) -> None:
        for name in ("max_new_tokens", "num_samples", "block_size", "blocks_in_flight"):
            check_count(name, getattr(self, name))
        if self.num_samples * self.max_new_tokens > 4 * MOST:
            raise ValueError(
                f"num_samples times max_new_tokens must be at most {4 * MOST}; got {self.num_samples} and "
                f"{self.max_new_tokens}. Ask several times, with other seeds."
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a 64-bit integer; got {self.seed}.")

    def _check_cost(self) -> None:
        said = [name for name in _COSTS if getattr(self, name) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} each say what a text may cost; give one of them.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget is a share of one forward per token, in (0, 1]; got {self.budget}.")

    def _check_blocks(self) -> None:
        size, total = self.block_size, self.max_new_tokens
        if size is None or total % size == 0:
            return
        near = sorted(_divisors(total), key=lambda n: abs(n - size))[:3]
        raise ValueError(
            f"block_size must divide max_new_tokens; got {size} and {total}. "
            f"Use {', '.join(str(n) for n in sorted(near))}."
        )

    def resolved(self) -> "SamplingConfig":
        """Put the preset's defaults where nothing was said."""
        preset = PRESETS[self.preset]
        absent = {name: value for name, value in preset.defaults.items() if getattr(self, name) is None}
        if self.factor is not None:
            absent.pop("threshold", None)  # another rule for the same choice
        if any(getattr(self, name) is not None for name in ("steps", "budget", "forwards")):
            absent.pop("steps_per_block", None)
        if "block_size" in absent and preset.attention != "grid":
            fits = [n for n in _divisors(self.max_new_tokens) if n <= absent["block_size"]]
            absent["block_size"] = max(fits)
        whole = {"temperature": 0.0, "cache": "auto"}
        absent |= {k: v for k, v in whole.items() if getattr(self, k) is None and k not in absent}
        return replace(self, **absent) if absent else self

    def layout(self, settings: DiffusionSettings) -> Layout:
        """Choose the attention: the model's own, or the preset's blocks."""
        if PRESETS[self.preset].attention == "model" and settings.block_size is None:
            return Layout()
        return Layout(block_size=self.block_size or settings.block_size or self.resolved().block_size)

    def frontier(self, settings: DiffusionSettings) -> policies.Frontier:
        """Choose the blocks: those of the attention where it has any."""
        config, attention = self.resolved(), PRESETS[self.preset].attention
        size = self.layout(settings).block_size or config.block_size
        if size is None:
            return policies.WholeCanvas()
        on_grid = attention == "grid" or (attention == "model" and settings.block_size is not None)
        kind = policies.GridBlocks if on_grid else policies.Blocks
        return kind(size=size, in_flight=self.blocks_in_flight)

    def sampler(
        self,
        settings: DiffusionSettings,
        *,
        eos_token_ids: tuple[int, ...] = (),
        decode: Callable[[Any, Any], Sequence[str]] | None = None,
    ) -> Sampler:
        """Build the combination of policies for a model."""
        config, preset = self.resolved(), PRESETS[self.preset]
        layout = self.layout(settings)
        assert config.temperature is not None
        budget = Budget(forwards=self.forwards, seconds=self.seconds)
        if self.budget is not None:
            budget = Budget(forwards=max(1, round(self.budget * self.max_new_tokens)))
        cache = config.cache or "auto"
        if cache == "auto":
            cache = "none" if layout.block_size is None else "exact"
        return Sampler(
            steps=self.steps if self.steps is not None else budget.forwards or self.max_new_tokens,
            steps_per_block=config.steps_per_block,
            frontier=self.frontier(settings),
            stop=self._stop(eos_token_ids, decode),
            cache=cache,
            refresh=self.refresh,
            layout=layout,
            is_grid_from_prompt=preset.attention == "prompt",
            cfg_scale=self.cfg_scale,
            budget=budget,
            temperature=config.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            **preset.build(config),
        )

    def _stop(
        self, eos_token_ids: tuple[int, ...], decode: Callable[[Any, Any], Sequence[str]] | None
    ) -> policies.Stop:
        ends: policies.Stop = policies.Filled()
        if self.stop is not None and eos_token_ids:
            ends = policies.EndOfSequence(eos_token_ids=eos_token_ids)
        if isinstance(self.stop, tuple) and decode is not None:
            ends = policies.StopStrings(strings=self.stop, decode=decode, otherwise=ends)
        return ends

    def for_infilling(self, *, num_holes: int) -> "SamplingConfig":
        """Fill holes: as many steps as there are holes unless said otherwise, and no early end."""
        if self.budget is not None:
            return replace(self, budget=None, forwards=max(1, round(self.budget * num_holes)), stop=None)
        return replace(self, stop=None)


def with_saved(saved: dict[str, Any], given: dict[str, Any]) -> SamplingConfig:
    """Lay the settings that were given over those saved with a checkpoint.

    A preset that is named brings its own settings: then nothing saved counts but the length. What is saved of the cost
    gives way to any cost that is given, and a saved block size to a length that it does not divide. Raises ValueError
    for a name that is no setting.
    """
    for what, settings in (("setting", given), ("setting in config.json's generation", saved)):
        for name in settings:
            if name not in SamplingConfig.__dataclass_fields__:
                raise unknown_name(what, name, SamplingConfig.__dataclass_fields__)
    if "preset" in given:
        saved = {name: value for name, value in saved.items() if name == "max_new_tokens"}
    costs = {*_COSTS, "steps_per_block"}
    if costs & set(given):
        saved = {name: value for name, value in saved.items() if name not in costs}
    chosen = saved | given
    size, total = saved.get("block_size"), chosen.get("max_new_tokens", SamplingConfig.max_new_tokens)
    if size and "block_size" not in given and isinstance(total, int) and total > 0 and total % size:
        chosen["block_size"] = max(n for n in range(1, size) if total % n == 0)
    return SamplingConfig(**chosen)


_COSTS = ("steps", "budget", "forwards", "seconds")
"""Ways to say what a text may cost."""
_OF_SOME = sorted({name for preset in PRESETS.values() for name in preset.takes})
"""Settings that not every preset takes."""


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
