"""What the server asks of the engine, and what the engine answers: plain data, without HTTP and without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from redraft.language_model import Prepared

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Rows to denoise for one client, and where their tokens go."""

    id: str
    prepared: Prepared
    deliver: Callable[[Sequence[Delta]], None]
    """Called from the engine's thread, once per tick with all news of this request; it must not block."""
    key: str = ""
    """Whose request it is: keys share the engine fairly, and never each other's cached prompts."""
    adapter: str | None = None
    deadline: float | None = None
    """On the clock of `time.monotonic`. Then its rows end with what is decided, and finish_reason "length"."""
    wants_drafts: bool = False
    top_logprobs: int | None = None
    """None: no log-probabilities; 0: those of the tokens; k: those of the k likeliest tokens too."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The log-probability of a token at the step that placed it, in nats. Their sum is not the text's likelihood."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at that step, from the likeliest on."""


class DraftToken(NamedTuple):
    """A token that may still change."""

    token_id: int
    text: str
    status: Literal["noise", "draft", "committed"]
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The tokens from the first undecided one to the end of the open blocks; a later revision replaces them."""

    revision: int
    start: int
    """Index of the first of them among the new tokens."""
    end: int
    tokens: tuple[DraftToken, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a row has cost so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Up to and with the end token or stop string."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were copied from another row."""
    forwards: int = 0
    query_tokens: int = 0
    """Positions that the model was fed for this row."""
    queue_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a tick adds to a row of a request."""

    index: int
    """Row of the request."""
    token_ids: tuple[int, ...] = ()
    """Newly decided, in reading order."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    text: str = ""
    """What is added to the text; nothing is ever taken back. An infilled row gets its whole text at its end."""
    draft: Draft | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    usage: Usage = field(default_factory=Usage)


class Full(Exception):  # noqa: N818
    """Too many requests wait; `retry_after` says in how many seconds there is room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests wait; try again in {retry_after} s.")
        self.retry_after = retry_after


class Draining(Exception):  # noqa: N818
    """The engine shuts down, and takes no new requests."""
