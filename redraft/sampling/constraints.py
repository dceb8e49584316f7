"""Hard constraints on new text: what is asked for, as an automaton over bytes and limits on tokens."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from redraft.sampling.automaton import ByteAutomaton, after_space, from_regex, over_tokens
from redraft.sampling.completion import CompiledConstraint, Limits
from redraft.sampling.json_schema import schema_regex
from redraft.sampling.token_bytes import LeadingSpace


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What the new text must be; `a & b` asks for both."""

    def automaton(self) -> ByteAutomaton:
        """Return the automaton of the texts that are allowed."""
        return _regex_automaton("(?s:.*)")

    def limits(self) -> Limits:
        """Return what is said about tokens rather than text."""
        return Limits()

    def __and__(self, other: "Constraint") -> "Constraint":
        return All(parts=(self, other))

    def compile(
        self,
        token_bytes: Sequence[bytes | None],
        *,
        eos_token_id: int | None,
        leading_space: LeadingSpace = "text",
    ) -> CompiledConstraint:
        """Prepare for a vocabulary: bytes of each token, None for special tokens, which are never used.

        With an end token the text may end early: the end token fills what is left. Without, it fills the canvas.
        Raises ValueError for what can never be satisfied.
        """
        automaton = after_space(self.automaton(), leading_space)
        return CompiledConstraint(
            automaton=over_tokens(automaton, token_bytes, eos_token_id=eos_token_id), limits=self.limits()
        )


@dataclass(frozen=True)
class Regex(Constraint):
    """The whole text matches a regular expression (Python's syntax, without anchors, look-arounds and flags)."""

    pattern: str

    def automaton(self) -> ByteAutomaton:
        return _regex_automaton(self.pattern)


@dataclass(frozen=True)
class JsonSchema(Constraint):
    """The text is JSON that fits a schema (`json_schema.schema_regex` says what is supported)."""

    schema: Mapping[str, Any] | bool | str
    """The schema, or its JSON text."""
    max_depth: int = 4
    """The most objects and arrays inside each other."""
    whitespace: str = " ?"
    """Regular expression of what may stand after a comma or a colon."""

    def automaton(self) -> ByteAutomaton:
        return _regex_automaton(schema_regex(self.schema, max_depth=self.max_depth, whitespace=self.whitespace))


@dataclass(frozen=True)
class Choice(Constraint):
    """The text is one of the options."""

    options: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.options, str) or not self.options:
            raise ValueError(f"Choice needs a list of at least one option; got {self.options!r}.")

    def automaton(self) -> ByteAutomaton:
        return _regex_automaton("|".join(re.escape(option) for option in self.options))


@dataclass(frozen=True)
class Contains(Constraint):
    """The text holds each of the substrings somewhere; they may overlap."""

    substrings: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.substrings, str) or not self.substrings:
            raise ValueError(f"Contains needs a list of at least one substring; got {self.substrings!r}.")

    def automaton(self) -> ByteAutomaton:
        return _intersection([_regex_automaton(f"(?s:.*){re.escape(text)}(?s:.*)") for text in self.substrings])


@dataclass(frozen=True, kw_only=True)
class Length(Constraint):
    """Bounds on the number of characters (Unicode code points) and of tokens; the end token does not count."""

    min_chars: int = 0
    max_chars: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for unit, low, high in (
            ("chars", self.min_chars, self.max_chars),
            ("tokens", self.min_tokens, self.max_tokens),
        ):
            if low < 0 or (high is not None and high < low):
                raise ValueError(f"min_{unit} must be in 0 ... max_{unit}; got {low} and {high}.")

    def automaton(self) -> ByteAutomaton:
        high = "" if self.max_chars is None else self.max_chars
        return _regex_automaton(f"(?s:.{{{self.min_chars},{high}}})")

    def limits(self) -> Limits:
        return Limits(min_tokens=self.min_tokens, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class Spans(Constraint):
    """Token ids fixed from given positions on: {position in the new text: ids}."""

    spans: Mapping[int, Sequence[int]]

    def limits(self) -> Limits:
        return Limits(spans=_merged([{start + i: t for i, t in enumerate(ids)} for start, ids in self.spans.items()]))


@dataclass(frozen=True, kw_only=True)
class All(Constraint):
    """Every part holds."""

    parts: tuple[Constraint, ...]

    def automaton(self) -> ByteAutomaton:
        return _intersection([part.automaton() for part in self.parts])

    def limits(self) -> Limits:
        limits = [part.limits() for part in self.parts]
        return Limits(
            min_tokens=max(limit.min_tokens for limit in limits),
            max_tokens=min((limit.max_tokens for limit in limits if limit.max_tokens is not None), default=None),
            spans=_merged([limit.spans for limit in limits]),
        )


def _merged(spans: Sequence[Mapping[int, int]]) -> dict[int, int]:
    merged: dict[int, int] = {}
    for span in spans:
        for position, token in span.items():
            if position < 0:
                raise ValueError(f"a span must start at a position of the new text, from 0; got {position}.")
            if merged.setdefault(position, token) != token:
                raise ValueError(
                    f"spans must agree; got tokens {merged[position]} and {token} for position {position}."
                )
    return merged


@cache
def _regex_automaton(pattern: str) -> ByteAutomaton:
    return from_regex(pattern)


def _intersection(automata: Sequence[ByteAutomaton]) -> ByteAutomaton:
    total = automata[0]
    for automaton in automata[1:]:
        total = total & automaton
    return total
