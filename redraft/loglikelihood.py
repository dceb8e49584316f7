"""log p(continuation | context): a lower bound by Monte Carlo, with its standard error; exact where the model is.

LLaDA's estimator (Eq. 6 of arXiv 2502.09992) draws how many of the L continuation tokens are masked, l ~ U{1 ... L},
then which, and weighs the masked tokens' log-probabilities by L / l:

    log p(x | c) >= E_l E_{M: |M| = l} [ L / l * sum over i in M of log p(x_i | c, x without M) ]

Three things make it cheaper at the same error: l is stratified over the samples; samples come in antithetic pairs, (l,
an order of the positions) and (L + 1 - l, the reverse of it); and the choices of one question share strata and orders,
so that their difference is known better than either. A continuation with few masks to it is summed over all of them. A
block-causal model's bound is the sum of its blocks' bounds, each given the clean blocks before.

An autoregressive model's likelihood is exact and takes one forward pass. A model of uniform noise has its process' own
bound (`processes.uniform`), over times stratified over the samples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.likelihood import CleanRows, NoiseKey, draw_noise, solve, whole_canvas
from redraft.models.denoiser import Denoiser
from redraft.processes.uniform import UniformDiffusion
from redraft.randomness import fold, uniform
from redraft.sampling.guidance import guided
from redraft.schedules import schedule_from_name

FIRST_ROUND = 16  # samples after which the choices of a question are compared for the first time
LOGITS_PER_BATCH = 2**26
DRAW_STRATUM, DRAW_ORDER = 0, 1


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How likelihoods are estimated."""

    samples: int = 128
    """Monte-Carlo samples per continuation (of a block-causal model: per block); an even number."""
    confidence: float | None = None
    """Stop sampling a multiple-choice question once its best choice is known with this probability, e.g. 0.99."""
    cfg_scale: float = 0.0
    """Guidance as in LLaDA: un + (scale + 1)(cond - un), where un sees a masked context; doubles the work."""
    exclude_mask: bool = True
    """Give the mask token probability 0; the published code of LLaDA leaves it in the softmax."""
    masks: Literal["antithetic", "stratified", "independent"] = "antithetic"
    """How masks are drawn; the others are there to be compared with."""
    batch_tokens: int | None = None
    """Tokens in one forward pass; by default 16384 on an accelerator, 2048 on a CPU, whose caches are small."""
    seed: int = 0
    """Seed of the masks."""

    def __post_init__(self) -> None:
        if self.samples < 4 or self.samples % 2:
            raise ValueError(f"samples must be an even number of at least 4; got {self.samples}.")
        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence is a probability in [0.5, 1); got {self.confidence}. Use 0.99.")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1; got {self.batch_tokens}.")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One continuation to be scored after its context; either may hold any token, the mask token too."""

    context: Int[Tensor, "c"]
    continuation: Int[Tensor, "l"]
    key: int = 0
    """Requests of equal key share their noise; the choices of one question should."""

    def __post_init__(self) -> None:
        if not len(self.continuation):
            raise ValueError("a continuation must hold at least one token; got none.")


@dataclass(frozen=True, kw_only=True)
class LogLikelihood:
    """A lower bound of log p(continuation | context) in nats, and the standard error of its estimate."""

    nats: float
    standard_error: float
    """Of the Monte Carlo alone; 0 where all masks were summed, and for autoregressive models."""
    num_tokens: int
    forwards: int
    """Rows that went through the model, two per sample under guidance."""
    is_greedy: bool | None = None
    """Whether each token is the likeliest after those before it; None but for autoregressive models."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Masks of a continuation and their weights: the bound is sum_r weight_r * sum of log p over mask r."""

    is_masked: Bool[Tensor, "samples l"]
    weight: Float[Tensor, "samples"]
    is_exact: bool = False


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One noised sequence to be scored."""

    tokens: Int[Tensor, "seq"]
    is_masked: Bool[Tensor, "seq"]
    context_len: int
    """What guidance hides; the earlier blocks of the continuation stay."""


@dataclass
class _Running:
    """The estimate of one request so far: for each part and round, the values of independent units."""

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

    Decided means best by plain and, where `lengths` are given, by length-normalised log-likelihood: every rival's
    paired difference is further from 0 than its t quantile, shared among the rivals and the looks (Bonferroni). Rivals
    that are beaten in both leave early. The choices of a question should have equal keys. A model of uniform noise
    takes all samples for each choice.
    """
    config = config or LikelihoodConfig()
    if denoiser.settings.process == "uniform":
        return [[_uniform_bound(denoiser, request, config) for request in choices] for choices in questions]
    running = [[_Running(request, _parts(request, denoiser)) for request in choices] for choices in questions]
    rounds = _rounds(config)
    for number, samples in enumerate(rounds):
        active = [state for choices in running for state in choices if state.is_open]
        _run_round(denoiser, active, config, samples=samples, number=number, most=rounds[0])
        if config.confidence is None:
            continue
        for q, choices in enumerate(running):
            if any(state.is_open for state in choices):
                scales = [[1.0] * len(choices), *([list(lengths[q])] if lengths else [])]
                _drop_decided(choices, scales, confidence=config.confidence, looks=len(rounds))
    is_autoregressive = denoiser.settings.is_autoregressive
    return [[_finish(r, is_autoregressive=is_autoregressive) for r in choices] for choices in running]


def sample_values(
    denoiser: Denoiser, request: Request, is_masked: Bool[Tensor, "samples l"], config: LikelihoodConfig
) -> Float[Tensor, "samples"]:
    """Evaluate L / l * sum of log p(x_i) over each given mask, nats: one sample of the bound each."""
    start = len(request.context)
    rows = _rows(torch.cat([request.context, request.continuation]), start, is_masked, context_len=start)
    nats = torch.stack(_score(denoiser, rows, config))[:, 0]
    return nats * is_masked.shape[1] / is_masked.sum(dim=1)


def draw_masks(
    length: int, samples: int, *, key: int, number: int = 0, seed: int = 0, scheme: str = "antithetic", most: int = 0
) -> Masks:
    """Draw the masks of one round, or list all of them where they are at most `most`.

    Equal (seed, key, number) give equal strata and orders at every length.
    """
    if 2 ** min(length, 62) - 1 <= most:
        return _all_masks(length)
    index = torch.arange(samples)
    stratum = uniform(seed, key, number, index, DRAW_STRATUM)
    order = uniform(seed, key, number, index[:, None], torch.arange(length), DRAW_ORDER).argsort(dim=1).argsort(dim=1)
    if scheme == "antithetic":
        half = samples // 2
        first = (index[:half] + stratum[:half]) / samples
        count = (first * length).long() + 1
        count = torch.cat([count, length + 1 - count])
        order = torch.cat([order[:half], length - 1 - order[:half]])
    else:
        u = (index + stratum) / samples if scheme == "stratified" else stratum
        count = (u * length).long() + 1
    return Masks(is_masked=order < count[:, None], weight=length / count / samples)


def _all_masks(length: int) -> Masks:
    """List every mask of a short continuation, weighed by its probability."""
    code = torch.arange(1, 2**length)
    is_masked = (code[:, None] >> torch.arange(length)) % 2 == 1
    count = is_masked.sum(dim=1)
    subsets = torch.tensor([math.comb(length, n) for n in range(length + 1)], dtype=torch.float64)
    return Masks(is_masked=is_masked, weight=1 / (count * subsets[count]), is_exact=True)


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


def _run_round(
    denoiser: Denoiser, running: list[_Running], config: LikelihoodConfig, *, samples: int, number: int, most: int
) -> None:
    """Score one round of samples of many requests together."""
    drawn: list[tuple[_Running, int, Masks]] = []
    rows: list[_Row] = []
    for state in running:
        state.units.append([torch.empty(0)] * len(state.parts))
        for part, (tokens, start) in enumerate(state.parts):
            masks = _masks(
                denoiser, state.request, len(tokens) - start, config, samples=samples, number=number, most=most
            )
            if masks.is_exact and number > 0:
                state.units[-1][part] = state.units[0][part][:1].expand(_num_units(samples, config))
                continue
            drawn.append((state, part, masks))
            rows += _rows(tokens, start, masks.is_masked, context_len=len(state.request.context))
    scores = iter(_score(denoiser, rows, config))
    for state, part, masks in drawn:
        found = torch.stack([next(scores) for _ in masks.weight])
        values = found[:, 0] * masks.weight
        state.num_likeliest += int(found[:, 1].sum())
        state.forwards += len(values) * (2 if config.cfg_scale else 1)
        state.units[-1][part] = _units(values, masks, _num_units(samples, config))


def _masks(
    denoiser: Denoiser, request: Request, length: int, config: LikelihoodConfig, *, samples: int, number: int, most: int
) -> Masks:
    """Draw the masks of a part; an autoregressive model is asked for all of it at once."""
    if denoiser.settings.is_autoregressive:
        everything = torch.ones(1, length, dtype=torch.bool)
        return Masks(is_masked=everything, weight=torch.ones(1, dtype=torch.float64), is_exact=True)
    return draw_masks(length, samples, key=request.key, number=number, seed=config.seed, scheme=config.masks, most=most)


def _uniform_bound(denoiser: Denoiser, request: Request, config: LikelihoodConfig) -> LogLikelihood:
    """Estimate the bound of uniform noise (arXiv 2412.10193): noise on the continuation alone, times stratified.

    The times' standard error is that of independent ones, which is too large. Raises ValueError under guidance.
    """
    if config.cfg_scale:
        raise ValueError(f"the bound of a uniform process knows no guidance; got cfg_scale {config.cfg_scale}. Use 0.")
    tokens = torch.cat([request.context, request.continuation]).to(denoiser.device)
    is_target = torch.arange(len(tokens), device=tokens.device) >= len(request.context)
    size = denoiser.model.config.vocab_size
    process = UniformDiffusion(vocab_size=size, schedule=schedule_from_name(denoiser.settings.schedule))
    most = config.batch_tokens or (2048 if denoiser.device.type == "cpu" else 16384)
    rows_per_batch = max(1, min(most // len(tokens), LOGITS_PER_BATCH // (size * len(request.continuation))))
    seed = int(fold(config.seed, request.key))
    found = []
    for index in torch.arange(config.samples).split(rows_per_batch):
        shape = (len(index), -1)
        rows = CleanRows(
            x_0=tokens.expand(shape),
            segment_ids=torch.ones_like(tokens).expand(shape),
            is_target=is_target.expand(shape),
            has_padding=False,
        )
        key = NoiseKey(seed=seed, step=0, rows=index, total_rows=config.samples)
        noised = draw_noise(process, rows.x_0, key, can_change=rows.is_target)
        with torch.no_grad():
            found.append(solve(denoiser, whole_canvas(process, noised, rows), num_rows=len(index))[1])
    nats = -torch.cat(found).double().cpu()
    return LogLikelihood(
        nats=float(nats.mean()),
        standard_error=float(nats.std() / math.sqrt(config.samples)),
        num_tokens=len(request.continuation),
        forwards=config.samples,
    )


def _num_units(samples: int, config: LikelihoodConfig) -> int:
    return samples // 2 if config.masks == "antithetic" else samples


def _units(values: Float[Tensor, "samples"], masks: Masks, num_units: int) -> Float[Tensor, "units"]:
    """Combine weighted samples into units whose mean is the estimate: antithetic pairs, single samples, or the sum."""
    if masks.is_exact:
        return values.sum().expand(num_units)
    return values.view(-1, num_units).sum(dim=0) * num_units


def _rows(tokens: Tensor, start: int, is_masked: Tensor, *, context_len: int) -> list[_Row]:
    padded = F.pad(is_masked, (start, 0))
    return [_Row(tokens=tokens, is_masked=mask, context_len=context_len) for mask in padded]


def _score(denoiser: Denoiser, rows: list[_Row], config: LikelihoodConfig) -> list[Tensor]:
    """Sum log p over the masked positions of each row, nats, and count those whose token is the likeliest; (2,) each.

    Rows of like length share forward passes.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    found: dict[int, Tensor] = {}
    vocab_size = denoiser.model.config.vocab_size
    most = config.batch_tokens or (2048 if denoiser.device.type == "cpu" else 16384)
    for batch in _batches([rows[i] for i in order], most_tokens=most, vocab_size=vocab_size):
        scores = _score_batch(denoiser, batch, config).cpu()
        for score in scores:
            found[order[len(found)]] = score
    return [found[i] for i in range(len(rows))]


def _batches(rows: list[_Row], *, most_tokens: int, vocab_size: int) -> Iterator[list[_Row]]:
    """Group rows, ordered by length, so that neither tokens nor logits outgrow a forward pass."""
    batch: list[_Row] = []
    num_masked = 0
    for row in rows:
        masked = int(row.is_masked.sum())
        too_long = (len(batch) + 1) * len(row.tokens) > most_tokens
        if batch and (too_long or (num_masked + masked) * vocab_size > LOGITS_PER_BATCH):
            yield batch
            batch, num_masked = [], 0
        batch.append(row)
        num_masked += masked
    if batch:
        yield batch


@torch.no_grad()
def _score_batch(denoiser: Denoiser, rows: list[_Row], config: LikelihoodConfig) -> Float[Tensor, "batch 2"]:
    """Run one batch: the head only at the masked positions. An autoregressive model sees the tokens before each."""
    device, mask_token_id = denoiser.device, denoiser.settings.mask_token_id
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([row.tokens for row in rows], batch_first=True).to(device)
    is_masked = pad([row.is_masked for row in rows], batch_first=True).to(device)
    lengths = torch.tensor([len(row.tokens) for row in rows], device=device)
    positions = torch.arange(tokens.shape[1], device=device)
    is_ragged = len(rows[0].tokens) < len(rows[-1].tokens)
    segment_ids = (positions < lengths[:, None]).long() if is_ragged else None
    where = is_masked.flatten().nonzero()[:, 0]  # sync: how many are masked is data
    is_hidden = is_masked & (positions == 0) if denoiser.settings.is_autoregressive else is_masked
    x_t = torch.where(is_hidden, mask_token_id, tokens)
    logits = denoiser.logits_at(where, x_t, segment_ids=segment_ids).float()
    if config.cfg_scale:
        context_len = torch.tensor([row.context_len for row in rows], device=device)
        blind = torch.where(positions < context_len[:, None], mask_token_id, x_t)
        unconditional = denoiser.logits_at(where, blind, segment_ids=segment_ids).float()
        logits = guided(logits, unconditional, scale=config.cfg_scale)
    if config.exclude_mask:
        logits[:, mask_token_id] = -torch.inf
    targets = tokens.flatten()[where]
    nats = -F.cross_entropy(logits, targets, reduction="none").double()
    found = torch.stack([nats, (logits.argmax(-1) == targets).double()], dim=1)
    return found.new_zeros(len(rows), 2).index_add(0, where // tokens.shape[1], found)


def _mean_and_variance(rounds: list[Tensor]) -> tuple[float, float]:
    """Average units over rounds; return it and its variance, by successive differences of neighbouring strata.

    Neighbours differ in the means of their strata too, so the variance is overestimated on average; the single estimate
    may well be too small, with few units above all (collapsed strata: Cochran, Sampling Techniques, Section 5A.12).
    Where all masks were summed the units are equal, and the variance is 0.
    """
    total = sum(len(units) for units in rounds)
    mean = sum(float(units.sum()) for units in rounds) / total
    variance = 0.0
    for units in rounds:
        squares = float((units[1:] - units[:-1]).square().sum()) / (2 * (len(units) - 1))
        variance += squares * len(units) / total**2
    return mean, variance


def _drop_decided(choices: list[_Running], scales: list[list[float]], *, confidence: float, looks: int) -> None:
    """Take out the choices that are beaten in every ranking; all of them once every ranking's best is known."""
    alive = [i for i, state in enumerate(choices) if state.is_open]
    tail = (1 - confidence) / (max(1, len(choices) - 1) * looks)
    beaten = [_beaten(choices, alive, scale, tail=tail) for scale in scales]
    for i in alive:
        choices[i].is_open = not all(i in losers for losers in beaten)
    if all(len(losers) == len(alive) - 1 for losers in beaten) and len(choices) > 1:
        for state in choices:
            state.is_open = False


def _beaten(choices: list[_Running], alive: list[int], scale: list[float], *, tail: float) -> set[int]:
    """Find the choices whose paired difference to the best one is beyond doubt."""
    scaled = {i: [units / scale[i] for units in choices[i].total()] for i in alive}
    best = max(alive, key=lambda i: _mean_and_variance(scaled[i])[0])
    quantile = _t_quantile(1 - tail, sum(len(units) - 1 for units in scaled[best]))
    found = set()
    for rival in set(alive) - {best}:
        mean, variance = _mean_and_variance([a - b for a, b in zip(scaled[best], scaled[rival], strict=True)])
        if mean > quantile * math.sqrt(variance):
            found.add(rival)
    return found


def _t_quantile(p: float, freedom: int) -> float:
    """Approximate a quantile of Student's t (the first terms of Cornish and Fisher's expansion)."""
    z = NormalDist().inv_cdf(p)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _finish(state: _Running, *, is_autoregressive: bool) -> LogLikelihood:
    is_greedy = state.num_likeliest == len(state.request.continuation) if is_autoregressive else None
    parts = [[round_[i] for round_ in state.units] for i in range(len(state.parts))]
    estimates = [_mean_and_variance(rounds) for rounds in parts]
    return LogLikelihood(
        nats=sum(mean for mean, _ in estimates),
        standard_error=math.sqrt(sum(variance for _, variance in estimates)),
        num_tokens=len(state.request.continuation),
        forwards=state.forwards,
        is_greedy=is_greedy,
    )


def rolling_requests(tokens: Int[Tensor, "n"], *, window: int, context: int = 0, key: int = 0) -> list[Request]:
    """Cut a text into disjoint continuations, each after at most `context` tokens, that fit into `window` together."""
    if not 0 <= context < window:
        raise ValueError(f"context must leave room in the window of {window} tokens; got {context}.")
    stride = window - context
    starts = [0, *range(window, len(tokens), stride)]
    ends = [*starts[1:], len(tokens)]
    return [
        Request(context=tokens[max(0, start - context) : start], continuation=tokens[start:end], key=key + i)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
