"""The third stage: the model's own thoughts and the answer after them, as true ones are not there at sampling."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redraft.latent.objective import answer_input, answer_loss, prompt_tokens
from redraft.latent.sequence import Hidden, Latents, Part, ThoughtBatch
from redraft.latent.solvers import SOLVERS, solve
from redraft.layouts import two_copy_mask
from redraft.processes.gaussian import GaussianDiffusion
from redraft.randomness import normal, uniform


@dataclass(frozen=True, kw_only=True)
class Known:
    """The trains of thought of the training data, and their answers; `ThoughtBatch.alike` says which to choose from."""

    blocks: Float[Tensor, "rows blocks latents dim"]
    num_blocks: Int[Tensor, "rows"]
    answer: Int[Tensor, "rows answer"]
    is_answer: Bool[Tensor, "rows answer"]

    def nearest(self, batch: ThoughtBatch, own: Float[Tensor, "batch blocks latents dim"]) -> ThoughtBatch:
        """Put in place of each row that of `batch.alike` whose blocks have the least mean squared distance to `own`."""
        assert batch.alike is not None
        number = self.num_blocks[batch.alike]  # (B, A)
        is_real = torch.arange(own.shape[1], device=own.device) < number[..., None]
        distance = (self.blocks[batch.alike] - own[:, None]).square().mean((-1, -2)) * is_real  # (B, A, K)
        choice = (distance.sum(-1) / number).argmin(1, keepdim=True)
        row = batch.alike.gather(1, choice)[:, 0]
        columns = {name: getattr(self, name)[row] for name in ("blocks", "num_blocks", "answer", "is_answer")}
        return replace(batch, **columns)


@dataclass(frozen=True, kw_only=True)
class RolloutObjective:
    """Denoise all blocks in a few DDIM steps; take the nearest train of thought that the data has for the prompt.

    It is what every estimate on the way should have said, and its answer is what should be answered after them: where a
    task has many right thoughts, any other would teach the answer to look away from those that are there.
    """

    steps: int = 5
    """Denoising steps for each block."""
    weight: float = 1.0
    """Weight of the answer's cross-entropy, beside the teacher-forced losses; 0 without an answer decoder."""
    thought_weight: float = 1.0
    """Weight of the flow loss of the estimates at the model's own noisy latents."""
    answer_gradient: bool = False
    """Let the answer's gradient pass through the last estimate of each block; it may make thoughts unreadable."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"rollout.steps must be at least 1; got {self.steps}.")
        total = self.weight + self.thought_weight
        if not (min(self.weight, self.thought_weight) >= 0 and 0 < total < math.inf):
            raise ValueError(
                f"rollout.weight and rollout.thought_weight must be positive, or one of them 0; got {self.weight}, "
                f"{self.thought_weight}."
            )

    def __call__(
        self,
        model: Any,
        batch: ThoughtBatch,
        *,
        seed: int,
        step: int,
        part: Part | None = None,
        known: Known | None = None,
    ) -> dict[str, Tensor]:
        """Return {"own": flow loss, "rollout": nats of the answer, "loss": their weighted sum.

        They are divided by the blocks and answer tokens of the rows drawn, not of the nearest ones that stand for them.
        """
        part = part or Part.whole(batch)
        rows, count, size, dim = batch.blocks.shape
        index, places = part.rows[:, None], torch.arange(size * dim)
        own, estimates = batch.blocks[:, :0], []
        for block in range(1, count + 1):
            draws = normal(seed, step, 11, index, block, places.to(index.device)).to(own).view(rows, size, dim)
            found = self._denoise(model, batch, own, draws)
            own = torch.cat([own, found[-1].x_0[:, None]], dim=1)
            estimates.append(found)
        batch = batch if known is None else known.nearest(batch, own.detach())
        losses = {"loss": torch.zeros((), device=own.device)}
        if self.thought_weight:
            losses["own"] = _flow_loss(model.config.process, estimates, batch) / (part.num_blocks * size * self.steps)
            losses["loss"] = self.thought_weight * losses["own"]
        if self.weight:
            u = uniform(seed, step, 12, index, torch.arange(batch.answer.shape[1] + 1, device=index.device))
            ids, positions, order, noised = answer_input(model, batch.answer, u=u)
            seen = own if self.answer_gradient else own.detach()
            hidden = _run(model, batch, seen, answer=(ids, positions, order))
            states = hidden.tokens[:, batch.prompt.shape[1] :]
            losses["rollout"] = answer_loss(model, batch, part, states, noised)
            losses["loss"] = losses["loss"] + self.weight * losses["rollout"]
        return losses

    def _denoise(
        self,
        model: Any,
        batch: ThoughtBatch,
        own: Float[Tensor, "batch before latents dim"],
        z: Float[Tensor, "batch latents dim"],
    ) -> list["_Estimate"]:
        """Make the next block: DDIM, self-conditioned. No gradient passes from one estimate to the next."""
        process = model.config.process
        estimates: list[_Estimate] = []

        def estimate(z: Tensor, t: Tensor) -> Tensor:
            guess = estimates[-1].x_0.detach() if estimates else torch.zeros_like(z)
            is_last = len(estimates) + 1 == self.steps
            is_used = self.thought_weight > 0 or (is_last and self.answer_gradient)
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_used):
                hidden = _run(model, batch, own.detach(), z=z, x_0=guess, t=t)
                output = model.out(hidden.latents[:, -z.shape[1] :])
                x_0 = process.predict_x_0(output, z, t.to(z).expand(z.shape[:2]))
            estimates.append(_Estimate(output=output, z_t=z, t=t.to(z), x_0=x_0))
            return x_0.detach()

        times = process.schedule.even_times(self.steps, start=process.start()).to(z.device)
        solve(SOLVERS["ddim"], process.schedule, estimate, z, times, noise=lambda _: z)
        return estimates  # the last x_0 is what DDIM's step to t = 0 returns


@dataclass(frozen=True, kw_only=True)
class _Estimate:
    """What the model said of one block at one step."""

    output: Float[Tensor, "batch latents dim"]
    z_t: Float[Tensor, "batch latents dim"]
    t: Float[Tensor, ""]
    x_0: Float[Tensor, "batch latents dim"]


def _flow_loss(process: GaussianDiffusion, estimates: list[list[_Estimate]], batch: ThoughtBatch) -> Float[Tensor, ""]:
    """Sum the loss of all estimates of all real blocks, had the noisy latents been made from the batch's blocks."""
    total = torch.zeros((), device=batch.blocks.device)
    for number, found in enumerate(estimates):
        x_0, is_real = batch.blocks[:, number], (number < batch.num_blocks)[:, None]
        for estimate in found:
            noised = process.noised_from(x_0, estimate.t.expand(x_0.shape[:2]), z_t=estimate.z_t)
            total = total + (process.loss(estimate.output, noised) * is_real).sum()
    return total


def _run(
    model: Any,
    batch: ThoughtBatch,
    own: Float[Tensor, "batch before latents dim"],
    *,
    answer: tuple[Tensor, Tensor, Tensor] | None = None,
    z: Tensor | None = None,
    x_0: Tensor | None = None,
    t: Tensor | None = None,
) -> Hidden:
    """Run [prompt | answer, if any | own blocks | the noisy next block, if any]."""
    rows, done, size, _ = own.shape
    device = own.device
    withheld = torch.zeros(rows, dtype=torch.bool, device=device)
    prompt, is_seen = prompt_tokens(batch.prompt, withheld, batch.is_prompt)
    token_block, number = torch.zeros_like(batch.prompt), torch.arange(1, done + 1 + (z is not None), device=device)
    if answer is not None:
        ids, places, order = answer
        prompt = prompt.with_answer(ids, places)
        token_block = torch.cat([token_block, model.config.max_blocks + 1 + order], dim=1)
        is_seen = torch.cat([is_seen, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    clean = own.flatten(1, 2)
    pieces = [(clean, clean, torch.zeros(rows, clean.shape[1], dtype=own.dtype, device=device))]
    if z is not None and x_0 is not None and t is not None:
        pieces.append((z, x_0, t.to(z).expand(rows, size)))
    z_t, guess, times = (torch.cat(piece, dim=1) for piece in zip(*pieces, strict=True))
    positions = model.config.latent_positions(number).flatten().expand(rows, -1)
    latents = Latents(z_t=z_t, x_0=guess, t=times, positions=positions)
    block = torch.cat([token_block, number.repeat_interleave(size).expand(rows, -1)], dim=1)
    # thoughts go on past the row's own number of blocks: the nearest train of thought may be longer
    is_last = batch.num_blocks[:, None] if answer is not None else number[-1]
    is_real = (number <= is_last).expand(rows, -1).repeat_interleave(size, dim=1)
    mask = two_copy_mask(block, torch.zeros_like(block), is_valid=torch.cat([is_seen, is_real], dim=1))
    return model(prompt, latents, mask)
