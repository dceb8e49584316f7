"""The first minutes: a model that ships solves sudokus, a small one trains on real text, and one page shows it all."""

import time
from functools import partial
from pathlib import Path

import redraft
from redraft.cli import prepare_process
from redraft.cli.common import import_quietly
from redraft.cli.generation import text_of
from redraft.cli.train import longer_command, next_steps
from redraft.recipes import stdlib_demo
from redraft.trace.page import joined, page_data, render_page

PUZZLES = ("___2 _2_1 _12_ _4__", "_1__ 4_1_ 3___ _2_3", "___2 __3_ _41_ 1___")
config = stdlib_demo()


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
    """Solve, train, generate, and write the page."""
    prepare_process(is_debugging=False)
    import_quietly()
    from redraft.training.run import run  # imports transformers

    folder, begun, pages = Path(config.out), time.monotonic(), {}

    def keep(name, lm, out) -> None:
        pages[name] = page_data(out.trace, title=name, settings={}, text_of=partial(text_of, lm))

    print("1. Sudoku: redraft/sudoku fills all empty cells of a grid, the surest first. Start, 1/3, 2/3, end:\n")
    lm = redraft.load("redraft/sudoku")
    for number, puzzle in enumerate(PUZZLES, start=1):
        out = lm.infill(puzzle, trace=True)
        print(f"{grids(lm, out.trace[0])}\n({out.forwards[0]} forwards, {out.seconds:.2f} s)\n")
        keep(f"sudoku {number}", lm, out)

    print(f"2. Training a small model on Python's standard library, at most {config.train.max_minutes} minutes:\n")
    outcome = run(config, resume=(folder / "recipe.json").exists())
    if outcome.signal:
        raise SystemExit(128 + outcome.signal)
    lm = redraft.load(folder)
    sampling = {"preset": "llada-random", "temperature": 0.8, "top_p": 0.9, "seed": 1}  # of a model so young
    out = lm.generate('"""Utilities for', max_new_tokens=64, trace=True, **sampling)
    print(f'\nWhat it writes so far. It has seen text for a minute:\n\n"""Utilities for{out.texts[0]}\n')
    keep("text of the small model", lm, out)

    page = folder / "demo.html"
    page.write_text(render_page(joined(pages, title="redraft: the demo")), encoding="utf-8")
    print(f"3. Watch all of it form, step by step: {page}   (the loss: {folder}/loss.png)")
    print(f"   {time.monotonic() - begun:.0f} s in all")
    print("\nYour own text: redraft train stdlib-demo --data.source FOLDER --out runs/mine")
    print("Longer:", longer_command(config, steps=outcome.steps))
    print("Serve it: redraft serve", folder)
    print("Try next:", *next_steps(config), sep="\n  ")


if __name__ == "__main__":
    main()
