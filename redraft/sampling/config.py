"""The settings that Python, CLI and saved configs share. `sampler.build_sampler` makes a sampler of them."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from redraft.errors import unknown_name
from redraft.sampling.presets import OF_SOME_PRESETS, PRESETS, preset_from_name
from redraft.settings import MAX_COUNT, Count, NonNegative, Positive, Probability, Settings, Within

Share = Annotated[float, Within("(0, 1]")]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """How to denoise: the settings of `generate`, `infill`, `redraft sample` and a checkpoint's saved defaults.

    What is None is set by the preset, or not used.
    """

    preset: str = "llada"
    """Named sampler, by default the checkpoint's own; `--preset ?` lists them. MODULE:NAME is one of your own."""
    max_new_tokens: Count = 128
    """Tokens to generate."""
    steps: Count | None = None
    """Denoising steps for the whole text; by default one per token."""
    steps_per_block: Count | None = None
    """Denoising steps for each block, in place of steps."""
    block_size: Count | None = None
    """Tokens per block, decoded from left to right; by default the model's own blocks, or the whole canvas at once. Of
    sdlm and wedlm: tokens of the window; of fast-dllm-v2: tokens of a part of the model's block."""
    temperature: NonNegative | None = None
    """Temperature of the draws; 0 takes the likeliest token."""
    top_p: Share | None = None
    """Draw among the likeliest tokens that together have this probability, in (0, 1]."""
    top_k: Count | None = None
    """Draw among this many likeliest tokens."""
    alg_temperature: NonNegative | None = None
    """Temperature of the order in which tokens are committed (Dream's alg_temp); 0: a fixed order."""
    cfg_scale: float = 0.0
    """Classifier-free guidance: logits = uncond + (scale + 1) (cond - uncond); 0 for none."""
    threshold: Probability | None = None
    """Commit every token whose probability reaches this (fast-dllm), or is above it (sdar, llada2; at 1 sdar commits
    the same number in each step)."""
    factor: Positive | None = None
    """Commit the r most probable tokens, for the largest r whose r-th probability is at least 1 - factor / (r + 1)
    (fast-dllm)."""
    entropy_bound: NonNegative | None = None
    """Commit the tokens of lowest entropy, as long as their entropies, the largest left out, sum to at most this (nats;
    eb). The sum of sdar includes the largest, and is below this."""
    entropy_threshold: NonNegative | None = None
    """Commit every token whose entropy, and 0.02 for each position behind the first mask, sum to less than this (nats;
    wedlm)."""
    editing_threshold: Probability | None = None
    """Replace a draft where another token is more probable than this (llada2.1)."""
    budget: Share | None = None
    """Forward passes as a share of max_new_tokens, in (0, 1]: 1 is one token per forward pass."""
    forwards: Count | None = None
    """Largest number of forward passes for the whole text."""
    num_samples: Count = 1
    """Texts for each prompt, each with other random numbers."""
    cache: Literal["auto", "none", "exact", "prefix", "dual"] | None = None
    """Cache of keys and values: none, exact (block-causal models), prefix or dual (approximate, full attention); auto:
    exact for block-causal models, else none."""
    seed: Annotated[int, Within(f"[{-(2**63)}, {2**63})")] = 0
    """Seed of the draws."""
    stop: str | tuple[str, ...] | None = "eos"
    """When a text ends early: eos (any end token of the model), strings that end it, or None for never."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, list | tuple):  # no strings: only the end token stops
            object.__setattr__(self, "stop", tuple(self.stop) or "eos")
        super().__post_init__()
        if isinstance(self.stop, str) and self.stop != "eos":
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.stop, tuple) and not all(self.stop):
            raise ValueError(f"a stop string must not be empty; got {self.stop!r}. Leave it out.")
        if self.num_samples * self.max_new_tokens > 4 * MAX_COUNT:
            raise ValueError(
                f"num_samples times max_new_tokens must be at most {4 * MAX_COUNT}; got {self.num_samples} and "
                f"{self.max_new_tokens}. Generate several times, with other seeds."
            )
        costs = [name for name in COSTS if getattr(self, name) is not None]
        if len(costs) > 1:
            raise ValueError(f"{' and '.join(costs)} each set the number of forward passes; give one of them.")
        preset = preset_from_name(self.preset)
        unused = () if preset.blocks != "token" else ALL_COSTS if preset.drafts else (*ALL_COSTS, "block_size")
        for name in unused:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"preset {self.preset!r} decides the next token in each forward pass; got {name}="
                    f"{getattr(self, name)}. Leave it out, or use another preset."
                )
        for name in OF_SOME_PRESETS:
            value = getattr(self, name)
            if value is not None and name not in preset.defaults:
                users = ", ".join(other for other, its in PRESETS.items() if name in its.defaults)
                raise ValueError(f"preset {self.preset!r} has no setting {name!r}; got {value}. Use {users}.")

    def resolved(self) -> "SamplingConfig":
        """Fill in the preset's defaults where nothing was given."""
        preset = preset_from_name(self.preset)
        defaults: dict[str, Any] = {"temperature": 0.0, "cache": "auto"} | preset.defaults
        if self.factor is not None or self.entropy_bound is not None:
            defaults.pop("threshold", None)  # another rule replaces the threshold
        if any(getattr(self, name) is not None for name in COSTS):
            defaults.pop("steps_per_block", None)
        if "block_size" in defaults and preset.blocks != "grid":
            defaults["block_size"] = min(defaults["block_size"], self.max_new_tokens)
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def for_infilling(self, *, num_holes: int) -> "SamplingConfig":
        """Adapt the settings to infilling: the budget is a share of the holes' tokens, and no text ends early."""
        if self.budget is not None:
            return replace(self, budget=None, forwards=max(1, round(self.budget * num_holes)), stop=None)
        return replace(self, stop=None)


def with_saved(saved: dict[str, Any], given: dict[str, Any], *, has_grid: bool = False) -> SamplingConfig:
    """Combine given settings with those saved in a checkpoint; given ones win.

    If a preset is given, only the saved max_new_tokens is used. If a cost is given (`COSTS`, steps_per_block), no saved
    cost is used. A saved block size that does not divide max_new_tokens stays: the canvas is then longer, and the text
    is cut; but no block is longer than the text. On a grid, of the preset or the model (`has_grid`), any size fits.
    Raises ValueError for a name that is no setting, and for a given block size that does not divide.
    """
    saved = saved | OLD_PRESETS.get(str(saved.get("preset")), {})
    for what, settings in (("setting", given), ("setting in config.json's generation", saved)):
        for name in settings:
            if name in REMOVED:
                raise ValueError(f"{what} {name!r} was removed; got {settings[name]!r}. {REMOVED[name]}")
            if name not in SamplingConfig.setting_names():
                raise unknown_name(what, name, SamplingConfig.setting_names())
    if ":" in str(saved.get("preset")) and "preset" not in given:
        raise ValueError(
            f"config.json names code to run: preset {saved['preset']!r}. Pass preset= yourself if you trust it."
        )
    if "preset" in given:
        saved = {name: value for name, value in saved.items() if name == "max_new_tokens"}
    if set(ALL_COSTS) & set(given):
        saved = {name: value for name, value in saved.items() if name not in ALL_COSTS}
    chosen = saved | given
    config = SamplingConfig(**chosen)
    size, total = config.block_size, config.max_new_tokens
    preset = preset_from_name(config.preset)
    is_on_grid = preset.blocks in ("grid", "part", "window", "token") or (has_grid and preset.blocks == "model")
    if size is None or is_on_grid or preset.may_end_short:
        return config
    if "block_size" not in given:
        return replace(config, block_size=min(size, total))
    if total % size:
        near = ", ".join(str(n) for n in sorted(sorted(_divisors(total), key=lambda n: abs(n - size))[:3]))
        raise ValueError(f"block_size must divide max_new_tokens; got {size} and {total}. Use {near}.")
    return config


COSTS = ("steps", "budget", "forwards")
"""Settings that each set the number of forward passes of a text."""
ALL_COSTS = (*COSTS, "steps_per_block")
OLD_PRESETS = {f"fast-dllm-{kind}": {"preset": "fast-dllm", "cache": kind} for kind in ("prefix", "dual")}
"""Old names of presets in saved checkpoints, and the settings that replace them."""
_OWN_PRESET = "Use a preset of your own (MODULE:NAME) with the policy"
REMOVED = {
    "seconds": "Use forwards.",
    "refresh": "An approximate cache is refilled when a block opens. Leave it out.",
    "blocks_in_flight": f"{_OWN_PRESET} Blocks(in_flight=...).",
    "max_post_steps": f"{_OWN_PRESET} TokenEdit(max_post_steps=...).",
    "remasking": f"{_OWN_PRESET} Remasking(kind=...).",
    "eta": f"{_OWN_PRESET} Remasking(eta=...).",
}
"""Settings that were removed, and what to use instead."""


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
