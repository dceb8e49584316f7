"""The bound of uniform noise: there is no mask to draw, the process' own bound is averaged over noise levels."""

import math

import torch

from redraft.likelihood.problem import CleanRows, NoiseKey, draw_noise, solve, whole_canvas
from redraft.likelihood.requests import LikelihoodConfig, LogLikelihood, Request
from redraft.likelihood.rows import LOGITS_PER_BATCH
from redraft.models.denoiser import Denoiser
from redraft.processes.uniform import UniformDiffusion
from redraft.randomness import fold
from redraft.schedules import schedule_from_name


def uniform_bound(denoiser: Denoiser, request: Request, config: LikelihoodConfig) -> LogLikelihood:
    """Estimate the bound of uniform noise (arXiv 2412.10193): noise on the continuation alone, times stratified.

    The times' standard error is that of independent ones, which is too large. Raises ValueError under guidance.
    """
    if config.cfg_scale:
        raise ValueError(f"the bound of a uniform process knows no guidance; got cfg_scale {config.cfg_scale}. Use 0.")
    tokens = torch.cat([request.context, request.continuation]).to(denoiser.device)
    is_target = torch.arange(len(tokens), device=tokens.device) >= len(request.context)
    size = denoiser.model.config.vocab_size
    process = UniformDiffusion(vocab_size=size, schedule=schedule_from_name(denoiser.settings.schedule))
    rows_per_batch = max(
        1,
        min(config.tokens_per_forward(denoiser) // len(tokens), LOGITS_PER_BATCH // (size * len(request.continuation))),
    )
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
