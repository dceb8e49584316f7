"""Small tokenizers that write spaces as SentencePiece does, and a byte-level one as a control."""

from dataclasses import replace
from functools import cache

from tiny import tiny_lm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from redraft.language_model import LanguageModel

WORDS = ["Hello", "self", "able", "un", "yes", "no"]
SPECIAL = ["<unk>", "</s>", "<mask>", "<|im_end|>"]
KINDS = ["llama2", "first", "always", "bytes"]


def _vocabulary(space: str, alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The alphabet, and merges that build each word without and with the space before it."""
    merges = [(space, space), (2 * space, 2 * space)]
    for word in WORDS:
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    merges += [(space, word) for word in WORDS]
    pieces = [*SPECIAL, *alphabet, *("".join(merge) for merge in merges)]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, list(dict.fromkeys(merges))


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer: Llama 2's normalizer, Metaspace with prepend_scheme first or always, or byte-level BPE."""
    if kind == "bytes":
        vocabulary, merges = _vocabulary("Ġ", sorted(pre_tokenizers.ByteLevel.alphabet()))
        backend = Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        bytes_and_characters = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
        vocabulary, merges = _vocabulary("▁", bytes_and_characters)
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    if kind == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind in ("first", "always"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    if kind == "always":
        backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    names = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def text_lm_of(kind: str):
    """Build a random model around such a tokenizer."""
    tokenizer = tokenizer_of(kind)
    return replace(tiny_lm(vocab_size=len(tokenizer)), tokenizer=tokenizer)


class Script:
    """A guide that makes the model write given tokens, row by row, from its first new position on."""

    def __init__(self, *rows):
        self.rows = rows

    def __call__(self, logits, canvas, where):
        seq_len = canvas.tokens.shape[1]
        for i, place in enumerate(where.tolist()):
            row, position = place // seq_len, place % seq_len
            first = int((canvas.status[row] != 0).nonzero()[0, 0])
            written = self.rows[row % len(self.rows)]
            logits[i] = -30.0
            logits[i, written[min(position - first, len(written) - 1)]] = 30.0
        return logits


class _Scripted(LanguageModel):
    """A model whose calls take a guide from here."""

    def generate(self, prompts, **settings):
        return super().generate(prompts, guides=[self.script], **settings)

    def infill(self, prompts, **settings):
        return super().infill(prompts, guides=[self.script], **settings)

    def stream(self, prompts, **settings):
        return super().stream(prompts, guides=[self.script], **settings)


def scripted(lm, script):
    """Make a model write what a script says, for callers that pass no guides."""
    made = _Scripted(denoiser=lm.denoiser, tokenizer=lm.tokenizer, eos_token_ids=lm.eos_token_ids)
    object.__setattr__(made, "script", script)
    return made
