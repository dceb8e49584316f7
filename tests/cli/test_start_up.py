"""Help and every error in the arguments come at once; no command imports a package that it does not use."""

import subprocess
import sys

import pytest

from redraft.cli import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "numpy", "jaxtyping")
UNUSED = (
    *(
        "torchao",
        "scipy",
        "sklearn",
        "torchvision",
        "bitsandbytes",
        "peft",
        "datasets",
        "pandas",
        "matplotlib",
        "lm_eval",
    ),
    *("redraft.training", "redraft.data", "redraft.latent", "redraft.evaluation", "redraft.models.convert"),
)
"""What a sample of a model that is not quantised does without."""
PROGRAM = """
import sys
from redraft.cli import main
try:
    main()
finally:
    print("heavy:", *[name for name in {!r} if name in sys.modules])
"""
PREFIX = {"train": ["train", "stdlib-tiny"], "data": ["data", "build", "stdlib", "out"]}


def run(*arguments, heavy=HEAVY):
    """Run a command in a process that then lists the heavy modules which it imported."""
    program = [sys.executable, "-c", PROGRAM.format(heavy), *arguments]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()[-1], done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_a_wrong_flag_import_nothing_heavy(command):
    arguments = PREFIX.get(command, [command])
    assert run(*arguments, "--help") == (0, "heavy:", "")
    code, heavy, message = run(*arguments, "--no-such-flag")
    assert (code, heavy) == (2, "heavy:"), message


@pytest.mark.parametrize(
    "arguments",
    [
        ["help"],
        ["trian"],
        ["train"],
        ["models"],
        ["sample", "MODEL"],
        ["sample", "MODEL", "", "--chat"],
        ["sample", "MODEL", "x", "--trace", "out.pdf"],
        ["sample", "MODEL", "x", "y", "--explain", "out.html"],
        ["infill", "MODEL", "x", "--steps", "many"],
    ],
    ids=" ".join,
)
def test_other_mistakes_import_nothing_heavy(arguments):
    code, heavy, message = run(*arguments)
    assert (code, heavy) == (0 if arguments in (["help"], ["train"], ["models"]) else 2, "heavy:"), message


def test_import_redraft_imports_nothing_heavy():
    code = f"import sys, redraft; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_a_sample_imports_only_what_it_uses_and_writes_nothing_to_standard_error(model_folder):
    assert run("sample", str(model_folder), "def", "--max-new-tokens", "4", heavy=UNUSED) == (0, "heavy:", "")
