"""What the commands that generate text share: a run of `sample` or `infill`, and texts for a terminal. No torch."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redraft.cli.common import check_writable, load_quietly, plain_console, print_text, read_prompts
from redraft.cli.parsing import GenerationFlags

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

    from redraft.language_model import Generation, LanguageModel
    from redraft.sampling.config import SamplingConfig
    from redraft.trace.explain import Watcher
    from redraft.trace.record import RowTrace

NOISE_STYLE = "dim"
MIN_REPEATED = 8
"""Fewer equal tokens than this are not reported as repetition."""


def generate(flags: GenerationFlags, arguments: list[str], *, command: str, chat: bool = False) -> int:
    """Run `sample` or `infill`. Every mistake that can be found without the model is found before it is loaded."""
    prompts = read_prompts(flags.prompts)
    if chat and not all(prompt.strip() for prompt in prompts):
        raise ValueError("a user's message must hold text; got an empty one. Leave --chat out to sample without one.")
    check_writable(flags.trace, ".html", ".json")
    check_writable(flags.explain, ".html")
    settings = flags.sampling.given(arguments)
    num_texts = len(prompts) * settings.get("num_samples", 1)
    if flags.explain and num_texts > 1:
        raise ValueError(f"--explain takes one text; got {num_texts}. Give one prompt and leave out --num-samples.")
    constraint = flags.constraint.constraint()
    lm = load_quietly(flags.model, device=flags.device, quantization=flags.quantization)
    from redraft.trace.explain import Watcher, explain

    is_infilling = command == "infill"
    watcher = Watcher(mask_token_id=lm.denoiser.settings.mask_token_id if lm.process.noise == "mask" else -1)
    inputs: Any = [[{"role": "user", "content": prompt}] for prompt in prompts] if chat else prompts
    out = (lm.infill if is_infilling else lm.generate)(
        inputs,
        trace=is_infilling or bool(flags.trace or flags.explain),
        guides=[watcher] if flags.explain else [],
        constraint=constraint,
        **settings,
    )
    _print_texts(flags, prompts, out, lm, is_infilling=is_infilling)
    config = lm.sampling_config(**settings)
    if constraint is None:
        warn_of_repetition(lm, out.tokens, config)
    for path, seen in ((flags.trace, None), (flags.explain, watcher)):
        if path and out.trace:
            title = f"redraft {command} {flags.model}"
            write_trace(path, out.trace, lm, title=title, settings=asdict(config), watcher=seen)
    if flags.explain and out.trace and not flags.json:
        for line in explain(out.trace[0], watcher, text_of=partial(text_of, lm)):
            plain_console().print(line, style="dim")
    return 0


def _print_texts(
    flags: GenerationFlags, prompts: list[str], out: "Generation", lm: "LanguageModel", *, is_infilling: bool
) -> None:
    """Print the texts of each prompt, or with --vote the most frequent of them."""
    texts, traces, console = out.texts, out.trace or [], plain_console()
    assert texts is not None  # a model without a tokenizer has refused the prompts
    num_samples = len(texts) // len(prompts)
    for number, prompt in enumerate(prompts):
        rows = list(range(number * num_samples, (number + 1) * num_samples))
        votes = Counter(texts[row] for row in rows)
        if flags.vote:
            rows = [max(rows, key=lambda row: votes[texts[row]])]
        for row in rows:
            if flags.json:
                data = {"prompt": prompt, "text": texts[row], "tokens": out.tokens[row].tolist()}
                print(json.dumps(data | {"forwards": out.forwards[row], "votes": votes[texts[row]]}))
            elif is_infilling and console.is_terminal:
                styles = ["" if is_given else "bold green" for is_given in traces[row].is_given]
                console.print(styled(lm, traces[row].token_ids, styles))
            else:
                print_text(console, "" if is_infilling else prompt, style="dim", end="")
                print_text(console, texts[row])
        if flags.vote and not flags.json:
            console.print(f"{votes[texts[rows[0]]]} of {num_samples} samples agree", style="dim")
    if not is_infilling and not flags.json:
        num_new = sum(map(len, out.tokens))
        console.print(f"{num_new} tokens in {out.seconds:.2f} s, {max(out.forwards)} forwards", style="dim")


def write_trace(
    path: Path,
    traces: "list[RowTrace]",
    lm: "LanguageModel",
    *,
    title: str,
    settings: dict[str, Any],
    watcher: "Watcher | None" = None,
) -> None:
    """Write the page that replays a generation; .json writes the data alone."""
    from redraft.trace.page import page_data, render_page

    data = page_data(traces, title=title, settings=settings, text_of=partial(text_of, lm), watcher=watcher)
    path.write_text(json.dumps(data) if path.suffix.lower() == ".json" else render_page(data), encoding="utf-8")


def warn_of_repetition(lm: "LanguageModel", texts: "list[Tensor]", sampling: "SamplingConfig") -> None:
    """Warn on standard error of the first text of which one token makes up more than half, with what to try."""
    for token_ids in texts:
        (token_id, count), *_ = Counter(token_ids.tolist()).most_common(1) or [(0, 0)]
        if count >= MIN_REPEATED and 2 * count > len(token_ids):
            print(
                f"warning: {count} of {len(token_ids)} tokens are {text_of(lm, token_id)!r}. Models that are small or "
                f"trained little repeat their likeliest token. Try {_remedy(lm, sampling)}longer training.",
                file=sys.stderr,
            )
            return


def _remedy(lm: "LanguageModel", sampling: "SamplingConfig") -> str:
    """Name flags that draw tokens at random instead of the likeliest ones, and in random order."""
    varied = dict(lm.process.varied_sampling)
    if lm.denoiser.settings.is_autoregressive:  # its order is fixed
        varied.pop("preset", None)
    is_drawn = bool(sampling.resolved().temperature) and varied.get("preset", sampling.preset) == sampling.preset
    return "" if is_drawn or not varied else " ".join(f"--{name} {value}" for name, value in varied.items()) + ", or "


def styled(lm: "LanguageModel", token_ids: list[int], styles: list[str]) -> "Text":
    """Decode runs of tokens of one style together: a character or the space between words may span two tokens."""
    from rich.text import Text

    from redraft.prompts import text_after

    shown, start = Text(), 0
    for style, run in groupby(styles):
        end = start + len(list(run))
        before, ids = token_ids[:start], token_ids[start:end]
        text = "·" * len(ids) if style == NOISE_STYLE else text_after(lm.tokenizer, before, ids, with_special=True)
        shown.append(text, style=style)
        start = end
    return shown


def text_of(lm: "LanguageModel", token_id: int) -> str:
    """Show one token as it is decoded after another one."""
    from redraft.prompts import text_after

    return text_after(lm.tokenizer, [token_id], [token_id], with_special=True)
