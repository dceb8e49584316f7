"""Text to windows of tokens: read, split, tokenise, pack, cache, collate."""

from redraft.data.chat import ChatConfig
from redraft.data.collate import collate, targets_of
from redraft.data.config import DataConfig
from redraft.data.packing import PackingReport, TargetWindows, WindowDataset, Windows, pack
from redraft.data.preferences import collate_preferences, read_preferences
from redraft.data.prepare import PreparedData, StreamedWindows, build_data, prepare
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
    "ChatConfig",
    "DataConfig",
    "PackingReport",
    "PreparedData",
    "StreamedWindows",
    "TargetWindows",
    "WindowDataset",
    "Windows",
    "build_data",
    "collate",
    "collate_preferences",
    "encode_documents",
    "load_tokenizer",
    "pack",
    "prepare",
    "read_documents",
    "read_preferences",
    "require_eos_token",
    "require_mask_token",
    "source_fingerprint",
    "split_of",
    "targets_of",
    "token_byte_lengths",
    "tokenizer_fingerprint",
    "train_tokenizer",
]
