"""What the commands that load a model share."""

import json
import logging
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor

from redraft.language_model import LanguageModel, load
from redraft.prompts import text_after
from redraft.sampling.config import SamplingConfig
from redraft.sampling.trace import RowTrace, to_page
from redraft.sampling.trace_page import render_page

NOISE_STYLE = "dim"
REPEATED = 8  # fewer equal tokens say nothing


def plain_console() -> Console:
    """Make a console that prints a text as it is: no markup, no emoji, no wrapping, no colours of its own."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_text(console: Console, text: str, *, style: str | None = None, end: str = "\n") -> None:
    """Print a model's text: styled on a terminal, else to the byte (rich expands tabs and drops control characters)."""
    if console.is_terminal:
        console.print(text, style=style, end=end)
    else:
        print(text, end=end)


def be_quiet() -> None:
    """Switch off transformers' bars and notices, unless --debug asks for them; downloads keep their bars."""
    import huggingface_hub
    import transformers

    if logging.getLogger("redraft").isEnabledFor(logging.DEBUG):
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.enable_progress_bars()


def load_quietly(model: str, *, device: str | None, quantization: str | None) -> LanguageModel:
    """Load a model without the libraries' progress bars and notices."""
    be_quiet()
    return load(model, device=device, quantization=quantization)


def read_prompts(prompts: tuple[str, ...]) -> list[str]:
    """Take prompts from the arguments; a dash, or none on a pipe, reads one prompt from standard input.

    Raises ValueError where there is none. An empty text is a prompt only as an argument, where it is meant.
    """
    if prompts and prompts != ("-",):
        return list(prompts)
    if not prompts and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("there is no prompt: give one or more texts, or pipe one in.")
    try:
        text = "" if sys.stdin is None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise not_utf8(error) from error
    if not text.strip():
        raise ValueError(f"there is no prompt: standard input holds no text; got {text!r}.")
    return [text]


def not_utf8(error: UnicodeDecodeError) -> ValueError:
    """Make the error for standard input in another encoding."""
    return ValueError(f"standard input must be UTF-8; got {error.object[error.start : error.end]!r}.")


def check_prompts(prompts: list[str], *, chat: bool) -> None:
    """Raise ValueError for an empty user's message; an empty text asks for a sample without a prompt."""
    if chat and not all(prompt.strip() for prompt in prompts):
        raise ValueError("a user's message must hold text; got an empty one. Leave --chat out to sample without one.")


def check_writable(path: Path | None, *kinds: str) -> None:
    """Fail before the work, not after it, where a result cannot be written, or not in the format of its name."""
    if path is None:
        return
    if path.suffix.lower() not in kinds:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(kinds)}.")
    is_new = not path.exists()
    try:
        with path.open("a"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}.") from error


def warn_of_repetition(lm: LanguageModel, texts: list[Tensor], sampling: SamplingConfig) -> None:
    """Tell on standard error of the first text of which one token makes up more than half, and what to try."""
    for token_ids in texts:
        (token_id, count), *_ = Counter(token_ids.tolist()).most_common(1) or [(0, 0)]
        if count >= REPEATED and 2 * count > len(token_ids):
            print(
                f"warning: {count} of {len(token_ids)} tokens are {text_of(lm, token_id)!r}. Models that are small or "
                f"trained little repeat their likeliest token. Try {_remedy(lm, sampling)}longer training.",
                file=sys.stderr,
            )
            return


def _remedy(lm: LanguageModel, sampling: SamplingConfig) -> str:
    """Name the flags that draw tokens in place of the likeliest, in an order that does not favour them."""
    is_drawn = bool(sampling.resolved().temperature)
    match lm.denoiser.settings.process:
        case "masked" if not is_drawn or sampling.preset != "llada-random":
            return "--preset llada-random --temperature 0.9, or "
        case "autoregressive" if not is_drawn:
            return "--temperature 0.9, or "
    return ""


def write_trace(path: Path, traces: list[RowTrace], lm: LanguageModel, *, title: str, settings: dict[str, Any]) -> None:
    """Write the page that replays a generation; .json writes the data alone."""
    page = to_page(traces, title=title, settings=settings, text_of=lambda token: text_of(lm, token))
    path.write_text(json.dumps(page) if path.suffix.lower() == ".json" else render_page(page), encoding="utf-8")


def styled(lm: LanguageModel, token_ids: list[int], styles: list[str]) -> Text:
    """Decode runs of tokens of one style together: a character may take several tokens, and a space lie between two."""
    shown, start = Text(), 0
    for style, run in groupby(styles):
        end = start + len(list(run))
        ids = token_ids[start:end]
        if style == NOISE_STYLE:
            text = "·" * len(ids)
        elif lm.tokenizer is None:
            text = "".join(f" {i}" for i in ids)
        else:
            text = text_after(lm.tokenizer, token_ids[:start], ids, with_special=True)
        shown.append(text, style=style)
        start = end
    return shown


def text_of(lm: LanguageModel, token_id: int) -> str:
    """Show one token: its text behind another one, or its number where there is none."""
    if lm.tokenizer is None:
        return f" {token_id}"
    return text_after(lm.tokenizer, [token_id], [token_id], with_special=True)
