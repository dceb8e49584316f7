"""The text of a row while its tokens are decided: append-only, and in the end what `generate` gives."""

import re
from collections.abc import Sequence
from typing import Any

from redraft.prompts import CONTEXT_TOKENS, shown_and_raw, text_after

CLEANED = 8
"""Characters at the end of a text that the clean-up of spaces may still change: " n ' t" becomes "n't"."""
MOST_HELD = 4 * CONTEXT_TOKENS
"""Tokens that are decoded again with each new one, at most, where the end of the text is held back."""


def has_byte_tokens(tokenizer: Any) -> bool:
    """Tell whether tokens such as <0x0A> are decoded as bytes. Slow: it looks through the whole vocabulary."""
    return not tokenizer.is_fast or '"ByteFallback"' in tokenizer.backend_tokenizer.to_str()


class TextReader:
    """Decode a row's new tokens as they come; text that has been returned is never taken back.

    Held back is what further tokens may change: the bytes of a character that is not complete, spaces that a clean-up
    may remove, and what may be the beginning of a stop string. Each call decodes the new tokens and those held back.
    """

    def __init__(
        self,
        tokenizer: Any,
        before: Sequence[int],
        *,
        stop: Sequence[str] = (),
        dropped: str = "",
        has_bytes: bool | None = None,
    ) -> None:
        self.tokenizer, self.stop, self.dropped = tokenizer, tuple(stop), dropped
        self.num_returned = 0
        """Characters."""
        self._ids = list(before)
        self._start, self._num_shown = (
            len(self._ids),
            0,
        )  # tokens from `_start` on are held, of these so many characters
        self._is_cleaned = bool(tokenizer.clean_up_tokenization_spaces)
        self._has_bytes = has_byte_tokens(tokenizer) if has_bytes is None else has_bytes

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens, and return the text that is certain now."""
        self._ids += token_ids
        text = self._text(self._start, len(self._ids))
        end = max(self._num_shown, len(text) - self._num_held(text))
        new, self._num_shown = text[self._num_shown : end], end
        if end == len(text):
            self._start, self._num_shown = len(self._ids), 0
        elif len(self._ids) - self._start > MOST_HELD:
            self._move_on(text)
        if not self.num_returned and new:
            new = new.removeprefix(self.dropped)
            self.dropped = ""
        self.num_returned += len(new)
        return new

    def finish(self, text: str) -> str:
        """Return what is missing of the whole text."""
        return text[self.num_returned :]

    def _text(self, start: int, end: int) -> str:
        return text_after(self.tokenizer, self._ids[:start], self._ids[start:end])

    def _num_held(self, text: str) -> int:
        """Count the characters at the end that later tokens may change."""
        held = len(text) - len(text.rstrip("\ufffd"))
        if self._is_cleaned:
            held = max(held, CLEANED)
        if self._has_bytes:  # one byte that fits nothing spoils the characters of all bytes before it
            first = len(self._ids)
            while first > self._start and re.fullmatch("<0x..>", self._piece(self._ids[first - 1])):
                first -= 1
            if first < len(self._ids):
                held = max(held, len(text) - len(self._text(self._start, first)))
        texts = shown_and_raw(self.tokenizer, self._ids[: self._start], self._ids[self._start :]) if self.stop else ()
        lengths = [_overlap(one, string) for one in texts for string in self.stop]
        return max(held, *lengths, 0)

    def _piece(self, token_id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def _move_on(self, text: str) -> None:
        """Hold fewer tokens, where the text of the others has been returned and stands by itself."""
        middle = len(self._ids) - CONTEXT_TOKENS
        head = self._text(self._start, middle)
        if len(head) <= self._num_shown and head + self._text(middle, len(self._ids)) == text:
            self._start, self._num_shown = middle, self._num_shown - len(head)


def _overlap(text: str, string: str) -> int:
    """Count the characters at the end of a text that a string begins with; not the whole string."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
