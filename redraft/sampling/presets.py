"""Samplers by the names users know: their policies, defaults and sources. The table itself needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from redraft.errors import import_own, unknown_name


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named sampler: its policies, its published defaults, and where it comes from."""

    source: str
    build: Callable[[Any, Any], dict[str, Any]] = lambda policies, config: {}
    """(the package `policies`, a SamplingConfig with the defaults filled in) -> fields of its `Sampler`. Other fields
    keep the defaults of `Sampler`: an even quota, the most confident first."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that it sets where the user does not. It takes only those of `OF_SOME_PRESETS` that are listed here."""
    blocks: Literal["model", "grid", "prompt", "token", "part", "window"] = "model"
    """Which blocks it decodes. "model": the model's. "grid" and "prompt": its own, with block-causal attention, counted
    from position 0 or from the end of each row's prompt. "token": single tokens, by a model whose text is causal.
    "part": parts of the model's blocks. "window": as many positions as a block has, from the first undecided one on."""
    drafts: Literal["every", "ahead", "lookup"] | None = None
    """Where the drafts come from that its tokens are foretold by (`sampler.Speculation`); block_size of them."""
    may_end_short: bool = False
    """Whether its last block may have fewer tokens than the others."""


OF_SOME_PRESETS = (
    "alg_temperature", "threshold", "factor", "entropy_bound", "entropy_threshold", "editing_threshold",
)  # fmt: skip
"""Settings that a preset takes only if its defaults name them."""


def preset_from_name(name: str) -> Preset:
    """Return a preset of the table, or your own, given as MODULE:NAME.

    Raises ValueError for an unknown name, and for an object that is no preset.
    """
    if ":" not in name:
        if name not in PRESETS:
            raise unknown_name("preset", name, (*PRESETS, "MODULE:NAME"))
        return PRESETS[name]
    preset = import_own("preset", name)
    if not isinstance(preset, Preset):
        raise ValueError(f"preset {name!r} must be a redraft.sampling.presets.Preset; got {type(preset).__name__}.")
    return preset


def _parallel(policies: Any, config: Any, **rule: Any) -> dict[str, Any]:
    """Parallel decoding: commit tokens above a threshold, at least one; without a threshold, an even quota."""
    if config.factor is not None:
        return {"unmask": policies.Factor(factor=config.factor)}
    return {} if config.threshold is None else {"unmask": policies.Threshold(threshold=config.threshold, **rule)}


def _of_sdar(policies: Any, config: Any) -> dict[str, Any]:
    """Commit tokens above a threshold, or a fixed share of the block; or else what an entropy bound accepts."""
    if config.entropy_bound is None:
        return _parallel(policies, config, strict=True, at_least="quota")
    bound = policies.EntropyBound(bound=config.entropy_bound, has_all=True)
    return {"score": policies.negative_entropy, "unmask": bound}


def _edited(policies: Any, config: Any) -> dict[str, Any]:
    """Commit tokens above a threshold, and edit drafts."""
    return _parallel(policies, config, strict=True) | {"revise": policies.TokenEdit(threshold=config.editing_threshold)}


def _first_alone(policies: Any, config: Any, **rule: Any) -> dict[str, Any]:
    """Commit the first token of a block alone, and the others in parallel."""
    return {"unmask": policies.FirstAlone(rest=policies.Threshold(threshold=config.threshold, **rule))}


def _prefix(policies: Any, config: Any) -> dict[str, Any]:
    """Commit what is certain up to the first token that is not."""
    return {"unmask": policies.CertainPrefix(threshold=config.threshold)}


def _both(policy: Any) -> dict[str, Any]:
    """Use one policy as `unmask` and as `revise`."""
    return {"unmask": policy.unmask, "revise": policy}


def _renoised(policies: Any, config: Any) -> dict[str, Any]:
    """Keep the tokens that an entropy bound accepts, and draw the others again."""
    both = _both(policies.Renoise(accept=policies.EntropyBound(bound=config.entropy_bound)))
    return {"noise": "uniform", "anneal": policies.LinearAnneal()} | both


_DREAM = {"alg_temperature": None}
PRESETS = {
    "ar": Preset(source="autoregressive decoding by a model with a causal context", blocks="token"),
    "speculate": Preset(
        source="preset ar, token for token, with drafts of the model's own that it checks, as arXiv 2507.11851",
        defaults={"block_size": 4},
        blocks="token",
        drafts="every",
    ),
    "speculate-ahead": Preset(
        source="as speculate, with fewer masks: the next drafts are made beside the check, I-DLM, arXiv 2604.11035",
        defaults={"block_size": 4},
        blocks="token",
        drafts="ahead",
    ),
    "lookup": Preset(
        source="preset ar, token for token, with drafts from the text itself: prompt lookup decoding",
        defaults={"block_size": 8},
        blocks="token",
        drafts="lookup",
    ),
    "llada": Preset(source="low-confidence remasking, LLaDA, Section 2.4 of arXiv 2502.09992", defaults=_DREAM),
    "llada-random": Preset(
        source="random remasking, LLaDA, Algorithm 4 of arXiv 2502.09992", build=lambda p, _: {"score": p.random_order}
    ),
    "dream-confidence": Preset(source="maskgit_plus of Dream 7B, arXiv 2508.15487", defaults=_DREAM),
    "dream-margin": Preset(
        source="topk_margin of Dream 7B, arXiv 2508.15487", build=lambda p, _: {"score": p.margin}, defaults=_DREAM
    ),
    "dream-entropy": Preset(
        source="entropy of Dream 7B, arXiv 2508.15487",
        build=lambda p, _: {"score": p.negative_entropy},
        defaults=_DREAM,
    ),
    "fast-dllm": Preset(
        source="parallel decoding, Fast-dLLM, arXiv 2505.22618; cache prefix and dual are its caches",
        build=_parallel,
        defaults={"block_size": 32, "threshold": 0.9, "factor": None},
    ),
    "fast-dllm-v2": Preset(
        source="sub-blocks, each block's first token from the forward that commits the block before, arXiv 2509.26328",
        build=lambda p, c: _first_alone(p, c, strict=True),
        defaults={"block_size": 8, "threshold": 0.9},
        blocks="part",
    ),
    "nemotron": Preset(
        source="block diffusion after an autoregressive first token, Nemotron-Labs-Diffusion",
        build=_first_alone,
        defaults={"block_size": 32, "threshold": 0.9},
        blocks="prompt",
    ),
    "wedlm": Preset(
        source="sliding window, entropy with a penalty for later positions, WeDLM, arXiv 2512.22737",
        build=lambda p, c: {"unmask": p.LowEntropy(threshold=c.entropy_threshold)},
        defaults={"block_size": 16, "entropy_threshold": 0.4},
        blocks="window",
    ),
    "wedlm-blocks": Preset(
        source="blocks after the prompt by confidence, generate_wedlm of WeDLM, arXiv 2512.22737",
        build=_parallel,
        defaults={"block_size": 32, "threshold": 0.9},
        blocks="prompt",
        may_end_short=True,
    ),
    "sdlm": Preset(
        source="longest confident prefix of a window, SDLM, arXiv 2509.24007",
        build=_prefix,
        defaults={"block_size": 4, "threshold": 0.98},
        blocks="window",
    ),
    "sdlm-entropy": Preset(
        source="as sdlm, confidence = 1 - entropy / log(vocabulary)",
        build=lambda p, c: {"score": p.certainty} | _prefix(p, c),
        defaults={"block_size": 4, "threshold": 0.98},
        blocks="window",
    ),
    "bd3lm": Preset(
        source="block diffusion, BD3LM, arXiv 2503.09573; surest first",
        defaults={"block_size": 8, "alg_temperature": None},
        blocks="prompt",
    ),
    "sdar": Preset(
        source="dynamic low-confidence remasking, SDAR, arXiv 2510.06303; threshold 1 is its static strategy, "
        "entropy_bound that of JetEngine",
        build=_of_sdar,
        defaults={"block_size": 4, "threshold": 0.85, "entropy_bound": None},
        blocks="grid",
    ),
    "sdar-sequential": Preset(
        source="from left to right inside a block, SDAR, arXiv 2510.06303",
        build=lambda p, _: {"score": p.leftmost, "unmask": p.fixed_quota},
        defaults={"block_size": 4},
        blocks="grid",
    ),
    "llada2": Preset(
        source="threshold decoding, LLaDA2.0, arXiv 2512.15745",
        build=lambda p, c: _parallel(p, c, strict=True, at_least="quota"),
        defaults={"block_size": 32, "threshold": 0.95},
        blocks="grid",
    ),
    "llada2.1": Preset(
        source="threshold decoding with token editing, LLaDA2.1",
        build=_edited,
        defaults={"block_size": 32, "threshold": 0.7, "editing_threshold": 0.5},
        blocks="grid",
    ),
    "mdlm": Preset(
        source="ancestral sampling, MDLM, Eq. 7 of arXiv 2406.07524",
        build=lambda p, _: {"unmask": p.Bernoulli()},
        defaults={"temperature": 1.0},
    ),
    "remdm": Preset(
        source="remasking diffusion, ReMDM, arXiv 2503.00307",
        build=lambda p, _: _both(p.Remasking()),
        defaults={"temperature": 1.0},
    ),
    "p2": Preset(
        source="path planning with the model as its own planner, P2, arXiv 2502.03540",
        build=lambda p, _: _both(p.Rerank()),
        defaults={"temperature": 1.0},
    ),
    "eb": Preset(
        source="entropy-bounded unmasking, EB-Sampler, arXiv 2505.24857",
        build=lambda p, c: {"score": p.negative_entropy, "unmask": p.EntropyBound(bound=c.entropy_bound)},
        defaults={"entropy_bound": 0.1},
    ),
    "duo": Preset(
        source="ancestral sampling under uniform noise with a greedy tail, Duo, arXiv 2506.10892",
        build=lambda p, _: {"noise": "uniform", "unmask": p.at_the_end, "revise": p.Posterior()},
        defaults={"temperature": 1.0},
    ),
    "diffusion-gemma": Preset(
        source="entropy-bounded acceptance and renoising, DiffusionGemma in transformers 5",
        build=_renoised,
        defaults={"entropy_bound": 0.1, "temperature": 1.0, "steps_per_block": 48},
        blocks="prompt",
    ),
}
