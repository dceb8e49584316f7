"""`redraft sample MODEL PROMPT ...`: generate text."""

from dataclasses import dataclass
from itertools import pairwise

from redraft.cli.generation import generate
from redraft.cli.parsing import GenerationFlags, TemplateFlags, parse


@dataclass(frozen=True, kw_only=True)
class SampleFlags(GenerationFlags, TemplateFlags):
    """Generate text from prompts by denoising."""


def main(arguments: list[str]) -> int:
    """Generate and print, or list the presets."""
    if "--preset=?" in arguments or ("--preset", "?") in pairwise(arguments):
        return _print_presets()
    flags = parse(SampleFlags, arguments, command="sample")
    return generate(flags, arguments, command="sample", chat=flags.chat)


def _print_presets() -> int:
    from redraft.sampling.presets import PRESETS

    width = max(map(len, PRESETS))
    for name, preset in PRESETS.items():
        defaults = ", ".join(f"{key}={value}" for key, value in preset.defaults.items() if value is not None)
        print(f"{name:<{width}}  {preset.source}{f' [{defaults}]' if defaults else ''}")
    return 0
