"""Thinking: blocks of thought are denoised one after another, each from noise, then an answer is read off them."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from redraft.errors import check_types, unknown_name
from redraft.latent.answers import Cache, no_latents, no_tokens, write_autoregressive, write_masked
from redraft.latent.autoencoder import TextAutoencoder
from redraft.latent.denoiser import LatentDenoiser
from redraft.latent.objective import joint_mask, prompt_tokens
from redraft.latent.repulsion import push_apart
from redraft.latent.sequence import Hidden, Latents
from redraft.latent.solvers import ESTIMATES, solver_from_name
from redraft.latent.thought import Estimate, Thought, TrainOfThought
from redraft.randomness import fold, normal

UNCHANGED = 2  # decodings in a row that must equal the one before for an early exit

Intervene = Callable[[int, Tensor], Tensor]
"""(number of the block from 1, latents of all rows) -> what is committed in their place."""


@dataclass(frozen=True, kw_only=True)
class ThinkingConfig:
    """The dials of thinking."""

    blocks: int | None = None
    """Most blocks of thought; by default as many as the model was built for."""
    steps: int = 10
    """Denoising steps for each block."""
    samples: int = 1
    """Trains of thought for each prompt."""
    solver: str = "dpm++2m"
    """ddim, ancestral, heun, midpoint (both: two forwards a step), dpm++2m or churn."""
    eta: float | None = None
    """Noise that ancestral adds, in [0, 1] (by default 1, DDPM's), or churn (its gamma, by default 0.5)."""
    cfg: float = 1.0
    """Classifier-free guidance: 1 is none, more follows the prompt more closely; doubles the work."""
    init_noise: float = 1.0
    """Standard deviation of the noise a block starts from."""
    early_exit: bool = False
    """Leave a block once its decoded text has not changed twice."""
    diversity: float = 0.0
    """Strength of the repulsion between the samples of one prompt."""
    revise: int = 0
    """Rounds of revision: the least stable block is denoised again, seeing all others."""
    revise_t: float = 0.5
    """Time up to which a revised block is noised, in (0, 1]."""
    force_blocks: bool = False
    """Think all blocks whatever the stop head says."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("blocks", "steps", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        for name in ("cfg", "diversity", "revise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, and finite; got {getattr(self, name)}.")
        if not 0 < self.init_noise < math.inf:
            raise ValueError(f"init_noise must be positive and finite; got {self.init_noise}. 1 is usual.")
        if not 0 < self.revise_t <= 1:
            raise ValueError(f"revise_t must be in (0, 1]; got {self.revise_t}. 0.5 is usual.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2**63); got {self.seed}.")
        solver_from_name(self.solver, eta=self.eta)


@dataclass(frozen=True)
class Thinker:
    """A denoiser of thoughts with its autoencoder and tokenizer."""

    denoiser: LatentDenoiser
    autoencoder: TextAutoencoder
    tokenizer: Any

    @torch.no_grad()
    def think(
        self,
        prompts: str | Sequence[str],
        *,
        trace: bool = False,
        intervene: Intervene | None = None,
        **settings: Any,
    ) -> list[list[TrainOfThought]]:
        """Think about prompts; returns the samples of each. Settings: `ThinkingConfig`.

        A row's noise is keyed by (seed, prompt, sample): it does not depend on the batch. `intervene` changes what is
        committed (necessity controls). Raises ValueError for settings that do not fit, more blocks than the model was
        built for, and prompts longer than trained.
        """
        for name in settings:
            if name not in ThinkingConfig.__dataclass_fields__:
                raise unknown_name("setting", name, ThinkingConfig.__dataclass_fields__)
        config = ThinkingConfig(**settings)
        shape = self.denoiser.config
        if config.cfg != 1 and not shape.can_guide:
            raise ValueError(f"this model was never trained without a prompt, as guidance needs; got cfg {config.cfg}.")
        if config.revise and not shape.can_revise:
            raise ValueError(f"this model was trained without steps of revision; got revise {config.revise}.")
        limit = shape.max_blocks
        if config.blocks is not None and config.blocks > limit:
            raise ValueError(f"blocks must be at most the {limit} the model was built for; got {config.blocks}.")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ValueError("there is no prompt; give at least one.")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"a prompt must be a text; got {wrong[0]!r}.")
        run = _Run(self, texts, config, is_traced=trace)
        for block in range(1, (config.blocks or limit) + 1):
            run.denoise_block(block)
            run.commit(block, intervene=intervene)
            if not run.is_thinking.any():  # sync: once per block
                break
        for index in range(config.revise):
            run.revise(index, intervene=intervene)
        return run.results()


class _Run:
    """The state of one call of `think`: rows are prompts times samples, and as many again with the prompt withheld."""

    def __init__(self, thinker: Thinker, prompts: list[str], config: ThinkingConfig, *, is_traced: bool) -> None:
        model = thinker.denoiser
        self.thinker, self.model, self.config, self.is_traced = thinker, model, config, is_traced
        encoded = [_encode_prompt(thinker, prompt) for prompt in prompts]
        digests = [hashlib.blake2b(repr(ids).encode(), digest_size=8).digest() for ids in encoded]
        prompt_keys = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
        self.keys = fold(config.seed, prompt_keys[:, None], torch.arange(config.samples)).flatten().to(model.device)
        rows = len(self.keys)
        prompt_of = torch.arange(len(prompts)).repeat_interleave(config.samples).repeat(1 if config.cfg == 1 else 2)
        width = model.config.prompt_tokens
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded])[prompt_of]
        lengths = torch.tensor([len(ids) for ids in encoded])[prompt_of]
        layout = (ids, torch.arange(len(ids)) >= rows, torch.arange(width) < lengths[:, None])
        self.tokens, self.is_seen = prompt_tokens(*(piece.to(model.device) for piece in layout))
        self.is_thinking = torch.ones(rows, dtype=torch.bool, device=model.device)
        self.forwards = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.blocks: list[Tensor] = []
        self.committed: list[Tensor] = []
        """What later blocks see: the blocks, or what `intervene` put in their place."""
        self.selected: tuple[Tensor, Cache] | None = None
        self.was_thinking: list[Tensor] = []
        self.instability: list[Tensor] = []
        self.steps: list[list[list[Estimate]]] = []
        self._prefill()

    def _prefill(self) -> None:
        """Compute the prompts' keys and values."""
        self.cache = Cache()
        nothing = no_latents(len(self.is_seen), self.model)
        mask = self.is_seen[:, None, None].expand(-1, 1, self.is_seen.shape[1], -1)
        self.cache.add(self.model(self.tokens, nothing, mask).keys_values, self.is_seen)

    def _with_doubles(self, active: Tensor) -> Tensor:
        """Add the rows without the prompt where there is guidance."""
        return active if self.config.cfg == 1 else torch.cat([active, active + len(self.keys)])

    def denoise_block(self, block: int) -> None:
        """Denoise the next block from noise, for the rows that still think."""
        self.steps.append([[] for _ in self.keys])
        z, process = self.config.init_noise * self._noise(block, 0), self.model.config.process
        times = process.schedule.even_times(self.config.steps, start=process.start())
        x_0, instability = self._solve(block, z, times, self.is_thinking, partial(self._estimate, block))
        self.blocks.append(x_0)
        self.instability.append(instability)

    def _solve(
        self,
        draw: int,
        z: Tensor,
        times: Tensor,
        is_active: Tensor,
        estimate: Callable[..., Tensor],
        *,
        place: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Drive the solver; rows that leave early keep their last estimate. Returns latents and their instability.

        `place`: the block that each row denoises, where it is not the same one.
        """
        queries = solver_from_name(self.config.solver, eta=self.config.eta)(
            self.model.config.process.schedule, z, times.to(z.device), noise=lambda i: self._noise(draw, i + 1)
        )
        x_0 = torch.zeros_like(z)
        is_done, change = ~is_active, torch.zeros(len(z), device=z.device)
        unchanged, texts = torch.zeros_like(self.forwards), torch.full((len(z), 1), -1, device=z.device)
        place = torch.zeros_like(self.forwards) if place is None else place
        question, asked = next(queries), 0
        active = (~is_done).nonzero()[:, 0]  # sync: rows that are done are not computed
        while len(active):
            z_t, t = question
            previous, x_0 = x_0, x_0.clone()
            x_0[active] = estimate(z_t[active], t, previous[active], active).to(x_0)
            self.forwards[active] += 1
            change[active] = (x_0 - previous)[active].square().mean((1, 2)).sqrt().to(change)
            if self.config.diversity and self.config.samples > 1:
                apart = push_apart(z_t, place.masked_fill(is_done, -1), samples=self.config.samples)
                x_0 = x_0 + self.config.diversity * t.to(z_t) * apart
            if self.is_traced or self.config.early_exit:
                written = self.thinker.autoencoder.decode(x_0)
                if self.is_traced and draw <= len(self.steps):  # revisions are not shown
                    for row in active.tolist():
                        self.steps[draw - 1][row].append(Estimate(float(t), self._text(written[row]), x_0[row]))
                if self.config.early_exit and asked % ESTIMATES.get(self.config.solver, 1) == 0:  # once a step
                    unchanged = torch.where((written == texts).all(1), unchanged + 1, 0)
                    texts = written
                    is_done = is_done | (unchanged >= UNCHANGED)
                    active = (~is_done).nonzero()[:, 0]  # sync
            asked += 1
            try:
                question = queries.send(x_0)
            except StopIteration as end:
                return torch.where(is_done[:, None, None], x_0, end.value).to(self.model.dtype), change
        return x_0.to(self.model.dtype), change

    def _estimate(self, block: int, z: Tensor, t: Tensor, x_0: Tensor, active: Tensor) -> Tensor:
        """Ask the denoiser for x_0 of a block given the cache, with guidance."""
        if self.selected is None or self.selected[0] is not active:  # anew where rows have left, and for each block
            self.selected = (active, self.cache.rows(self._with_doubles(active)))
        hidden = self._forward(block, z, x_0, t, self.selected[1])
        return self._guided(hidden.latents, z, t)

    def _guided(self, hidden: Tensor, z: Tensor, t: Tensor) -> Tensor:
        copies = len(hidden) // len(z)
        at = t.to(z).expand(z.shape[:2]).repeat(copies, 1)
        found = self.model.config.process.predict_x_0(self.model.out(hidden), z.repeat(copies, 1, 1), at)
        if copies == 1:
            return found
        with_prompt, without = found.chunk(2)
        return torch.lerp(without, with_prompt, self.config.cfg)

    def _forward(self, block: int, z: Tensor, x_0: Tensor, t: Tensor, cache: Cache) -> Hidden:
        """Run the positions of one block against a cache, of the same rows or of these and their doubles."""
        rows, size = len(cache), z.shape[1]
        z, x_0 = (piece.repeat(rows // len(z), 1, 1) for piece in (z, x_0))
        place = self.model.config.latent_positions(torch.tensor(block, device=z.device)).expand(rows, -1)
        latents = Latents(z_t=z, x_0=x_0, t=t.to(z).expand(rows, size), positions=place)
        own = torch.ones(rows, size, size, dtype=torch.bool, device=z.device)
        hidden: Hidden = self.model(no_tokens(rows, z.device), latents, cache.mask(own), cache.keys_values)
        return hidden

    def commit(self, block: int, *, intervene: Intervene | None) -> None:
        """Keep the keys and values of a finished block, and ask the stop head."""
        self.was_thinking.append(self.is_thinking)
        z = self.blocks[block - 1]
        kept = z if intervene is None else intervene(block, z)
        self.committed.append(kept)
        hidden = self._forward(block, kept, kept, torch.zeros((), device=z.device), self.cache)
        is_kept = self.is_thinking.repeat(len(self.cache) // len(z))
        self.cache.add(hidden.keys_values, is_kept[:, None].expand(-1, z.shape[1]))
        self.forwards += self.is_thinking
        if not self.config.force_blocks:
            ends = self.model.stop_logit(hidden.latents[: len(z)]) > 0
            self.is_thinking = self.is_thinking & ~ends

    def revise(self, index: int, *, intervene: Intervene | None) -> None:
        """Denoise each row's least stable block again, seeing all blocks; then commit them all anew."""
        whole, is_real = torch.stack(self.blocks, dim=1), torch.stack(self.was_thinking, dim=1)  # (R, B, n, d), (R, B)
        seen = torch.stack(self.committed, dim=1)
        instability = torch.stack(self.instability, dim=1)
        chosen = instability.masked_fill(~is_real, -1).argmax(1)
        rows, count, size, _ = whole.shape
        is_chosen = torch.arange(count, device=whole.device) == chosen[:, None]  # (R, B)
        places = self.model.config.latent_positions(torch.arange(1, count + 1, device=whole.device)).flatten()

        def estimate(z: Tensor, t: Tensor, x_0: Tensor, active: Tensor) -> Tensor:
            index = self._with_doubles(active)
            copies, is_open = len(index) // len(active), is_chosen[active]
            z_t, guess = (
                torch.where(is_open[..., None, None], piece[:, None], seen[active]).flatten(1, 2).repeat(copies, 1, 1)
                for piece in (z, x_0)
            )
            is_noisy, is_kept = (
                flag.repeat_interleave(size, 1).repeat(copies, 1) for flag in (is_open, is_real[active])
            )
            times = torch.where(is_noisy, t.to(z), 0.0)
            latents = Latents(z_t=z_t, x_0=guess, t=times, positions=places.expand(len(index), -1))
            mask = joint_mask(self.is_seen[index], is_kept)
            hidden = self.model(self.tokens.rows(index), latents, mask).latents
            return self._guided(hidden[is_noisy].view(len(index), size, -1), z, t)

        draw = 1000 + index  # apart from the noise of the blocks
        process = self.model.config.process
        start = min(self.config.revise_t, process.start())
        before = whole[torch.arange(rows, device=whole.device), chosen]
        at = whole.new_full((rows, size), start)
        z = process.corrupt(before, at, eps=self._noise(draw, 0)).z_t
        times = process.schedule.even_times(max(1, round(self.config.steps * start)), start=start)
        x_0, change = self._solve(draw, z, times, is_real[:, 0], estimate, place=chosen)
        self.blocks = list(torch.where(is_chosen[..., None, None], x_0[:, None], whole).unbind(1))
        self.instability = list(torch.where(is_chosen, change[:, None], instability).unbind(1))
        turns, is_cut = self.was_thinking, self.is_thinking
        self.was_thinking, self.committed = [], []
        self._prefill()
        for block, self.is_thinking in enumerate(turns, start=1):
            self.commit(block, intervene=intervene)
        self.is_thinking = is_cut  # the thoughts ended where they did, whatever the stop head says now

    def _noise(self, draw: int, step: int) -> Tensor:
        """Standard normal latents of every row, keyed by row, block and step."""
        config = self.model.config
        places = torch.arange(config.num_latents * config.latent_dim, device=self.keys.device)
        drawn = normal(self.keys[:, None], draw, step, places).to(self.model.dtype)
        return drawn.unflatten(1, (config.num_latents, config.latent_dim))

    def results(self) -> list[list[TrainOfThought]]:
        """Answer, and lay out the rows by prompt."""
        answers, is_cut, forwards = self._answers(), self.is_thinking.tolist(), self.forwards.tolist()
        texts = [self.thinker.autoencoder.decode(z) for z in self.blocks]
        is_real = torch.stack(self.was_thinking).tolist()
        trains = [
            TrainOfThought(
                thoughts=[
                    Thought(
                        latents=self.blocks[b][row],
                        text=self._text(texts[b][row]),
                        steps=self.steps[b][row],
                        instability=float(self.instability[b][row]),
                    )
                    for b in range(len(self.blocks))
                    if is_real[b][row]
                ],
                answer=answers[row],
                forwards=forwards[row],
                stop="blocks" if is_cut[row] else "stop head",
            )
            for row in range(len(self.keys))
        ]
        return [trains[i : i + self.config.samples] for i in range(0, len(trains), self.config.samples)]

    def _answers(self) -> list[str]:
        """Write the likeliest answers, token by token or, masked, surest token first."""
        if not self.model.config.answer_tokens:
            return [""] * len(self.keys)
        write = write_autoregressive if self.model.config.answer == "autoregressive" else write_masked
        ids = write(self.model, self.cache.rows(slice(len(self.keys))))
        self.forwards += self.model.config.answer_tokens
        return [self._text(row) for row in ids]

    def _text(self, ids: Tensor) -> str:
        """Decode up to the end-of-text token."""
        kept = ids.tolist()
        end = self.model.config.eos_token_id
        kept = kept[: kept.index(end)] if end in kept else kept
        return str(self.thinker.tokenizer.decode(kept, skip_special_tokens=True))


def _encode_prompt(thinker: Thinker, prompt: str) -> list[int]:
    ids = list(thinker.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    limit = thinker.denoiser.config.prompt_tokens
    if not 0 < len(ids) <= limit:
        raise ValueError(f"a prompt must have 1 to {limit} tokens, as in training; got {len(ids)}: {prompt[:60]!r}.")
    unknown = thinker.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        word = next(w for w in prompt.split() if unknown in thinker.tokenizer(w, add_special_tokens=False)["input_ids"])
        raise ValueError(f"{word!r} is no word of this model; got it in {prompt[:60]!r}. Write prompts as in its task.")
    return ids
