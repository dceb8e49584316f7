"""Write docs/samples.md: ten unselected samples of each checkpoint that ships: `python tools/samples.py [NAME ...]`.

Seeds are 0 to 9; the examples of a checkpoint (its index entry, from tools/checkpoints.toml) are taken in turn. The
sampler is the one saved in the checkpoint. The same machine with the same number of threads writes the same file. With
names, only these are printed and nothing is written.
"""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from redraft import checkpoints
from redraft.cli import main as redraft
from redraft.cli.models import example_command

PAGE = Path(__file__).parents[1] / "docs" / "samples.md"
SEEDS = range(10)
INTRODUCTION = """# Samples

Ten samples of each checkpoint that ships, with seeds 0 to 9. None was selected. Each command makes its sample again, on
a machine that rounds as this one. `python tools/samples.py` writes this page."""


def samples_of(name: str, entry: dict[str, Any]) -> str:
    """Run the examples of a checkpoint in turn, and format their commands and texts."""
    config = json.loads((checkpoints.FOLDER / name / "config.json").read_text(encoding="utf-8"))
    sampler = f"\n\nSaved sampler: `{json.dumps(config['generation'])}`" if config.get("generation") else ""
    parts = [f"## {checkpoints.PREFIX}{name}\n\n{entry['description']}{sampler}"]
    for seed in SEEDS:
        example = [*entry["examples"][seed % len(entry["examples"])], "--seed", str(seed)]
        command, *arguments = example
        output = run([command, checkpoints.PREFIX + name, *arguments, "--json"])
        texts = [text_of(command, json.loads(line)) for line in output.splitlines()]
        parts.append("\n".join(["````text", f"$ {example_command(name, example)}", *texts, "````"]))
    return "\n\n".join(parts)


def run(arguments: list[str]) -> str:
    """Run a command of redraft in this process, and return what it prints. Raises RuntimeError where it fails."""
    output = io.StringIO()
    with redirect_stdout(output):
        try:
            redraft(arguments)
        except SystemExit as exit_:
            if exit_.code:
                raise RuntimeError(f"redraft {' '.join(arguments)}: exit code {exit_.code}") from exit_
    return output.getvalue()


def text_of(command: str, result: dict[str, Any]) -> str:
    """Format one result of `sample` (its prompt and new text), `infill` (its whole text) or `think`."""
    if command != "think":
        return result["text"] if command == "infill" else result["prompt"] + result["text"]
    lines = [f"thought {i}: {thought['text']}" for i, thought in enumerate(result["thoughts"], start=1)]
    return "\n".join([*lines, f"answer: {result['answer']}"])


def main(names: list[str]) -> int:
    """Write the page, or print the samples of some checkpoints."""
    index = checkpoints.read_index()
    sections = [samples_of(name, index[name]) for name in names or index]
    page = "\n\n".join([INTRODUCTION, *sections]) + "\n"
    if names:
        print(page)
    else:
        PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
