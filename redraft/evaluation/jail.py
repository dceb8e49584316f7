"""The inside of the sandbox: a script of its own (standard library only) that `sandbox.run_python` starts.

There are four processes. The outer one can be killed by the evaluator. Process 1 of a new process namespace watches
time and memory; when it ends, the kernel kills everything in the namespace, daemons included. The generated code runs
under another user (where we are root), without capabilities, on a read-only file system with a small private /tmp. The
tests call the code through two pipes: arguments and results are sent as text, so that the code never sees the tests,
and the tests receive plain data only.

A seccomp filter refuses system calls that allocate memory which is not counted for any process. (A cgroup would count
it, but few machines permit one; the filter works on all.)
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_READ_ONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
JOIN_SESSION_KEYRING = 1
NOBODY = 65534
USERS = range(2**20, 2**21)
HIDDEN = ("/home", "/root", "/run", "/var/tmp", "/tmp", "/dev")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
WATCH_SECONDS = 0.02
MEMORY = ("VmRSS:", "VmSwap:", "VmPTE:", "HugetlbPages:")

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machines whose system calls are known: the column in the tables below, and seccomp's number of the machine."""
FORBIDDEN = {
    # Memory that is not counted for any process: System V IPC, files in memory, rings, pages given to a pipe, large
    # socket buffers, buffers of unaccepted connections, rules. Pairs of Unix sockets remain, and no network.
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "io_setup": (206, 0), "io_uring_setup": (425, 425), "vmsplice": (278, 75),
    "setsockopt": (54, 208), "socket": (41, 198), "bind": (49, 200), "listen": (50, 201),
    "landlock_create_ruleset": (444, 444),
    # A file system in memory takes a namespace of its own (clone is in CHECKED).
    "unshare": (272, 97), "setns": (308, 268),
    # Keyrings are the user's; processes of the same user are the evaluator's.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    # Large parts of the kernel that no program here needs.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
CHECKED = (  # numbers, argument, bits that it may not have
    ((56, 220), 0, 0x7E020000),  # clone: no new namespaces
    ((9, 222), 3, 1),  # mmap: not shared, as its pages outlive a part that is unmapped
)
CLONE3 = 435  # a filter cannot read its flags, which are in memory; where it is missing, libraries use clone

RUNNER = """
import os, sys
from _collections_abc import Mapping, Set  # which every interpreter has loaded

def plain(value):
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, Set):
        return {plain(one) for one in value}
    for kind in (list, tuple):
        if isinstance(value, kind):
            return kind(map(plain, value))
    for kind, convert in ((int, int.__int__), (float, float.__float__), (str, str.__str__)):
        if isinstance(value, kind) and value is not True and value is not False:
            return convert(value)
    return value

def serve(path, function, calls, answers):
    pid, module = os.getpid(), type(sys)("__main__")
    sys.argv, sys.modules["__main__"] = [path], module
    with open(path, "rb") as file:
        exec(compile(file.read(), path, "exec"), vars(module))
    sys.stdout.flush()
    if os.getpid() != pid:
        return  # a child that reaches the end has nothing to answer
    answers.write(b"\\n")
    for call in calls:
        args, options = eval(call, {"inf": float("inf"), "nan": float("nan")})
        answer = plain(vars(module)[function](*args, **options))
        sys.stdout.flush()
        answers.write(f"{answer!r}\\n".encode())

serve(sys.argv[1], sys.argv[2], open(int(sys.argv[3]), "rb"), open(int(sys.argv[4]), "wb", 0))
"""
"""Runs a program to its end, reports that, and answers calls of one of its functions."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Run the sources on standard input under the settings in argv, and write the result to the report pipe."""
    settings = json.loads(sys.argv[1])
    sources = json.load(sys.stdin)
    os.set_inheritable(settings["report_fd"], False)
    uid = _other_user()
    try:
        _enter_namespaces(is_root=uid is not None)
    except OSError as error:
        _report(settings, {"reason": "no isolation", "error": str(error)})
        return
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the namespaces: entering one clears it
    libc.syscall(FORBIDDEN["keyctl"][_column()], JOIN_SESSION_KEYRING, None)
    if not (pid := os.fork()):
        _be_first(sources, settings, uid=uid)
    os.waitpid(pid, 0)


def _other_user() -> int | None:
    """Draw a user id for the code, so that its processes are counted apart, if we are root and may change to it."""
    maps = [[int(number) for number in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if os.geteuid() != 0 or not any(first <= USERS.start and first + size >= USERS.stop for first, _, size in maps):
        return None
    return USERS[int.from_bytes(os.urandom(4)) % len(USERS)]


def _enter_namespaces(*, is_root: bool) -> None:
    """Enter new namespaces for network, processes and mounts. Raises OSError where that is not permitted."""
    flags = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    if is_root:
        _check(libc.unshare(flags))
        return
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(flags | NEW_USER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {gid} 1")


def _be_first(sources: dict[str, str], settings: dict, *, uid: int | None) -> None:
    """Prepare, start code and tests, watch them, report, and exit."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _close_file_system(settings)
        _filter_system_calls()
        libc.prctl(PR_SET_DUMPABLE, 0)  # /proc shows the code neither this memory nor these pipes
        Path("program.py").write_bytes(sources["program"].encode(errors="surrogatepass"))
        if uid is not None:
            os.chown(".", uid, uid)
        calls, answers = os.pipe(), os.pipe()  # this process keeps both ends, so that neither side sees the other's end
        if not (code := os.fork()):
            _become_code(sources["function"], settings, calls=calls[0], answers=answers[1], uid=uid)
        if not (tests := os.fork()):
            _become_tests(sources["tests"], settings, calls=calls[1], answers=answers[0], uid=uid)
        _report(settings, {"reason": _watch(code, tests, settings)})
    except OSError as error:
        _report(settings, {"reason": "no isolation", "error": str(error)})
    os._exit(0)


def _close_file_system(settings: dict) -> None:
    """Make every mount read-only, hide homes, sockets and other processes; only a new, small /tmp can be written."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    paths = {Path(path).resolve() for path in (*HIDDEN, settings["home"]) if Path(path).is_dir()}
    hidden = sorted(str(path) for path in paths if not paths & set(path.parents))
    needed = [path for path in (*settings["needed"], *DEVICES) if any(Path(path).is_relative_to(h) for h in hidden)]
    handles = {path: os.open(path, os.O_PATH) for path in needed if Path(path).exists()}
    for path in hidden:
        _mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"size={settings['file_bytes']},nr_inodes=4096,mode=755")
    for path, fd in handles.items():  # devices, and an interpreter that lives in a hidden folder, are bound back
        if Path(f"/proc/self/fd/{fd}").is_dir():
            Path(path).mkdir(parents=True, exist_ok=True)
        else:
            Path(path).touch()
        _mount(f"/proc/self/fd/{fd}", path, None, MS_BIND | MS_REC)
        os.close(fd)
    _set_read_only("/", is_on=True)
    _set_read_only("/tmp", is_on=False)
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)  # without it nobody's memory could be counted
    if Path("/proc/keys").exists():
        _mount(os.devnull, "/proc/keys", None, MS_BIND)
    os.chdir("/tmp")


def _filter_system_calls() -> None:
    """Refuse what FORBIDDEN and CHECKED name, to this process and all that it starts."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of BPF
    allow, refuse = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x50000 | errno.EPERM)
    column = _column()
    code = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[os.uname().machine][1]), refuse]
    code += [(load, 0, 0, 0), (at_least, 0, 1, 1 << 30), refuse]  # x32 is another table of calls
    for numbers in FORBIDDEN.values():
        code += [(equal, 0, 1, numbers[column]), refuse]
    code += [(equal, 0, 1, CLONE3), (give, 0, 0, 0x50000 | errno.ENOSYS)]
    for numbers, argument, bits in CHECKED:
        code += [(equal, 0, 4, numbers[column]), (load, 0, 0, 16 + 8 * argument), (any_bit, 0, 1, bits), refuse, allow]
    packed = b"".join(struct.pack("HBBI", *line) for line in [*code, allow])
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = ctypes.create_string_buffer(struct.pack("HP", len(packed) // 8, ctypes.addressof(buffer)))
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0))


def _column() -> int:
    return ARCHITECTURES[os.uname().machine][0]


def _become_code(function: str, settings: dict, *, calls: int, answers: int, uid: int | None) -> None:
    """Drop all privileges and become the generated program. Never returns."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        _give_up(settings, uid=uid)
        for fd in (calls, answers):
            os.set_inheritable(fd, True)
        folder = str(Path.cwd())
        environment = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        program = [settings["python"], "-I", "-S", "-B", "-c", RUNNER, "program.py", function, str(calls), str(answers)]
        os.execve(settings["python"], program, environment)
    except BaseException as error:
        _report(settings, {"reason": "no isolation", "error": str(error)})
    finally:
        os._exit(1)


def _become_tests(source: str, settings: dict, *, calls: int, answers: int, uid: int | None) -> None:
    """Wait until the program has reached its end, run the tests, and exit with 0 if they pass. Never returns."""
    import ast
    import traceback  # imported here, while the code starts: both take as long as an interpreter

    def candidate(*args: object, **options: object) -> object:
        os.write(calls, f"{(args, options)!r}\n".encode())
        answer = lines.readline()
        try:
            return ast.literal_eval(answer.decode())
        except Exception:
            raise TypeError(f"an answer must be plain data; got {answer[:80]!r}") from None

    try:
        _give_up(settings, uid=uid)
        lines = os.fdopen(answers, "rb")
        lines.readline()
        exec(compile(source, "tests.py", "exec"), {"__name__": "tests", "candidate": candidate})
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _give_up(settings: dict, *, uid: int | None) -> None:
    """Set the limits, and stop being root."""
    for what, limit in settings["rlimits"].items():
        number = getattr(resource, f"RLIMIT_{what}")
        hard = resource.getrlimit(number)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        soft = limit - 1 if what == "CPU" else limit  # SIGXCPU, which says why, then comes before SIGKILL
        resource.setrlimit(number, (soft, limit))
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _watch(code: int, tests: int, settings: dict) -> str:
    """Wait for the tests; code that ends before them, or exceeds its time or memory, does not pass."""
    deadline = time.monotonic() + settings["seconds"]
    while True:
        if _memory_bytes() > settings["memory_bytes"]:
            return "memory"
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == tests:
            return "failed" if status else "passed"
        if ended == code:
            return "timeout" if os.waitstatus_to_exitcode(status) == -signal.SIGXCPU else "failed"
        if time.monotonic() > deadline:
            return "timeout"
        if not ended:
            time.sleep(WATCH_SECONDS)


def _memory_bytes() -> int:
    """Sum the memory of all other processes of the namespace, page tables included."""
    kilobytes = 0
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for thread in (folder / "task").iterdir():  # the first one may have ended before the others
                lines = [line.split() for line in (thread / "status").read_text().splitlines()]
                if sizes := [int(words[1]) for words in lines if words and words[0] in MEMORY]:
                    kilobytes += sum(sizes)
                    break
    return kilobytes * 1024


def _report(settings: dict, what: dict) -> None:
    os.write(settings["report_fd"], f"{json.dumps(what)}\n".encode())


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = None if kind is None else kind.encode()
    _check(libc.mount(source.encode(), target.encode(), encoded, ctypes.c_ulong(flags), options.encode()))


def _set_read_only(path: str, *, is_on: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(ATTR_READ_ONLY if is_on else 0, 0 if is_on else ATTR_READ_ONLY, 0, 0)
    flags = AT_RECURSIVE if is_on else 0
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, size))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main()
