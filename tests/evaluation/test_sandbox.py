"""The hostile set: everything is contained, nothing is left behind, the next program runs."""

import ctypes
import os
import re
import threading
import time
from pathlib import Path

import pytest
from hostile import CALLS, CHEATS, CROWDS, HOARDS, TESTS

from redraft.evaluation import jail, sandbox
from redraft.evaluation.sandbox import Limits, run_python
from redraft.evaluation.tasks import TaskOptions, make_task

QUICK = Limits(seconds=1.5, memory_mb=256, output_kb=16)
PATIENT = Limits(seconds=120, memory_mb=256, output_kb=16)
SMALL = Limits(seconds=120, memory_mb=64, output_kb=16)


def processes_with(marker):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
            except OSError:
                pass
    return found


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    wait_until(lambda: not processes_with("program.py"))  # other tests may have programs of their own


def test_a_program_that_reaches_its_end_passes():
    assert run_python("assert 1 + 1 == 2", limits=PATIENT).status == "passed"


@pytest.mark.parametrize(
    "program",
    ["assert False", "raise SystemExit(0)", "import os; os._exit(0)", "def f(:", "import os; os.kill(os.getpid(), 11)"],
)
def test_only_the_end_of_the_program_passes(program):
    assert run_python(program, limits=PATIENT).status == "failed"


def test_an_infinite_loop_ends_at_the_time_limit():
    assert run_python("while True: pass", limits=QUICK).status == "timeout"


def test_processor_time_is_limited_too():
    limits = Limits(seconds=300, cpu_seconds=1)
    outcome = run_python("while True: pass", limits=limits)
    assert outcome.status == "timeout"
    assert outcome.seconds < 300


def test_a_fork_bomb_runs_into_the_process_limit():
    program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    most = [0]
    stop = threading.Event()

    def count():
        while not stop.wait(0.1):
            most[0] = max(most[0], len(processes_with("program.py")))

    counter = threading.Thread(target=count)
    counter.start()
    outcome = run_python(program, limits=QUICK)
    stop.set()
    counter.join()
    assert outcome.status == "timeout"
    assert most[0] < 60


def test_a_memory_hog_is_refused():
    outcome = run_python("x = bytearray(10**9)", limits=PATIENT)
    assert outcome.status == "failed"
    assert "MemoryError" in outcome.output


def test_processes_that_hog_memory_together_are_ended():
    program = (
        "import os, time\n"
        "for _ in range(6):\n"
        "    if not os.fork():\n"
        "        x = b'x' * (100 * 2**20); time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    assert run_python(program, limits=PATIENT).status == "memory"


def test_ten_gigabytes_of_output_are_cut_at_the_cap():
    program = "import sys\nfor _ in range(10**4): sys.stdout.write('x' * 2**20)"
    outcome = run_python(program, limits=PATIENT)
    assert outcome.status == "output"
    assert len(outcome.output) == 16 * 1024


def test_leftover_children_in_sessions_of_their_own_are_gone():
    program = (
        "import os, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            os.closerange(0, 20); time.sleep(60)\n"
        "        os._exit(0)\n"
    )
    assert run_python(program, limits=PATIENT).status == "passed"


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
    outcome = run_python(program, limits=PATIENT)
    assert outcome.status == "passed"
    assert "written" not in outcome.output
    assert victim.read_text() == "as it was"
    assert not (tmp_path / "new").exists()
    assert not Path("/tmp/fine").exists()


def test_files_are_limited_in_all():
    program = "for i in range(64): open(f'/tmp/{i}', 'wb').write(bytes(2**20))"
    assert "No space left" in run_python(program, limits=PATIENT).output


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
    outcome = run_python(program, limits=PATIENT)
    assert outcome.output.splitlines() == ["False False", "[] [] ['HOME', 'LANG', 'PATH', 'TMPDIR']", "3"]


def test_the_parent_cannot_be_killed():
    program = (
        f"import os\nfor pid in [{os.getpid()}, os.getppid(), 1]:\n"
        "    try: os.kill(pid, 9)\n"
        "    except OSError: print('refused')\n"
    )
    assert run_python(program, limits=PATIENT).status == "passed"


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK"])
def test_there_is_no_network(family):
    outcome = run_python(f"import socket\nsocket.socket(socket.{family})", limits=PATIENT)
    assert outcome.status == "failed"
    assert "PermissionError" in outcome.output


def test_a_killed_evaluator_takes_the_code_along(tmp_path):
    pid = os.fork()
    if not pid:
        try:
            run_python("import time; time.sleep(60)", limits=PATIENT)
        finally:
            os._exit(0)
    wait_until(lambda: processes_with("program.py"))
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    wait_until(lambda: not processes_with("program.py"))


def test_a_machine_without_namespaces_refuses_and_says_what_to_do(monkeypatch):
    report = {"reason": "no isolation", "error": "Operation not permitted"}
    monkeypatch.setattr(sandbox, "_run_jail", lambda *args, **kwargs: (report, b""))
    with pytest.raises(ValueError, match="does not permit the namespaces.*Run as root, or permit"):
        run_python("pass")


def test_a_task_that_runs_code_is_refused_before_a_model_is_loaded(monkeypatch):
    report = {"reason": "no isolation", "error": "Operation not permitted"}
    monkeypatch.setattr(sandbox, "_run_jail", lambda *args, **kwargs: (report, b""))
    with pytest.raises(ValueError, match="does not permit the namespaces"):
        make_task("humaneval", TaskOptions(allow_code=True))


@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 1", "exit status 1"), ("echo no ctypes; exit 2", "no ctypes")],
)
def test_a_sandbox_that_does_not_start_is_an_error_and_no_score(script, reason, monkeypatch, tmp_path):
    (stand_in := tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sandbox, "_python", lambda: str(stand_in))
    with pytest.raises(ValueError, match=f"did not start with {stand_in}: {reason}. Repair"):
        run_python("pass" + " " * 10**6)


def test_a_machine_with_other_system_calls_is_refused(monkeypatch):
    monkeypatch.setattr(jail, "ARCHITECTURES", {"vax": (0, 0)})
    with pytest.raises(ValueError, match="Linux on vax; got linux on"):
        run_python("pass")


@pytest.mark.parametrize("name", HOARDS)
def test_memory_that_no_process_is_charged_with_is_refused(name):
    outcome = run_python(CALLS + HOARDS[name], limits=SMALL)
    assert outcome.status == "failed"
    assert "Operation not permitted" in outcome.output or "not implemented" in outcome.output


@pytest.mark.parametrize("name", CROWDS)
def test_memory_that_is_spread_is_summed(name):
    assert run_python(CALLS + CROWDS[name], limits=SMALL).status == "memory"


def test_programs_may_fork_start_threads_and_talk_among_themselves():
    program = (
        "import os, socket, subprocess, sys, threading\n"
        "a, b = socket.socketpair()\n"
        "threading.Thread(target=a.send, args=(b'thread',)).start()\n"
        "print(b.recv(9).decode(), subprocess.check_output([sys.executable, '-S', '-c', 'print(1 + 1)']).decode())\n"
    )
    outcome = run_python(program)
    assert (outcome.status, outcome.output.split()) == ("passed", ["thread", "2"])


@pytest.mark.parametrize("name", jail.FORBIDDEN)
def test_a_forbidden_call_is_refused_before_its_arguments_are_read(name):
    number = jail.FORBIDDEN[name][jail.ARCHITECTURES[os.uname().machine][0]]
    program = f"{CALLS}\nprint(libc.syscall({number}, -1, -1, -1, -1, -1), ctypes.get_errno())"
    assert run_python(program, limits=PATIENT).output == "-1 1\n"


def test_system_calls_have_the_numbers_of_the_kernel_headers():
    headers = ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"]
    for column, header in enumerate(map(Path, headers)):
        for name, numbers in jail.FORBIDDEN.items() if header.exists() else ():
            if found := re.search(rf"#define __NR_{name} (\d+)", header.read_text()):
                assert int(found[1]) == numbers[column], name


def test_a_program_runs_as_a_script_with_few_devices():
    program = "import os, sys\nprint(__name__, sys.argv, sys.modules['__main__'].os is os, sorted(os.listdir('/dev')))"
    expected = "__main__ ['program.py'] True ['full', 'null', 'random', 'urandom', 'zero']\n"
    assert run_python(program, limits=PATIENT).output == expected


def test_the_keyring_of_the_evaluator_is_neither_read_nor_cleared():
    libc = ctypes.CDLL(None, use_errno=True)
    add, keyctl = (jail.FORBIDDEN[name][jail.ARCHITECTURES[os.uname().machine][0]] for name in ("add_key", "keyctl"))
    libc.syscall(keyctl, jail.JOIN_SESSION_KEYRING, None)  # one of this process' own
    key = libc.syscall(add, b"user", b"a-token", b"secret", 6, -3)  # fails where the machine has no keyrings
    program = (
        f"{CALLS}\nprint(libc.syscall({keyctl}, 10, -3, b'user', b'a-token', 0), libc.syscall({keyctl}, 7, -3))\n"
        "print(os.path.exists('/proc/keys') and 'a-token' in open('/proc/keys').read())\n"
    )
    output = run_python(program, limits=PATIENT).output.splitlines()
    assert output[0] == "-1 -1"
    assert output[1] == "False"
    assert libc.syscall(keyctl, 10, -3, b"user", b"a-token", 0) == key


def test_a_function_that_is_right_passes_its_tests():
    outcome = run_python("def square(x): return x * x", tests=TESTS, function="square", limits=PATIENT)
    assert outcome.status == "passed"


def test_killing_everybody_does_not_pass():
    program = (
        "import os\n"
        "def square(x):\n"
        "    os.kill(-1, 9)\n"
        "    for name in os.listdir('/proc'):\n"
        "        if name.isdigit() and int(name) != os.getpid():\n"
        "            try: os.kill(int(name), 9)\n"
        "            except OSError: pass\n"
        "    os._exit(0)\n"
    )
    assert run_python(program, tests=TESTS, function="square", limits=PATIENT).status == "failed"


@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_cheats_fails(name):
    outcome = run_python(CHEATS[name], tests=TESTS, function="square", limits=PATIENT)
    assert outcome.status == "failed"


PLAIN = "[1, (2.5, 'ä\\n'), {3: {4}}, None, True, b'x', set(), 1j]"


@pytest.mark.parametrize(
    ("answer", "is_received_as"),
    [
        (PLAIN, PLAIN),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("__import__('collections').namedtuple('Pair', 'a b')(1, 2)", "(1, 2)"),
        ("__import__('enum').IntEnum('Color', 'RED')(1)", "1"),
        ("{1: 2}.keys()", "{1}"),
    ],
)
def test_answers_arrive_as_plain_data(answer, is_received_as):
    tests = f"a, b = candidate(), {is_received_as}\nassert a == b and type(a) is type(b)"
    assert run_python(f"def f(): return {answer}", tests=tests, function="f", limits=PATIENT).status == "passed"


def test_arguments_arrive_as_they_are():
    tests = "assert candidate([1, (2,), 'x'], y=float('-inf')) == \"([1, (2,), 'x'], -inf)\""
    assert run_python("def f(x, y): return repr((x, y))", tests=tests, function="f", limits=PATIENT).status == "passed"


def test_code_sees_nothing_of_the_tests():
    program = (
        "import glob\n"
        "def square(x):\n"
        "    for path in glob.glob('/proc/[0-9]*/*') + glob.glob('/proc/[0-9]*/fd/*'):\n"
        "        if not path.endswith(('kmsg', 'clear_refs')) and '/proc/self' not in path:\n"
        "            try: file = open(path, 'rb')\n"
        "            except OSError: continue\n"
        "            try: found = b'156' + b'.25' in file.read(2**16)\n"
        "            except OSError: continue\n"
        "            if found: print('seen in', path)\n"
    )
    outcome = run_python(program, tests=TESTS, function="square")
    assert outcome.status != "passed"
    assert "seen in" not in outcome.output


@pytest.mark.parametrize("attribute", ["mem", "fd", "environ", "maps"])
def test_the_memory_of_the_tests_cannot_be_opened(attribute):
    program = (
        "import os\n"
        "def square(x):\n"
        "    for name in os.listdir('/proc'):\n"
        "        if name.isdigit() and int(name) != os.getpid():\n"
        f"            path = f'/proc/{{name}}/{attribute}'\n"
        "            try: os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(1)\n"
        "            except OSError: print('refused')\n"
        "            else: print('opened')\n"
    )
    output = run_python(program, tests=TESTS, function="square", limits=PATIENT).output
    assert output.count("refused") == 2  # process 1 and the tests
    assert "opened" not in output
