"""The autoregressive baseline: exact negative log-likelihood, no noise."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from redraft.layouts import Layout
from redraft.likelihood.problem import CleanRows, NoiseKey, Problem
from redraft.models.query import Query


@dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """-log p(x_0) = sum over i of -log p(x_0^i | x_0^(<i)): blocks of one token, each predicted by its left neighbour.

    The first token is counted too, so that the number can be compared with a NELBO. It is predicted from a mask token
    that no other position sees, as a sampler without a prompt would predict it.
    """

    mask_token_id: int

    def problem(self, rows: CleanRows, key: NoiseKey) -> Problem:
        """Feed [mask, all but the last token] and ask for every target."""
        x_0, segment_ids = rows.x_0, rows.segment_ids if rows.isolate_segments else rows.segment_ids.clamp(max=1)
        where = rows.is_target.flatten().nonzero()[:, 0]  # sync: how many targets there are is data
        targets, length = x_0.flatten()[where], x_0.shape[1]
        column = where % length
        is_first = (segment_ids.flatten()[where] != segment_ids.flatten()[where - (column > 0).long()]) | (column == 0)

        def nats(logits: Float[Tensor, "n vocab"], part: slice) -> Float[Tensor, "n"]:
            return F.cross_entropy(logits.float(), targets[part], reduction="none")

        mask = torch.full_like(x_0[:, :1], self.mask_token_id)
        alone = segment_ids.amax(dim=1, keepdim=True) + 1  # a segment of its own
        query = Query(
            input_ids=torch.cat([mask, x_0[:, :-1]], dim=1),
            where=torch.where(is_first, where - column, where),
            segment_ids=torch.cat([alone, segment_ids[:, :-1]], dim=1),
            isolate_segments=True,
            layout=Layout(block_size=1),
            shift=False,
        )
        return Problem(query=query, row=where // length, nats=nats)

    def evaluation(self) -> "Autoregressive":
        """Return itself: the likelihood is exact."""
        return self
