"""One worked example."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkedExample:
    """A prompt, the thoughts that lead from it to the answer, and the answer: words separated by spaces."""

    prompt: str
    blocks: tuple[str, ...]
    answer: str

    def texts(self) -> tuple[str, ...]:
        """All its texts."""
        return (self.prompt, *self.blocks, self.answer)
