"""The third stage: answers after the model's own thoughts, because true ones are not there at sampling."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from redraft.latent.objective import answer_input, answer_loss, prompt_tokens
from redraft.latent.sequence import Hidden, Latents, Part, ThoughtBatch
from redraft.latent.solvers import SOLVERS, uniform_times
from redraft.layouts import two_copy_mask
from redraft.randomness import normal, uniform


@dataclass(frozen=True, kw_only=True)
class RolloutObjective:
    """Denoise all blocks in a few DDIM steps, the last ones with gradient; then the answer's nats."""

    steps: int = 5
    """Denoising steps for each block."""
    gradient_steps: int = 1
    """The last steps of each block that carry the answer's gradient; with 0 it stops at the thoughts."""
    weight: float = 1.0
    """Weight of the answer's cross-entropy, beside the teacher-forced losses."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.weight > 0:
            raise ValueError(f"rollout.steps must be at least 1 and weight positive; got {self.steps}, {self.weight}.")
        if not 0 <= self.gradient_steps <= self.steps:
            raise ValueError(f"rollout.gradient_steps must be in [0, {self.steps}]; got {self.gradient_steps}.")

    def __call__(
        self, model: Any, batch: ThoughtBatch, *, seed: int, step: int, part: Part | None = None
    ) -> dict[str, Tensor]:
        """Return {"rollout": nats per answer token, "loss": the same, weighted}."""
        part = part or Part.whole(batch)
        rows, count, size, dim = batch.blocks.shape
        index, places = part.rows[:, None], torch.arange(size * dim)
        own = batch.blocks[:, :0]
        for block in range(1, count + 1):
            draws = normal(seed, step, 11, index, block, places.to(index.device)).to(own).view(rows, size, dim)
            own = torch.cat([own, self._denoise(model, batch, own, draws)[:, None]], dim=1)
        u = uniform(seed, step, 12, index, torch.arange(batch.answer.shape[1] + 1, device=index.device))
        ids, positions, order, noised = answer_input(model, batch.answer, u=u)
        hidden = _run(model, batch, own, answer=(ids, positions, order))
        nats = answer_loss(model, batch, part, hidden.tokens[:, batch.prompt.shape[1] :], noised)
        return {"rollout": nats, "loss": self.weight * nats}

    def _denoise(
        self,
        model: Any,
        batch: ThoughtBatch,
        own: Float[Tensor, "batch before latents dim"],
        z: Float[Tensor, "batch latents dim"],
    ) -> Float[Tensor, "batch latents dim"]:
        """Make the next block: DDIM, self-conditioned."""
        process = model.config.process
        queries = SOLVERS["ddim"](process.schedule, z, uniform_times(self.steps).to(z.device), noise=lambda _: z)
        z, t = next(queries)
        x_0 = torch.zeros_like(z)
        for index in range(self.steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index + self.gradient_steps >= self.steps):
                hidden = _run(model, batch, own, z=z, x_0=x_0.detach(), t=t)
                x_0 = process.predict_x_0(model.out(hidden.latents[:, -z.shape[1] :]), z, t.to(z).expand(z.shape[:2]))
            if index + 1 < self.steps:
                z, t = queries.send(x_0)
        return x_0  # what DDIM's step to t = 0 returns


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
    is_real = (number <= batch.num_blocks[:, None]).repeat_interleave(size, dim=1)
    mask = two_copy_mask(block, torch.zeros_like(block), is_valid=torch.cat([is_seen, is_real], dim=1))
    return model(prompt, latents, mask)
