"""`redraft chat MODEL`: talk with a model and watch its drafts form."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from redraft.cli.common import load_quietly, not_utf8, plain_console
from redraft.cli.parsing import LoadingFlags, SamplingFlags, parse


@dataclass(frozen=True, kw_only=True)
class ChatFlags(LoadingFlags):
    """Talk with a model; drafts are shown dim until they are decided."""

    model: tyro.conf.Positional[str]
    """Folder or hub id of a model, or redraft/NAME (see `redraft models`)."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    """How to denoise."""
    system: str | None = None
    """System message, for models with a chat template."""


def main(arguments: list[str]) -> int:
    """Read a line, denoise and show the reply, until the end of the input."""
    flags = parse(ChatFlags, arguments, command="chat")
    given = flags.sampling.given(arguments)
    lm = load_quietly(flags.model, device=flags.device, quantization=flags.quantization)
    from rich.live import Live
    from rich.text import Text

    from redraft.cli.conversation import HELP, Conversation

    console = plain_console()
    conversation = Conversation(lm, given, system=flags.system)
    if not conversation.has_template:
        console.print("this model has no chat template: it continues your text as it is", style="dim")
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
            if line.startswith("/"):
                console.print(conversation.command(line), style="dim")
            elif line.strip():
                with Live(Text(), console=console, refresh_per_second=20) as live:
                    for draft in conversation.reply(line):
                        live.update(draft)
        except ValueError as error:
            console.print(str(error), style="red")
        except KeyboardInterrupt:
            console.print("stopped; this turn is forgotten", style="dim")
