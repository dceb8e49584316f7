"""How one generation came about: entropy and alternatives of every open position at each step, and a summary."""

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redraft.sampling.canvas import Canvas
from redraft.trace.record import RowTrace

NOT_OPEN = 255
"""Byte for a position that was not open in a step."""
MAX_CELLS = 200_000
"""Steps x positions for which a page holds the alternatives."""
LISTED = 5
"""Tokens or positions that a line of the summary lists."""


@dataclass
class Watcher:
    """A guide that changes nothing: it records what the model predicts at the open positions of one row.

    Pass it with `trace=True`: `lm.generate(prompt, trace=True, guides=[watcher])`. Each step is copied to the CPU.
    """

    mask_token_id: int
    """Left out of the probabilities, as it is never sampled under masked noise; -1 for none."""
    top_k: int = 5
    """Alternatives recorded for each position."""
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """For each step: positions (n,), their entropy in nats (n,), likeliest ids (n, k) and probabilities (n, k)."""

    def __call__(
        self, logits: Float[Tensor, "n vocab"], canvas: Canvas, where: Int[Tensor, "n"]
    ) -> Float[Tensor, "n vocab"]:
        """Record a step. Raises ValueError for more than one row."""
        if len(canvas.tokens) > 1:
            raise ValueError(f"one row at a time can be explained; got {len(canvas.tokens)}. Give one prompt.")
        wide = logits.float()
        if self.mask_token_id >= 0:
            wide = wide.index_fill(-1, torch.tensor([self.mask_token_id], device=wide.device), -torch.inf)
        p = wide.softmax(-1)
        top = p.topk(min(self.top_k, p.shape[-1]))
        self.steps.append((where.cpu(), torch.special.entr(p).sum(-1).cpu(), top.indices.cpu(), top.values.cpu()))
        return logits

    def data(self, *, num_positions: int, text_of: Callable[[int], str]) -> dict[str, Any]:
        """Lay out for the page: base64 of bytes, rows are steps, columns are positions; 255: not open.

        `entropy` is in 254ths of `max_entropy`. `ids` (32 bits) and `probabilities` (255ths) hold `k` alternatives of
        each position for every `stride`-th step, so that a page stays small.
        """
        max_entropy = max([float(entropy.max()) for _, entropy, _, _ in self.steps if len(entropy)], default=0.0) or 1.0
        stride = max(1, -(-len(self.steps) * num_positions // MAX_CELLS))
        k = max((top.shape[1] for _, _, top, _ in self.steps), default=1)
        heat = torch.full((len(self.steps), num_positions), NOT_OPEN, dtype=torch.uint8)
        ids = torch.zeros(-(-len(self.steps) // stride), num_positions, k, dtype=torch.int32)
        probabilities = torch.zeros_like(ids, dtype=torch.uint8)
        for index, (where, entropy, top, p) in enumerate(self.steps):
            inside = where < num_positions
            heat[index, where[inside]] = (254 * entropy[inside] / max_entropy).round().to(torch.uint8)
            if index % stride == 0:
                ids[index // stride, where[inside]] = top[inside].int()
                probabilities[index // stride, where[inside]] = (255 * p[inside]).round().to(torch.uint8)
        return {
            "max_entropy": max_entropy,
            "stride": stride,
            "k": k,
            "entropy": _base64(heat),
            "ids": _base64(ids),
            "probabilities": _base64(probabilities),
            "texts": {str(token): text_of(token) for token in sorted(set(ids[probabilities > 0].tolist()))},
        }


def _base64(values: Tensor) -> str:
    array = values.contiguous().numpy()
    return b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def explain(trace: RowTrace, watcher: Watcher, *, text_of: Callable[[int], str]) -> list[str]:
    """Summarise a traced and watched generation in a few lines. Raises ValueError where nothing was decided.

    The order is Spearman's correlation of the step a token was last decided in with its position. The confidence is the
    token's probability when it was last decided.
    """
    final = {event.position: event for event in trace.events if event.kind != "reopen"}
    if not final:
        raise ValueError("nothing was decided, so there is nothing to explain. Ask for at least one new token.")
    order = _rank_correlation(torch.tensor([float(final[position].step) for position in sorted(final)]))
    confidence = sum(event.confidence for event in final.values()) / len(final)
    uncertain = sorted(final.values(), key=lambda event: event.confidence)[:LISTED]
    quarters: list[list[Tensor]] = [[], [], [], []]
    total = torch.zeros(len(trace.token_ids), dtype=torch.float64)
    for index, (where, entropy, _, _) in enumerate(watcher.steps):
        quarters[4 * index // len(watcher.steps)].append(entropy)
        inside = where < len(total)
        total.index_add_(0, where[inside], entropy[inside].double())
    means = [float(torch.cat(part).mean()) if part and len(torch.cat(part)) else 0.0 for part in quarters]
    sums, places = total.topk(min(LISTED, len(total)))
    largest = [(place, nats) for place, nats in zip(places.tolist(), sums.tolist(), strict=True) if nats > 0]
    num_revised, num_reopened = (sum(event.kind == kind for event in trace.events) for kind in ("revise", "reopen"))
    return [
        f"{len(final)} tokens in {trace.num_steps} steps; order: {order:+.2f} (+1 is reading order)",
        f"mean confidence {100 * confidence:.1f} %; least confident: "
        + ", ".join(f"{text_of(e.token_id)!r} {100 * e.confidence:.0f} % (step {e.step + 1})" for e in uncertain),
        f"{num_revised} revised, {num_reopened} reopened",
        f"mean entropy of an open position in each quarter of the steps: {', '.join(f'{m:.2f}' for m in means)} nats",
        "largest entropy summed over the steps: "
        + ", ".join(f"{text_of(trace.token_ids[place])!r} {nats:.1f} nats" for place, nats in largest),
    ]


def _rank_correlation(values: Float[Tensor, "n"]) -> float:
    """Spearman's correlation of values with their order; equal values share their mean rank."""
    if len(values) < 2 or (values == values[0]).all():
        return 0.0
    ranks = (values[:, None] > values).double().sum(1) + (values[:, None] == values).double().sum(1) / 2
    return float(torch.corrcoef(torch.stack([ranks, torch.arange(len(values), dtype=torch.float64)]))[0, 1])
