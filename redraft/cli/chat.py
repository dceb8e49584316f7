"""`redraft chat MODEL`: talk with a model and watch its drafts form."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from redraft.cli.parsing import LoadingFlags, SamplingFlags, parse
from redraft.errors import unknown_name
from redraft.language_model import LanguageModel
from redraft.sampling.batch import Batch
from redraft.sampling.canvas import Status
from redraft.sampling.config import SamplingConfig
from redraft.sampling.step import Step

HELP = "/reset forgets the conversation, /set NAME VALUE changes a setting, /settings lists them, /quit ends."


@dataclass(frozen=True, kw_only=True)
class Arguments(LoadingFlags):
    """Talk with a model; drafts are shown dim until they are decided."""

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to denoise."""
    system: str | None = None
    """System message, for models with a chat template."""


def main(arguments: list[str]) -> int:
    """Read, denoise, show, until the end of the input."""
    args = parse(Arguments, arguments, command="chat")

    from redraft.cli.common import load_quietly, not_utf8, plain_console

    console = plain_console()
    given = args.sampling.given(arguments)
    lm = load_quietly(args.model, device=args.device, quantization=args.quantization)
    conversation = Conversation(lm, given, system=args.system)
    if not conversation.has_template:
        console.print("this model has no chat template: it continues your text as it stands", style="dim")
    console.print(HELP, style="dim")
    while True:
        try:
            line = console.input("> ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        except UnicodeDecodeError as error:
            raise not_utf8(error) from error
        if line in ("/quit", "/exit"):
            return 0
        try:
            _take_turn(conversation, line, console)
        except ValueError as error:
            console.print(str(error), style="red")
        except KeyboardInterrupt:
            console.print("stopped; the turn is forgotten", style="dim")


def _take_turn(conversation: "Conversation", line: str, console: Console) -> None:
    if line.startswith("/"):
        console.print(conversation.command(line), style="dim")
        return
    if not line.strip():
        return
    with Live(Text(), console=console, refresh_per_second=20) as live:
        for shown in conversation.reply(line):
            live.update(shown)


class Conversation:
    """The messages so far, or the text so far for a model without a chat template."""

    def __init__(self, lm: LanguageModel, given: dict[str, Any], *, system: str | None = None) -> None:
        self.lm = lm
        self.given = given
        self.system = system
        self.has_template = lm.tokenizer is not None and lm.tokenizer.chat_template is not None
        if lm.tokenizer is None:
            raise ValueError("this model has no tokenizer, so there is nothing to talk with. Use the Python API.")
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

    def reply(self, line: str) -> Any:
        """Yield the reply as it forms, and remember the turn when it is whole."""
        if self.sampling.num_samples > 1:
            raise ValueError(f"a conversation has one reply at a time; got num_samples={self.sampling.num_samples}.")
        from redraft.cli.common import warn_of_repetition

        prompt: Any = [*self.messages, {"role": "user", "content": line}] if self.has_template else self.text + line
        last: Step | None = None
        for step in self.lm.stream(prompt, batch=self.batch, **self.given):
            last = step
            yield _shown(step, self.lm)
        assert last is not None
        tokens, status = last.canvas.tokens[0], last.canvas.status[0]
        new = self.lm.new_tokens(tokens, status, self.sampling)
        warn_of_repetition(self.lm, [new], self.sampling)
        answer = self.lm.new_text(tokens[status == Status.GIVEN], new, self.sampling)
        yield Text(answer)
        if self.has_template:
            self.messages = [*prompt, {"role": "assistant", "content": answer}]
        else:
            self.text = prompt + answer + "\n"

    def command(self, line: str) -> str:
        """Obey a line that begins with a slash."""
        name, *rest = line.split()
        if name == "/reset":
            self.reset()
            return "forgotten"
        if name == "/settings":
            return "  ".join(f"{key}={value}" for key, value in asdict(self.sampling).items())
        if name == "/set" and len(rest) == 2:
            setting = rest[0].replace("-", "_")
            if setting not in asdict(self.sampling):
                raise unknown_name("setting", setting, asdict(self.sampling))
            value: Any = rest[1]
            if setting != "preset":  # it changes what the others mean
                flags = [f"--{setting.replace('_', '-')}", rest[1]]
                value = getattr(parse(SamplingFlags, flags, command="chat"), setting)
            given = self.given | {setting: value}
            self.lm.sampling_config(**given)  # its checks
            self.given = given
            return f"{rest[0]} is {rest[1]}"
        return HELP


def _shown(step: Step, lm: LanguageModel) -> Text:
    """Draw the reply up to its end: decided tokens plain, proposals dim and slanted, untouched noise as dots."""
    from redraft.cli.common import NOISE_STYLE, styled

    token_ids, styles = [], []
    proposed = step.confidence[0] > 0
    shown = torch.where(step.canvas.is_noise[0], step.x_0[0], step.canvas.tokens[0])
    for token, state, has_proposal in zip(
        shown.tolist(), step.canvas.status[0].tolist(), proposed.tolist(), strict=True
    ):
        if state in (Status.GIVEN, Status.PAD):
            continue
        if state == Status.COMMITTED and token in lm.eos_token_ids:
            break
        token_ids.append(token)
        styles.append("" if state == Status.COMMITTED else "dim italic" if has_proposal else NOISE_STYLE)
    return styled(lm, token_ids, styles)
