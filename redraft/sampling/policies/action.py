"""Actions: what a step does to each open position."""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor


class Kind(IntEnum):
    """What happens to a position."""

    KEEP = 0
    """It stays as it is."""
    SET = 1
    """Noise takes a token."""
    EDIT = 2
    """A draft takes another token."""
    REOPEN = 3
    """A draft becomes noise again."""
    RENOISE = 4
    """Noise takes another noise token."""
    DELETE = 5
    """It goes: on a canvas whose length may change."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What a step does, over the columns that the policies see. What does not fit a position's status is ignored."""

    kind: UInt8[Tensor, "batch seq"]
    tokens: Int[Tensor, "batch seq"]
    """What is set, and what a draft is edited to; the next step finds it as `Candidates.previous`."""
    may_close: Bool[Tensor, "batch"]
    """Rows whose block ends here if it holds no noise: while a `Revise` has a block open, its tokens are drafts."""
    noise: Int[Tensor, "batch seq"] | None = None
    """What becomes noise becomes this, where a process says so; else it is drawn from the prior."""
    insertions: Int[Tensor, "batch seq"] | None = None
    """Positions to open before each one: on a canvas whose length may change."""

    def having(self, kind: Kind, where: Bool[Tensor, "batch seq"]) -> "Action":
        """Do this at these positions instead."""
        return replace(self, kind=self.kind.masked_fill(where, int(kind)))

    def closing(self, rows: Bool[Tensor, "batch"]) -> "Action":
        """Let these rows close: nothing of theirs becomes or stays noise by a revision."""
        is_noised = (self.kind == Kind.REOPEN) | (self.kind == Kind.RENOISE)
        return replace(self.having(Kind.KEEP, is_noised & rows[:, None]), may_close=self.may_close | rows)


def setting(is_set: Bool[Tensor, "batch seq"], tokens: Int[Tensor, "batch seq"]) -> Action:
    """Set tokens, and close nothing."""
    return Action(kind=is_set.to(torch.uint8), tokens=tokens, may_close=torch.zeros_like(is_set[:, 0]))
