"""Examples of a task as tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from redraft.data.sources import Split
from redraft.data.tokenizer import EOS, MASK, PAD
from redraft.latent.tasks import ThoughtTask, WorkedExample, side_of

UNKNOWN = "<|unk|>"


def word_tokenizer(examples: list[WorkedExample]) -> Any:
    """Build a tokenizer with one token for every word of the examples."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words, special = _words(examples), [PAD, EOS, MASK, UNKNOWN]
    if taken := [token for token in special if any(token in word for word in words)]:
        raise ValueError(f"the word {taken[0]!r} is a special token of the tokenizer. Use another word.")
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, mask_token=MASK, unk_token=UNKNOWN
    )


def _words(examples: list[WorkedExample]) -> list[str]:
    return sorted({word for example in examples for text in example.texts() for word in text.split()})


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """Examples, and their tokens, padded at their ends with the tokenizer's padding (id 0 where it has none)."""

    examples: list[WorkedExample]
    columns: dict[str, Tensor]
    """The fields of a `ThoughtBatch`, with blocks of tokens (examples, blocks, tokens), and `is_block_token`. Answers
    end with an end-of-text token; they have no column where no example has one."""

    def unknown_words(self, tokenizer: Any) -> list[str]:
        """List words of these examples that the tokenizer has no token for."""
        unknown = tokenizer.unk_token_id  # none in some tokenizers; in others it is 0, as padding is
        texts = (("prompt", "is_prompt"), ("blocks", "is_block_token"), ("answer", "is_answer"))
        if unknown is None or not any(
            (self.columns[ids][self.columns[is_token]] == unknown).any() for ids, is_token in texts
        ):
            return []
        return [w for w in _words(self.examples) if unknown in tokenizer(w, add_special_tokens=False)["input_ids"]]

    def real_blocks(self) -> tuple[Tensor, Tensor]:
        """Return all blocks of all examples, (n, tokens), without repetition, and which of their tokens are real."""
        blocks, is_token = self.columns["blocks"], self.columns["is_block_token"]
        is_real = torch.arange(blocks.shape[1]) < self.columns["num_blocks"][:, None]
        both = torch.stack([blocks[is_real], is_token[is_real].long()], dim=1).unique(dim=0)
        return both[:, 0], both[:, 1].bool()


def encode_examples(examples: list[WorkedExample], tokenizer: Any, *, split: Split, held_out: float) -> EncodedExamples:
    """Encode the examples of one side of the split; the widths are those of all examples."""

    def padded(texts: list[str], *, end: bool = False) -> tuple[Tensor, Tensor]:
        """Return the padded ids of texts, ended where they are not empty, and which of them are real."""
        rows = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        ids = [torch.tensor(row + [tokenizer.eos_token_id] * (end and len(row) > 0), dtype=torch.int64) for row in rows]
        table = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
        return table, torch.arange(table.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]

    num_blocks = torch.tensor([len(e.blocks) for e in examples])
    count = int(num_blocks.max())
    prompt, is_prompt = padded([e.prompt for e in examples])
    answer, is_answer = padded([e.answer for e in examples], end=True)
    pieces = padded([text for e in examples for text in [*e.blocks, *[""] * (count - len(e.blocks))]])
    blocks, is_block_token = (piece.unflatten(0, (-1, count)) for piece in pieces)
    columns = {"prompt": prompt, "is_prompt": is_prompt, "blocks": blocks, "is_block_token": is_block_token}
    columns |= {"num_blocks": num_blocks, "answer": answer, "is_answer": is_answer}
    rows = [i for i, e in enumerate(examples) if side_of(e.prompt, held_out=held_out) == split]
    return EncodedExamples(
        examples=[examples[i] for i in rows], columns={name: column[rows] for name, column in columns.items()}
    )


def encode_split(
    task: ThoughtTask, tokenizer: Any, *, split: Split, where: str, sizes: Mapping[str, int] | None = None
) -> EncodedExamples:
    """Encode one side of a task's split for the model of `where`.

    Raises ValueError where the side is empty, and for a task with words that the tokenizer does not know, with blocks
    of another length than `sizes["block_tokens"]`, or with a larger number than another entry of `sizes` allows.
    """
    examples = list(task.examples())
    encoded = encode_examples(examples, tokenizer, split=split, held_out=task.held_out)
    if not encoded.examples:
        side = "held-out blocks for the gate" if split == "validation" else "blocks to train on"
        raise ValueError(
            f"there are no {side}: of {len({e.prompt for e in examples})} prompts {100 * task.held_out:g} % are held "
            "out, by the hash of their text. Give examples with more prompts."
        )
    widths = {f"{name}_tokens": encoded.columns[name].shape[1] for name in ("prompt", "answer")}
    _, widths["blocks"], widths["block_tokens"] = encoded.columns["blocks"].shape
    problems = [
        f"{name} {widths[name]}, not {size}{'' if name == 'block_tokens' else ' or fewer'}"
        for name, size in (sizes or {}).items()
        if widths[name] > size or (name == "block_tokens" and widths[name] < size)
    ]
    if unknown := encoded.unknown_words(tokenizer):
        problems.append(f"words that it does not know, {unknown[0]!r} the first")
    if problems:
        raise ValueError(f"{where} was made for another task; got {'; '.join(problems)}. Set --task to its own.")
    return encoded
