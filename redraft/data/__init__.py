"""Text to windows of tokens: read, split, tokenise, pack, cache, collate."""

from redraft.data.collate import collate
from redraft.data.packing import PackingReport, WindowDataset, Windows, pack
from redraft.data.prepare import DataConfig, PreparedData, StreamedWindows, prepare
from redraft.data.sources import read_documents, source_fingerprint
from redraft.data.splits import split_of
from redraft.data.tokenizer import (
    encode_documents,
    load_tokenizer,
    require_eos_token,
    require_mask_token,
    token_byte_lengths,
    tokenizer_fingerprint,
    train_tokenizer,
)

__all__ = [
    "DataConfig",
    "PackingReport",
    "PreparedData",
    "StreamedWindows",
    "WindowDataset",
    "Windows",
    "collate",
    "encode_documents",
    "load_tokenizer",
    "pack",
    "prepare",
    "read_documents",
    "require_eos_token",
    "require_mask_token",
    "source_fingerprint",
    "split_of",
    "token_byte_lengths",
    "tokenizer_fingerprint",
    "train_tokenizer",
]
