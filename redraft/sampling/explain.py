"""What the model thought at each step of one generation: entropy and alternatives of every open position."""

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.sampling.canvas import Canvas
from redraft.sampling.trace import Event, RowTrace

UNASKED = 255
MOST_CELLS = 200_000  # of steps x positions whose alternatives a page keeps


@dataclass
class Watcher:
    """A guide that changes nothing: it notes what the model gave the open positions of the one row it watches.

    Pass it with `trace=True`: `lm.generate(prompt, trace=True, guides=[watcher])`. It copies each step off the device.
    """

    mask_token_id: int
    """Never sampled under masked noise, and so left out of the probabilities; -1 for none."""
    top_k: int = 5
    """Alternatives kept for each position."""
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """For each step: positions (n,), their entropy in nats (n,), likeliest ids (n, k) and probabilities (n, k)."""

    def __call__(
        self, logits: Float[Tensor, "n vocab"], canvas: Canvas, where: Int[Tensor, "n"]
    ) -> Float[Tensor, "n vocab"]:
        """Note a step. Raises ValueError for more than one row."""
        if len(canvas.tokens) > 1:
            raise ValueError(f"one row at a time can be explained; got {len(canvas.tokens)}. Give one prompt.")
        wide = logits.float()
        if self.mask_token_id >= 0:
            wide = wide.index_fill(-1, torch.tensor([self.mask_token_id], device=wide.device), -torch.inf)
        p = wide.softmax(-1)
        top = p.topk(min(self.top_k, p.shape[-1]))
        noted = (where, torch.special.entr(p).sum(-1), top.indices, top.values)
        self.steps.append(tuple(part.cpu() for part in noted))  # type: ignore[arg-type]
        return logits

    def page(self, *, num_positions: int, text_of: Callable[[int], str]) -> dict[str, Any]:
        """Lay out for the page: base64 of bytes, rows are steps, columns positions; 255 is a position not asked for.

        `entropy` is in 254ths of `max_entropy`. `ids` (32 bits) and `probabilities` (255ths) hold `k` alternatives of
        each position for every `stride`-th step, so that a page stays small.
        """
        most = max([float(entropy.max()) for _, entropy, _, _ in self.steps if len(entropy)], default=0.0) or 1.0
        stride = max(1, -(-len(self.steps) * num_positions // MOST_CELLS))
        kept = range(0, len(self.steps), stride)
        k = max((top.shape[1] for _, _, top, _ in self.steps), default=1)
        heat = torch.full((len(self.steps), num_positions), UNASKED, dtype=torch.uint8)
        ids = torch.zeros(len(kept), num_positions, k, dtype=torch.int32)
        probabilities = torch.zeros(len(kept), num_positions, k, dtype=torch.uint8)
        for index, (where, entropy, top, p) in enumerate(self.steps):
            inside = where < num_positions
            heat[index, where[inside]] = (254 * entropy[inside] / most).round().to(torch.uint8)
            if index % stride == 0:
                ids[index // stride, where[inside]] = top[inside].int()
                probabilities[index // stride, where[inside]] = (255 * p[inside]).round().to(torch.uint8)
        known = sorted(set(ids[probabilities > 0].tolist()))
        return {
            "max_entropy": most,
            "stride": stride,
            "k": k,
            "entropy": _base64(heat),
            "ids": _base64(ids),
            "probabilities": _base64(probabilities),
            "texts": {str(token): text_of(token) for token in known},
        }


def _base64(values: Tensor) -> str:
    array = values.contiguous().numpy()
    return b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A generation in numbers."""

    num_decided: int
    num_steps: int
    order: float
    """Spearman's correlation of the step a token was last decided in with its position: 1 is reading order."""
    mean_confidence: float
    """Mean probability of the tokens when they were last decided."""
    least_sure: list[Event]
    """The decisions that stand with the least confidence."""
    num_revised: int
    num_reopened: int
    entropy_by_quarter: list[float]
    """Mean entropy of the open positions in each quarter of the steps, nats."""
    most_open: list[tuple[int, float]]
    """Positions of the largest entropy over all steps, and that sum in nats."""


def explain(trace: RowTrace, watcher: Watcher, *, most: int = 5) -> Explanation:
    """Sum up a traced and watched generation. Raises ValueError where nothing was decided."""
    final = {event.position: event for event in trace.events if event.kind != "reopen"}
    if not final:
        raise ValueError("nothing was decided, so there is nothing to explain. Ask for at least one new token.")
    positions = sorted(final)
    decided = torch.tensor([float(final[position].step) for position in positions])
    quarters: list[list[Tensor]] = [[], [], [], []]
    total = torch.zeros(len(trace.token_ids), dtype=torch.float64)
    for index, (where, entropy, _, _) in enumerate(watcher.steps):
        quarters[4 * index // len(watcher.steps)].append(entropy)
        inside = where < len(total)
        total.index_add_(0, where[inside], entropy[inside].double())
    sums, places = total.topk(min(most, len(total)))
    return Explanation(
        num_decided=len(final),
        num_steps=trace.num_steps,
        order=_rank_correlation(decided),
        mean_confidence=sum(event.confidence for event in final.values()) / len(final),
        least_sure=sorted(final.values(), key=lambda event: event.confidence)[:most],
        num_revised=sum(event.kind == "revise" for event in trace.events),
        num_reopened=sum(event.kind == "reopen" for event in trace.events),
        entropy_by_quarter=[
            float(torch.cat(part).mean()) if part and len(torch.cat(part)) else 0.0 for part in quarters
        ],
        most_open=[(place, nats) for place, nats in zip(places.tolist(), sums.tolist(), strict=True) if nats > 0],
    )


def _rank_correlation(values: Float[Tensor, "n"]) -> float:
    """Spearman's correlation of values with their order; equal values share their mean rank."""
    if len(values) < 2 or (values == values[0]).all():
        return 0.0
    ranks = (values[:, None] > values).double().sum(1) + (values[:, None] == values).double().sum(1) / 2
    return float(torch.corrcoef(torch.stack([ranks, torch.arange(len(values), dtype=torch.float64)]))[0, 1])
