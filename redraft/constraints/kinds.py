"""The kinds of constraints. Each is an automaton over bytes, and limits on tokens. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any

from redraft.constraints.automaton import ByteAutomaton, after_space, from_pattern, over_tokens
from redraft.constraints.schema import schema_pattern
from redraft.constraints.token_bytes import LeadingSpace
from redraft.settings import Natural, Settings, check_field, fits

if TYPE_CHECKING:
    from redraft.constraints.completion import CompiledConstraint

_ANY = "(?s:.)"
_ANYTHING = "(?s:.*)"


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """Bounds on the number of tokens before the end token, and tokens fixed at positions."""

    min_tokens: int = 0
    max_tokens: int | None = None
    spans: Mapping[int, int] = field(default_factory=dict)

    def __and__(self, other: "TokenLimits") -> "TokenLimits":
        for position in self.spans.keys() & other.spans.keys():
            if self.spans[position] != other.spans[position]:
                both = f"tokens {self.spans[position]} and {other.spans[position]} for position {position}"
                raise ValueError(f"spans must agree; got {both}.")
        highest = min([one.max_tokens for one in (self, other) if one.max_tokens is not None], default=None)
        lowest = max(self.min_tokens, other.min_tokens)
        return TokenLimits(min_tokens=lowest, max_tokens=highest, spans={**self.spans, **other.spans})


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What the new text must be; `a & b` asks for both."""

    def automaton(self) -> ByteAutomaton:
        """Return the automaton of the texts that are allowed."""
        return from_pattern(_ANYTHING)

    def limits(self) -> TokenLimits:
        """Return the requirements on tokens, as opposed to text."""
        return TokenLimits()

    def __and__(self, other: "Constraint") -> "Constraint":
        return All(parts=(*(self.parts if isinstance(self, All) else (self,)), other))

    def compile(
        self, token_bytes: Sequence[bytes | None], *, eos_token_id: int | None, leading_space: LeadingSpace = "text"
    ) -> "CompiledConstraint":
        """Prepare for a vocabulary: bytes of each token, None for special tokens, which are never used.

        With an end token the text may end early: end tokens fill the rest. Without one, the text fills the canvas.
        Raises ValueError for a constraint that can never be satisfied.
        """
        from redraft.constraints.completion import CompiledConstraint

        automaton = after_space(self.automaton(), leading_space)
        over_vocabulary = over_tokens(automaton, token_bytes, eos_token_id=eos_token_id)
        return CompiledConstraint(automaton=over_vocabulary, limits=self.limits())


@dataclass(frozen=True)
class Regex(Constraint):
    """The whole text matches a regular expression (Python's syntax, without anchors, look-arounds and flags)."""

    pattern: str

    def __post_init__(self) -> None:
        _check_texts("Regex", [self.pattern])

    def automaton(self) -> ByteAutomaton:
        return from_pattern(self.pattern)


@dataclass(frozen=True)
class JsonSchema(Constraint):
    """The text is JSON that fits a schema (`schema.schema_pattern` says what is supported)."""

    schema: Mapping[str, Any] | bool | str
    """The schema, or its JSON text."""
    max_depth: int = 4
    """Largest number of objects and arrays inside each other."""

    def __post_init__(self) -> None:
        if not isinstance(self.schema, dict | bool | str):
            raise ValueError(f"a JSON schema must be a dict, a boolean or a text; got {self.schema!r:.200}.")
        check_field("max_depth", self.max_depth, Natural)

    def automaton(self) -> ByteAutomaton:
        return from_pattern(schema_pattern(self.schema, max_depth=self.max_depth))


@dataclass(frozen=True)
class Choice(Constraint):
    """The text is one of the options."""

    options: Sequence[str]

    def __post_init__(self) -> None:
        _check_texts("Choice", self.options, "option")

    def automaton(self) -> ByteAutomaton:
        return from_pattern(("either", *(("text", option) for option in self.options)))


@dataclass(frozen=True)
class Contains(Constraint):
    """The text holds each of the substrings somewhere; they may overlap."""

    substrings: Sequence[str]

    def __post_init__(self) -> None:
        _check_texts("Contains", self.substrings, "substring")

    def automaton(self) -> ByteAutomaton:
        texts = [("text", text) for text in dict.fromkeys(self.substrings)]
        return reduce(and_, (from_pattern(("join", _ANYTHING, text, _ANYTHING)) for text in texts))


@dataclass(frozen=True, kw_only=True)
class Length(Settings, Constraint):
    """Bounds on the number of characters (Unicode code points) and of tokens; the end token does not count."""

    min_chars: Natural = 0
    max_chars: Natural | None = None
    min_tokens: Natural = 0
    max_tokens: Natural | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for unit in ("chars", "tokens"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if high is not None and high < low:
                raise ValueError(f"min_{unit} must be at most max_{unit}; got {low} and {high}.")

    def automaton(self) -> ByteAutomaton:
        return from_pattern(("repeat", self.min_chars, self.max_chars, _ANY))

    def limits(self) -> TokenLimits:
        return TokenLimits(min_tokens=self.min_tokens, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class Spans(Constraint):
    """Token ids fixed from given positions on: {position in the new text: ids}."""

    spans: Mapping[int, Sequence[int]]

    def __post_init__(self) -> None:
        if not isinstance(self.spans, dict):
            raise ValueError(f"Spans needs a dict of lists of token ids by position; got {self.spans!r:.200}.")
        for start, ids in self.spans.items():
            is_list = isinstance(ids, list | tuple)
            if not is_list or not all(fits(number, int) and number >= 0 for number in (start, *ids)):
                raise ValueError(f"a span is a position, from 0, and a list of token ids; got {start!r}: {ids!r:.200}.")

    def limits(self) -> TokenLimits:
        spans = ({start + i: token for i, token in enumerate(ids)} for start, ids in self.spans.items())
        return reduce(and_, (TokenLimits(spans=span) for span in spans), TokenLimits())


@dataclass(frozen=True, kw_only=True)
class All(Constraint):
    """Every part holds."""

    parts: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        is_list = isinstance(self.parts, list | tuple) and len(self.parts) > 0
        if not is_list or not all(isinstance(part, Constraint) for part in self.parts):
            raise ValueError(f"All needs at least one part, each a constraint; got {self.parts!r:.200}.")

    def automaton(self) -> ByteAutomaton:
        return reduce(and_, (part.automaton() for part in self.parts))

    def limits(self) -> TokenLimits:
        return reduce(and_, (part.limits() for part in self.parts))


def _check_texts(name: str, texts: Any, of: str = "text") -> None:
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(f"{name} needs a list of at least one {of}; got {texts!r:.200}.")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} takes text; got {text!r:.200}.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name} takes text that UTF-8 can write, without lone surrogates; got {text!r:.200}.")


def constraint_key(constraint: Constraint) -> object:
    """Return a key that equal constraints of this module share; one of a user's own class is equal to itself only."""
    if isinstance(constraint, All):
        return tuple(map(constraint_key, constraint.parts))
    return repr(constraint) if type(constraint).__module__ == __name__ else id(constraint)
