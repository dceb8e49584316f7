"""Byte-level tokenizers: training, loading, encoding text as text, bytes per token."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from redraft.checkpoints import local_path
from redraft.constraints.token_bytes import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Tokenizer = Any  # transformers is imported on use only

PAD, EOS, MASK = "<|pad|>", "<|eos|>", "<|mask|>"
LONGEST_WORD = 1000  # characters that a tokenizer is trained on as one word
LONGEST_PIECE = 1_000_000  # characters that are encoded at once
CUTS_TRIED, AROUND_A_CUT = 8, 64  # places, and characters to either side
WORDS = (
    r"\s*\n[ \t]*"  # the end of a line with the indentation of the next one
    r"|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's words
)
"""What a token may span. GPT-2's words alone give the last space of an indentation to the word after it, so that a text
cut after its indentation, as before a hole, has other tokens than the same text uncut."""


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a lossless byte-level BPE with `<|pad|>`, `<|eos|>` and `<|mask|>` as ids 0, 1 and 2.

    No normalisation and no prefix space: decode(encode(x)) == x for every text. A token stays within a word or within
    the end of a line and the next line's indentation (`WORDS`). The result depends on the documents but
    not on their order. Raises ValueError where the corpus has too few distinct pairs for `vocab_size`: a smaller
    vocabulary is never returned silently.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(chain.from_iterable(map(_cut_runs, documents)), trainer)
    if (size := backend.get_vocab_size()) != vocab_size:
        remedy = f"Use vocab_size={size}" + (" or less, or more text" if size < vocab_size else " or more")
        raise ValueError(f"the documents support a vocabulary of {size} tokens; got vocab_size={vocab_size}. {remedy}.")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, mask_token=MASK)


def _cut_runs(document: str) -> Iterator[str]:
    """Cut a document inside of very long words: the time to train is quadratic in the length of a word."""
    start = 0
    for run in re.finditer(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}", document):
        yield document[start : run.end()]
        start = run.end()
    yield document[start:]


def load_fast_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """Load a fast tokenizer from a folder or the hub. Raises ValueError where there is none."""
    from redraft.models.load import read_tokenizer

    if Path(path_or_id).is_file():
        raise ValueError(f"tokenizer must be a folder or a hub id; got the file {str(path_or_id)!r}. Give its folder.")
    tokenizer = read_tokenizer(local_path(path_or_id))
    if tokenizer is None or len(tokenizer) == len(tokenizer.all_special_ids):  # transformers made an empty one
        raise ValueError(f"{str(path_or_id)!r} holds no tokenizer. Give a folder with tokenizer.json, or a hub id.")
    _require_fast(tokenizer)
    return tokenizer


def require_mask_token(tokenizer: Tokenizer) -> int:
    """Return the id of the mask token; ValueError where there is none."""
    return _require_special_token(tokenizer, "mask_token", MASK)


def require_eos_token(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a document, BERT's separator included; ValueError where there is none."""
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        return int(tokenizer.sep_token_id)
    return _require_special_token(tokenizer, "eos_token", EOS)


def _require_special_token(tokenizer: Tokenizer, name: str, example: str) -> int:
    token_id: int | None = getattr(tokenizer, f"{name}_id")
    if token_id is None:
        kind = tokenizer.name_or_path or type(tokenizer).__name__
        remedy = f"tokenizer.add_special_tokens({{{name!r}: {example!r}}})"
        raise ValueError(f"the tokenizer must have {name}; {kind!r} has none. Add it: {remedy}.")
    return token_id


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """Encode documents as text only: no special token is added, and `<|mask|>` in a document is eight characters.

    Raises ValueError where a tokenizer yields the mask id all the same (whole words from a list, or unigram pieces):
    as a clean token it would have probability 0 under the masked process.
    """
    short = [document for document in documents if len(document) <= LONGEST_PIECE]
    of_short = iter(encode_texts(tokenizer, short, as_text=True))
    encoded = [
        next(of_short) if len(document) <= LONGEST_PIECE else _encode_long(tokenizer, document)
        for document in documents
    ]
    if tokenizer.mask_token_id is not None and any(tokenizer.mask_token_id in tokens for tokens in encoded):
        raise ValueError(
            f"the text holds {tokenizer.mask_token!r} and this tokenizer cannot encode it as ordinary text."
            " Remove it from the documents or use a byte-level tokenizer."
        )
    return encoded


def encode_texts(tokenizer: Tokenizer, texts: list[str], *, as_text: bool = False) -> list[list[int]]:
    """Encode texts without the tokens that a tokenizer adds; `as_text` reads literal special tokens as text."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=as_text,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return encoded


def _encode_long(tokenizer: Tokenizer, document: str) -> list[int]:
    """Encode a document piece by piece: else a tokenizer needs 170 bytes of memory for each character."""
    ids: list[int] = []
    start = 0
    while start < len(document):
        end = _cut(tokenizer, document, start + LONGEST_PIECE)
        ids += encode_texts(tokenizer, [document[start:end]], as_text=True)[0]
        start = end
    return ids


def _cut(tokenizer: Tokenizer, document: str, start: int) -> int:
    """Find a place from `start` on where cutting the text does not change its tokens; the end if there is none.

    Candidates are spaces between two letters. A cut is safe where the tokenizer begins a word with the space, and the
    text around has the same tokens as its two halves.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return len(document)
    for space in islice(re.compile("(?<=[a-zA-Z]) (?=[a-zA-Z])").finditer(document, start), CUTS_TRIED):
        at = space.start()
        before, after = document[max(at - AROUND_A_CUT, 0) : at], document[at : at + AROUND_A_CUT]
        words = backend.pre_tokenizer.pre_tokenize_str(before + after)
        whole, left, right = encode_texts(tokenizer, [before + after, before, after], as_text=True)
        if any(begin == len(before) for _, (begin, _) in words) and whole == left + right:
            return at
    return len(document)


def token_byte_lengths(tokenizer: Tokenizer) -> Int[Tensor, "vocab"]:
    """Return how many UTF-8 bytes each token id stands for, 0 for special tokens: for bits per byte.

    Exact for byte-level tokenizers; others may be off by the spaces that they add or forget (`token_bytes`). The length
    is the largest id + 1, which may be below the rows of a model's embedding.
    """
    return torch.tensor([len(piece or b"") for piece in token_bytes(tokenizer)])


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the sha256 of everything that affects encoding. Raises ValueError for a tokenizer without an end token."""
    _require_fast(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    del content["padding"], content["truncation"]  # left over from the last call
    content["eos_token_id"] = require_eos_token(tokenizer)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_fast(tokenizer: Tokenizer) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer must be a fast one (with a tokenizer.json); got {type(tokenizer).__name__}."
            " Convert it with transformers' AutoTokenizer and save it again."
        )
