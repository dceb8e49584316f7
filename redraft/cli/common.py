"""What the commands share: the terminal, prompts, files to write, a model without the libraries' notices. No torch."""

import gc
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from redraft.language_model import LanguageModel


def plain_console() -> "Console":
    """Make a console that prints a text as it is: no markup, no emoji, no wrapping, no colours of its own."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_text(console: "Console", text: str, *, style: str | None = None, end: str = "\n") -> None:
    """Print a model's text: styled on a terminal, else byte by byte (rich expands tabs, drops control characters)."""
    if console.is_terminal:
        console.print(text, style=style, end=end)
    else:
        print(text, end=end)


def import_quietly() -> None:
    """Import transformers, and switch off its bars and notices unless --debug asks for them; downloads keep their bars.

    Called before torch is imported: Python's cycle collector, which would visit the libraries' objects again and again
    (an eighth of the time), waits, and never visits them later.
    """
    gc.disable()
    try:
        from redraft.models.later import import_modelling

        import_modelling()
        gc.freeze()
    finally:
        gc.enable()
    if logging.getLogger("redraft").isEnabledFor(logging.DEBUG):
        return
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.enable_progress_bars()


def load_quietly(
    model: str,
    *,
    device: str | None,
    quantization: str | None,
    dtype: str = "auto",
    compile: bool = False,
    adapter: str | None = None,
) -> "LanguageModel":
    """Load a model without the libraries' progress bars and notices."""
    import_quietly()
    from redraft.language_model import load

    return load(model, device=device, quantization=quantization, dtype=dtype, compile=compile, adapter=adapter)


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


def check_writable(path: Path | None, *kinds: str) -> None:
    """Raise ValueError, before the work begins, for a file that cannot be written or whose name has another ending."""
    if path is None:
        return
    if path.suffix.lower() not in kinds:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(kinds)}.")
    is_new = not path.exists()
    try:
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}.") from error
