"""What trains a denoiser of thoughts: flow loss of the blocks, cross-entropy of the answer, when to stop."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.latent.sequence import Hidden, Latents, Part, ThoughtBatch, Tokens
from redraft.layouts import two_copy_mask
from redraft.processes.gaussian import AdaptiveTimes, GaussianDiffusion, LogitNormalTimes, UniformTimes
from redraft.processes.masked import MaskedDiffusion
from redraft.randomness import normal, uniform
from redraft.schedules import stratified_times

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class ThoughtObjective:
    """Weights of the losses and how training imitates sampling."""

    copies: int = 1
    """Noisy copies of every block that share one clean context."""
    self_conditioning: float = 0.5
    """Share of steps whose estimate of a first pass is fed to the second."""
    drop_prompt: float = 0.1
    """Share of rows whose prompt is withheld, for guidance."""
    context_noise: float = 0.1
    """Largest time of the noise on the clean blocks of half of the rows (exposure bias)."""
    joint: float = 0.1
    """Share of steps in which all blocks see each other and one of them is noisy: trains revision."""
    answer_weight: float = 0.2
    """Weight of the answer's cross-entropy, nats per token."""
    stop_weight: float = 0.1
    """Weight of the stop head's cross-entropy, nats per block."""
    times: Literal["logit-normal", "uniform", "adaptive"] = "logit-normal"
    """Density of the training times, stratified over the batch; adaptive: by the loss of each log-SNR so far."""
    time_mean: float = 1.0
    """Mean of the logit of logit-normal times; positive is noise-heavy."""
    time_std: float = 1.0
    """Standard deviation of the logit of logit-normal times."""

    def __post_init__(self) -> None:
        LogitNormalTimes(mean=self.time_mean, std=self.time_std)
        if self.copies < 1:
            raise ValueError(f"copies must be at least 1; got {self.copies}.")
        for name in ("answer_weight", "stop_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}. 0 leaves it out.")
        for name in ("self_conditioning", "drop_prompt", "joint", "context_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {getattr(self, name)}.")

    def density(self, model: Any) -> LogitNormalTimes | UniformTimes | AdaptiveTimes:
        """Build the density of the times, or return the one that the model learns."""
        if self.times == "adaptive":
            return model.times
        return UniformTimes() if self.times == "uniform" else LogitNormalTimes(mean=self.time_mean, std=self.time_std)

    def __call__(
        self,
        model: Any,
        batch: ThoughtBatch,
        *,
        seed: int,
        step: int,
        part: Part | None = None,
        wrapped: Any = None,
    ) -> dict[str, Tensor]:
        """Return the losses by name, `loss` their weighted sum. Noise is keyed by (seed, step, row).

        Of a `part` of a global batch they are its share in the means over the whole one.
        """
        part = part or Part.whole(batch)
        draws = _Draws(seed=seed, step=step, batch=batch, part=part)
        process, density = model.config.process, self.density(model)
        if isinstance(density, AdaptiveTimes):
            density.begin(step)
        is_joint = draws.coin(0) < self.joint
        sequence, noised = (_joint if is_joint else _two_copies)(self, model, process, batch, draws)
        latents = sequence.latents
        if draws.coin(1) < self.self_conditioning:
            with torch.no_grad():
                first = model.out(model(sequence.tokens, latents, sequence.mask).latents)
                guess = process.predict_x_0(first, latents.z_t, latents.t)
            latents = replace(latents, x_0=torch.where(sequence.is_noisy[..., None], guess, latents.x_0))
            sequence = replace(sequence, latents=latents)
        hidden = (wrapped or model)(sequence.tokens, latents, sequence.mask)
        is_counted = sequence.is_noisy & sequence.is_valid[:, -latents.t.shape[1] :]
        flow = process.loss(model.out(hidden.latents), noised)
        if isinstance(density, AdaptiveTimes):
            density.record(noised.t, flow, where=is_counted)
            flow = flow * density.importance(noised.t)
        num_noisy = part.total_rows if is_joint else self.copies * part.num_blocks
        losses = {"flow": (flow * is_counted).sum() / (num_noisy * batch.blocks.shape[2])}
        if not is_joint:
            losses["stop"] = _stop_loss(model, batch, hidden) / part.num_blocks
            if batch.answer.shape[1]:
                states = hidden.tokens[:, batch.prompt.shape[1] :]
                losses["answer"] = answer_loss(model, batch, part, states, sequence.answer_noised)
        weights = {"flow": 1.0, "stop": self.stop_weight, "answer": self.answer_weight}
        return losses | {"loss": sum((weights[name] * loss for name, loss in losses.items()), torch.zeros(()).to(flow))}


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One pass of the denoiser in training; `is_valid` covers [tokens | latents]."""

    tokens: Tokens
    latents: Latents
    mask: Bool[Tensor, "batch 1 seq seq"]
    is_noisy: Bool[Tensor, "batch latents"]
    is_valid: Bool[Tensor, "batch seq"]
    answer_noised: Any = None


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """Random numbers of one step, by purpose."""

    seed: int
    step: int
    batch: ThoughtBatch
    part: Part

    def coin(self, purpose: int) -> float:
        return float(uniform(self.seed, self.step, purpose))

    def rows(self, purpose: int, *shape: int) -> Tensor:
        """Uniform numbers (batch, *shape)."""
        return uniform(self.seed, self.step, purpose, *self._counters(shape))

    def normal(self, purpose: int, *shape: int) -> Tensor:
        """Standard normal numbers (batch, *shape), in the latents' dtype."""
        return normal(self.seed, self.step, purpose, *self._counters(shape)).to(self.batch.blocks.dtype)

    def stratified(self, purpose: int, columns: int) -> Tensor:
        """Uniform numbers (batch, columns), each column's spread evenly over the rows of the global batch."""
        rows, count = self.part.rows, self.part.total_rows
        places = torch.arange(columns, device=rows.device)
        drawn = uniform(self.seed, self.step, purpose, torch.arange(count, device=rows.device)[:, None], places)
        strata = drawn.argsort(dim=0)[rows].to(torch.float64)
        offset = uniform(self.seed, self.step, purpose + 100, places)
        return stratified_times(strata, total=count, offset=offset).clamp(1e-6, 1 - 1e-6).to(self.batch.blocks.dtype)

    def _counters(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        rows = self.part.rows
        places = torch.arange(torch.Size(shape).numel(), device=rows.device).view(shape)
        return rows.view(-1, *[1] * len(shape)), places


def prompt_tokens(
    prompt: Int[Tensor, "batch prompt"], is_withheld: Bool[Tensor, "batch"], is_prompt: Bool[Tensor, "batch prompt"]
) -> tuple[Tokens, Bool[Tensor, "batch prompt"]]:
    """Lay out a prompt, or the null prompt where it is withheld; return it and which positions may be seen."""
    positions = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)
    is_null = is_withheld[:, None].expand_as(prompt)
    return Tokens(ids=prompt, positions=positions, is_null=is_null), is_prompt | is_null


def _prompt_and_answer(
    objective: ThoughtObjective, model: Any, batch: ThoughtBatch, draws: _Draws
) -> tuple[Tokens, Tensor, Tensor, Any]:
    """Return the tokens, their block numbers, which of them are valid, and the answer as it was noised, if it was."""
    is_withheld = draws.rows(2, 1)[:, 0] < objective.drop_prompt
    tokens, is_seen = prompt_tokens(batch.prompt, is_withheld, batch.is_prompt)
    after = model.config.max_blocks + 1
    ids, positions, block, noised = answer_input(model, batch.answer, u=draws.rows(3, batch.answer.shape[1] + 1))
    blocks = torch.cat([torch.zeros_like(batch.prompt), after + block], dim=1)
    return (
        tokens.with_answer(ids, positions),
        blocks,
        torch.cat([is_seen, torch.ones_like(batch.is_answer)], dim=1),
        noised,
    )


def answer_input(
    model: Any, answer: Int[Tensor, "batch answer"], *, u: Float[Tensor, "batch answer_and_one"]
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Return the ids at the answer's positions, the positions, the order of their blocks, and the noised answer.

    An autoregressive answer is moved right by one, behind the end-of-text token. A masked one is noised, t = u[:, 0].
    """
    index = torch.arange(answer.shape[1], device=answer.device).expand_as(answer)
    positions = model.config.answer_position + index
    if model.config.answer == "autoregressive":
        start = torch.full_like(answer[:, :1], model.config.eos_token_id)
        return torch.cat([start, answer], dim=1)[:, : answer.shape[1]], positions, index, None
    noised = masked_process(model).corrupt(answer, u[:, 0].clamp(min=1e-3), u=u[:, 1:])
    return noised.x_t, positions, torch.zeros_like(index), noised


def masked_process(model: Any) -> MaskedDiffusion:
    """The process of a masked answer."""
    return MaskedDiffusion(mask_token_id=model.config.mask_token_id)


def _two_copies(
    objective: ThoughtObjective, model: Any, process: GaussianDiffusion, batch: ThoughtBatch, draws: _Draws
) -> tuple[Sequence, Any]:
    """Lay out [prompt | answer | clean blocks | noisy blocks ...]: every block given the true ones before it."""
    rows, count, size, dim = batch.blocks.shape
    copies = objective.copies
    tokens, token_block, is_token, answer_noised = _prompt_and_answer(objective, model, batch, draws)
    block = torch.arange(1, count + 1, device=batch.prompt.device).repeat(1 + copies)  # (M,)
    copy = torch.arange(1 + copies, device=block.device).repeat_interleave(count)
    t = objective.density(model)(draws.stratified(4, copies * count))  # (B, copies * count)
    noise_t = objective.context_noise * draws.rows(5, 1).to(t)  # half of the rows: clean
    clean_t = torch.where(draws.rows(6, 1) < 0.5, noise_t, 0.0).to(t)
    t = torch.cat([clean_t.expand(-1, count), t], dim=1).repeat_interleave(size, dim=1)
    x_0 = batch.blocks.repeat(1, 1 + copies, 1, 1).flatten(1, 2)
    noised = process.corrupt(x_0, t, eps=draws.normal(7, x_0.shape[1], dim))
    is_noisy = (copy > 0).repeat_interleave(size).expand(rows, -1)
    told = torch.where(is_noisy, t, 0.0)  # sampled blocks do not say how far off they are either
    latents = Latents(
        z_t=noised.z_t,
        x_0=torch.where(is_noisy[..., None], 0.0, noised.z_t),
        t=told,
        positions=model.config.latent_positions(block).flatten().expand(rows, -1),
    )
    is_valid = torch.cat([is_token, (block <= batch.num_blocks[:, None]).repeat_interleave(size, dim=1)], dim=1)
    mask = two_copy_mask(
        torch.cat([token_block, block.repeat_interleave(size).expand(rows, -1)], dim=1),
        torch.cat([torch.zeros_like(token_block), copy.repeat_interleave(size).expand(rows, -1)], dim=1),
        is_valid=is_valid,
    )
    sequence = Sequence(
        tokens=tokens, latents=latents, mask=mask, is_noisy=is_noisy, is_valid=is_valid, answer_noised=answer_noised
    )
    return sequence, noised


def _joint(
    objective: ThoughtObjective, model: Any, process: GaussianDiffusion, batch: ThoughtBatch, draws: _Draws
) -> tuple[Sequence, Any]:
    """Lay out [prompt | blocks], all of which see each other, one block of each row noisy: what revision does."""
    rows, count, size, dim = batch.blocks.shape
    is_withheld = draws.rows(2, 1)[:, 0] < objective.drop_prompt
    tokens, is_seen = prompt_tokens(batch.prompt, is_withheld, batch.is_prompt)
    block = torch.arange(1, count + 1, device=batch.prompt.device)
    chosen = 1 + (draws.rows(8, 1) * batch.num_blocks[:, None]).long()  # (B, 1)
    is_noisy = (block == chosen).repeat_interleave(size, dim=1)
    t = objective.density(model)(draws.stratified(4, 1)) * is_noisy
    noised = process.corrupt(batch.blocks.flatten(1, 2), t, eps=draws.normal(7, count * size, dim))
    latents = Latents(
        z_t=noised.z_t,
        x_0=torch.where(is_noisy[..., None], 0.0, noised.z_t),
        t=t,
        positions=model.config.latent_positions(block).flatten().expand(rows, -1),
    )
    is_valid = torch.cat([is_seen, (block <= batch.num_blocks[:, None]).repeat_interleave(size, dim=1)], dim=1)
    mask = joint_mask(is_seen, is_valid[:, is_seen.shape[1] :])
    return Sequence(tokens=tokens, latents=latents, mask=mask, is_noisy=is_noisy, is_valid=is_valid), noised


def joint_mask(
    is_prompt: Bool[Tensor, "batch prompt"], is_block: Bool[Tensor, "batch latents"]
) -> Bool[Tensor, "batch 1 seq seq"]:
    """The prompt sees itself; the blocks see it and each other. Given are the positions that may be seen."""
    group = torch.cat([torch.zeros_like(is_prompt, dtype=torch.int64), is_block.new_ones(is_block.shape).long()], dim=1)
    return two_copy_mask(group, torch.zeros_like(group), is_valid=torch.cat([is_prompt, is_block], dim=1))


def _stop_loss(model: Any, batch: ThoughtBatch, hidden: Hidden) -> Float[Tensor, ""]:
    """Sum over clean blocks of the cross-entropy of "this block is the last"."""
    rows, count, size, _ = batch.blocks.shape
    ends = hidden.latents[:, : count * size].unflatten(1, (count, size))
    logits = model.stop_logit(ends.flatten(0, 1)).view(rows, count).float()
    number = torch.arange(1, count + 1, device=logits.device)
    is_real = (number <= batch.num_blocks[:, None]).to(logits)
    is_last = (number == batch.num_blocks[:, None]).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, is_last, reduction="none")
    return (losses * is_real).sum()


def answer_loss(
    model: Any, batch: ThoughtBatch, part: Part, hidden: Float[Tensor, "batch answer width"], noised: Any
) -> Float[Tensor, ""]:
    """Nats per answer token of the global batch (for a masked answer, noised as given: a sample of the bound)."""
    logits = model.token_logits(hidden).float().flatten(0, 1)
    if noised is None:
        targets = torch.where(batch.is_answer, batch.answer, IGNORED)
        nats = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return nats / part.num_answer.clamp(min=1)  # no row of the step may have an answer
    where = noised.targets()
    nats = masked_process(model).loss(logits[where], noised.flatten()[where])
    return nats.sum() / (part.total_rows * batch.answer.shape[1])
