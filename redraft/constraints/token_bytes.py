"""What bytes the tokens of a vocabulary stand for."""

import json
import re
from typing import Any, Literal

LeadingSpace = Literal["text", "stripped", "added"]
"""A space at the start of a row of tokens: it is text, decoding drops it, or decoding adds it before every word."""


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """Return the bytes of each token id of a fast tokenizer, None for special tokens and ids without a token.

    Byte-level alphabets are mapped back to bytes, `▁` is a space, `<0x0A>` one byte. Word pieces (`##ly`) that begin a
    word get the space before it: concatenation gives the decoded text but for the first word's space.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer must be a fast one (with a tokenizer.json); got {type(tokenizer).__name__}."
            " Convert it with transformers' AutoTokenizer and save it again."
        )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = json.dumps(backend["decoder"])
    is_byte_level, is_word_piece = '"ByteLevel"' in decoder, '"WordPiece"' in decoder
    has_bytes = '"ByteFallback"' in decoder  # without, decoding writes <0x0A> as six characters
    pieces: dict[str, int] = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    bytes_of: list[bytes | None] = [None] * (max(pieces.values()) + 1)
    for piece, id in pieces.items():
        if id in added:
            bytes_of[id] = None if added[id].special or id in special else added[id].content.encode()
        elif id not in special and is_byte_level:
            bytes_of[id] = bytes(map(byte_of.__getitem__, piece)) if byte_of.keys() >= set(piece) else piece.encode()
        elif id not in special:
            bytes_of[id] = _from_text(piece, is_word_piece, has_bytes)
    return bytes_of


def leading_space(tokenizer: Any) -> LeadingSpace:
    """Return what decoding does with a space at the beginning of the first token."""
    if '"WordPiece"' in tokenizer.backend_tokenizer.to_str():
        return "added"
    pieces = token_bytes(tokenizer)
    word = next((id for id, piece in enumerate(pieces) if piece and re.fullmatch(rb" [!-~]+", piece)), None)
    return "text" if word is None or tokenizer.decode([word]).startswith(" ") else "stripped"


def _from_text(piece: str, is_word_piece: bool, has_bytes: bool) -> bytes:
    if has_bytes and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    if is_word_piece:
        return piece.removeprefix("##").encode() if piece.startswith("##") else b" " + piece.encode()
    return piece.replace("▁", " ").encode()
