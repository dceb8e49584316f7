"""The hostile set: everything is contained, nothing is left behind, the next program runs."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from redraft.evaluation import sandbox
from redraft.evaluation.sandbox import Limits, run_python

QUICK = Limits(seconds=1.5, cpu_seconds=3, memory_mb=256, output_kb=16)
BOTH = pytest.mark.parametrize("isolation", ["namespaces", "weak"])


def processes_with(marker):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "cmdline").read_text():
                    found.append(entry.name)
            except OSError:
                pass
    return found


def num_processes():
    return sum(entry.name.isdigit() for entry in Path("/proc").iterdir())


@pytest.fixture(autouse=True)
def an_interpreter_that_other_users_reach(request, monkeypatch):
    if "isolation" in request.fixturenames and request.getfixturevalue("isolation") == "weak":
        monkeypatch.setattr(sandbox, "_python", lambda: str(Path("/usr/bin/python3").resolve()))


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert not processes_with("program.py")
    assert run_python("print(6 * 7)", limits=QUICK).output == "42\n"  # the evaluation goes on


@BOTH
def test_a_program_that_reaches_its_end_passes(isolation):
    outcome = run_python("assert 1 + 1 == 2", limits=QUICK, isolation=isolation)
    assert (outcome.status, outcome.isolation) == ("passed", isolation)


@BOTH
@pytest.mark.parametrize(
    "program",
    ["assert False", "raise SystemExit(0)", "import os; os._exit(0)", "def f(:", "import os; os.kill(os.getpid(), 11)"],
)
def test_only_the_end_of_the_program_passes(program, isolation):
    assert run_python(program, limits=QUICK, isolation=isolation).status == "failed"


@BOTH
def test_an_infinite_loop_ends_at_the_time_limit(isolation):
    outcome = run_python("while True: pass", limits=QUICK, isolation=isolation)
    assert outcome.status == "timeout"
    assert outcome.seconds < 4


@BOTH
def test_processor_time_is_limited_too(isolation):
    limits = Limits(seconds=60, cpu_seconds=1)
    outcome = run_python("while True: pass", limits=limits, isolation=isolation)
    assert outcome.status == "timeout"
    assert outcome.seconds < 55  # a busy machine gives a second of processor time late


@BOTH
def test_a_fork_bomb_runs_into_the_process_limit(isolation):
    program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    before = num_processes()
    most = [0]
    stop = threading.Event()

    def count():
        while not stop.wait(0.1):
            most[0] = max(most[0], num_processes() - before)

    counter = threading.Thread(target=count)
    counter.start()
    outcome = run_python(program, limits=QUICK, isolation=isolation)
    stop.set()
    counter.join()
    assert outcome.status == "timeout"
    assert most[0] < 60


@BOTH
def test_a_memory_hog_is_refused(isolation):
    outcome = run_python("x = bytearray(10**9)", limits=QUICK, isolation=isolation)
    assert outcome.status == "failed"
    assert "MemoryError" in outcome.output


@BOTH
def test_processes_that_hog_memory_together_are_ended(isolation):
    program = (
        "import os, time\n"
        "for _ in range(6):\n"
        "    if not os.fork():\n"
        "        x = b'x' * (100 * 2**20); time.sleep(9)\n"
        "time.sleep(9)\n"
    )
    assert run_python(program, limits=QUICK, isolation=isolation).status == "memory"


@BOTH
def test_ten_gigabytes_of_output_are_cut_at_the_cap(isolation):
    program = "import sys\nfor _ in range(10**4): sys.stdout.write('x' * 2**20)"
    outcome = run_python(program, limits=Limits(seconds=20, output_kb=16), isolation=isolation)
    assert outcome.status == "output"
    assert len(outcome.output) == 16 * 1024
    assert outcome.seconds < 4


@BOTH
def test_leftover_children_in_sessions_of_their_own_are_gone(isolation):
    program = (
        "import os, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            os.closerange(0, 20); time.sleep(60)\n"
        "        os._exit(0)\n"
    )
    assert run_python(program, limits=QUICK, isolation=isolation).status == "passed"


def test_nothing_is_written_outside_the_private_folder(tmp_path):
    victim = tmp_path / "precious"
    victim.write_text("as it was")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    program = (
        f"for path in [{str(victim)!r}, {str(tmp_path / 'new')!r}, '/etc/new', '/var/tmp/new', '/dev/shm/new']:\n"
        "    try: open(path, 'w').write('harm')\n"
        "    except OSError as error: print(error.errno)\n"
        "    else: print('written', path)\n"
        "open('/tmp/fine', 'w').write('fine')\n"
    )
    outcome = run_python(program, limits=QUICK)
    assert outcome.status == "passed"
    assert "written" not in outcome.output
    assert victim.read_text() == "as it was"
    assert not (tmp_path / "new").exists()
    assert not Path("/tmp/fine").exists()


def test_files_are_limited_in_all():
    program = "for i in range(64): open(f'/tmp/{i}', 'wb').write(bytes(2**20))"
    assert "No space left" in run_python(program, limits=QUICK).output


def test_homes_sockets_environment_and_other_processes_are_hidden(monkeypatch, tmp_path):
    (note := tmp_path / "note").write_text("private")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECRET_TOKEN", "do not tell")
    program = (
        "import os, pathlib\n"
        f"print(os.path.exists({str(note)!r}), os.path.exists('/root/.bashrc'))\n"
        "print(os.listdir('/run'), os.listdir('/var/tmp'), sorted(os.environ))\n"
        "print(sum(name.isdigit() for name in os.listdir('/proc')))\n"
    )
    outcome = run_python(program, limits=QUICK)
    assert outcome.output.splitlines() == ["False False", "[] [] ['HOME', 'LANG', 'PATH', 'TMPDIR']", "2"]


def test_the_parent_cannot_be_killed():
    program = (
        f"import os\nfor pid in [{os.getpid()}, os.getppid(), 1]:\n"
        "    try: os.kill(pid, 9)\n"
        "    except OSError: print('refused')\n"
    )
    assert run_python(program, limits=QUICK).status == "passed"


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        outcome = run_python(program, limits=QUICK)
    assert outcome.status == "failed"
    assert "OSError" in outcome.output or "ConnectionRefused" in outcome.output


@BOTH
def test_a_killed_evaluator_takes_the_code_along(isolation, tmp_path):
    pid = os.fork()
    if not pid:
        try:
            run_python("import time; time.sleep(30)", limits=Limits(seconds=30), isolation=isolation)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 5
    while not processes_with("program.py") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 5
    while processes_with("program.py") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes_with("program.py")


def test_a_machine_without_namespaces_refuses_and_says_what_to_do(monkeypatch):
    report = {"reason": "no isolation", "error": "Operation not permitted"}
    monkeypatch.setattr(sandbox, "_run_jail", lambda *args, **kwargs: (report, b"", False))
    with pytest.raises(ValueError, match="does not permit the namespaces.*--sandbox weak"):
        run_python("pass")
    monkeypatch.undo()


def test_the_weak_mode_refuses_an_interpreter_that_only_root_reaches(monkeypatch):
    monkeypatch.setattr(sandbox, "_is_open_to_all", lambda path: False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(ValueError, match="another user than root"):
        run_python("pass", isolation="weak")
