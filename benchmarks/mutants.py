"""Change the code in one place at a time, and see whether the tests that mirror it notice.

    pip install cosmic-ray
    python benchmarks/mutants.py [--number 300] [--seed 0] [--minutes 60] [--part 0/2] [--out mutants.jsonl]

Draws places by seed over sampling/, processes/ and likelihood/, one of cosmic-ray's mutations each;
annotations, decorators and raise statements are left out. Works in a copy of the last commit, appends one line for each
mutant to --out, and leaves out those that are there already. `--part 0/2` takes every second one.
"""

import argparse
import ast
import difflib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

KEY = ("module_path", "start_pos_row", "operator_name", "operator_args", "occurrence")
GROUPS = ("processes", "likelihood", "sampling", "trace")
S = "tests/sampling/test_"
C = "tests/constraints/test_"
CONSTRAINTS = [f"{C}constraints.py", f"{C}schema.py", f"{S}constrained_generation.py"]
LOOP = [
    *(f"{S}{name}.py" for name in ("formulas", "policies", "progress", "generate", "control")),
    "tests/golden/test_golden_trajectories.py",
    f"{S}every_combination.py",
]
TESTS = {
    "schema.py": [CONSTRAINTS[1], CONSTRAINTS[0]],
    "regex.py": CONSTRAINTS,
    "automaton.py": CONSTRAINTS,
    "completion.py": CONSTRAINTS,
    "kinds.py": CONSTRAINTS,
    "constrain.py": [CONSTRAINTS[2], CONSTRAINTS[0], f"{S}ends.py"],
    "propose.py": [f"{S}{name}.py" for name in ("propose", "distributions", "generate", "formulas", "control")],
    "config.py": [f"{S}{name}.py" for name in ("saved_settings", "control", "generate", "policies")],
    "trace": ["tests/trace/test_explain.py", "tests/trace/test_page.py"],
    "token_bytes.py": [f"{C}token_bytes.py"],
    "stop.py": [f"{S}ends.py", *LOOP],
    "preference.py": ["tests/training/test_preference.py"],
    "processes": ["tests/processes", "tests/test_gaussian_schedules.py"],
    "likelihood": ["tests/likelihood", "tests/processes/test_masked.py"],
    "sampling": LOOP,
}
"""Tests of a file, else of its folder; the likeliest to notice first."""


def spans_left_out(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """List where annotations, decorators and raise statements stand."""
    nodes: list[Any] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            nodes += [argument.annotation for argument in arguments if argument.annotation]
            nodes += [node.returns] if node.returns else []
        nodes += getattr(node, "decorator_list", [])
        nodes += [node.annotation] if isinstance(node, ast.AnnAssign) else []
        nodes += [node] if isinstance(node, ast.Raise) else []
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def draw(root: Path, *, number: int, seed: int) -> list[dict[str, Any]]:
    """Draw mutants of a checkout: distinct places, one operator each."""
    places: dict[tuple[str, str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for group in GROUPS:
        config, session = root / f"{group}.toml", root / f"{group}.sqlite"
        config.write_text(
            f'[cosmic-ray]\nmodule-path = "redraft/{group}"\ntimeout = 1.0\nexcluded-modules = []\n'
            'test-command = "true"\n[cosmic-ray.distributor]\nname = "local"\n'
        )
        subprocess.run(
            [sys.executable, "-m", "cosmic_ray.cli", "init", config.name, session.name], cwd=root, check=True
        )
        connection = sqlite3.connect(session)
        connection.row_factory = sqlite3.Row
        for row in map(dict, connection.execute("select * from mutation_specs")):
            at = (row["start_pos_row"], row["start_pos_col"])
            left_out = spans_left_out((root / row["module_path"]).read_text())
            if "Decorator" not in row["operator_name"] and not any(a <= at < b for a, b in left_out):
                places[group, row["module_path"], *at].append({**row, "group": group})
    rng = random.Random(seed)
    chosen = rng.sample(sorted(places), min(number, len(places)))
    order = ("operator_name", "occurrence", "operator_args")
    return [rng.choice(sorted(places[place], key=lambda m: [str(m[name]) for name in order])) for place in chosen]


def try_out(root: Path, mutant: dict[str, Any]) -> dict[str, Any]:
    """Apply a mutant, run its tests until the first fails, and take it back."""
    from cosmic_ray.mutating import apply_mutation
    from cosmic_ray.plugins import get_operator

    path = root / mutant["module_path"]
    arguments = json.loads(json.loads(mutant["operator_args"] or '"{}"'))
    before, after = apply_mutation(path, get_operator(mutant["operator_name"])(**arguments), mutant["occurrence"])
    tests = TESTS.get(path.name, TESTS[mutant["group"]])
    paths = f"{root}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        code = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=400).returncode
        outcome = "killed" if code else "survived"
    except subprocess.TimeoutExpired:
        outcome = "timeout"
    path.write_text(before)
    lines = difflib.unified_diff(before.splitlines(), (after or before).splitlines(), lineterm="", n=0)
    diff = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return {**{name: mutant[name] for name in KEY}, "outcome": outcome, "diff": diff}


def main() -> None:
    """Draw, try out, and write down what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300, help="mutants to draw (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no mutant after so many (default: 60)")
    parser.add_argument("--part", default="0/1", help="which share of the mutants to try, as 0/2 (default: all)")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="file of results")
    args = parser.parse_args()
    share, of = map(int, args.part.split("/"))
    seen = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {tuple(one[name] for name in KEY) for one in seen}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "copy")
        subprocess.run(["git", "clone", "--quiet", Path(__file__).parents[1], root], check=True)
        drawn, end = draw(root, number=args.number, seed=args.seed), time.monotonic() + 60 * args.minutes
        for mutant in drawn[share::of]:
            if tuple(mutant[name] for name in KEY) not in done and time.monotonic() < end:
                with args.out.open("a") as file:
                    file.write(f"{json.dumps(try_out(root, mutant))}\n")


if __name__ == "__main__":
    main()
