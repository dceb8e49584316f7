"""Samplers by the names users know: their policies, defaults and sources."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from redraft.sampling import policies

Build = Callable[[Any], dict[str, Any]]
"""SamplingConfig -> the policies of a `Sampler`."""
AttentionKind = Literal["model", "grid", "prompt"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named sampler: its policies, its published defaults, and where it comes from."""

    source: str
    build: Build
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that this sampler sets where the user does not."""
    takes: tuple[str, ...] = ()
    """Settings that mean something to this sampler and not to every other."""
    attention: AttentionKind = "model"
    """The model's own, or block-causal: on the absolute grid, or from each row's prompt end."""


def _scored(score: policies.Score) -> Build:
    """Commit an even quota by a score."""

    def build(config: Any) -> dict[str, Any]:
        perturbed = config.alg_temperature
        return {
            "score": policies.Perturbed(score=score, temperature=perturbed) if perturbed else score,
            "unmask": policies.Quota(),
        }

    return build


def _sure(**rule: Any) -> Build:
    """Commit what passes a threshold, by default one at least; without one, an even quota."""

    def build(config: Any) -> dict[str, Any]:
        if config.factor is not None:
            return {"unmask": policies.Factor(factor=config.factor)}
        threshold = config.threshold
        return {"unmask": policies.Quota() if threshold is None else policies.Threshold(threshold=threshold, **rule)}

    return build


def _both(policy: Any) -> dict[str, Any]:
    return {"unmask": policy.unmask, "revise": policy}


def _edited(config: Any) -> dict[str, Any]:
    edit = policies.TokenEdit(threshold=config.editing_threshold, max_post_steps=config.max_post_steps)
    return {"unmask": policies.Threshold(threshold=config.threshold, strict=True), "revise": edit}


def _renoised(config: Any) -> dict[str, Any]:
    accept = policies.EntropyBound(bound=config.entropy_bound)
    return {"noise": "uniform", "anneal": policies.LinearAnneal()} | _both(policies.Renoise(accept=accept))


_OF_FAST = {"block_size": 32, "threshold": 0.9}
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
        build=_sure(),
        defaults=_OF_FAST,
        takes=("threshold", "factor"),
    ),
    "fast-dllm-prefix": Preset(
        source="prefix cache, Fast-dLLM, arXiv 2505.22618",
        build=_sure(),
        defaults=_OF_FAST | {"cache": "prefix"},
        takes=("threshold", "factor"),
    ),
    "fast-dllm-dual": Preset(
        source="dual cache, Fast-dLLM, arXiv 2505.22618",
        build=_sure(),
        defaults=_OF_FAST | {"cache": "dual"},
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
        build=_sure(at_least="quota"),
        defaults={"block_size": 4, "threshold": 0.85},
        attention="grid",
        takes=("threshold",),
    ),
    "llada2": Preset(
        source="threshold decoding, LLaDA2.0, arXiv 2512.15745",
        build=_sure(strict=True, at_least="quota"),
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
        build=lambda _: {"unmask": policies.Bernoulli()},
        defaults={"temperature": 1.0},
    ),
    "remdm": Preset(
        source="remasking diffusion, ReMDM, arXiv 2503.00307",
        build=lambda config: _both(policies.Remasking(kind=config.remasking, eta=config.eta)),
        defaults={"temperature": 1.0, "remasking": "cap", "eta": 0.02},
        takes=("remasking", "eta"),
    ),
    "p2": Preset(
        source="path planning with the model as its own planner, P2, arXiv 2502.03540",
        build=lambda _: _both(policies.Rerank()),
        defaults={"temperature": 1.0},
    ),
    "eb": Preset(
        source="entropy-bounded unmasking, EB-Sampler, arXiv 2505.24857",
        build=lambda c: {"score": policies.NegativeEntropy(), "unmask": policies.EntropyBound(bound=c.entropy_bound)},
        defaults={"entropy_bound": 0.1},
        takes=("entropy_bound",),
    ),
    "duo": Preset(
        source="ancestral sampling under uniform noise with a greedy tail, Duo, arXiv 2506.10892",
        build=lambda _: {"noise": "uniform", "unmask": policies.AtTheEnd(), "revise": policies.Posterior()},
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
