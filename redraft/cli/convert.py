"""`redraft convert SOURCE OUT`: any model of transformers becomes a diffusion model."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from redraft.cli.parsing import parse

if TYPE_CHECKING:
    from redraft.models.convert import Conversion
    from redraft.models.probe import Check


@dataclass(frozen=True, kw_only=True)
class ConvertFlags:
    """Turn any decoder or encoder of transformers into a diffusion model. Nothing is written unless its checks pass."""

    source: Annotated[str, tyro.conf.Positional] = ""
    """Folder, hub id, redraft/NAME or .gguf file."""
    out: Annotated[str, tyro.conf.Positional] = ""
    """Folder to write; without it, SOURCE is only checked."""
    mask_token_id: int | None = None
    """Token id of the mask; by default the tokenizer's mask token, a reserved token or a new one."""
    shift_logits: bool = False
    """Read the prediction of position i from the logits at i - 1, as an autoregressive model was trained."""
    block_size: int | None = None
    """Tokens per block of block-causal attention; None for full attention."""
    context: Literal["block", "causal"] | None = None
    """causal: only the open block is denoised, text before it stays autoregressive (preset ar, exact likelihood)."""
    within: Literal["full", "causal"] = "full"
    """How an open block attends after a causal context: both ways, or causally."""
    autoregressive: bool = False
    """Keep a causal model causal, to sample and evaluate it as the baseline."""
    merge: str | None = None
    """LoRA adapter (folder or hub id) to merge into the weights."""
    to: str | None = None
    """Write the weights under a family's own names, for its code: llada, llada2, llada2.1 or dream."""
    family: str | None = None
    """Family of a diffusion SOURCE whose config.json looks autoregressive: diffullama, diffugpt, open-dcoder, or one of
    your own, MODULE:NAME."""


def main(arguments: list[str]) -> int:
    """Convert, or only check; print the measurements."""
    flags = parse(ConvertFlags, arguments or ["--help"], command="convert")
    if not flags.source:
        raise ValueError("name a model to convert: redraft convert SOURCE OUT.")
    from redraft.cli.common import import_quietly

    import_quietly()
    return _convert(flags) if flags.out else _check(flags)


def _convert(flags: ConvertFlags) -> int:
    from redraft.models.convert import convert

    made = convert(
        flags.source,
        flags.out,
        mask_token_id=flags.mask_token_id,
        shift_logits=flags.shift_logits or None,  # None: as in the source
        block_size=flags.block_size,
        context=flags.context,
        within=flags.within,
        adapter=flags.merge,
        to=flags.to,
        family=flags.family,
        autoregressive=flags.autoregressive,
    )
    block_size = made.settings.block_size
    layout = "full attention" if block_size is None else f"block-causal attention, {block_size} tokens"
    if made.settings.context == "causal":
        layout = f"causal attention, {made.settings.within} in an open block of {block_size} tokens"
    shift = ", logits shifted" if made.settings.shift_logits else ""
    print(f"{made.folder}: {made.architecture}, {layout}{shift}")
    for note in made.notes:
        print(f"  {note}")
    _print_checks(made.checks)
    print(f"try next:\n{_next_step(made)}")
    return 0


def _next_step(made: "Conversion") -> str:
    """Name the next command: weights that have never seen their mask token have to be trained."""
    folder = shlex.quote(str(made.folder))
    is_untrained = any(note.startswith("mask token") for note in made.notes)
    if made.settings.is_autoregressive or not is_untrained:
        return f"  redraft sample {folder} 'Once upon a time'"
    recipe = "stdlib-small" if made.settings.context == "block" else "a2d-speculate"
    train = f"  redraft train {recipe} --model.start {folder} --data.source my_texts/ --out {folder}-trained"
    if made.settings.context == "block":
        return train
    if made.settings.layout.has_order:  # no training keeps its order
        return f"  redraft sample {folder} 'Once upon a time' --preset ar"
    blocks = f"--objective.block-size {made.settings.block_size} --objective.within {made.settings.within}"
    return f"  redraft sample {folder} 'Once upon a time' --preset ar\n{train} {blocks}"


def _check(flags: ConvertFlags) -> int:
    """Check SOURCE as it is; return 1 where a claim fails that every diffusion model must meet."""
    from redraft.models.load import load_denoiser
    from redraft.models.probe import NEEDED, check_model

    denoiser, *_ = load_denoiser(flags.source, mask_token_id=flags.mask_token_id, family=flags.family)
    checks = check_model(denoiser.model, denoiser.settings)
    _print_checks(checks)
    return 1 if any(check.claim in NEEDED and not check.passed for check in checks) else 0


def _print_checks(checks: "Sequence[Check]") -> None:
    for check in checks:
        print(f"  {'yes' if check.passed else 'NO '}  {check.claim}: {check.measured}")
