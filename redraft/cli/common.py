"""What the commands that load a model share."""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from redraft.language_model import LanguageModel, load
from redraft.prompts import text_after
from redraft.sampling.trace import RowTrace, to_page
from redraft.sampling.trace_page import render_page

NOISE_STYLE = "dim"


def be_quiet() -> None:
    """Switch off transformers' progress bars and notices."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def load_quietly(model: str, *, device: str | None, quantization: str | None) -> LanguageModel:
    """Load a model without the libraries' progress bars and notices."""
    be_quiet()
    return load(model, device=device, quantization=quantization)


def read_prompts(prompts: tuple[str, ...]) -> list[str]:
    """Take prompts from the arguments; a dash, or none on a pipe, reads one prompt from standard input."""
    if prompts == ("-",) or (not prompts and not sys.stdin.isatty()):
        return [sys.stdin.read()]
    if not prompts:
        raise ValueError("there is no prompt: give one or more texts, or pipe one in.")
    return list(prompts)


def check_writable(path: Path | None) -> None:
    """Fail before the work, not after it, where a result cannot be written."""
    if path is None:
        return
    try:
        with path.open("a"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}.") from error


def write_trace(path: Path, traces: list[RowTrace], lm: LanguageModel, *, title: str, settings: dict[str, Any]) -> None:
    """Write the page that replays a generation; .json writes the data alone."""
    page = to_page(traces, title=title, settings=settings, text_of=lambda token: text_of(lm, token))
    path.write_text(json.dumps(page) if path.suffix == ".json" else render_page(page), encoding="utf-8")


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


def say(console: Console, text: str, *, style: str | None = None, end: str = "\n") -> None:
    """Print a text as it is: no markup, no wrapping, no colours of its own."""
    console.print(text, style=style, end=end, markup=False, highlight=False, soft_wrap=True)
