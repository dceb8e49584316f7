"""Estimates of log p(continuation | context): requests, results, and how they are computed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from redraft.likelihood.blocks import SharedBlocks, can_share
from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.masks import Masks, draw_masks
from redraft.likelihood.objectives.diffusion import Diffusion
from redraft.likelihood.problem import CleanRows, NoiseKey, problem_loss
from redraft.likelihood.spans import MaskedSpan, Sample, WholeRows, tokens_per_forward
from redraft.models.denoiser import Denoiser
from redraft.models.finite import explain_nan
from redraft.processes import process_class
from redraft.randomness import fold
from redraft.sampling.guidance import guided
from redraft.schedules import schedule_from_name

LOGITS_PER_FORWARD = 2**26

Predictor = WholeRows | SharedBlocks
"""Runs samples through a model: (span, mask) pairs -> logits of all masked tokens, one sample after the other."""


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

    @property
    def tokens(self) -> Int[Tensor, "seq"]:
        """Context and continuation."""
        return torch.cat([self.context, self.continuation])


@dataclass(frozen=True, kw_only=True)
class LogLikelihood:
    """A lower bound of log p(continuation | context) in nats, and the standard error of its estimate."""

    nats: float
    standard_error: float
    """Of the Monte Carlo alone; 0 where all masks were summed, and for causal models."""
    num_tokens: int
    forwards: int
    """Rows that went through the model, two per sample under guidance; of a block-causal model a row is a block."""
    is_greedy: bool | None = None
    """Whether each token is the likeliest after those before it; None but for causal models."""


def rolling_requests(tokens: Int[Tensor, "n"], *, window: int, key: int = 0) -> list[Request]:
    """Cut a text into disjoint windows, each of which is scored without a context."""
    windows = torch.split(tokens, window)
    return [Request(context=tokens[:0], continuation=one, key=key + i) for i, one in enumerate(windows)]


def loglikelihoods(
    denoiser: Denoiser, requests: Sequence[Request], config: LikelihoodConfig | None = None
) -> list[LogLikelihood]:
    """Estimate log p(continuation | context) of each request. Raises ValueError where the model returns NaN."""
    questions = score_questions(denoiser, [[request] for request in requests], config)
    return [choices[0] for choices in questions]


def score_questions(
    denoiser: Denoiser, questions: Sequence[Sequence[Request]], config: LikelihoodConfig | None = None
) -> list[list[LogLikelihood]]:
    """Estimate log p of the choices of questions, which should have equal keys.

    Raises ValueError, which names the damage, where the model returns NaN.
    """
    config, settings = config or LikelihoodConfig(), denoiser.settings
    has_choices = any(len(choices) > 1 for choices in questions)
    requests = list(chain(*questions))
    if process_class(settings.process).noise != "mask" and not settings.is_causal:
        results = [process_bound(denoiser, request, config) for request in requests]
    elif can_share(denoiser) and (has_choices or not settings.is_causal):
        results = [one for choices in questions for one in mask_bounds(denoiser, choices, config, shares_blocks=True)]
    else:
        results = mask_bounds(denoiser, requests, config, shares_blocks=False)
    for request, result in zip(requests, results, strict=True):
        if math.isnan(result.nats):
            raise explain_nan(denoiser, request.tokens[None].to(denoiser.device))
    rest = iter(results)
    return [[next(rest) for _ in choices] for choices in questions]


def mask_bounds(
    denoiser: Denoiser, requests: Sequence[Request], config: LikelihoodConfig, *, shares_blocks: bool
) -> list[LogLikelihood]:
    """Estimate the bounds of a model of masked noise, or the likelihoods of a causal one.

    `shares_blocks`: run the clean blocks of all requests once (`blocks`); the results are the same.
    """
    spans = [_spans(request, denoiser, config) for request in requests]
    flat, is_guided = list(chain(*spans)), config.cfg_scale > 0
    kind = SharedBlocks if shares_blocks else WholeRows
    plain = kind(denoiser, flat, hides_context=False)
    unguided = kind(denoiser, flat, hides_context=True) if is_guided else None
    scores = score_spans(flat, plain, unguided=unguided, cfg_scale=config.cfg_scale)
    results = []
    for request, parts in zip(requests, spans, strict=True):
        estimates = [span.masks.estimate(scores[span][..., 0]) for span in parts]
        num_likeliest = sum(int(scores[span][..., 1].sum()) for span in parts)
        is_greedy = num_likeliest == len(request.continuation)
        results.append(
            LogLikelihood(
                nats=sum(nats for nats, _ in estimates),
                standard_error=math.sqrt(sum(variance for _, variance in estimates)),
                num_tokens=len(request.continuation),
                forwards=sum(len(scores[span]) for span in parts) * (2 if is_guided else 1),
                is_greedy=is_greedy if denoiser.settings.is_causal else None,
            )
        )
    return results


def _spans(request: Request, denoiser: Denoiser, config: LikelihoodConfig) -> list[MaskedSpan]:
    """Cut a request into spans, each with an estimate of its own: the whole continuation, or each block of it.

    A causal model is asked for all tokens at once, except that a text's first token, which a mask token
    predicts, is a span of its own.
    """
    tokens, start, settings = request.tokens, len(request.context), denoiser.settings
    if settings.is_causal:
        ends = [1, len(tokens)] if start == 0 and len(tokens) > 1 else [len(tokens)]
    else:
        size = settings.block_size or len(tokens)
        ends = [*range((start // size + 1) * size, len(tokens), size), len(tokens)]
    spans = []
    for begin, end in zip([start, *ends[:-1]], ends, strict=True):
        if settings.is_causal:
            masks = Masks(is_masked=torch.ones(1, end - begin, dtype=torch.bool), weight=torch.ones(1), is_exact=True)
        else:
            masks = draw_masks(end - begin, config.num_samples, key=request.key, seed=config.seed)
        spans.append(MaskedSpan(tokens=tokens[:end], masks=masks, context_len=start))
    return spans


def score_spans(
    spans: Sequence[MaskedSpan], predict: Predictor, *, unguided: Predictor | None = None, cfg_scale: float = 0.0
) -> dict[MaskedSpan, Float[Tensor, "samples l 2"]]:
    """Evaluate log p of masked tokens, nats, and whether each is the likeliest; 0 at the others.

    The mask token has probability 0. `unguided` predicts without the context, for guidance.
    """
    scores = {span: torch.zeros(*span.masks.is_masked.shape, 2, dtype=torch.float64) for span in spans}
    for samples in _batches(spans, predict):
        logits = predict(samples)
        if unguided is not None:
            logits = guided(logits, unguided(samples), scale=cfg_scale)
        logits[:, predict.denoiser.settings.mask_token_id] = -torch.inf
        masks = [span.masks.is_masked[sample] for span, sample in samples]
        targets = [span.tokens[span.start :][mask] for (span, _), mask in zip(samples, masks, strict=True)]
        target = torch.cat(targets).to(logits.device)
        nats = -F.cross_entropy(logits, target, reduction="none").double()
        columns = torch.stack([nats, (logits.argmax(-1) == target).double()], dim=1).cpu()
        rows = torch.split(columns, [len(one) for one in targets])
        for (span, sample), mask, row in zip(samples, masks, rows, strict=True):
            scores[span][sample, mask] = row
    return scores


def _batches(spans: Sequence[MaskedSpan], predict: Predictor) -> Iterator[list[Sample]]:
    """Group samples, ordered by width, so that neither tokens nor logits exceed a forward pass."""
    max_masked = LOGITS_PER_FORWARD // predict.denoiser.model.config.vocab_size
    counts = [span.masks.is_masked.sum(dim=1).tolist() for span in spans]
    order = sorted((predict.width(span), i, n) for i, span in enumerate(spans) for n in range(len(counts[i])))
    batch: list[Sample] = []
    num_masked = 0
    for width, i, sample in order:
        num_masked += counts[i][sample]
        if batch and ((len(batch) + 1) * width > predict.max_tokens or num_masked > max_masked):
            yield batch
            batch, num_masked = [], counts[i][sample]
        batch.append((spans[i], sample))
    if batch:
        yield batch


def process_bound(denoiser: Denoiser, request: Request, config: LikelihoodConfig) -> LogLikelihood:
    """Estimate the bound of a process by its own loss: noise on the continuation alone, times stratified over samples.

    This works for every process; for masked noise `mask_bounds` has a much smaller error. The standard error is that
    of independent times, which is too large. Raises ValueError under guidance.
    """
    if config.cfg_scale:
        raise ValueError(
            f"guidance is not supported for a {denoiser.settings.process} process; got cfg_scale {config.cfg_scale}. "
            "Use 0."
        )
    tokens, count, settings = request.tokens.to(denoiser.device), config.num_samples, denoiser.settings
    vocab_size = denoiser.model.config.vocab_size
    schedule = schedule_from_name(settings.schedule)
    process = process_class(settings.process).build(
        mask_token_id=settings.mask_token_id, vocab_size=vocab_size, schedule=schedule
    )
    max_rows = LOGITS_PER_FORWARD // (vocab_size * len(request.continuation))
    rows_per_batch = max(1, min(tokens_per_forward(denoiser) // len(tokens), max_rows))
    is_target = torch.arange(len(tokens), device=tokens.device) >= len(request.context)
    seed = int(fold(config.seed, request.key))
    losses = []
    for index in torch.split(torch.arange(count), rows_per_batch):
        x_0 = tokens.expand(len(index), -1)
        rows = CleanRows(
            x_0=x_0, segment_ids=torch.ones_like(x_0), is_target=is_target.expand_as(x_0), has_padding=False
        )
        key = NoiseKey(seed=seed, step=0, rows=index, total_rows=count)
        with torch.no_grad():
            losses.append(problem_loss(denoiser, Diffusion(process=process).problem(rows, key), num_rows=len(index))[1])
    nats = -torch.cat(losses).double().cpu()
    return LogLikelihood(
        nats=float(nats.mean()),
        standard_error=float(nats.std() / math.sqrt(count)),
        num_tokens=len(request.continuation),
        forwards=count,
    )
