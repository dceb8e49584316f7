"""The conversation of `redraft chat`: its turns, its commands and the drafts of a reply."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.text import Text

from redraft.cli.generation import NOISE_STYLE, styled, warn_of_repetition
from redraft.cli.parsing import SamplingFlags, parse
from redraft.errors import unknown_name
from redraft.language_model import LanguageModel
from redraft.sampling.batch import Batch
from redraft.sampling.canvas import Status
from redraft.sampling.config import SamplingConfig
from redraft.sampling.step import Step

HELP = "/reset forgets the conversation, /set NAME VALUE changes a setting, /settings lists them, /quit ends."


class Conversation:
    """The messages so far, or the text so far for a model without a chat template."""

    def __init__(self, lm: LanguageModel, given: dict[str, Any], *, system: str | None = None) -> None:
        self.lm = lm
        self.given = given
        self.system = system
        if lm.tokenizer is None:
            raise ValueError("this model has no tokenizer, so there is nothing to talk with. Use the Python API.")
        self.has_template = lm.tokenizer.chat_template is not None
        self.reset()

    @property
    def sampling(self) -> SamplingConfig:
        """All settings: those given, over the model's own."""
        return self.lm.sampling_config(**self.given)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.text = ""
        self.batch = Batch(self.lm.denoiser)

    def reply(self, line: str) -> Iterator[Text]:
        """Yield the reply as it forms, and remember the turn when it is complete."""
        if self.sampling.num_samples > 1:
            raise ValueError(f"a conversation has one reply at a time; got num_samples={self.sampling.num_samples}.")
        prompt: Any = [*self.messages, {"role": "user", "content": line}] if self.has_template else self.text + line
        for step in self.lm.stream(prompt, batch=self.batch, **self.given):
            yield self._draft(step)
        tokens, status = step.canvas.tokens[0], step.canvas.status[0]
        new = self.lm.new_tokens(tokens, status, self.sampling)
        warn_of_repetition(self.lm, [new], self.sampling)
        answer = self.lm.new_text(tokens[status == Status.GIVEN], new, self.sampling)
        yield Text(answer)
        if self.has_template:
            self.messages = [*prompt, {"role": "assistant", "content": answer}]
        else:
            self.text = prompt + answer + "\n"

    def _draft(self, step: Step) -> Text:
        """Draw the reply up to its end: decided tokens plain, proposals dim and italic, other noise as dots."""
        token_ids, styles = [], []
        shown = torch.where(step.canvas.is_noise[0], step.x_0[0], step.canvas.tokens[0]).tolist()
        is_proposed = (step.confidence[0] > 0).tolist()
        for token, status, has_proposal in zip(shown, step.canvas.status[0].tolist(), is_proposed, strict=True):
            if status in (Status.GIVEN, Status.PAD):
                continue
            if status == Status.COMMITTED and token in self.lm.eos_token_ids:
                break
            token_ids.append(token)
            styles.append("" if status == Status.COMMITTED else "dim italic" if has_proposal else NOISE_STYLE)
        return styled(self.lm, token_ids, styles)

    def command(self, line: str) -> str:
        """Run a line that begins with a slash as a command, and return what to print."""
        match line.split():
            case ["/reset"]:
                self.reset()
                return "the conversation is forgotten"
            case ["/settings"]:
                return "  ".join(f"{name}={value}" for name, value in asdict(self.sampling).items())
            case ["/set", name, value]:
                setting = name.replace("-", "_")
                if setting not in asdict(self.sampling):
                    raise unknown_name("setting", name, asdict(self.sampling))
                flags = [f"--{name.replace('_', '-')}", value]
                given = self.given | parse(SamplingFlags, flags, command="chat").given(flags)
                self.lm.sampling_config(**given)  # raises ValueError for a setting that does not fit the others
                self.given = given
                return f"{name} is {value}"
        return HELP
