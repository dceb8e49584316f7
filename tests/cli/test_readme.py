"""The commands in a process of their own, as a user starts them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
NOT_IN_README = (
    "redraft convert runs/tiny converted",
    "redraft eval runs/tiny --tasks infill-stdlib --items.limit 2 --out eval",
    "redraft data build stdlib built[/red] --max-documents 12 --seq-len 64 --vocab-size 400 --validation-fraction 0.2 ",
)
PROGRAM = """
import io, shlex, sys
from redraft.cli import main
for line in sys.argv[1:]:
    sys.argv, sys.stdin = shlex.split(line), io.TextIOWrapper(io.BytesIO(b"import os\\n/quit\\n"))
    try:
        main()
    except SystemExit as exit_:
        if exit_.code:
            sys.exit(f"{line}: exit code {exit_.code}")
"""


@pytest.mark.slow
def test_the_commands_and_code_of_the_readme_run_and_print_nothing_of_the_libraries(tmp_path):
    """Every `redraft` line of the README, in order, in an empty folder; then other commands; then README's Python.

    Off a terminal there is no progress bar, and no notice of a library: standard error stays empty.
    """
    readme = README.read_text()
    lines = [line.split("  #")[0].strip() for line in readme.splitlines() if line.startswith("redraft ")]
    assert len(lines) >= 6
    (python,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    program = [sys.executable, "-c", PROGRAM + python, *lines, *NOT_IN_README]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for line in ("a tiny model runs", "yes  padding is inert", "try next", "infill-stdlib", "saved to built[/red]. To"):
        assert line in done.stdout
    assert (tmp_path / "built[/red]").is_dir()


def test_the_installed_script_runs_the_commands():
    script = Path(sys.executable).with_name("redraft")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.startswith("redraft ")
