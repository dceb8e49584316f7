"""`redraft models`: the checkpoints that ship in the package. No torch."""

import json
import shlex
from dataclasses import dataclass
from typing import Any

from redraft.checkpoints import PREFIX, read_index
from redraft.cli.parsing import JsonFlags, parse


@dataclass(frozen=True, kw_only=True)
class ModelsFlags(JsonFlags):
    """List the checkpoints that ship in this package: size, licences, scores, and a command to try each."""


def main(arguments: list[str]) -> int:
    """Print the list."""
    flags = parse(ModelsFlags, arguments, command="models")
    for name, entry in read_index().items():
        if flags.json:
            print(json.dumps({"name": PREFIX + name} | entry))
        else:
            print(*_lines(name, entry), "", sep="\n")
    if not flags.json:
        print(f"Use a name wherever a model is named: redraft.load('{PREFIX}NAME'), redraft sample {PREFIX}NAME ...")
    return 0


def _lines(name: str, entry: dict[str, Any]) -> list[str]:
    """Describe one checkpoint."""
    size = f"{entry['parameters'] / 1e6:.2f} M parameters, {entry['bytes'] / 1e6:.1f} MB"
    licences = entry["licences"]
    return [
        f"{PREFIX}{name}  {entry['description']}",
        f"  {size}; weights: {licences['weights']}; data: {'; '.join(licences['data'])}",
        *(f"  {score_line(score)}" for score in entry["scores"]),
        f"  {example_command(name, entry['examples'][0])}",
    ]


def score_line(score: dict[str, Any]) -> str:
    """Format one score with its standard error (of the mean over items)."""
    return f"{score['task']}: {score['unit']} {score['value']:.4g}, standard error {score['standard_error']:.2g}"


def example_command(name: str, example: list[str]) -> str:
    """Write the command of an example: the command's name, then its arguments after the model."""
    command, *arguments = example
    return shlex.join(["redraft", command, PREFIX + name, *arguments])
