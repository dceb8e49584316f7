"""Programs that hold memory which no process is charged with, and programs that cheat their tests."""

CALLS = """
import ctypes, mmap, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
MB = 2**20
def check(result):
    if result in (-1, 2**64 - 1): raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""

HOARDS = {
    "System V shared memory": """
libc.shmat.restype = ctypes.c_void_p
libc.shmdt.argtypes = [ctypes.c_void_p]
for _ in range(16):
    at = libc.shmat(check(libc.shmget(0, 10 * MB, 0o1600)), None, 0)
    ctypes.memset(at, 1, 10 * MB)
    libc.shmdt(at)
""",
    "System V messages": """
message = ctypes.create_string_buffer(b"\\1" + bytes(7) + b"x" * 8000, 8200)
for _ in range(10000):
    check(libc.msgsnd(check(libc.msgget(0, 0o1600)), message, 8000, 0o4000))
""",
    "System V semaphores": "for _ in range(80): check(libc.semget(0, 32000, 0o1600))",
    "files in memory": """
for _ in range(16):
    file = os.memfd_create("x")
    for _ in range(10): os.write(file, bytes(MB))
""",
    "secret memory": """
file = check(libc.syscall(447, 0))
os.ftruncate(file, MB)
""",
    "a file system in a nested user namespace": "check(libc.unshare(0x10000000 | 0x20000))",
    "a nested user namespace by clone": """
nr = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
if not check(libc.syscall(nr, 0x10000000 | 17, 0, 0, 0, 0)): os._exit(0)
""",
    "a nested user namespace by clone3": """
flags = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17)
if not check(libc.syscall(435, flags, 64)): os._exit(0)
""",
    "shared pages whose mapping is gone but for a part": """
for _ in range(16):
    at = check(libc.mmap(None, 10 * MB, 3, 0x21, -1, 0))
    ctypes.memset(at, 1, 10 * MB)
    libc.munmap(at + 4096, 10 * MB - 4096, 0)
""",
    "shared pages of /dev/zero": """
zero = os.open("/dev/zero", os.O_RDWR)
at = check(libc.mmap(None, 10 * MB, 3, 1, zero, 0))
""",
    "shared pages by Python": "mmap.mmap(-1, MB)",
    "huge pages kept alive by a pipe": """
class Part(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
page = check(libc.mmap(None, MB, 3, 0x22, -1, 0))
check(libc.vmsplice(os.pipe()[1], ctypes.byref(Part(page, 4096)), 1, 0))
""",
    "large socket buffers": """
import socket
socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MB)
""",
    "connections that nobody has accepted": """
import socket
a, b = socket.socketpair()
check(libc.listen(b.fileno(), 4096))
""",
    "rules": "check(libc.syscall(444, (ctypes.c_uint64 * 2)(0, 3), 16, 0))",
    "rings": "check(libc.syscall(425, 8, ctypes.create_string_buffer(120)))",
}
"""Each is refused; most would hold 160 MB if they were not."""

CROWDS = {
    "many processes": """
for _ in range(8):
    if not os.fork(): held = b"x" * (20 * MB); time.sleep(60)
time.sleep(60)
""",
    "processes whose first thread has ended": """
import threading
def hold():
    held = b"x" * (20 * MB); time.sleep(60)
nr = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
for _ in range(8):
    if not os.fork():
        threading.Thread(target=hold).start()
        libc.syscall(nr, 0)
time.sleep(60)
""",
    "page tables": """
for i in range(10000):
    at = check(libc.mmap(2**44 + i * 2**30, 4096, 1, 0x22 | 0x100000, -1, 0))
    ctypes.c_char.from_address(at).value
time.sleep(60)
""",
}
"""Each is ended."""

TESTS = "assert candidate(2) == 4\nassert candidate(12.5) == 156.25"

CHEATS = {
    "wrong": "def square(x): return 4",
    "without asserts": """
import os, sys
if not sys.flags.optimize: os.execv(sys.executable, [sys.executable, "-O", *sys.orig_argv[1:]])
def square(x): return 0
""",
    "equal to everything": """
class Any:
    def __eq__(self, other): return True
def square(x): return Any()
""",
    "a number equal to everything": """
class Any(float):
    def __eq__(self, other): return True
    __hash__ = float.__hash__
def square(x): return Any(1)
""",
    "a number that looks like another": """
class Any(int):
    def __repr__(self): return "Any()"
def square(x): return Any(1)
""",
    "text that is code": """
class Code:
    def __repr__(self): return "__import__('os')._exit(0)"
def square(x): return Code()
""",
    "too deep to read": """
class Deep:
    def __repr__(self): return "[" * 10**5
def square(x): return Deep()
""",
    "exit when called": "def square(x): import sys; sys.exit(0)",
    "hard exit when called": "def square(x): import os; os._exit(0)",
    "exit at the end": "import os, atexit\nsquare = lambda x: 1 / 0\natexit.register(os._exit, 0)",
    "no function": "pass",
    "other builtins": """
import builtins, sys
builtins.compile = builtins.exec = builtins.eval = builtins.repr = lambda *_: 4
builtins.AssertionError = type("Never", (Exception,), {})
sys.excepthook = lambda *_: None
def square(x): return 0
""",
    "other frames": """
import sys
def square(x):
    frame = sys._getframe()
    while frame:
        frame.f_locals.update(answer=x * 0 + 4, result=4)
        frame = frame.f_back
    return 0
""",
    "a trace": """
import sys
def trace(frame, event, argument): return trace
sys.settrace(trace)
def square(x): return None
""",
    "verdicts in every pipe": """
import os
def square(x):
    for fd in range(1, 64):
        try: os.write(fd, b'{"reason": "passed", "code": 0}\\npassed\\nNone\\n')
        except OSError: pass
""",
    "a child that answers": """
import os
def square(x):
    if os.fork(): os.wait(); os._exit(0)
    return 0
""",
    "a thread that ends all": """
import os, threading
def square(x):
    threading.Thread(target=os._exit, args=(0,)).start()
    import time; time.sleep(60)
""",
}
"""None of them knows the answers; each fails TESTS."""
