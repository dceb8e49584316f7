"""Samplers by the names users know, built from the settings that Python, CLI and saved configs share."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from redraft.errors import unknown_name
from redraft.layouts import Layout
from redraft.models.settings import DiffusionSettings
from redraft.sampling import policies
from redraft.sampling.budget import Budget
from redraft.sampling.loop import Sampler

AttentionKind = Literal["model", "grid", "prompt"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named sampler: its policies, its published defaults, and where it comes from."""

    source: str
    build: Callable[["SamplingConfig"], dict[str, Any]]
    """Policies of the `Sampler` from the settings."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that this sampler sets where the user does not."""
    takes: tuple[str, ...] = ()
    """Settings that mean something to this sampler and not to every other."""
    attention: AttentionKind = "model"
    """The model's own, or block-causal: on the absolute grid, or from each row's prompt end."""


def _scored(score: policies.Score) -> Callable[["SamplingConfig"], dict[str, Any]]:
    """Commit an even quota by a score."""

    def build(config: "SamplingConfig") -> dict[str, Any]:
        perturbed = config.alg_temperature
        return {
            "score": policies.Perturbed(score=score, temperature=perturbed) if perturbed else score,
            "unmask": policies.Quota(),
        }

    return build


def _fast(config: "SamplingConfig") -> dict[str, Any]:
    if config.factor is not None:
        return {"unmask": policies.Factor(factor=config.factor)}
    return {"unmask": policies.Quota() if config.threshold is None else policies.Threshold(threshold=config.threshold)}


def _dynamic(*, strict: bool) -> Callable[["SamplingConfig"], dict[str, Any]]:
    """Commit what passes a threshold, and no fewer than the quota (SDAR's dynamic strategy, LLaDA2)."""

    def build(config: "SamplingConfig") -> dict[str, Any]:
        if config.threshold is None:
            return {"unmask": policies.Quota()}
        return {"unmask": policies.Threshold(threshold=config.threshold, strict=strict, at_least="quota")}

    return build


def _edited(config: "SamplingConfig") -> dict[str, Any]:
    assert config.threshold is not None
    assert config.editing_threshold is not None
    assert config.max_post_steps is not None
    edit = policies.TokenEdit(threshold=config.editing_threshold, max_post_steps=config.max_post_steps)
    return {"unmask": policies.Threshold(threshold=config.threshold, strict=True), "revise": edit}


def _remasked(config: "SamplingConfig") -> dict[str, Any]:
    assert config.remasking is not None
    assert config.eta is not None
    both = policies.Remasking(kind=config.remasking, eta=config.eta)
    return {"unmask": both.unmask, "revise": both}


def _reranked(config: "SamplingConfig") -> dict[str, Any]:
    both = policies.Rerank()
    return {"unmask": both.unmask, "revise": both}


def _ancestral(config: "SamplingConfig") -> dict[str, Any]:
    return {"unmask": policies.Bernoulli()}


def _renoised(config: "SamplingConfig") -> dict[str, Any]:
    assert config.entropy_bound is not None
    both = policies.Renoise(accept=policies.EntropyBound(bound=config.entropy_bound))
    return {"noise": "uniform", "anneal": policies.LinearAnneal(), "unmask": both.unmask, "revise": both}


def _uniform(config: "SamplingConfig") -> dict[str, Any]:
    return {"noise": "uniform", "unmask": policies.AtTheEnd(), "revise": policies.Posterior()}


def _bounded(config: "SamplingConfig") -> dict[str, Any]:
    assert config.entropy_bound is not None
    return {
        "score": policies.NegativeEntropy(),
        "unmask": policies.EntropyBound(bound=config.entropy_bound),
    }


PRESETS = {
    "llada": Preset(
        source="low-confidence remasking, LLaDA, Section 2.4 of arXiv 2502.09992",
        build=_scored(policies.Confidence()),
        takes=("alg_temperature",),
    ),
    "llada-random": Preset(
        source="random remasking, LLaDA, Algorithm 4 of arXiv 2502.09992",
        build=_scored(policies.Random()),
    ),
    "dream-confidence": Preset(
        source="maskgit_plus of Dream 7B, arXiv 2508.15487",
        build=_scored(policies.Confidence()),
        takes=("alg_temperature",),
    ),
    "dream-margin": Preset(
        source="topk_margin of Dream 7B, arXiv 2508.15487",
        build=_scored(policies.Margin()),
        takes=("alg_temperature",),
    ),
    "dream-entropy": Preset(
        source="entropy of Dream 7B, arXiv 2508.15487",
        build=_scored(policies.NegativeEntropy()),
        takes=("alg_temperature",),
    ),
    "fast-dllm": Preset(
        source="parallel decoding without a cache, Fast-dLLM, arXiv 2505.22618",
        build=_fast,
        defaults={"block_size": 32, "threshold": 0.9},
        takes=("threshold", "factor"),
    ),
    "fast-dllm-prefix": Preset(
        source="prefix cache, Fast-dLLM, arXiv 2505.22618",
        build=_fast,
        defaults={"block_size": 32, "threshold": 0.9, "cache": "prefix"},
        takes=("threshold", "factor"),
    ),
    "fast-dllm-dual": Preset(
        source="dual cache, Fast-dLLM, arXiv 2505.22618",
        build=_fast,
        defaults={"block_size": 32, "threshold": 0.9, "cache": "dual"},
        takes=("threshold", "factor"),
    ),
    "bd3lm": Preset(
        source="block diffusion, BD3LM, arXiv 2503.09573; surest first",
        build=_scored(policies.Confidence()),
        defaults={"block_size": 8},
        attention="prompt",
        takes=("alg_temperature",),
    ),
    "sdar": Preset(
        source="dynamic low-confidence remasking, SDAR, arXiv 2510.06303",
        build=_dynamic(strict=False),
        defaults={"block_size": 4, "threshold": 0.85},
        attention="grid",
        takes=("threshold",),
    ),
    "llada2": Preset(
        source="threshold decoding, LLaDA2.0, arXiv 2512.15745",
        build=_dynamic(strict=True),
        defaults={"block_size": 32, "threshold": 0.95},
        attention="grid",
        takes=("threshold",),
    ),
    "llada2.1": Preset(
        source="threshold decoding with token editing, LLaDA2.1",
        build=_edited,
        defaults={"block_size": 32, "threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 16},
        attention="grid",
        takes=("threshold", "editing_threshold", "max_post_steps"),
    ),
    "mdlm": Preset(
        source="ancestral sampling, MDLM, Eq. 7 of arXiv 2406.07524",
        build=_ancestral,
        defaults={"temperature": 1.0},
    ),
    "remdm": Preset(
        source="remasking diffusion, ReMDM, arXiv 2503.00307",
        build=_remasked,
        defaults={"temperature": 1.0, "remasking": "cap", "eta": 0.02},
        takes=("remasking", "eta"),
    ),
    "p2": Preset(
        source="path planning with the model as its own planner, P2, arXiv 2502.03540",
        build=_reranked,
        defaults={"temperature": 1.0},
    ),
    "eb": Preset(
        source="entropy-bounded unmasking, EB-Sampler, arXiv 2505.24857",
        build=_bounded,
        defaults={"entropy_bound": 0.1},
        takes=("entropy_bound",),
    ),
    "duo": Preset(
        source="ancestral sampling under uniform noise with a greedy tail, Duo, arXiv 2506.10892",
        build=_uniform,
        defaults={"temperature": 1.0},
    ),
    "diffusion-gemma": Preset(
        source="entropy-bounded acceptance and renoising, DiffusionGemma in transformers 5",
        build=_renoised,
        defaults={"entropy_bound": 0.1, "temperature": 1.0, "steps_per_block": 48},
        takes=("entropy_bound",),
        attention="prompt",
    ),
}


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
    """When a text ends early: eos, strings that end it, or None for never."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown_name("preset", self.preset, PRESETS)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}.")
        preset = PRESETS[self.preset]
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1; got {self.num_samples}.")
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

    def _check_cost(self) -> None:
        said = [name for name in _COSTS if getattr(self, name) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} each say what a text may cost; give one of them.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget is a share of one forward per token, in (0, 1]; got {self.budget}.")

    def _check_blocks(self) -> None:
        size, total = self.block_size, self.max_new_tokens
        if size is None or (size >= 1 and total % size == 0):
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
        eos_token_id: int | None = None,
        decode: Callable[[Any], str] | None = None,
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
            stop=self._stop(eos_token_id, decode),
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

    def _stop(self, eos_token_id: int | None, decode: Callable[[Any], str] | None) -> policies.Stop:
        ends: policies.Stop = policies.Filled()
        if self.stop is not None and eos_token_id is not None:
            ends = policies.EndOfSequence(eos_token_id=eos_token_id)
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
    if isinstance(chosen.get("stop"), list):
        chosen["stop"] = tuple(chosen["stop"])
    size, total = saved.get("block_size"), chosen.get("max_new_tokens", SamplingConfig.max_new_tokens)
    if size and "block_size" not in given and total > 0 and total % size:
        chosen["block_size"] = max(n for n in _divisors(total) if n <= size)
    return SamplingConfig(**chosen)


_COSTS = ("steps", "budget", "forwards", "seconds")
"""Ways to say what a text may cost."""
_OF_SOME = sorted({name for preset in PRESETS.values() for name in preset.takes})
"""Settings that not every preset takes."""


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
