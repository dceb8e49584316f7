"""A command whose reader leaves ends as quietly as other tools; one whose output is closed does its work."""

import os
import subprocess
import sys

import pytest

COMMAND = """
import sys, types
import redraft.cli
def command(arguments):
    {}
    return 0
sys.modules["redraft.cli.doctor"] = types.SimpleNamespace(main=command)
redraft.cli.main(["doctor"])
"""
PRINTS = {
    "less than a buffer": "print('a line')",
    "more than a buffer": "print('a line\\n' * 100_000)",
    "by rich": "from rich.console import Console; Console().print('a line')",
}


def run(body, **streams):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", COMMAND.format(body)], text=True, env=buffered, **streams)


@pytest.fixture
def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("body", PRINTS.values(), ids=PRINTS)
def test_a_reader_that_left_ends_a_command_without_a_word(body, broken_pipe):
    done = run(body, stdout=broken_pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (128 + 13, "")


def test_a_mistake_keeps_its_exit_code_where_the_reader_of_stdout_left(broken_pipe):
    done = run("print('a line'); return 2", stdout=broken_pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, "")


def test_a_full_disk_below_the_output_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = run("print('a line')", stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "redraft: the output could not be written: No space left on device\n")


def test_no_file_takes_the_place_of_an_output_that_the_shell_closed(tmp_path):
    body = f"""
    import os
    kept = open({str(tmp_path / "kept")!r}, "w")
    os.write(1, b"a library's message")
    os.write(2, b"another")
    print("a line", flush=True)
    print("a warning", file=sys.stderr)
    kept.write("mine")
    kept.close()"""
    script = tmp_path / "script.py"
    script.write_text(COMMAND.format(body))
    assert subprocess.run(["sh", "-c", f"'{sys.executable}' '{script}' <&- >&- 2>&-"]).returncode == 0
    assert (tmp_path / "kept").read_text() == "mine"
