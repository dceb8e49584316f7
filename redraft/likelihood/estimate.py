"""The estimates: parts of requests, rounds of samples, early decisions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from redraft.likelihood.blocks import SharedBlocks, Tree, can_share, score_blocks
from redraft.likelihood.decide import mean_and_variance, undecided
from redraft.likelihood.masks import Masks, draw_masks, units_of
from redraft.likelihood.requests import LikelihoodConfig, LogLikelihood, Request
from redraft.likelihood.rows import Part, score_rows
from redraft.likelihood.uniform_bound import uniform_bound
from redraft.models.denoiser import Denoiser
from redraft.models.finite import explain_nan

FIRST_ROUND = 16  # samples after which the choices of a question are compared for the first time

Scorer = Callable[[Sequence[Part]], list[Tensor]]


@dataclass
class _Running:
    """The estimate of one request so far: for each round and part, the values of independent units."""

    request: Request
    parts: list[tuple[Tensor, int]]
    units: list[list[Tensor]] = field(default_factory=list)
    forwards: int = 0
    num_likeliest: int = 0
    is_open: bool = True

    def total(self) -> list[Tensor]:
        """Sum the parts of each round, unit by unit."""
        return [torch.stack(round_).sum(dim=0) for round_ in self.units]


def loglikelihoods(
    denoiser: Denoiser, requests: Sequence[Request], config: LikelihoodConfig | None = None
) -> list[LogLikelihood]:
    """Estimate log p(continuation | context) of each request. Raises ValueError for what the model cannot hold."""
    questions = score_questions(denoiser, [[request] for request in requests], config)
    return [choices[0] for choices in questions]


def score_questions(
    denoiser: Denoiser,
    questions: Sequence[Sequence[Request]],
    config: LikelihoodConfig | None = None,
    *,
    lengths: Sequence[Sequence[float]] | None = None,
) -> list[list[LogLikelihood]]:
    """Estimate the choices of questions; with `config.confidence` only until each question's best choice is decided.

    Decided means best by plain and, where `lengths` are given, by length-normalised log-likelihood (`decide`). Rivals
    that are beaten in both leave early. The choices of a question should have equal keys. A model of uniform noise
    takes all samples for each choice.
    """
    config = config or LikelihoodConfig()
    settings = denoiser.settings
    if settings.process == "uniform":
        found = [[uniform_bound(denoiser, request, config) for request in choices] for choices in questions]
        return _without_nan(denoiser, questions, found)
    running = [[_Running(request, _parts(request, denoiser)) for request in choices] for choices in questions]
    scales = [[[1.0] * len(choices), *([lengths[q]] if lengths else [])] for q, choices in enumerate(running)]
    has_choices = any(len(choices) > 1 for choices in questions)
    if config.share_context and can_share(denoiser) and (has_choices or not settings.is_autoregressive):
        for choices, scale in zip(running, scales, strict=True):
            _sample(denoiser, [choices], [scale], config, _block_scorer(denoiser, choices, config))
    else:
        _sample(denoiser, running, scales, config, lambda parts: score_rows(denoiser, parts, config))
    found = [[_finish(r, is_autoregressive=settings.is_autoregressive) for r in choices] for choices in running]
    return _without_nan(denoiser, questions, found)


def _without_nan(
    denoiser: Denoiser, questions: Sequence[Sequence[Request]], found: list[list[LogLikelihood]]
) -> list[list[LogLikelihood]]:
    """Raise ValueError, which names the damage, where an estimate is NaN."""
    for request, result in zip(chain(*questions), chain(*found), strict=True):
        if math.isnan(result.nats):
            tokens = torch.cat([request.context, request.continuation])[None]
            raise explain_nan(denoiser, tokens.to(denoiser.device))
    return found


def sample_values(
    denoiser: Denoiser, request: Request, is_masked: Bool[Tensor, "samples l"], config: LikelihoodConfig
) -> Float[Tensor, "samples"]:
    """Evaluate L / l * sum of log p(x_i) over each given mask, nats: one sample of the bound each."""
    tokens = torch.cat([request.context, request.continuation])
    part = Part(tokens=tokens, is_masked=is_masked, context_len=len(request.context))
    nats = score_rows(denoiser, [part], config)[0][..., 0].sum(dim=1)
    return nats * is_masked.shape[1] / is_masked.sum(dim=1)


def _parts(request: Request, denoiser: Denoiser) -> list[tuple[Tensor, int]]:
    """Cut a request into (tokens, where the part to score begins): one, or one for each block it touches.

    Of an autoregressive model all blocks go together, but for a text's first token, which a mask token predicts.
    """
    tokens, start = torch.cat([request.context, request.continuation]), len(request.context)
    if denoiser.settings.is_autoregressive:
        first = [(tokens[:1], 0)] if start == 0 else []
        return first + ([(tokens, max(start, 1))] if len(tokens) > 1 else [])
    size = denoiser.settings.block_size or len(tokens)
    ends = [*range((start // size + 1) * size, len(tokens), size), len(tokens)]
    return [(tokens[:end], begin) for begin, end in zip([start, *ends[:-1]], ends, strict=True)]


def _rounds(config: LikelihoodConfig) -> list[int]:
    """Split the samples into rounds that double the total, so that a question may end early."""
    if config.confidence is None:
        return [config.samples]
    totals = [0, min(FIRST_ROUND, config.samples)]
    while totals[-1] < config.samples:
        totals.append(min(2 * totals[-1], config.samples))
    return [b - a for a, b in pairwise(totals)]


def _block_scorer(denoiser: Denoiser, choices: Sequence[_Running], config: LikelihoodConfig) -> Scorer:
    """Make what scores the choices of one question over their common clean blocks."""
    size, mask_token_id = denoiser.settings.block_size, denoiser.settings.mask_token_id
    assert size is not None
    texts = []
    for state in choices:
        tokens, start = state.parts[-1]  # what is before the last part is the clean side of another
        texts.append(tokens[: start + 1])
    hidden = [
        torch.where(torch.arange(len(text)) < len(state.request.context), mask_token_id, text)
        for text, state in zip(texts, choices, strict=True)
    ]
    trees = [Tree.of(texts, size), *([Tree.of(hidden, size)] if config.cfg_scale else [])]
    shared = [SharedBlocks(denoiser, tree) for tree in trees]
    return lambda parts: score_blocks(parts, shared, config)


def _sample(
    denoiser: Denoiser,
    questions: Sequence[Sequence[_Running]],
    scales: Sequence[Sequence[Sequence[float]]],
    config: LikelihoodConfig,
    score: Scorer,
) -> None:
    """Sample round by round until all samples are taken or every question is decided."""
    rounds = _rounds(config)
    for number, samples in enumerate(rounds):
        active = [state for choices in questions for state in choices if state.is_open]
        draws = [_draw(denoiser, state, config, samples=samples, number=number, most=rounds[0]) for state in active]
        _run_round(active, draws, config, score, num_units=config.num_units(samples))
        if config.confidence is None:
            continue
        for choices, scale in zip(questions, scales, strict=True):
            if units := {i: state.total() for i, state in enumerate(choices) if state.is_open}:
                stay = undecided(units, scale, confidence=config.confidence, looks=len(rounds), rivals=len(choices) - 1)
                for i, state in enumerate(choices):
                    state.is_open = i in stay


def _draw(
    denoiser: Denoiser, state: _Running, config: LikelihoodConfig, *, samples: int, number: int, most: int
) -> list[Masks | None]:
    """Draw one round of masks for each part; None where an earlier round summed over all of them.

    An autoregressive model is asked for all of a part at once.
    """
    drawn: list[Masks | None] = []
    for tokens, start in state.parts:
        length = len(tokens) - start
        if denoiser.settings.is_autoregressive:
            masks = Masks(is_masked=torch.ones(1, length, dtype=torch.bool), weight=torch.ones(1), is_exact=True)
        else:
            key, scheme = state.request.key, config.masks
            masks = draw_masks(length, samples, key=key, number=number, seed=config.seed, scheme=scheme, most=most)
        drawn.append(None if masks.is_exact and number > 0 else masks)
    return drawn


def _run_round(
    running: Sequence[_Running],
    draws: Sequence[Sequence[Masks | None]],
    config: LikelihoodConfig,
    score: Scorer,
    *,
    num_units: int,
) -> None:
    """Score one round of samples of many requests together."""
    asked = [
        Part(tokens=tokens, is_masked=masks.is_masked, context_len=len(state.request.context))
        for state, drawn in zip(running, draws, strict=True)
        for (tokens, _), masks in zip(state.parts, drawn, strict=True)
        if masks is not None
    ]
    scores = iter(score(asked))
    for state, drawn in zip(running, draws, strict=True):
        units = []
        for part, masks in enumerate(drawn):
            if masks is None:
                units.append(state.units[0][part][:1].expand(num_units))
                continue
            found = next(scores)
            state.num_likeliest += int(found[..., 1].sum())
            state.forwards += len(found) * (2 if config.cfg_scale else 1)
            units.append(units_of(found[..., 0], masks, num_units, control=config.control))
        state.units.append(units)


def _finish(state: _Running, *, is_autoregressive: bool) -> LogLikelihood:
    is_greedy = state.num_likeliest == len(state.request.continuation) if is_autoregressive else None
    parts = [[round_[i] for round_ in state.units] for i in range(len(state.parts))]
    estimates = [mean_and_variance(rounds) for rounds in parts]
    return LogLikelihood(
        nats=sum(mean for mean, _ in estimates),
        standard_error=math.sqrt(sum(variance for _, variance in estimates)),
        num_tokens=len(state.request.continuation),
        forwards=state.forwards,
        is_greedy=is_greedy,
    )
