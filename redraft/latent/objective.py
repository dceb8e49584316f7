"""Losses of a denoiser of thoughts: teacher forcing, and rollouts, because sampling has no true thoughts.

The losses are the flow loss of the blocks, the cross-entropy of the answer, and that of when to stop.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.latent.config import ThoughtObjective
from redraft.latent.sequence import DenoiserOutput, LatentInputs, StepShare, ThoughtBatch, TokenInputs
from redraft.latent.solvers import ddim
from redraft.layouts import two_copy_mask
from redraft.processes.gaussian import times_from_uniform
from redraft.randomness import normal
from redraft.schedules import FlowSchedule

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainingSequence:
    """One pass of the denoiser in training: its inputs and targets."""

    inputs: tuple[TokenInputs, LatentInputs, Bool[Tensor, "batch 1 seq seq"]]
    x_0: Float[Tensor, "batch latents dim"]
    t: Float[Tensor, "batch latents"]
    """Times of the noise. A noised context is fed with time 0, as sampled blocks do not come with their error."""
    is_noisy: Bool[Tensor, "batch latents"]
    is_real: Bool[Tensor, "batch latents"]


@dataclass(frozen=True, kw_only=True)
class ForcedLoss:
    """Teacher forcing: every block is denoised given the true blocks before it, and the answer is given true blocks."""

    settings: ThoughtObjective = field(default_factory=ThoughtObjective)
    self_conditioning: float = 0.5
    """Share of steps with two passes, the second of which gets the estimate of the first."""
    drop_prompt: float = 0.1
    """Share of rows whose prompt is withheld, for guidance."""
    context_noise: float = 0.1
    """Largest time of the noise on the clean blocks of half of the rows (exposure bias)."""
    joint: float = 0.1
    """Share of steps in which all blocks see each other and one of them is noisy."""
    stop_weight: float = 0.1
    """Weight of the stop head's cross-entropy, nats per block."""

    def __call__(
        self, model: Any, batch: ThoughtBatch, share: StepShare, *, wrapped: Any = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the batch's share in the losses of the global batch by name; `loss` is their weighted sum."""
        is_joint = share.coin(0) < self.joint
        sequence = self.sequence(model, batch, share, is_joint=is_joint)
        tokens, latents, mask = sequence.inputs
        if share.coin(1) < self.self_conditioning:
            with torch.no_grad():
                guess = model.out(model(tokens, latents, mask).latents)
            latents = replace(latents, x_0=torch.where(sequence.is_noisy[..., None], guess, latents.x_0))
        output = (wrapped or model)(tokens, latents, mask)
        flow = model.config.process.loss(model.out(output.latents), sequence.x_0, sequence.t)
        num_noisy = share.total_rows if is_joint else share.num_blocks
        is_counted = sequence.is_noisy & sequence.is_real
        losses = {"flow": (flow * is_counted).sum() / (num_noisy * batch.blocks.shape[2])}
        if not is_joint:
            losses["stop"] = _stop_loss(model, batch, output) / share.num_blocks
            if batch.answer.shape[1]:
                losses["answer"] = answer_loss(model, batch, share, output)
        weights = {"flow": 1.0, "stop": self.stop_weight, "answer": self.settings.answer_weight}
        return losses | {"loss": sum((weights[name] * loss for name, loss in losses.items()), torch.zeros(()).to(flow))}

    def sequence(self, model: Any, batch: ThoughtBatch, share: StepShare, *, is_joint: bool) -> TrainingSequence:
        """Lay out [prompt | answer | clean blocks | noisy blocks]; or in a joint step [prompt | blocks], one noisy."""
        rows, count, size, _ = batch.blocks.shape
        number = torch.arange(1, count + 1, device=batch.prompt.device)
        columns = 1 if is_joint else count
        u = share.stratified(4, columns).to(batch.blocks.dtype)
        t = times_from_uniform(u, density=self.settings.times)  # (B, 1) or (B, count)
        copy = torch.zeros_like(number)
        if is_joint:
            chosen = 1 + (share.uniform(8, 1) * batch.num_blocks[:, None]).long()  # (B, 1)
            is_noisy = number == chosen
            t = t * is_noisy
        else:
            context_t = self.context_noise * share.uniform(5, 1).to(t)
            clean_t = torch.where(share.uniform(6, 1) < 0.5, context_t, 0.0).to(t)  # (B, 1)
            t = torch.cat([clean_t.expand(-1, count), t], dim=1)
            number, copy = number.repeat(2), torch.cat([copy, copy + 1])
            is_noisy = (copy > 0).expand(rows, -1)
        is_real = number <= batch.num_blocks[:, None]
        t, is_noisy, is_real = (of_block.repeat_interleave(size, dim=1) for of_block in (t, is_noisy, is_real))
        x_0 = batch.blocks[:, number - 1].flatten(1, 2)
        z_t = model.config.process.corrupt(x_0, t, eps=share.normal(7, *x_0.shape[1:]).to(x_0.dtype))
        inputs = lay_out(
            model,
            batch,
            z_t=z_t,
            guess=torch.where(is_noisy[..., None], 0.0, z_t),
            t=torch.where(is_noisy, t, 0.0),
            number=number,
            copy=copy,
            is_real=is_real,
            is_withheld=share.uniform(2, 1)[:, 0] < self.drop_prompt,
            is_joint=is_joint,
        )
        return TrainingSequence(inputs=inputs, x_0=x_0, t=t, is_noisy=is_noisy, is_real=is_real)


def lay_out(
    model: Any,
    batch: ThoughtBatch,
    *,
    z_t: Float[Tensor, "batch latents dim"],
    guess: Float[Tensor, "batch latents dim"],
    t: Float[Tensor, "batch latents"],
    number: Int[Tensor, "blocks"],
    is_real: Bool[Tensor, "batch latents"],
    copy: Int[Tensor, "blocks"] | None = None,
    is_withheld: Bool[Tensor, "batch"] | None = None,
    is_joint: bool = False,
) -> tuple[TokenInputs, LatentInputs, Bool[Tensor, "batch 1 seq seq"]]:
    """Lay out [prompt | answer | blocks], or, where all blocks see each other (`is_joint`), [prompt | blocks].

    The prompt counts as block 0, and each answer token as a block after the thoughts (`layouts.two_copy_mask`).
    """
    rows, size = len(z_t), model.config.num_latents
    copy = torch.zeros_like(number) if copy is None else copy
    is_withheld = torch.zeros_like(is_real[:, 0]) if is_withheld is None else is_withheld
    tokens, is_valid = prompt_tokens(batch.prompt, is_withheld, batch.is_prompt)
    block = torch.zeros_like(batch.prompt)
    if not is_joint:
        ids, positions = answer_input(model, batch.answer)
        order = positions - model.config.answer_position + model.config.max_blocks + 1
        tokens, block = tokens.with_answer(ids, positions), torch.cat([block, order], dim=1)
        is_valid = torch.cat([is_valid, torch.ones_like(batch.is_answer)], dim=1)
    group = torch.ones_like(number) if is_joint else number
    numbers, copies = (of_block.repeat_interleave(size).expand(rows, -1) for of_block in (group, copy))
    mask = two_copy_mask(
        torch.cat([block, numbers], dim=1),
        torch.cat([torch.zeros_like(block), copies], dim=1),
        is_valid=torch.cat([is_valid, is_real], dim=1),
    )
    positions = model.config.latent_positions(number).flatten().expand(rows, -1)
    return tokens, LatentInputs(z_t=z_t, x_0=guess, t=t, positions=positions), mask


def prompt_tokens(
    prompt: Int[Tensor, "batch prompt"], is_withheld: Bool[Tensor, "batch"], is_prompt: Bool[Tensor, "batch prompt"]
) -> tuple[TokenInputs, Bool[Tensor, "batch prompt"]]:
    """Lay out a prompt, or the null prompt where it is withheld; return it and which positions may be seen."""
    positions = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)
    is_null = is_withheld[:, None].expand_as(prompt)
    return TokenInputs(ids=prompt, positions=positions, is_null=is_null), is_prompt | is_null


def answer_input(
    model: Any, answer: Int[Tensor, "batch answer"]
) -> tuple[Int[Tensor, "batch answer"], Int[Tensor, "batch answer"]]:
    """Return what is fed at an answer's positions, the token before each of them, and these positions."""
    start = torch.full_like(answer[:, :1], model.config.eos_token_id)
    positions = model.config.answer_position + torch.arange(answer.shape[1], device=answer.device)
    return torch.cat([start, answer], dim=1)[:, : answer.shape[1]], positions.expand_as(answer)


def answer_loss(model: Any, batch: ThoughtBatch, share: StepShare, output: DenoiserOutput) -> Float[Tensor, ""]:
    """Return the batch's share in the nats per answer token of the global batch."""
    logits = model.token_logits(output.tokens[:, batch.prompt.shape[1] :]).float().flatten(0, 1)
    targets = torch.where(batch.is_answer, batch.answer, IGNORED)
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return nats / share.num_answer.clamp(min=1)  # 0 where no row of the step has an answer


def _stop_loss(model: Any, batch: ThoughtBatch, output: DenoiserOutput) -> Float[Tensor, ""]:
    """Sum over clean blocks the cross-entropy of "this block is the last"."""
    rows, count, size, _ = batch.blocks.shape
    ends = output.latents[:, : count * size].unflatten(1, (count, size))
    logits = model.stop_logit(ends.flatten(0, 1)).view(rows, count).float()
    number, last = torch.arange(1, count + 1, device=logits.device), batch.num_blocks[:, None]
    losses = F.binary_cross_entropy_with_logits(logits, (number == last).to(logits), reduction="none")
    return (losses * (number <= last)).sum()


def nearest(
    table: ThoughtBatch, batch: ThoughtBatch, thoughts: Float[Tensor, "batch blocks latents dim"]
) -> ThoughtBatch:
    """Replace the blocks and the answer of each row by those of the nearest row of `table` with the same prompt.

    Nearest is the train of thought with the least mean squared distance of its blocks to `thoughts`.
    """
    assert batch.same_prompt is not None
    number = table.num_blocks[batch.same_prompt]  # (B, A)
    is_real = torch.arange(thoughts.shape[1], device=thoughts.device) < number[..., None]
    distance = (table.blocks[batch.same_prompt] - thoughts[:, None]).square().mean((-1, -2)) * is_real  # (B, A, K)
    choice = (distance.sum(-1) / number).argmin(1, keepdim=True)
    row = batch.same_prompt.gather(1, choice)[:, 0]
    names = ("blocks", "num_blocks", "answer", "is_answer")
    return replace(batch, **{name: getattr(table, name)[row] for name in names})


@dataclass(frozen=True, kw_only=True)
class RolloutLoss:
    """Denoise all blocks in a few steps, and take as target the nearest train of thought in the data for the prompt.

    Every estimate is trained towards it, and the answer decoder towards its answer. A task may have many right
    thoughts: with any other target the answer decoder would learn to ignore the thoughts that were sampled.
    """

    steps: int = 5
    """DDIM steps for each block."""

    def __call__(
        self, model: Any, batch: ThoughtBatch, share: StepShare, *, table: ThoughtBatch
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the flow loss, the nats of the answer where there is a decoder (`rollout`), and their sum, `loss`.

        They are divided by the blocks and answer tokens of the original rows, not of the nearest rows.
        No gradient passes from one estimate to the next, nor from the answer into the thoughts.
        """
        rows, count, size, dim = batch.blocks.shape
        thoughts, estimates = batch.blocks[:, :0].flatten(1, 2), []
        places = torch.arange(size * dim, device=share.rows.device)
        for block in range(1, count + 1):
            noise = normal(share.seed, share.step, 11, share.rows[:, None], block, places)
            estimates.append(self.estimates(model, batch, thoughts, noise.to(thoughts).view(rows, size, dim)))
            thoughts = torch.cat([thoughts, estimates[-1][-1][1].detach()], dim=1)
        batch = nearest(table, batch, thoughts.unflatten(1, (count, size)))
        total = torch.zeros((), device=thoughts.device)
        for number, of_block in enumerate(estimates):
            x_0, is_real = batch.blocks[:, number], (number < batch.num_blocks)[:, None]
            for t, estimate in of_block:
                loss = model.config.process.loss(estimate, x_0, t.to(x_0).expand(x_0.shape[:2]))
                total = total + (loss * is_real).sum()
        losses = {"rollout_flow": total / (share.num_blocks * size * self.steps)}
        if batch.answer.shape[1]:
            is_real = torch.arange(count, device=thoughts.device) < batch.num_blocks[:, None]
            output = _forward(model, batch, thoughts, thoughts, torch.zeros_like(thoughts[..., 0]), is_real)
            losses["rollout"] = answer_loss(model, batch, share, output)
        return losses | {"loss": sum(losses.values(), torch.zeros((), device=thoughts.device))}

    def estimates(
        self,
        model: Any,
        batch: ThoughtBatch,
        before: Float[Tensor, "batch before dim"],
        z: Float[Tensor, "batch latents dim"],
    ) -> list[tuple[Tensor, Tensor]]:
        """Denoise the next block by DDIM, self-conditioned; return the time and the estimate of x_0 of every step.

        The last estimate is what DDIM's step to t = 0 returns. More blocks are denoised than a row has, as the nearest
        train of thought may be longer.
        """
        times = FlowSchedule().grid(self.steps).to(z.device)
        batch = replace(batch, answer=batch.answer[:, :0], is_answer=batch.is_answer[:, :0])
        is_real = torch.ones(len(z), 1 + before.shape[1] // z.shape[1], dtype=torch.bool, device=z.device)
        steps: list[tuple[Tensor, Tensor]] = []

        def denoise(z_t: Tensor, step: int) -> Tensor:
            guess = steps[-1][1].detach() if steps else torch.zeros_like(z_t)
            t = torch.cat([torch.zeros_like(before[..., 0]), times[step].to(z_t).expand(z_t.shape[:2])], dim=1)
            output = _forward(model, batch, torch.cat([before, z_t], 1), torch.cat([before, guess], 1), t, is_real)
            x_0: Tensor = model.out(output.latents[:, -z_t.shape[1] :])
            steps.append((times[step], x_0))
            return x_0.detach()

        ddim(denoise, z, FlowSchedule().alpha(times).to(z), FlowSchedule().sigma(times).to(z))
        return steps


def _forward(
    model: Any,
    batch: ThoughtBatch,
    z_t: Float[Tensor, "batch latents dim"],
    guess: Float[Tensor, "batch latents dim"],
    t: Float[Tensor, "batch latents"],
    is_real: Bool[Tensor, "batch blocks"],
) -> DenoiserOutput:
    """Run [prompt | answer | blocks], each block after those before it."""
    number = torch.arange(1, is_real.shape[1] + 1, device=z_t.device)
    is_real = is_real.repeat_interleave(model.config.num_latents, dim=1)
    inputs = lay_out(model, batch, z_t=z_t, guess=guess, t=t, number=number, is_real=is_real)
    output: DenoiserOutput = model(*inputs)
    return output
