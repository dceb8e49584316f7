"""`redraft infill MODEL TEXT ...`: fill the holes in texts."""

from dataclasses import dataclass

from redraft.cli.generation import generate
from redraft.cli.parsing import GenerationFlags, parse


@dataclass(frozen=True, kw_only=True)
class InfillFlags(GenerationFlags):
    """Fill the holes of texts: [MASK:12] is a hole of 12 tokens. The holes decide how many tokens are generated."""


def main(arguments: list[str]) -> int:
    """Fill and print."""
    return generate(parse(InfillFlags, arguments, command="infill"), arguments, command="infill")
