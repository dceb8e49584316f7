"""The first minutes: models that ship solve and fill gaps, a small one trains on text, and one page shows it all."""

import time
from functools import partial

from demo_training import train_and_sample

import redraft
from redraft.cli import prepare_process
from redraft.cli.common import import_quietly
from redraft.cli.generation import text_of
from redraft.trace.page import joined, page_data, render_page

PUZZLES = ("___2 _2_1 _12_ _4__", "_1__ 4_1_ 3___ _2_3", "___2 __3_ _41_ 1___")
GAPS = {
    '"You are very[MASK:1]," said Elizabeth, "but I cannot[MASK:1] you."\n': "austen",
    "try:\n    import yaml\nexcept[MASK:1]:\n    yaml =[MASK:1]\nis_there = yaml is not[MASK:1]\n": "stdlib-small",
    'if not os.path.[MASK:1](path):\n    raise[MASK:1]("no file")\n': "stdlib-small",
}
PORT = {"type": "integer", "minimum": 1, "maximum": 9999}
OBJECT = {"name": {"enum": ["spam", "eggs"]}, "port": PORT, "debug": {"type": "boolean"}}
SCHEMA = {"type": "object", "properties": OBJECT, "required": [*OBJECT], "additionalProperties": False}


def grids(lm, trace) -> str:
    """Write a puzzle at the start, after a third and two thirds of the steps, and at the end, side by side."""
    shown = []
    for steps in (0, trace.num_steps // 3, 2 * trace.num_steps // 3, trace.num_steps):
        decided = {event.position for event in trace.events if event.step < steps}
        known = [is_given or place in decided for place, is_given in enumerate(trace.is_given)]
        cells = [text_of(lm, token) if one else "_" for token, one in zip(trace.token_ids, known, strict=True)]
        shown.append("".join(cells).split("\n"))
    return "\n".join("   ".join(rows) for rows in zip(*shown, strict=True))


def main() -> None:
    """Solve, fill, constrain, train, and write the page."""
    prepare_process(is_debugging=False)
    import_quietly()
    begun, pages = time.monotonic(), {}

    def keep(name, lm, out) -> None:
        pages[name] = page_data(out.trace, title=name, settings={}, text_of=partial(text_of, lm))

    print("1. Sudoku: redraft/sudoku fills all empty cells of a grid, the surest first. Start, 1/3, 2/3, end:\n")
    lm = redraft.load("redraft/sudoku")
    for number, puzzle in enumerate(PUZZLES, start=1):
        out = lm.infill(puzzle, trace=True)
        print(f"{grids(lm, out.trace[0])}\n({out.forwards[0]} forwards, {out.seconds:.2f} s)\n")
        keep(f"sudoku {number}", lm, out)

    print("2. Gaps: models fill all masks of a text, with both sides in view (texts written for this demo):\n")
    for number, (text, name) in enumerate(GAPS.items(), start=1):
        lm = redraft.load(f"redraft/{name}")
        out = lm.infill(text, temperature=0.0, trace=True)
        print(f"redraft/{name}:\n{text}\n  in {out.forwards[0]} forwards, {out.seconds:.2f} s:\n\n{out.texts[0]}")
        keep(f"gaps {number}", lm, out)
    out = lm.generate("config =", constraint=redraft.JsonSchema(SCHEMA), max_new_tokens=32, temperature=0.6, trace=True)
    print(f"A JSON object that fits a schema, whatever the order in which its tokens are decided: {out.texts[0]}\n")
    keep("JSON object", lm, out)

    folder = train_and_sample(keep)
    (folder / "demo.html").write_text(render_page(joined(pages, title="redraft: the demo")), encoding="utf-8")
    print(f"4. Watch all of it form, step by step: {folder}/demo.html   (the loss: {folder}/loss.png)")
    print(f"   {time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
