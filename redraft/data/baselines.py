"""What a model must beat: the entropy of token frequencies, and a general-purpose compressor."""

import gzip
import math
from typing import Any

import torch
from torch import Tensor

from redraft.data.collate import targets_of


def unigram_nats(dataset: Any, *, vocab_size: int) -> float:
    """Entropy of a dataset's tokens under their own frequencies, in nats per token."""
    counts = torch.bincount(_tokens(dataset), minlength=vocab_size).to(torch.float64)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * probabilities.log()).sum())


def gzip_bits_per_byte(dataset: Any, tokenizer: Any) -> float:
    """Compress the dataset's text as one stream with `gzip -9`: bits per byte of text."""
    text = tokenizer.decode(_tokens(dataset).tolist(), skip_special_tokens=True).encode()
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text) if text else math.nan


def _tokens(dataset: Any) -> Tensor:
    """All tokens of a dataset that a model is measured on, in order."""
    rows = (dataset[i] for i in range(len(dataset)))
    return torch.cat([row["input_ids"][targets_of(row)] for row in rows]).to(torch.int64)
