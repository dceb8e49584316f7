"""One step's call of the model: what is fed, what is cached, what is guided, and what need not be computed again."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.layouts import Layout
from redraft.models.cache import Slots
from redraft.models.denoiser import Denoiser
from redraft.models.encoder_decoder import SelfConditioning
from redraft.sampling.caching import Bounds, ExactPlanner, Planner
from redraft.sampling.guidance import guided, unconditional
from redraft.sampling.rows import Rows, bounds_of


@dataclass
class Session:
    """Keys and values that stay for the next turn of one conversation: its prompt goes on from these tokens.

    Used where the cache is exact and its blocks lie on the absolute grid; otherwise every turn begins anew.
    """

    slots: Slots | None = None
    tokens: Int[Tensor, "seq"] | None = None
    """Tokens whose keys and values are final in the slots."""
    layout: Layout | None = None
    """Attention that they were computed under."""


class Forward:
    """Calls the model: with or without a cache, with or without guidance, and not twice for the same input."""

    def __init__(
        self,
        denoiser: Denoiser,
        planner: Planner | None,
        *,
        num_positions: int,
        layout: Layout | None,
        cfg_scale: float,
        session: Session | None,
    ) -> None:
        self.denoiser, self.planner, self.layout, self.cfg_scale = denoiser, planner, layout, cfg_scale
        self.session = session if isinstance(planner, ExactPlanner) and not cfg_scale else None
        self.slots = Slots(num_positions)
        self.memo: tuple[Tensor, Tensor, Tensor] | None = None
        self.told: Tensor | None = None
        if denoiser.is_self_conditioned and cfg_scale:
            raise ValueError(f"this model has no unconditional branch; got cfg_scale={cfg_scale}. Use 0.")
        self.has_begun = False
        # What an approximate cache gives depends on when it was filled: there, every step is a forward.
        # What a self-conditioned model gives depends on the step before.
        is_exact = planner is None or isinstance(planner, ExactPlanner)
        self.is_repeatable = is_exact and not denoiser.is_self_conditioned
        self.num_forwards = 0

    def remember(self, logits: Float[Tensor, "n vocab"], rows: Rows) -> None:
        """Keep what a self-conditioned model is told in the next step."""
        if self.denoiser.is_self_conditioned:
            self.told = logits.view(len(rows.index), -1, logits.shape[-1])

    def keep(self, kept: Int[Tensor, "kept"], *, of: int) -> None:
        """Drop the other rows of a batch of `of`."""
        self.memo = None
        self.told = None if self.told is None else self.told[kept]
        if self.planner:
            self.planner.keep(kept.tolist())  # sync: only when rows leave
            self.slots.select(torch.cat([kept, kept + of]) if self.cfg_scale else kept)

    @torch.no_grad()
    def __call__(self, rows: Rows, where: Int[Tensor, "n"]) -> Float[Tensor, "n vocab"]:
        """Return the logits at the n positions of `where` (indices into batch * seq).

        Raises ValueError where several canvases of a model that takes one are open: a budget can ask for that.
        """
        tokens = rows.canvas.tokens
        if self.denoiser.is_self_conditioned and rows.block.ne(rows.last_block).any():  # sync
            raise ValueError("this model denoises one canvas after the other; give a forward for each, at least.")
        if not self.is_repeatable:
            return self._guided(rows, where)
        if not len(where):
            return tokens.new_zeros((0, self.denoiser.model.config.get_text_config().vocab_size), dtype=torch.float32)
        if self.memo and torch.equal(self.memo[0], tokens) and torch.equal(self.memo[1], where):  # sync
            return self.memo[2]
        logits = self._guided(rows, where)
        self.memo = (tokens, where, logits)
        return logits

    def _guided(self, rows: Rows, where: Int[Tensor, "n"]) -> Float[Tensor, "n vocab"]:
        self.num_forwards += 1
        tokens = rows.canvas.tokens
        if not self.cfg_scale:
            return self._logits(tokens, where, rows)
        hidden = unconditional(rows.canvas, self.denoiser.settings.mask_token_id)
        both = self._logits(torch.cat([tokens, hidden]), torch.cat([where, where + tokens.numel()]), rows)
        return guided(*both.chunk(2), scale=self.cfg_scale)

    def _logits(self, tokens: Int[Tensor, "rows seq"], where: Int[Tensor, "n"], rows: Rows) -> Float[Tensor, "n vocab"]:
        copies = len(tokens) // len(rows.index)
        origin = rows.origin.repeat(copies)
        told: dict[str, Any] = {} if self.told is None else {"previous": SelfConditioning(self.told, rows.step > 0)}
        if self.planner is None:
            segments = rows.canvas.segment_ids.repeat(copies, 1) if len(rows.index) > 1 else None
            return self.denoiser.logits_at(
                where, tokens, segment_ids=segments, layout=self.layout, grid_origin=origin, **told
            )
        bounds = bounds_of(rows)
        if not self.has_begun and isinstance(self.planner, ExactPlanner):
            self._begin(self.planner, tokens, origin, bounds)
        self.has_begun = True
        spans = self.planner.plan(bounds).repeated(copies)
        logits = self.denoiser.cached_logits_at(
            where, tokens, spans=spans, slots=self.slots, layout=self.layout, grid_origin=origin, **told
        )
        if self.session is not None and isinstance(self.planner, ExactPlanner):
            self.session.slots, self.session.tokens = self.slots, tokens[0, : self.planner.final[0]]
            self.session.layout = self.planner.layout
        return logits

    def _begin(
        self, planner: ExactPlanner, tokens: Int[Tensor, "rows seq"], origin: Int[Tensor, "rows"], bounds: list[Bounds]
    ) -> None:
        """Take over what an earlier turn left, or feed a prompt that several rows share once for all of them."""
        if len(tokens) == 1:
            kept = self.session
            if kept and kept.slots is not None and kept.tokens is not None and kept.layout == planner.layout:
                self.slots = kept.slots.grown(self.slots.num_positions)
                planner.begin_after(_num_equal(kept.tokens, tokens[0]), bounds)
            return
        ends = torch.tensor([row.unfinished for row in bounds], device=tokens.device).repeat(len(tokens) // len(bounds))
        told_apart = torch.cat([tokens, ends[:, None]], dim=1)  # noise and padding look alike
        distinct, group = torch.unique(told_apart, dim=0, return_inverse=True)
        if len(distinct) == len(tokens):
            return
        rows = torch.arange(len(tokens), device=group.device)
        first = rows.new_full((len(distinct),), len(tokens)).scatter_reduce(0, group, rows, "amin")
        spans = planner.prompt_spans([bounds[row % len(bounds)] for row in first.tolist()])  # sync: once
        if spans is None:
            return
        self.denoiser.cached_logits_at(
            rows[:0], tokens[first], spans=spans, slots=self.slots, layout=self.layout, grid_origin=origin[first]
        )
        self.slots.select(group)
        planner.begin_after(tokens.shape[1], bounds)


def _num_equal(a: Int[Tensor, "n"], b: Int[Tensor, "m"]) -> int:
    """Count the tokens that two sequences begin with alike."""
    length = min(len(a), len(b))
    return int((a[:length] == b[:length]).long().cumprod(dim=0).sum())  # sync: once a turn
