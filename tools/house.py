"""Count what the package is made of, and fail over budget: `python tools/house.py` (part of `make lint`).

Lines of code are physical lines without blank lines, comments, docstrings, and strings that document fields. Settings
are the fields of every dataclass that becomes flags or is saved with a model, without the positional arguments that
say what a command works on; `--list` prints them. Public names are top-level classes and functions without a leading
underscore; a name that two modules define is two concepts, unless it is listed here with its reason.
"""

import ast
import io
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "redraft"
BUDGET = {"core": 12620, "latent": 1861, "constraints": 995, "evaluation": 1305, "serving": 1871}
"""Lines of code; core is everything that has no budget of its own."""
SETTINGS = 164
DOUBLED = 0
"""Public names that two modules define."""
LATENT = ("latent", "processes/gaussian")
PARTS = {
    **dict.fromkeys(LATENT, "latent"),
    "constraints": "constraints",
    "evaluation": "evaluation",
    "serving": "serving",
}
"""Beginnings of paths that belong to a part."""
IS_SETTINGS = ("Settings", "Arguments", "Flags", "Config", "Shape", "Options", "ThoughtObjective")
"""Ends of the names of the classes whose fields are settings."""
NO_SETTINGS = ("AutoencoderConfig", "LatentDenoiserConfig")
"""Saved shapes of models, which are built from settings."""
MODES = ["train --resume", "train --smoke", "train --launch", "train --processes"]
"""Flags that no dataclass declares: they say how a recipe is run."""
DUPLICATES = {
    "main": "every command of the command line has one",
    "Request": "one is asked of a likelihood, the other of the server",
}


def lines_of_code(source: str) -> int:
    """Count the lines that hold code."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    documented.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def part_of(path: str) -> str:
    """Name the part that a file of the package belongs to."""
    return next((part for start, part in PARTS.items() if path.startswith(start)), "core")


def settings_in(tree: ast.Module) -> list[str]:
    """List the settings that a module declares, as Class.field; a field that holds other settings is none itself."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith(IS_SETTINGS) and node.name not in NO_SETTINGS:
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    kind = ast.unparse(statement.annotation)
                    is_other = "ClassVar" in kind or "Positional" in kind
                    if not is_other and not kind.split("[")[-1].split(",")[0].strip("]").endswith(IS_SETTINGS):
                        found.append(f"{node.name}.{statement.target.id}")
    return found


def public_names(tree: ast.Module) -> list[str]:
    """List the public classes and functions that a module defines."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def main() -> int:
    """Print the counts; 1 where one is over its budget."""
    lines: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    settings = list(MODES)
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        name, source = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        tree, count = ast.parse(source), lines_of_code(source)
        lines[part_of(name)] += count
        folders[name.split("/")[0] if "/" in name else "(top)"] += count
        settings += settings_in(tree)
        for public in public_names(tree):
            homes[public].append(name)
    doubled = {name: where for name, where in homes.items() if len(where) > 1 and name not in DUPLICATES}
    print("lines of code by folder:", ", ".join(f"{name} {count}" for name, count in folders.most_common()))
    problems = [f"{part} has {lines[part]} lines, over {most}" for part, most in BUDGET.items() if lines[part] > most]
    print("lines of code by part:", ", ".join(f"{part} {lines[part]} of {most}" for part, most in BUDGET.items()))
    print(f"settings: {len(settings)} of {SETTINGS}")
    print(f"public names defined twice: {len(doubled)} of {DOUBLED}")
    if "--list" in sys.argv:
        print("\n".join(settings))
    if len(settings) > SETTINGS:
        problems.append(f"{len(settings)} settings, over {SETTINGS} (--list shows them)")
    if len(doubled) > DOUBLED:
        problems += [f"{name} is defined in {' and '.join(where)}" for name, where in doubled.items()]
    for problem in problems:
        print(f"over budget: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
