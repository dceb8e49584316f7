"""The public API: a loaded diffusion language model that generates, infills and streams."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from redraft.constraints.completion import CompiledConstraint
from redraft.constraints.kinds import Constraint, constraint_key
from redraft.constraints.token_bytes import LeadingSpace, leading_space, token_bytes
from redraft.errors import check_names
from redraft.layouts import Layout
from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.estimate import LogLikelihood, Request, loglikelihoods
from redraft.models.denoiser import Denoiser
from redraft.models.encoder_decoder import EncoderDecoder
from redraft.models.load import load_denoiser
from redraft.models.masks import first_position
from redraft.processes import process_class
from redraft.prompts import (
    Prompt,
    as_batch,
    encode,
    encode_pair,
    encode_with_holes,
    end_token_ids,
    filled_text,
    row_keys,
    shown_and_raw,
    special_token_ids,
    text_after,
    until_stop,
)
from redraft.sampling.batch import Batch, denoise
from redraft.sampling.canvas import Canvas, Status, build_canvas
from redraft.sampling.config import SamplingConfig, with_saved
from redraft.sampling.constrain import TextConstraint
from redraft.sampling.guidance import Guide, Processors
from redraft.sampling.policies.frontier import Blocks
from redraft.sampling.policies.stop import Enough
from redraft.sampling.presets import preset_from_name
from redraft.sampling.sampler import Sampler, build_sampler
from redraft.sampling.step import Step
from redraft.settings import Count, check_field
from redraft.trace.record import Recorder, RowTrace

FOR_A_LENGTH = ("block_size", "steps", "steps_per_block", "forwards")
"""Saved settings that depend on the length of a new text, so infilling does not use them."""
MAX_COMPILED = 16
"""Compiled constraints that a model keeps in memory."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` and `infill` return, one entry per prompt."""

    tokens: list[Tensor]
    """New tokens only, 1-D; for `infill` the filled holes."""
    sequences: list[Tensor]
    """Prompt and new tokens, or the whole infilled row, 1-D."""
    texts: list[str] | None
    """Without special tokens; None without a tokenizer. `generate`: what the new tokens add to the prompt's text, up
    to a stop string. `infill`: the whole text, in which the given text does not change."""
    forwards: list[int]
    """Forward passes that each row took part in; a step whose input did not change needs none."""
    seconds: float
    accepted: list[list[int]] | None = None
    """Of each row that speculates, in how many forwards 0, 1, 2, ... drafts were accepted."""
    trace: list[RowTrace] | None = None
    """Every decision, with trace=True."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows that are ready to be denoised, and how each ends: what `generate`, `infill` and a server have in common."""

    config: SamplingConfig
    rows: list[Tensor]
    """Token ids: the prompts, or whole rows with holes. With `num_samples`, those of one prompt follow each other."""
    canvas: Canvas
    sampler: Sampler
    row_keys: Int[Tensor, "batch"]
    finish: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, str | None]]
    """(row, its tokens, their status) -> new tokens, sequence and text, as `Generation` holds them."""
    is_infilling: bool = False
    dropped: str = ""
    """What decoding puts before the new text and is not part of it."""


def load(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    adapter: str | Path | None = None,
    family: str | None = None,
    block_size: int | None = None,
    compile: bool = False,
) -> "LanguageModel":
    """Load a diffusion language model from a folder or the hub; see `models.load.load_denoiser` for the errors.

    `redraft/NAME` loads a checkpoint that ships in this package (`redraft models` lists them). A text ends at any of
    `eos_token_id`: by default the tokenizer's EOS, the token that ends an answer in its chat template, and what
    config.json and generation_config.json list. `block_size` says how many tokens the blocks of a checkpoint have that
    does not say it. `compile` is for long runs with equal shapes: see `Denoiser.compiled`.
    """
    denoiser, tokenizer, raw = load_denoiser(
        path,
        mask_token_id=mask_token_id,
        dtype=dtype,
        device=device,
        quantization=quantization,
        adapter=adapter,
        family=family,
        block_size=block_size,
    )
    if block_size not in (None, denoiser.settings.block_size):
        raise ValueError(
            f"block_size is for checkpoints that do not state their blocks; got {block_size} for {path}, which has "
            f"{denoiser.settings.block_size}. Leave it out; generate and `redraft convert` take another block_size."
        )
    process_class(denoiser.settings.process)  # refuses an unknown name
    listed = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
    if listed is None:
        listed = end_token_ids(denoiser.model, tokenizer, raw=raw)
    if compile:
        denoiser = denoiser.compiled()
    return LanguageModel(denoiser=denoiser, tokenizer=tokenizer, eos_token_ids=tuple(listed))


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A denoiser with its tokenizer. Without a tokenizer everything works on token ids."""

    denoiser: Denoiser
    tokenizer: Any = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text, any of them; the first is the one that a constraint ends with."""
    _compiled: dict[Any, tuple[CompiledConstraint, Any]] = field(default_factory=dict, repr=False)
    _vocabularies: dict[Any, tuple[list[bytes | None], LeadingSpace, Any]] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> Any:
        """The plain transformers model."""
        return self.denoiser.model

    @property
    def process(self) -> Any:
        """The class of the noising process that the model was trained on. Raises ValueError for an unknown one."""
        return process_class(self.denoiser.settings.process)

    @property
    def context_length(self) -> int | None:
        """Longest canvas the model was built for, in tokens."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else positions - first_position(self.model.config)

    @property
    def saved_sampling(self) -> dict[str, Any]:
        """Settings that come with the checkpoint: the `generation` entry of its config.json."""
        return dict(getattr(self.model.config, "generation", None) or {})

    def sampling_config(self, **settings: Any) -> SamplingConfig:
        """Resolve settings as `generate` does: those given, over the checkpoint's own, over the defaults.

        Raises ValueError for names that are no settings, and for values that do not fit.
        """
        saved, has_grid = self.saved_sampling, self.denoiser.settings.block_size is not None
        return with_saved({"preset": self.process.default_preset} | saved, settings, has_grid=has_grid)

    def _config(self, settings: dict[str, Any], constraint: Constraint | None) -> SamplingConfig:
        """Resolve settings; under a constraint, stop strings of the checkpoint do not count."""
        if constraint is not None and self.saved_sampling.get("stop", "eos") not in ("eos", None):
            settings = {"stop": "eos"} | settings
        return self.sampling_config(**settings)

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

        Rows are independent: a prompt's tokens depend on its text, the seed and the number of equal prompts before
        it, never on the rest of the batch. With `num_samples`, the rows of one prompt follow each other. `guides` and
        transformers' `logits_processor`s change the logits at the open positions (`sampling.guidance`); a `streamer` of
        transformers gets the decided tokens of one prompt in reading order, and the drafts if it has `put_draft`. A
        `constraint` (`redraft.Regex`, `JsonSchema`, `Choice`, ...) holds for every whole text.

        Raises ValueError for settings that do not fit, for prompts that do not leave room in the model's context, and,
        before the first forward, for a constraint that cannot be satisfied.
        """
        given: dict[str, Any] = {"guides": guides, "logits_processor": logits_processor, "constraint": constraint}
        prepared = self.prepare(prompts, **given, **settings)
        steps = self._denoise(prepared)
        if streamer is not None:
            steps = self._feed(streamer, prepared.rows, prepared.config, steps)
        return _collect(prepared, steps, trace=trace)

    def prepare(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        guides: Sequence[Guide] = (),
        logits_processor: Sequence[Any] = (),
        constraint: Constraint | None = None,
        holes: bool = False,
        **settings: Any,
    ) -> Prepared:
        """Make rows of prompts, as `generate` does (with `holes`: as `infill` does), without denoising them.

        Raises the ValueErrors of `generate` and `infill`. It changes nothing: several threads may call it.
        """
        make = self._with_holes if holes else self._after_prompts
        prepared = make(prompts, settings, guides, logits_processor, constraint)
        if prepared.sampler.constraint is not None:
            prepared.sampler.constraint.check(prepared.canvas)
        return prepared

    def _denoise(self, prepared: Prepared, batch: Batch | None = None) -> Iterator[Step]:
        canvas, sampler, row_keys = prepared.canvas, prepared.sampler, prepared.row_keys
        return denoise(self.denoiser, canvas, sampler, row_keys=row_keys, batch=batch)

    def _after_prompts(
        self,
        prompts: Prompt | Sequence[Prompt],
        settings: dict[str, Any],
        guides: Sequence[Guide],
        logits_processor: Sequence[Any],
        constraint: Constraint | None,
    ) -> Prepared:
        """Lay out the new tokens behind the prompts."""
        config = self._config(settings, constraint)
        rows = [row for prompt in as_batch(prompts) for row in [self.encode(prompt)] * config.num_samples]
        sampler = self._sampler(config, guides, logits_processor, constraint, rows)
        if sampler.lookahead:
            sampler = replace(sampler, stop=Enough(num_tokens=config.max_new_tokens, otherwise=sampler.stop))
        # Word pieces are decoded with a space before them; a constraint holds for the text after that space.
        added = " " if constraint is not None and self._vocabulary()[1] == "added" else ""

        def finish(i: int, tokens: Tensor, status: Tensor) -> tuple[Tensor, Tensor, str | None]:
            new = self.new_tokens(tokens, status, config)
            text = None if self.tokenizer is None else self.new_text(rows[i], new, config).removeprefix(added)
            return new, torch.cat([rows[i], new]), text

        return Prepared(
            config=config,
            rows=rows,
            canvas=self._canvas_after(rows, config.max_new_tokens, sampler),
            sampler=sampler,
            row_keys=self._row_keys(rows, config),
            finish=finish,
            dropped=added,
        )

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        guides: Sequence[Guide] = (),
        logits_processor: Sequence[Any] = (),
        constraint: Constraint | None = None,
        batch: Batch | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """Continue prompts as `generate` does, and yield every step of the loop.

        A `batch` that is passed to every call keeps the exact cache of a conversation between the calls.
        """
        given: dict[str, Any] = {"guides": guides, "logits_processor": logits_processor, "constraint": constraint}
        return self._denoise(self.prepare(prompts, **given, **settings), batch)

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
        """Fill holes: `[MASK:n]` in a text (n tokens), or mask tokens in a text or ids. Settings: `SamplingConfig`.

        A `constraint` holds for the text of the hole, of which there is one then.

        Raises ValueError where a prompt has no hole.
        """
        given: dict[str, Any] = {"guides": guides, "logits_processor": logits_processor, "constraint": constraint}
        prepared = self.prepare(prompts, holes=True, **given, **settings)
        return _collect(prepared, self._denoise(prepared), trace=trace)

    def _with_holes(
        self,
        prompts: Prompt | Sequence[Prompt],
        settings: dict[str, Any],
        guides: Sequence[Guide],
        logits_processor: Sequence[Any],
        constraint: Constraint | None,
    ) -> Prepared:
        """Make noise of the holes in the prompts."""
        if isinstance(self.denoiser, EncoderDecoder):
            raise ValueError(f"{self.model.config.model_type} only continues its prompt; it cannot fill holes.")
        given = {name: None for name in FOR_A_LENGTH if name in self.saved_sampling} | settings
        size = given.get("block_size")  # blocks of holes lie on the grid, so it need not divide any length
        check_field("block_size", size, Count | None)
        config = self._config(given | {"block_size": None}, constraint)
        if preset_from_name(config.preset).blocks == "token":  # a number of drafts, if anything
            config, size = self._config(given, constraint), None
        mask_token_id = self.denoiser.settings.mask_token_id
        given_prompts = [prompt for prompt in as_batch(prompts) for _ in range(config.num_samples)]
        encoded = [encode_with_holes(self.tokenizer, prompt, mask_token_id=mask_token_id) for prompt in given_prompts]
        rows, is_hole = [self._in_vocabulary(row) for row, _ in encoded], [holes for _, holes in encoded]
        for row, holes in encoded:
            if not holes.any():
                raise ValueError(
                    "nothing to fill: mark holes as [MASK:n], n tokens each, or by mask tokens in token ids."
                )
            self._check_length(len(row))
        config = config.for_infilling(num_holes=max(int(holes.sum()) for holes in is_hole))
        befores = [row[: int(holes.long().argmax())] for row, holes in encoded]
        sampler = self._sampler(config, guides, logits_processor, constraint, befores, is_infilling=True)
        if config.steps is None and config.forwards is None:
            sampler = replace(sampler, steps=None)  # one for each token of a row's holes, whatever the other rows have
        if isinstance(sampler.frontier, Blocks):  # on the grid: there is no prompt whose end could begin the blocks
            frontier = replace(sampler.frontier, size=size or sampler.frontier.size, on_grid=True)
            sampler = replace(sampler, frontier=frontier, is_grid_from_prompt=False)

        def finish(i: int, tokens: Tensor, status: Tensor) -> tuple[Tensor, Tensor, str | None]:
            sequence = tokens[status != Status.PAD].cpu()
            has_text = self.tokenizer is not None
            text = filled_text(self.tokenizer, given_prompts[i], sequence, is_hole[i]) if has_text else None
            return tokens[status == Status.COMMITTED].cpu(), sequence, text

        return Prepared(
            config=config,
            rows=rows,
            canvas=self._build_canvas(rows, is_hole),
            sampler=sampler,
            row_keys=self._row_keys(rows, config),
            finish=finish,
            is_infilling=True,
        )

    def loglikelihood(self, context: Prompt, continuation: Prompt, **settings: Any) -> LogLikelihood:
        """Bound log p(continuation | context), in nats with its standard error. Settings: `LikelihoodConfig`.

        Raises ValueError where the two do not fit into the model's context together.
        """
        given, asked = self.encode_pair(context, continuation)
        self._check_length(len(given) + len(asked))
        check_names("setting", settings, LikelihoodConfig.setting_names())
        config = LikelihoodConfig(**settings)
        return loglikelihoods(self.denoiser, [Request(context=given, continuation=asked)], config)[0]

    def encode(self, prompt: Prompt, *, is_inside: bool = False) -> Int[Tensor, "seq"]:
        """Turn a prompt into token ids. `is_inside`: the text does not begin its row.

        Raises ValueError without a tokenizer or its chat template, and for ids outside the vocabulary.
        """
        return self._in_vocabulary(encode(self.tokenizer, prompt, is_inside=is_inside))

    def encode_pair(self, context: Prompt, continuation: Prompt) -> tuple[Int[Tensor, "c"], Int[Tensor, "l"]]:
        """Tokenize a context and its continuation as one text, and cut the ids at the boundary."""
        given, asked = encode_pair(self.tokenizer, context, continuation)
        return self._in_vocabulary(given), self._in_vocabulary(asked)

    def decode(self, token_ids: Tensor | list[int], *, after: Tensor | Sequence[int] = ()) -> str:
        """Turn token ids into text without special tokens, as they stand after others.

        Raises ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; use token ids.")
        return text_after(self.tokenizer, after, token_ids)

    def new_text(self, before: Tensor, new: Tensor, config: SamplingConfig) -> str:
        """Return what new tokens add to the text before them, up to a stop string; an end token adds nothing."""
        if config.stop is not None and len(new) and int(new[-1]) in self.eos_token_ids:
            new = new[:-1]
        if isinstance(config.stop, tuple):
            return until_stop(self.tokenizer, before, new, config.stop)[1]
        return self.decode(new, after=before)

    def _in_vocabulary(self, row: Int[Tensor, "seq"]) -> Int[Tensor, "seq"]:
        vocab_size = self.model.config.get_text_config().vocab_size
        if len(row) and int(row.max()) >= vocab_size:
            raise ValueError(
                f"token ids must be below the model's vocabulary of {vocab_size}; got {int(row.max())}."
                " Do they come from another model's tokenizer?"
            )
        return row

    def _vocabulary(self) -> tuple[list[bytes | None], LeadingSpace]:
        """Return the bytes of each token, and what decoding does with a first space: seconds of work, done once."""
        key = (id(self.tokenizer), len(self.tokenizer))
        if key not in self._vocabularies:  # the entry keeps the tokenizer alive, so no other one gets its id
            self._vocabularies[key] = token_bytes(self.tokenizer), leading_space(self.tokenizer), self.tokenizer
        return self._vocabularies[key][:2]

    def compile_constraint(
        self, constraint: Constraint, *, is_infilling: bool = False, is_start: bool = True
    ) -> CompiledConstraint:
        """Prepare a constraint for this model's vocabulary, once. A hole has no end token: the text fills it exactly.

        With no text before it (`is_start`), SentencePiece-like tokenizers drop a first space in decoding.

        Raises ValueError without a tokenizer, and for what can never be satisfied.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so its tokens have no text to constrain; load one with it.")
        if not isinstance(constraint, Constraint):
            raise ValueError(f"a constraint must be a redraft.Regex, JsonSchema, Choice, ...; got {constraint!r:.200}.")
        vocabulary, space = self._vocabulary()
        if (space == "added" and is_infilling) or (space == "stripped" and not is_start):
            space = "text"
        ends = self.eos_token_ids
        key = (constraint_key(constraint), id(self.tokenizer), len(self.tokenizer), ends, is_infilling, space)
        entry = self._compiled.get(key)
        if entry is None:
            pieces = list(vocabulary)
            for end in ends:  # an end token is no text
                pieces[end : end + 1] = [None] * len(pieces[end : end + 1])
            last = None if is_infilling or not ends else ends[0]
            compiled = constraint.compile(pieces, eos_token_id=last, leading_space=space)
            while len(self._compiled) >= MAX_COMPILED:
                self._compiled.pop(next(iter(self._compiled)), None)  # another thread may have been there
            # The key holds ids of these objects: they must stay alive, or another object could get the same id.
            entry = self._compiled[key] = compiled, (constraint, self.tokenizer)
        return entry[0]

    def _constrained(
        self, constraint: Constraint, config: SamplingConfig, befores: Sequence[Tensor], *, is_infilling: bool
    ) -> TextConstraint:
        """Prepare a constraint for rows that begin with these tokens."""
        if isinstance(config.stop, tuple):
            raise ValueError(
                f"a constraint holds for the whole text, which stop strings would cut; got stop={config.stop!r}."
                " Leave them out, or put them into the constraint."
            )
        silent = frozenset(() if self.tokenizer is None else special_token_ids(self.tokenizer))
        kinds = {
            is_start: self.compile_constraint(constraint, is_infilling=is_infilling, is_start=is_start)
            for is_start in {silent.issuperset(before.tolist()) for before in befores}
        }

        completion = _Completions(kinds=kinds, silent=silent)
        return TextConstraint(completion=completion, num_tokens=None if is_infilling else config.max_new_tokens)

    def _sampler(
        self,
        config: SamplingConfig,
        guides: Sequence[Guide],
        logits_processor: Sequence[Any],
        constraint: Constraint | None,
        befores: Sequence[Tensor],
        *,
        is_infilling: bool = False,
    ) -> Sampler:
        """Build the sampler of rows that begin with these tokens."""
        text_constraint = None
        if constraint is not None:
            text_constraint = self._constrained(constraint, config, befores, is_infilling=is_infilling)
        texts = None if self.tokenizer is None else _Texts(tokenizer=self.tokenizer)
        sampler = build_sampler(config, self.denoiser.settings, eos_token_ids=self.eos_token_ids, decode=texts)
        if sampler.noise != self.process.noise:
            raise ValueError(
                f"preset {config.preset!r} starts from {sampler.noise} noise, and this model was trained on "
                f"{self.process.noise} noise. Use {self.saved_sampling.get('preset', self.process.default_preset)!r}."
            )
        if isinstance(config.stop, tuple) and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none. Use stop='eos' or None.")
        if logits_processor:
            never = self.denoiser.settings.mask_token_id if sampler.noise == "mask" else None
            guides = (*guides, Processors(processors=tuple(logits_processor), never=never))
        return replace(sampler, guides=tuple(guides), constraint=text_constraint)

    def _row_keys(self, rows: list[Tensor], config: SamplingConfig) -> Int[Tensor, "batch"]:
        return row_keys(rows, seed=config.seed).to(self.denoiser.device)

    def _feed(self, streamer: Any, rows: list[Tensor], config: SamplingConfig, steps: Iterator[Step]) -> Iterator[Step]:
        """Pass decided tokens to a streamer in reading order, and drafts if it takes them."""
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
        """Cut a finished row of a canvas to its new tokens, up to and with the end token or stop string."""
        is_new = (status != Status.PAD) & (status != Status.GIVEN)
        new = tokens[is_new].cpu()[: config.max_new_tokens]
        if isinstance(config.stop, tuple):
            num_decided = int((status[is_new].cpu()[: len(new)] == Status.COMMITTED).long().cumprod(dim=0).sum())
            count = until_stop(self.tokenizer, tokens[status == Status.GIVEN], new[:num_decided], config.stop)[0]
            new = new[:count]
        if config.stop is None:
            return new
        ends = torch.isin(new, torch.tensor(self.eos_token_ids)).nonzero()[:, 0]
        return new[: int(ends[0]) + 1] if len(ends) else new

    def _canvas_after(self, rows: list[Tensor], max_new_tokens: int, sampler: Sampler) -> Canvas:
        whole, is_noise = [], []
        frontier = sampler.frontier
        size, on_grid = (frontier.size, frontier.on_grid) if isinstance(frontier, Blocks) else (None, True)
        if sampler.layout is not None and sampler.layout.within in ("causal", "reordered"):
            size = None  # noise sees no later noise, so a last block may be short
        for row in rows:
            self._check_length(len(row) + max_new_tokens)
            # The last block is a whole one, unless the context ends before it; the rest is cut off later.
            start = 0 if on_grid else len(row)
            length = start + _round_up(len(row) - start + max_new_tokens, size) + sampler.lookahead
            if self.denoiser.is_self_conditioned:  # its canvases are always whole
                self._check_length(length)
            length = min(length, self.context_length or length)
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


# These two are no closures, so that samplers of equal settings are equal and their rows are decided together.
@dataclass(frozen=True, kw_only=True)
class _Texts:
    """The texts of new tokens after those given, without special tokens and with them."""

    tokenizer: Any

    def __call__(self, before: Tensor, new: Tensor) -> tuple[str, str]:
        return shown_and_raw(self.tokenizer, before, new)


@dataclass(frozen=True, kw_only=True)
class _Completions:
    """The constraint on a text, by whether it begins its row: after nothing, or after silent tokens alone."""

    kinds: dict[bool, CompiledConstraint]
    silent: frozenset[int]

    def __call__(self, before: Tensor) -> CompiledConstraint:
        return self.kinds[self.silent.issuperset(before.tolist()) if len(self.kinds) > 1 else next(iter(self.kinds))]


def _collect(prepared: Prepared, steps: Iterator[Step], *, trace: bool) -> Generation:
    """Run all steps, and finish the rows."""
    canvas = prepared.canvas
    start, recorder = time.perf_counter(), Recorder()
    if trace:
        recorder.start(canvas)
    finals = list(zip(canvas.tokens, canvas.status, strict=True))
    forwards = [0] * len(finals)
    accepted: list[Counter[int]] = [Counter() for _ in finals]
    for step in steps:
        if trace:
            recorder.add(step)
        if step.num_accepted is not None:
            for row, number in zip(step.rows.tolist(), step.num_accepted.tolist(), strict=True):
                accepted[row][number] += 1
        for place in step.is_done.nonzero()[:, 0].tolist():  # sync: results leave the device here
            row = int(step.rows[place])
            finals[row] = (step.canvas.tokens[place], step.canvas.status[place])
            forwards[row] = int(step.num_forwards[place])
    new, sequences, texts = zip(*(prepared.finish(i, *final) for i, final in enumerate(finals)), strict=True)
    return Generation(
        tokens=list(new),
        sequences=list(sequences),
        texts=None if None in texts else list(texts),
        forwards=forwards,
        seconds=time.perf_counter() - start,
        accepted=[[one[n] for n in range(max(one) + 1)] for one in accepted] if any(accepted) else None,
        trace=recorder.traces() if trace else None,
    )


def _round_up(length: int, size: int | None) -> int:
    return length if size is None else -(-length // size) * size
