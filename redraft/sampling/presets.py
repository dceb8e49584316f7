"""Samplers by the names users know: their policies, defaults and sources. The table itself needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from redraft.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named sampler: its policies, its published defaults, and where it comes from."""

    source: str
    build: Callable[[Any, Any], dict[str, Any]] = lambda policies, config: {}
    """(the package `policies`, a SamplingConfig with the defaults filled in) -> fields of its `Sampler`. Other fields
    keep the defaults of `Sampler`: an even quota, the most confident first."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that it sets where the user does not. It takes only those of `OF_SOME_PRESETS` that are listed here."""
    blocks: Literal["model", "grid", "prompt", "token"] = "model"
    """Which blocks it decodes. "model": the model's. "grid" and "prompt": its own, with block-causal attention, counted
    from position 0 or from the end of each row's prompt. "token": single tokens, by a model whose text is causal."""


OF_SOME_PRESETS = ("alg_temperature", "threshold", "factor", "entropy_bound", "editing_threshold")
"""Settings that a preset takes only if its defaults name them."""


def preset_from_name(name: str) -> Preset:
    """Return a preset of the table, or your own, given as MODULE:NAME.

    Raises ValueError for an unknown name, and for an object that is no preset.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        if name not in PRESETS:
            raise unknown_name("preset", name, (*PRESETS, "MODULE:NAME"))
        return PRESETS[name]
    try:
        preset = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"preset {name!r} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error
    if not isinstance(preset, Preset):
        raise ValueError(f"preset {name!r} must be a redraft.sampling.presets.Preset; got {type(preset).__name__}.")
    return preset


def _parallel(policies: Any, config: Any, **rule: Any) -> dict[str, Any]:
    """Parallel decoding: commit tokens above a threshold, at least one; without a threshold, an even quota."""
    if config.factor is not None:
        return {"unmask": policies.Factor(factor=config.factor)}
    return {} if config.threshold is None else {"unmask": policies.Threshold(threshold=config.threshold, **rule)}


def _edited(policies: Any, config: Any) -> dict[str, Any]:
    """Commit tokens above a threshold, and edit drafts."""
    return _parallel(policies, config, strict=True) | {"revise": policies.TokenEdit(threshold=config.editing_threshold)}


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
    "bd3lm": Preset(
        source="block diffusion, BD3LM, arXiv 2503.09573; surest first",
        defaults={"block_size": 8, "alg_temperature": None},
        blocks="prompt",
    ),
    "sdar": Preset(
        source="dynamic low-confidence remasking, SDAR, arXiv 2510.06303",
        build=lambda p, c: _parallel(p, c, at_least="quota"),
        defaults={"block_size": 4, "threshold": 0.85},
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
