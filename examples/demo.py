"""The main job from end to end: train on real text, fill in a real function, generate, and look at it."""

import ast
from pathlib import Path

import redraft
from redraft.cli.generation import write_trace
from redraft.cli.train import next_steps
from redraft.data.sources import read_documents, split_of
from redraft.recipes import stdlib_demo
from redraft.training.run import run

config = stdlib_demo()
folder = Path(config.out)


def held_out_function(*, longest: int = 400) -> tuple[str, str, str]:
    """Find a short function in a module that was not trained on: its head, its body, and what follows."""
    for module in read_documents(config.data.source):
        if split_of(module, validation_fraction=config.data.validation_fraction) != "validation":
            continue
        lines = module.splitlines(keepends=True)
        for node in ast.walk(ast.parse(module)):
            if not isinstance(node, ast.FunctionDef) or not node.end_lineno or len(node.body) < 2:
                continue
            start, body, end = node.lineno - 1, node.body[-1].lineno - 1, node.end_lineno
            parts = "".join(lines[start:body]), "".join(lines[body:end]), "".join(lines[end : end + 4])
            if 3 <= end - start <= 9 and 100 < sum(map(len, parts)) < longest:
                return parts
    raise SystemExit("no function of that length in the held-out modules")


def main() -> None:
    """Train unless it is done already, then show what the model can do."""
    if (folder / "model.safetensors").exists():
        print(f"{folder} is trained already; remove it to train again")
    else:
        outcome = run(config, resume=(folder / "recipe.json").exists())
        if outcome.signal:
            raise SystemExit(128 + outcome.signal)
    lm = redraft.load(folder)

    head, body, rest = held_out_function()
    num_tokens = len(lm.tokenizer(body)["input_ids"])
    drawing = {
        "preset": "llada-random",
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 1,
    }  # small models repeat the likeliest
    out = lm.infill(f"{head}[MASK:{num_tokens}]{rest}", trace=True, **drawing)
    filled = lm.decode(out.tokens[0])
    print(f"\na function the model has not seen:\n{head}{body}\nits end filled in by the model:\n{head}{filled}")
    write_trace(folder / "infill.html", out.trace, lm, title="redraft demo: infilling", settings=drawing)

    sampling = {"max_new_tokens": 96, "steps": 96, **drawing}
    out = lm.generate('"""Utilities for', trace=True, **sampling)
    print(f'\ngenerated:\n"""Utilities for{out.texts[0]}\n')
    write_trace(folder / "trace.html", out.trace, lm, title="redraft demo: generation", settings=sampling)
    print(f"watch it happen: {folder}/trace.html, {folder}/infill.html; the loss curve: {folder}/loss.png")
    print("try next:", *next_steps(config), sep="\n  ")


if __name__ == "__main__":
    main()
