"""What training data are: a source, its kind, and how it becomes windows of tokens."""

from dataclasses import dataclass, field

from redraft.data.chat import ChatConfig
from redraft.data.tokenizer import SMALLEST_VOCAB_SIZE
from redraft.errors import unknown_name

KINDS = ("text", "chat", "preference")
READ_BY_OWN_KINDS = ("kind", "source", "seq_len")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes windows of tokens."""

    source: str = "stdlib"
    """stdlib (Python's own library), a file or folder (txt, md, py, jsonl, json, csv, parquet), a dataset of
    save_to_disk, a hub id such as owner/name:config@split, a folder of `redraft data build`, or a mixture
    SOURCE:WEIGHT,SOURCE:WEIGHT of them (weights are shares of the text; WEIGHT/1000 takes the first 1000 documents).
    For a kind MODULE:FUNCTION whatever that function reads."""
    kind: str = "text"
    """text: documents. chat: conversations (messages, prompt and response, instruction and output) to learn answers;
    stdlib and text files mixed with them are learnt whole. preference: pairs (prompt, chosen, rejected) to learn the
    better answer by (VRPO; objective.beta). MODULE:FUNCTION: rows that your own function makes of the source."""
    text_field: str = "text"
    """Field that holds the text of a record (kind text)."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """How conversations become tokens and targets (kind chat)."""
    seq_len: int = 256
    """Tokens per window."""
    validation_fraction: float = 0.05
    """Fraction of the documents for validation, chosen by the hash of their text; 0 for none."""
    isolate_documents: bool = False
    """No attention across documents in a window; positions restart at each."""
    random_length: float = 0.0
    """Probability that a training window is cut to a uniformly random length (LLaDA's pretraining: 0.01; kind text)."""
    max_documents: int | None = None
    """Use the source's first documents only."""
    streaming: bool = False
    """Read and pack on the fly, without cache. Needs a tokenizer."""
    validation_windows: int = 64
    """Windows of the validation set when streaming: the first ones."""
    shuffle_seed: int | None = 0
    """Seed for the order of the training documents before packing (within 1000 documents); None keeps the source's."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer; by default a byte-level BPE is trained on the training documents."""
    vocab_size: int = 4096
    """Size of the tokenizer that is trained."""
    cache_dir: str | None = None
    """Folder of the cache; by default redraft/data in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self) -> None:
        for name, smallest in (("seq_len", 2), ("validation_windows", 1), ("vocab_size", SMALLEST_VOCAB_SIZE)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}; got {getattr(self, name)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1); got {self.validation_fraction}. 0.05 is usual.")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents must be at least 1, or None for all; got {self.max_documents}.")
        if not self.source:
            raise ValueError("source must not be empty; got ''. Give 'stdlib', a path or a hub id.")
        if not 0 <= self.random_length <= 1:
            raise ValueError(f"random_length is a probability in [0, 1]; got {self.random_length}. LLaDA's is 0.01.")
        if ":" in self.kind:
            self._check_own_kind()
        elif self.kind not in KINDS:
            raise unknown_name("data.kind", self.kind, (*KINDS, "MODULE:FUNCTION"))
        elif self.kind != "text":
            self._check_chat()

    def _check_own_kind(self) -> None:
        plain = DataConfig()
        for name, value in vars(self).items():
            if name not in READ_BY_OWN_KINDS and value != getattr(plain, name):
                raise ValueError(f"data.{name} is not for kind {self.kind}; got {value!r}. Leave it out.")

    def _check_chat(self) -> None:
        if self.streaming and self.kind == "preference":
            raise ValueError("preference pairs are not streamed; got streaming with kind preference. Leave it out.")
        if self.streaming and self.chat.batching == "grouped":
            raise ValueError("chat.batching grouped needs all lengths, which a stream does not tell. Use packed.")
        if self.kind == "preference" and self.chat.loss_on == "all":
            raise ValueError("of preference pairs only the last answer is learnt; got chat.loss_on all. Use last.")
        if self.random_length:
            raise ValueError("random_length is for kind text: a conversation cut anywhere may lose its answer. Use 0.")
        if self.chat.eos == "to-block-end" and self.seq_len % self.chat.block_size:
            raise ValueError(
                f"chat.block_size must divide seq_len with chat.eos to-block-end; got {self.chat.block_size} and"
                f" {self.seq_len}. Change one of them."
            )

    @property
    def isolates_segments(self) -> bool:
        """Whether the segments of a window must not see each other; conversations never do."""
        return self.isolate_documents or self.kind != "text"

    @property
    def has_padding(self) -> bool:
        """Whether a batch may hold padding."""
        return self.kind != "text" or self.random_length > 0
