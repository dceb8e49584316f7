"""What training data are: a source, its kind, and how it becomes windows of tokens. No torch."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from redraft.errors import unknown_name
from redraft.settings import Count, Fraction, Probability, Settings, Within

KINDS = ("text", "chat", "preference")
SMALLEST_VOCAB_SIZE = 256 + 3
"""Every byte and the three special tokens."""
GRIDS = "redraft.data.grids:prepare_grids"
"""The kind of grids of sudoku."""
READ_BY_OWN_KINDS = ("kind", "source", "seq_len")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Settings):
    """How conversations become tokens and targets (kinds chat and preference)."""

    section: ClassVar[str] = "data.chat"
    removed: ClassVar = {
        "eos": ("train", "the end of an answer is always learnt; data.chat.eos_block fills its block with EOS"),
        "block_size": (32, "data.chat.eos_block"),
        "too_long": ("cut", "a conversation that is too long always loses the left of its prompt"),
        "skip_bad": (False, "a malformed record is always an error"),
    }

    loss_on: Literal["last", "all"] = "last"
    """Assistant turns to learn: the last or all. With all, an earlier turn is learnt while later turns are visible."""
    eos_block: Count = 1
    """Pad each conversation with EOS tokens, which are learnt, to a multiple of this many tokens. 1: no padding; the
    value of seq_len: as LLaDA does."""
    batching: Literal["packed", "grouped"] = "packed"
    """packed: several conversations per window, without attention between them. grouped: one conversation per row, and
    rows of about equal length in a batch."""
    template: str | None = None
    """File with a Jinja chat template; by default the tokenizer's own, or a plain one if it has none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Where the text comes from and how it becomes windows of tokens."""

    section: ClassVar[str] = "data"
    removed: ClassVar = {
        "cache_dir": (None, "the cache is redraft/data in $XDG_CACHE_HOME, by default ~/.cache"),
        "shuffle_seed": (0, "training documents are always shuffled, with seed 0"),
        "validation_windows": (64, "validation takes the first 64 held-out windows of a stream"),
        "thought": (
            {"form": "written", "pad_prompt": False, "fill": False},
            "data.kind redraft.latent.words:prepare_words with data.source TASK:FORM:padded",
        ),
    }

    source: str = "stdlib"
    """stdlib (Python's standard library), site-packages (installed packages under permissive licences; `redraft data
    packages` lists them), a file or folder (txt, md, py, jsonl, json, csv, parquet), a folder of
    datasets' save_to_disk, a hub id such as owner/name:config@split, a folder of `redraft data build`, or a mixture
    SOURCE:WEIGHT,SOURCE:WEIGHT of them (weights are shares of the text; WEIGHT/1000 takes the first 1000 documents).
    With kind MODULE:FUNCTION: what that function reads."""
    kind: str = "text"
    """text: documents. chat: conversations (messages; prompt and response; instruction and output) of which the answers
    are learnt; stdlib and text files mixed with them are learnt whole. preference: pairs (prompt, chosen, rejected) for
    VRPO (objective.beta). MODULE:FUNCTION: rows that your own function makes from the source."""
    text_field: str = "text"
    """Field that holds the text of a record (kind text)."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """How conversations become tokens and targets (kinds chat and preference)."""
    seq_len: Annotated[int, Within("[2, 1048576]")] = 256
    """Tokens per window."""
    validation_fraction: Fraction = 0.05
    """Fraction of the documents for validation, chosen by the hash of their text; 0 for none."""
    isolate_documents: bool = False
    """No attention between documents in a window; positions restart at each document."""
    random_length: Probability = 0.0
    """Probability that a training window is cut to a uniformly random length (LLaDA's pretraining: 0.01; kind text)."""
    max_documents: Annotated[int, Within("[1, inf)")] | None = None
    """Number of documents to use, from the source's beginning; by default all."""
    streaming: bool = False
    """Read and pack while training, without a cache; the first 64 held-out windows are for validation. Needs a
    tokenizer."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer; by default a byte-level BPE is trained on the training documents."""
    vocab_size: Annotated[int, Within(f"[{SMALLEST_VOCAB_SIZE}, inf)")] = 4096
    """Number of tokens of a tokenizer that is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise ValueError("data.source must not be empty; got ''. Give 'stdlib', a path or a hub id.")
        if ":" in self.kind:
            self._check_own_kind()
        elif self.kind not in KINDS:
            raise unknown_name(
                "data.kind",
                self.kind,
                (*KINDS, "MODULE:FUNCTION (thoughts in words: redraft.latent.words:prepare_words)"),
            )
        elif self.kind != "text":
            self._check_chat()

    def _check_own_kind(self) -> None:
        plain = DataConfig()
        for name, value in vars(self).items():
            if name not in READ_BY_OWN_KINDS and value != getattr(plain, name):
                raise ValueError(f"data.{name} is not for kind {self.kind}; got {value!r}. Leave it out.")

    def _check_chat(self) -> None:
        if self.streaming and self.kind == "preference":
            raise ValueError("preference pairs are not streamed; got data.streaming True. Leave it out.")
        if self.streaming and self.chat.batching == "grouped":
            raise ValueError("data.chat.batching grouped needs all lengths; a stream does not know them. Use packed.")
        if self.kind == "preference" and self.chat.loss_on == "all":
            raise ValueError("preference pairs learn only the last answer; got data.chat.loss_on all. Use last.")
        if self.random_length:
            raise ValueError("data.random_length is for kind text: a cut conversation may lose its answer. Use 0.")
        if self.seq_len % self.chat.eos_block:
            raise ValueError(
                f"data.chat.eos_block must divide data.seq_len; got {self.chat.eos_block} and {self.seq_len}."
                " Change one of them."
            )

    @property
    def isolates_segments(self) -> bool:
        """Whether the segments of a window must not see each other; conversations never do."""
        return self.isolate_documents or self.kind != "text"

    @property
    def has_padding(self) -> bool:
        """Whether a batch may hold padding."""
        return self.kind != "text" or self.random_length > 0
