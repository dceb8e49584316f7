"""The public face: a loaded diffusion language model that generates, infills and streams."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from redraft.errors import unknown_name
from redraft.layouts import Layout
from redraft.loglikelihood import LikelihoodConfig, LogLikelihood, Request, loglikelihoods
from redraft.models.denoiser import Denoiser
from redraft.models.encoder_decoder import EncoderDecoder
from redraft.models.load import load_denoiser
from redraft.models.masks import first_position
from redraft.prompts import Prompt, as_batch, encode, encode_pair, encode_with_holes, row_keys
from redraft.sampling.canvas import Canvas, Status, build_canvas
from redraft.sampling.completion import CompiledConstraint
from redraft.sampling.config import SamplingConfig, with_saved
from redraft.sampling.constrain import Constrained
from redraft.sampling.constraints import Constraint, identity
from redraft.sampling.forward import Session
from redraft.sampling.guidance import Guide, Processors
from redraft.sampling.loop import Sampler, Step, denoise
from redraft.sampling.policies import Blocks, GridBlocks
from redraft.sampling.token_bytes import leading_space, token_bytes
from redraft.sampling.trace import Recorder, RowTrace

_OF_A_LENGTH = ("block_size", "steps", "steps_per_block", "forwards")
"""Saved settings that rest on the length of a new text, and say nothing of holes."""
MAX_COMPILED = 16
"""The most constraints that a model keeps prepared."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` and `infill` return, one entry per prompt."""

    tokens: list[Tensor]
    """New tokens only, 1-D; for `infill` the filled holes."""
    sequences: list[Tensor]
    """Prompt and new tokens, or the whole infilled row, 1-D."""
    texts: list[str] | None
    """Decoded `tokens` (`generate`) or `sequences` (`infill`), without special tokens; None without a tokenizer."""
    forwards: list[int]
    """Forward passes each row took part in."""
    seconds: float
    trace: list[RowTrace] | None = None
    """Every decision, where asked for."""


def load(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    adapter: str | Path | None = None,
    family: str | None = None,
    compile: bool = False,
) -> "LanguageModel":
    """Load a diffusion language model from a folder or the hub; see `models.load.load_denoiser` for the errors.

    `compile` is for long runs with equal shapes: see `Denoiser.compiled`.
    """
    denoiser, tokenizer = load_denoiser(
        path,
        mask_token_id=mask_token_id,
        dtype=dtype,
        device=device,
        quantization=quantization,
        adapter=adapter,
        family=family,
    )
    if eos_token_id is None:
        eos_token_id = _end_token_id(denoiser.model.config, tokenizer)
    if compile:
        denoiser = denoiser.compiled()
    return LanguageModel(denoiser=denoiser, tokenizer=tokenizer, eos_token_id=eos_token_id)


def _end_token_id(config: Any, tokenizer: Any) -> int | None:
    """Find what ends a text: the tokenizer's EOS, BERT's separator, or the config's first EOS."""
    if tokenizer is not None:
        return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ends = getattr(config, "eos_token_id", None)
    ends = config.get_text_config().eos_token_id if ends is None else ends
    return ends[0] if isinstance(ends, list) else ends


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A denoiser with its tokenizer. Without a tokenizer everything works on token ids."""

    denoiser: Denoiser
    tokenizer: Any = None
    eos_token_id: int | None = None
    _compiled: dict[Any, tuple[CompiledConstraint, Any]] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> Any:
        """The plain transformers model."""
        return self.denoiser.model

    @property
    def context_length(self) -> int | None:
        """Longest canvas the model was built for, in tokens."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if most is None else most - first_position(self.model.config)

    @property
    def saved_sampling(self) -> dict[str, Any]:
        """Settings that come with the checkpoint: the `generation` entry of its config.json."""
        return dict(getattr(self.model.config, "generation", None) or {})

    def sampling_config(self, **settings: Any) -> SamplingConfig:
        """Resolve settings as `generate` does: those given, over the checkpoint's own, over the defaults.

        Raises ValueError for names that are no settings, and for values that do not fit.
        """
        own = {"preset": "duo"} if self.denoiser.settings.process == "uniform" else {}
        return with_saved(own | self.saved_sampling, settings)

    @torch.no_grad()
    def logits(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        *,
        layout: Layout | str | tuple[str, int] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Predict every position, float32, shifted where the model asks for it.

        `attention_mask` is 1 for tokens and 0 for padding; `layout` is "full" or ("block-causal", block_size), by
        default the model's own.
        """
        device = self.denoiser.device
        segment_ids = None if attention_mask is None else attention_mask.long().to(device)
        chosen = None if layout is None else Layout.parse(layout)
        return self.denoiser.logits(input_ids.to(device), segment_ids=segment_ids, layout=chosen).float()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        trace: bool = False,
        guides: Sequence[Guide] = (),
        logits_processor: Sequence[Any] = (),
        constraint: Constraint | None = None,
        streamer: Any = None,
        **settings: Any,
    ) -> Generation:
        """Continue prompts: text, chat messages or token ids, one or several. Settings: `SamplingConfig`.

        Rows are independent: a prompt's tokens depend on its text, the seed and how many equal prompts stand before
        it, never on the rest of the batch. With `num_samples`, the rows of one prompt follow each other. `guides` and
        transformers' `logits_processor`s change the logits at the open positions (`sampling.guidance`); a `streamer` of
        transformers gets the decided tokens of one prompt in reading order, and the drafts if it has `put_draft`. A
        `constraint` (`redraft.Regex`, `JsonSchema`, `Choice`, ...) holds for every whole text.

        Raises ValueError for settings that do not fit, for prompts that do not leave room in the model's context, and,
        before the first forward, for a constraint that cannot be satisfied.
        """
        config = self.sampling_config(**settings)
        sampler = self._sampler(config, guides, logits_processor, self._constrained(constraint, config))
        rows = self._encode_all(prompts, config)
        canvas = self._canvas_after(rows, config.max_new_tokens, sampler)
        steps = self._denoise(canvas, rows, config, sampler)
        if streamer is not None:
            steps = self._feed(streamer, rows, config, steps)
        return self._collect(canvas, rows, config, steps, trace=trace, is_infilling=False)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        guides: Sequence[Guide] = (),
        logits_processor: Sequence[Any] = (),
        constraint: Constraint | None = None,
        session: Session | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """Continue prompts as `generate` does, and yield every step of the loop.

        A `session` keeps the exact cache of one conversation from one call to the next.
        """
        config = self.sampling_config(**settings)
        sampler = self._sampler(config, guides, logits_processor, self._constrained(constraint, config))
        rows = self._encode_all(prompts, config)
        canvas = self._canvas_after(rows, config.max_new_tokens, sampler)
        return self._denoise(canvas, rows, config, sampler, session)

    def infill(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        trace: bool = False,
        guides: Sequence[Guide] = (),
        logits_processor: Sequence[Any] = (),
        constraint: Constraint | None = None,
        **settings: Any,
    ) -> Generation:
        """Fill holes: `[MASK:n]` in a text (n tokens), or mask tokens in token ids. Settings: `SamplingConfig`.

        A `constraint` holds for the text of the hole, of which there is one then.

        Raises ValueError where a prompt has no hole.
        """
        if isinstance(self.denoiser, EncoderDecoder):
            raise ValueError(f"{self.model.config.model_type} writes behind its prompt; it cannot fill holes.")
        given = {name: None for name in _OF_A_LENGTH if name in self.saved_sampling} | settings
        size = given.get("block_size")  # blocks of holes lie on the grid: no length need be a multiple of them
        config = self.sampling_config(**given | {"block_size": None})
        mask_token_id = self.denoiser.settings.mask_token_id
        encoded = [
            encode_with_holes(self.tokenizer, prompt, mask_token_id=mask_token_id)
            for prompt in as_batch(prompts)
            for _ in range(config.num_samples)
        ]
        rows, is_hole = [row for row, _ in encoded], [holes for _, holes in encoded]
        for row, holes in encoded:
            if not holes.any():
                raise ValueError(
                    "nothing to fill: mark holes as [MASK:n], n tokens each, or by mask tokens in token ids."
                )
            self._check_length(len(row))
        config = config.for_infilling(num_holes=max(int(holes.sum()) for holes in is_hole))
        constrained = self._constrained(constraint, config, is_infilling=True)
        sampler = self._sampler(config, guides, logits_processor, constrained)
        if config.steps is None and config.forwards is None:
            sampler = replace(sampler, steps=None)  # as many as a row has holes, whatever stands beside it
        if size is not None:
            sampler = replace(sampler, frontier=GridBlocks(size=size), is_grid_from_prompt=False)
        elif isinstance(sampler.frontier, Blocks):  # there is no prompt whose end could begin a grid
            sampler = replace(sampler, frontier=GridBlocks(size=sampler.frontier.size), is_grid_from_prompt=False)
        canvas = self._build_canvas(rows, is_hole)
        steps = self._denoise(canvas, rows, config, sampler)
        return self._collect(canvas, rows, config, steps, trace=trace, is_infilling=True)

    def loglikelihood(self, context: Prompt, continuation: Prompt, **settings: Any) -> LogLikelihood:
        """Bound log p(continuation | context), in nats with its standard error. Settings: `LikelihoodConfig`.

        Raises ValueError where the two do not fit into the model's context together.
        """
        given, asked = self.encode_pair(context, continuation)
        self._check_length(len(given) + len(asked))
        for name in settings:
            if name not in LikelihoodConfig.__dataclass_fields__:
                raise unknown_name("setting", name, LikelihoodConfig.__dataclass_fields__)
        config = LikelihoodConfig(**settings)
        return loglikelihoods(self.denoiser, [Request(context=given, continuation=asked)], config)[0]

    def encode(self, prompt: Prompt) -> Int[Tensor, "seq"]:
        """Turn text or chat messages into token ids. Raises ValueError without a tokenizer or its chat template."""
        return encode(self.tokenizer, prompt)

    def encode_pair(self, context: Prompt, continuation: Prompt) -> tuple[Int[Tensor, "c"], Int[Tensor, "l"]]:
        """Turn a context and its continuation into token ids as their text together is tokenized."""
        return encode_pair(self.tokenizer, context, continuation)

    def decode(self, token_ids: Tensor | list[int]) -> str:
        """Turn token ids into text without special tokens. Raises ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; use token ids.")
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _encode_all(self, prompts: Prompt | Sequence[Prompt], config: SamplingConfig) -> list[Tensor]:
        return [row for prompt in as_batch(prompts) for row in [self.encode(prompt)] * config.num_samples]

    def _collect(
        self,
        canvas: Canvas,
        rows: list[Tensor],
        config: SamplingConfig,
        steps: Iterator[Step],
        *,
        trace: bool,
        is_infilling: bool,
    ) -> Generation:
        start = time.perf_counter()
        recorder = Recorder()
        if trace:
            recorder.start(canvas)
        finals: list[tuple[Tensor, Tensor]] = [(canvas.tokens[i], canvas.status[i]) for i in range(len(rows))]
        forwards = [0] * len(rows)
        for step in steps:
            if trace:
                recorder.add(step)
            for i, row in _finished(step):
                finals[row] = (step.canvas.tokens[i], step.canvas.status[i])
                forwards[row] = step.index + 1
        if is_infilling:
            sequences = [tokens[status != Status.PAD].cpu() for tokens, status in finals]
            new = [tokens[status == Status.COMMITTED].cpu() for tokens, status in finals]
        else:
            new = [self.new_tokens(tokens, status, config) for tokens, status in finals]
            sequences = [torch.cat([row, tokens]) for row, tokens in zip(rows, new, strict=True)]
        shown = sequences if is_infilling else new
        return Generation(
            tokens=new,
            sequences=sequences,
            texts=[cut_text(self.decode(tokens), config.stop) for tokens in shown]
            if self.tokenizer is not None
            else None,
            forwards=forwards,
            seconds=time.perf_counter() - start,
            trace=recorder.traces() if trace else None,
        )

    def compile(self, constraint: Constraint, *, is_infilling: bool = False) -> CompiledConstraint:
        """Prepare a constraint for this model's vocabulary, once. A hole has no end token: what fits fills it.

        Raises ValueError without a tokenizer, and for what can never be satisfied.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so its tokens have no text to constrain; load one with it.")
        if not isinstance(constraint, Constraint):
            raise ValueError(f"a constraint must be a redraft.Regex, JsonSchema, Choice, ...; got {constraint!r:.200}.")
        eos_token_id = None if is_infilling else self.eos_token_id
        key = (identity(constraint), id(self.tokenizer), len(self.tokenizer), eos_token_id, is_infilling)
        if key not in self._compiled:
            compiled = constraint.compile(
                token_bytes(self.tokenizer),
                eos_token_id=eos_token_id,
                leading_space="text" if is_infilling else leading_space(self.tokenizer),
            )
            while len(self._compiled) >= MAX_COMPILED:
                self._compiled.pop(next(iter(self._compiled)))
            # What a key names by its id is kept, so that no other object gets the id.
            self._compiled[key] = compiled, (constraint, self.tokenizer)
        return self._compiled[key][0]

    def _constrained(
        self, constraint: Constraint | None, config: SamplingConfig, *, is_infilling: bool = False
    ) -> Constrained | None:
        if constraint is None:
            return None
        if isinstance(config.stop, tuple):
            raise ValueError(
                f"a constraint holds for the whole text, which stop strings would cut; got stop={config.stop!r}."
                " Leave them out, or put them into the constraint."
            )
        compiled = self.compile(constraint, is_infilling=is_infilling)
        return Constrained(compiled=compiled, num_tokens=None if is_infilling else config.max_new_tokens)

    def _sampler(
        self,
        config: SamplingConfig,
        guides: Sequence[Guide],
        logits_processor: Sequence[Any],
        constraint: Constrained | None = None,
    ) -> Sampler:
        sampler = config.sampler(self.denoiser.settings, eos_token_id=self.eos_token_id, decode=self.decode)
        if self.denoiser.settings.process == "uniform" and sampler.noise != "uniform":
            raise ValueError(
                f"preset {config.preset!r} starts from mask tokens, and this model was trained on uniform noise. Use "
                f"{self.saved_sampling.get('preset', 'a preset for it')!r}."
            )
        if self.denoiser.settings.process != "uniform" and sampler.noise == "uniform":
            raise ValueError(f"preset {config.preset!r} is for uniform noise, and this model was trained on masks.")
        if isinstance(config.stop, tuple) and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none. Use stop='eos' or None.")
        if logits_processor:
            guides = (*guides, Processors(processors=tuple(logits_processor)))
        return replace(sampler, guides=tuple(guides), constraint=constraint)

    def _denoise(
        self,
        canvas: Canvas,
        rows: list[Tensor],
        config: SamplingConfig,
        sampler: Sampler,
        session: Session | None = None,
    ) -> Iterator[Step]:
        keys = row_keys(rows, seed=config.seed).to(self.denoiser.device)
        return denoise(self.denoiser, canvas, sampler, row_keys=keys, session=session)

    def _feed(self, streamer: Any, rows: list[Tensor], config: SamplingConfig, steps: Iterator[Step]) -> Iterator[Step]:
        """Pass on to a streamer what is decided, in reading order, and the drafts where it takes them."""
        if len(rows) > 1:
            raise ValueError(f"a streamer follows one text; got {len(rows)} rows.")
        put_draft = getattr(streamer, "put_draft", None)
        streamer.put(rows[0])
        num_put = 0
        for step in steps:
            status = step.canvas.status[0]
            new = self.new_tokens(step.canvas.tokens[0], status, config)
            is_decided = (status[status != Status.GIVEN][: len(new)] == Status.COMMITTED).long()
            num_decided = int(is_decided.cumprod(dim=0).sum())  # sync: text leaves the device here
            if num_decided > num_put:
                streamer.put(new[num_put:num_decided])
                num_put = num_decided
            if put_draft is not None:
                shown = torch.where(step.canvas.is_noise[0], step.x_0[0], step.canvas.tokens[0])
                put_draft(shown[status != Status.GIVEN][: len(new)].cpu())
            yield step
        streamer.end()

    def new_tokens(
        self, tokens: Int[Tensor, "seq"], status: UInt8[Tensor, "seq"], config: SamplingConfig
    ) -> Int[Tensor, "new"]:
        """Cut a finished row of a canvas to its new tokens, up to and with the EOS that ended it."""
        new = tokens[(status != Status.PAD) & (status != Status.GIVEN)].cpu()[: config.max_new_tokens]
        if isinstance(config.stop, tuple):
            state = status[(status != Status.PAD) & (status != Status.GIVEN)].cpu()[: len(new)]
            num_decided = int((state == Status.COMMITTED).long().cumprod(dim=0).sum())
            lengths = range(1, num_decided + 1)
            is_stop = (n for n in lengths if any(string in self.decode(new[:n]) for string in config.stop))
            new = new[: next(is_stop, len(new))]
        if config.stop is None or self.eos_token_id is None:
            return new
        ends = (new == self.eos_token_id).nonzero()[:, 0]
        return new[: int(ends[0]) + 1] if len(ends) else new

    def _canvas_after(self, rows: list[Tensor], max_new_tokens: int, sampler: Sampler) -> Canvas:
        whole, is_noise = [], []
        for row in rows:
            length = len(row) + max_new_tokens
            if isinstance(sampler.frontier, Blocks):  # of DiffusionGemma: the canvases of others divide the length
                length = len(row) + -(-max_new_tokens // sampler.frontier.size) * sampler.frontier.size
            self._check_length(length)
            if isinstance(sampler.frontier, GridBlocks):  # the last block is a whole one; what is too much is cut off
                whole_blocks = -(-length // sampler.frontier.size) * sampler.frontier.size
                length = min(whole_blocks, self.context_length or whole_blocks)
            whole.append(torch.cat([row, row.new_zeros(length - len(row))]))
            is_noise.append(torch.arange(length) >= len(row))
        return self._build_canvas(whole, is_noise)

    def _build_canvas(self, rows: list[Tensor], is_noise: list[Tensor]) -> Canvas:
        mask_token_id = self.denoiser.settings.mask_token_id
        return build_canvas(rows, is_noise, noise_token_id=mask_token_id, device=self.denoiser.device)

    def _check_length(self, length: int) -> None:
        limit = self.context_length
        if limit is not None and length > limit:
            raise ValueError(
                f"prompt and new tokens must fit into the model's context of {limit} tokens; got {length}. "
                "Shorten the prompt or lower max_new_tokens."
            )


def cut_text(text: str, stop: str | tuple[str, ...] | None) -> str:
    """End a text before the first of the strings that stop it."""
    ends = [text.index(string) for string in stop if string in text] if isinstance(stop, tuple) else []
    return text[: min(ends, default=len(text))]


def _finished(step: Step) -> list[tuple[int, int]]:
    """Pair the places in the step's batch with the rows that ended there."""
    places = step.is_done.nonzero()[:, 0].tolist()  # sync: results leave the device here
    return [(place, int(step.rows[place])) for place in places]
