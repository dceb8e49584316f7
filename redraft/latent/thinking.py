"""Thinking: blocks of thought are denoised one after another, each from noise, then an answer is decoded from them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from redraft.errors import check_names
from redraft.latent.answers import ThoughtCache, no_latents, no_tokens, write_answers
from redraft.latent.autoencoder import TextAutoencoder
from redraft.latent.config import ThinkingConfig
from redraft.latent.denoiser import LatentDenoiser
from redraft.latent.objective import prompt_tokens
from redraft.latent.sequence import DenoiserOutput, LatentInputs
from redraft.latent.solvers import SOLVERS
from redraft.randomness import fold, normal
from redraft.schedules import FlowSchedule

Intervene = Callable[[int, Tensor], Tensor]
"""(number of the block from 1, latents of all rows) -> the latents to commit instead."""


class BlockEstimate(NamedTuple):
    """The denoiser's estimate of a block at one step."""

    t: float
    text: str
    latents: Float[Tensor, "latents dim"]


@dataclass(frozen=True, kw_only=True)
class Thought:
    """One block of thought."""

    latents: Float[Tensor, "latents dim"]
    text: str
    steps: list[BlockEstimate]
    """The estimate at every step; empty unless traced."""


@dataclass(frozen=True, kw_only=True)
class TrainOfThought:
    """One sample: its thoughts, its answer, its cost."""

    thoughts: list[Thought]
    answer: str
    """Empty for a model without an answer decoder."""
    forwards: int
    """Passes of the denoiser this sample took part in: denoising, committing, answering."""
    stop: str
    """Why the thoughts ended: "stop head" or "blocks"."""

    @property
    def text(self) -> str:
        """The thoughts as text, in order."""
        return " ".join(thought.text for thought in self.thoughts)


def choose_sample(samples: Sequence[TrainOfThought]) -> TrainOfThought:
    """Choose the first sample with the commonest answer (with the commonest text where there are no answers)."""
    counts = Counter(sample.answer or sample.text for sample in samples)
    return max(samples, key=lambda sample: counts[sample.answer or sample.text])  # max returns the first of equals


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
        committed, to test whether thoughts are needed. Raises ValueError for settings that do not fit, more blocks than
        the model was built for, and prompts longer than in training.
        """
        check_names("setting", settings, ThinkingConfig.setting_names())
        config, shape = ThinkingConfig(**settings), self.denoiser.config
        if config.cfg_scale and not shape.can_guide:
            raise ValueError(f"this model was never trained without a prompt; got cfg_scale {config.cfg_scale}. Use 0.")
        if config.blocks is not None and config.blocks > (limit := shape.max_blocks):
            raise ValueError(f"blocks must be at most the {limit} the model was built for; got {config.blocks}.")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"there must be one or more prompts, all of them texts; got {texts!r:.80}.")
        run = _Run(self, texts, config, is_traced=trace)
        for block in range(1, (config.blocks or shape.max_blocks) + 1):
            run.denoise_block(block)
            run.commit(block, intervene)
            if not run.is_thinking.any():  # sync: once per block
                break
        return run.results()


class _Run:
    """The state of one call of `think`: rows are prompts times samples; under guidance the cache has them twice.

    The second half of the cache's rows has the prompt withheld.
    """

    def __init__(self, thinker: Thinker, prompts: list[str], config: ThinkingConfig, *, is_traced: bool) -> None:
        model = thinker.denoiser
        self.thinker, self.model, self.config, self.is_traced = thinker, model, config, is_traced
        encoded = [_encode_prompt(thinker, prompt) for prompt in prompts]
        digests = [hashlib.blake2b(repr(ids).encode(), digest_size=8).digest() for ids in encoded]
        prompt_keys = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
        sample = torch.arange(config.num_samples)
        self.keys = fold(config.seed, prompt_keys[:, None], sample).flatten().to(model.device)
        rows, self.branches = len(self.keys), 2 if config.cfg_scale else 1
        width, prompt_of = model.config.prompt_tokens, torch.arange(len(prompts)).repeat_interleave(len(sample))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded])[prompt_of].repeat(self.branches, 1)
        lengths = torch.tensor([len(ids) for ids in encoded])[prompt_of].repeat(self.branches)
        layout = (ids, torch.arange(len(ids)) >= rows, torch.arange(width) < lengths[:, None])
        tokens, is_seen = prompt_tokens(*(part.to(model.device) for part in layout))
        mask = is_seen[:, None, None].expand(-1, 1, width, -1)
        self.cache = ThoughtCache(model(tokens, no_latents(len(ids), model), mask).keys_values, is_seen)
        self.is_thinking = torch.ones(rows, dtype=torch.bool, device=model.device)
        self.forwards = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.blocks: list[Tensor] = []
        self.was_thinking: list[Tensor] = []
        self.steps: list[list[list[BlockEstimate]]] = []

    def denoise_block(self, block: int) -> None:
        """Denoise the next block from noise, for the rows that still think; the others get zeros."""
        config, schedule = self.config, FlowSchedule()
        times = schedule.grid(config.steps).to(self.keys.device)
        start = config.init_noise * self._noise(block)
        active = self.is_thinking.nonzero()[:, 0]  # sync: rows that are done are not computed
        cache = self.cache.rows(torch.cat([active + branch * len(self.keys) for branch in range(self.branches)]))
        x_0 = torch.zeros_like(start)
        steps: list[list[BlockEstimate]] = [[] for _ in self.keys]

        def denoise(z_t: Tensor, step: int) -> Tensor:
            nonlocal x_0
            t, previous = times[step], x_0
            x_0 = x_0.clone()
            output = self._forward(block, z_t[active], previous[active], t, cache)
            estimate = self.model.out(output.latents)
            if self.branches == 2:
                with_prompt, without = estimate.chunk(2)
                estimate = torch.lerp(without, with_prompt, config.cfg_scale + 1)
            x_0[active] = estimate.to(x_0)
            self.forwards[active] += 1
            if self.is_traced:
                texts = self.thinker.autoencoder.decode(x_0)
                for row in active.tolist():
                    steps[row].append(BlockEstimate(float(t), self._text(texts[row]), x_0[row]))
            return x_0

        z = SOLVERS[config.solver](denoise, start, schedule.alpha(times).to(start), schedule.sigma(times).to(start))
        self.blocks.append(z.where(self.is_thinking[:, None, None], 0.0).to(self.model.dtype))
        self.steps.append(steps)

    def _forward(self, block: int, z: Tensor, x_0: Tensor, t: Tensor, cache: ThoughtCache) -> DenoiserOutput:
        """Run the positions of one block against a cache that has its rows once, or twice under guidance."""
        rows, size = len(cache.is_valid), z.shape[1]
        z, x_0 = (part.repeat(rows // len(z), 1, 1) for part in (z, x_0))
        positions = self.model.config.latent_positions(torch.tensor(block, device=z.device)).expand(rows, -1)
        latents = LatentInputs(z_t=z, x_0=x_0, t=t.to(z).expand(rows, size), positions=positions)
        mask = cache.mask(torch.ones(size, size, dtype=torch.bool, device=z.device))
        output: DenoiserOutput = self.model(no_tokens(rows, z.device), latents, mask, cache.keys_values)
        return output

    def commit(self, block: int, intervene: Intervene | None) -> None:
        """Store the keys and values of a finished block, and ask the stop head."""
        self.was_thinking.append(self.is_thinking)
        z = self.blocks[block - 1]
        committed = z if intervene is None else intervene(block, z)
        output = self._forward(block, committed, committed, torch.zeros((), device=z.device), self.cache)
        is_valid = self.is_thinking.repeat(self.branches)
        self.cache.add(output.keys_values, is_valid[:, None].expand(-1, z.shape[1]))
        self.forwards += self.is_thinking
        if self.config.blocks is None:
            self.is_thinking = self.is_thinking & ~(self.model.stop_logit(output.latents[: len(z)]) > 0)

    def _noise(self, block: int) -> Tensor:
        """Standard normal latents of every row, keyed by row and block."""
        config = self.model.config
        places = torch.arange(config.num_latents * config.latent_dim, device=self.keys.device)
        noise = normal(self.keys[:, None], block, 0, places).to(self.model.dtype)
        return noise.unflatten(1, (config.num_latents, config.latent_dim))

    def results(self) -> list[list[TrainOfThought]]:
        """Answer, and group the rows by prompt."""
        texts = [self.thinker.autoencoder.decode(z) for z in self.blocks]
        was_thinking = torch.stack(self.was_thinking).tolist()
        answers = [""] * len(self.keys)
        if count := self.model.config.answer_tokens:
            answers = [self._text(row) for row in write_answers(self.model, self.cache.rows(slice(len(self.keys))))]
            self.forwards += count
        trains = []
        for row, answer in enumerate(answers):
            thoughts = [
                Thought(
                    latents=self.blocks[b][row],
                    text=self._text(texts[b][row]),
                    steps=self.steps[b][row],
                )
                for b in range(len(self.blocks))
                if was_thinking[b][row]
            ]
            stop = "blocks" if self.is_thinking[row] else "stop head"
            trains.append(TrainOfThought(thoughts=thoughts, answer=answer, forwards=int(self.forwards[row]), stop=stop))
        size = self.config.num_samples
        return [trains[i : i + size] for i in range(0, len(trains), size)]

    def _text(self, ids: Tensor) -> str:
        """Decode up to the end-of-text token."""
        tokens, end = ids.tolist(), self.model.config.eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        return str(self.thinker.tokenizer.decode(tokens, skip_special_tokens=True))


def _encode_prompt(thinker: Thinker, prompt: str) -> list[int]:
    ids = list(thinker.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    limit = thinker.denoiser.config.prompt_tokens
    if not 0 < len(ids) <= limit:
        raise ValueError(f"a prompt must have 1 to {limit} tokens, as in training; got {len(ids)}: {prompt[:60]!r}.")
    unknown = thinker.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        word = next(w for w in prompt.split() if unknown in thinker.tokenizer(w, add_special_tokens=False)["input_ids"])
        raise ValueError(f"the model does not know the word {word!r} of {prompt[:60]!r}. Write prompts as in its task.")
    return ids
