"""Which side of the train/validation split a document is on."""

import hashlib
from typing import Literal

Split = Literal["train", "validation"]


def split_of(document: str, *, validation_fraction: float, seed: int = 0) -> Split:
    """Put a document on one side of the split by the hash of its text alone.

    P(validation) = validation_fraction over documents, not over tokens. Exact duplicates land on one side, and a
    document stays where it is when the corpus is re-ordered or grows. A larger fraction only adds to validation.
    """
    digest = hashlib.sha256(f"{seed}:{document}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"
