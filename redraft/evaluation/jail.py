"""The inside of the sandbox: a script of its own (standard library only) that `sandbox.run_python` starts.

Three processes: the outer one, which the evaluator can kill; process 1 of a new process namespace, which watches time
and memory and whose end makes the kernel kill everything in the namespace, daemons included; and the generated code,
under another user (where we are root), without capabilities, on a read-only file system with a small private /tmp.

The weak mode, for machines that permit no namespaces: resource limits, another user where we are root, and a hunt for
every descendant at the end. It hides neither the file system nor the network.
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_READ_ONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
NOBODY = 65534
HIDDEN = ("/home", "/root", "/run", "/var/tmp", "/tmp")
WATCH_SECONDS = 0.02

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Run the program on standard input under the settings in argv, and write what became of it to the report pipe."""
    settings = json.loads(sys.argv[1])
    program = sys.stdin.buffer.read()
    os.set_inheritable(settings["report_fd"], False)
    signal.signal(signal.SIGTERM, _kill_all_and_exit)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    uid = random.SystemRandom().randrange(2**20, 2**21) if os.geteuid() == 0 else None  # its own count of processes
    if settings["isolation"] == "namespaces":
        try:
            _enter_namespaces()
        except OSError as error:
            _report(settings, {"reason": "no isolation", "error": str(error)})
            return
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    pid = os.fork()
    if not pid:
        _be_first(program, settings, uid=uid)
    os.waitpid(pid, 0)
    kill_descendants(os.getpid())


def _kill_all_and_exit(*_: object) -> None:
    kill_descendants(os.getpid())
    os._exit(1)


def _enter_namespaces() -> None:
    """Leave the network, the processes and the mounts of the machine. Raises OSError where that is not permitted."""
    flags = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    if os.geteuid() == 0 and libc.unshare(flags) == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(flags | NEW_USER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {gid} 1")


def _be_first(program: bytes, settings: dict, *, uid: int | None) -> None:
    """Prepare, start the code, watch it, report, and exit."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        if settings["isolation"] == "namespaces":
            _close_file_system(settings)
        else:
            os.chdir(settings["folder"])
        Path("program.py").write_bytes(program)
        if uid is not None:
            os.chown(".", uid, uid)
        pid = os.fork()
        if not pid:
            _become_code(settings, uid=uid)
        reason, code = _watch(pid, settings)
        _report(settings, {"reason": reason, "code": code})
    except OSError as error:
        _report(settings, {"reason": "no isolation", "error": str(error)})
    if settings["isolation"] == "weak":
        kill_descendants(os.getpid())
    os._exit(0)


def _close_file_system(settings: dict) -> None:
    """Make every mount read-only, hide homes, sockets and other processes; /tmp is fresh, small and the only place."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    paths = {Path(path).resolve() for path in (*HIDDEN, settings["home"]) if Path(path).is_dir()}
    hidden = sorted(str(path) for path in paths if not paths & set(path.parents))
    kept = {p: os.open(p, os.O_PATH) for p in settings["kept"] if any(Path(p).is_relative_to(h) for h in hidden)}
    for path in hidden:
        _mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"size={settings['file_bytes']},nr_inodes=4096,mode=755")
    for path, fd in kept.items():  # an interpreter that lives in a hidden folder is bound back
        Path(path).mkdir(parents=True, exist_ok=True)
        _mount(f"/proc/self/fd/{fd}", path, None, MS_BIND | MS_REC)
        os.close(fd)
    _set_read_only("/", is_on=True)
    _set_read_only("/tmp", is_on=False)
    try:
        _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)
    except OSError:
        _mount("tmpfs", "/proc", "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755")
    os.chdir("/tmp")


def _become_code(settings: dict, *, uid: int | None) -> None:
    """Give everything up and become the generated program. Never returns."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for what, most in settings["rlimits"].items():
            number = getattr(resource, f"RLIMIT_{what}")
            hard = resource.getrlimit(number)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            soft = most - 1 if what == "CPU" else most  # so that SIGXCPU, which names its reason, comes before SIGKILL
            resource.setrlimit(number, (soft, most))
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        folder = str(Path.cwd())
        environment = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        os.execve(settings["python"], [settings["python"], "-I", "-S", "-B", "program.py"], environment)
    except BaseException as error:
        os.write(2, f"sandbox: {error}\n".encode())
    os._exit(127)


def _watch(pid: int, settings: dict) -> tuple[str, int]:
    """Wait for the code, and end it when its time or the memory of all its processes is used up."""
    deadline = time.monotonic() + settings["seconds"]
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == pid:
            return "ended", os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return "timeout", -signal.SIGKILL
        if _resident_bytes() > settings["memory_bytes"]:
            return "memory", -signal.SIGKILL
        if not ended:
            time.sleep(WATCH_SECONDS)


def _descendants(root: int) -> list[int]:
    """List the processes below one, by /proc."""
    parent: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parent[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    below, found = {root}, {root}
    while found:
        found = {child for child, of in parent.items() if of in below and child not in below}
        below |= found
    return sorted(below - {root})


def _resident_bytes() -> int:
    pages = 0
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def kill_descendants(root: int) -> None:
    """Stop, then kill, all below: a stopped process cannot fork away."""
    while pids := _descendants(root):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _report(settings: dict, what: dict) -> None:
    os.write(settings["report_fd"], json.dumps(what).encode())


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
