"""Train with outputs that fail in different ways: `python outlive.py RECIPE`, printing JSON.

Importing takes longer than the training, so it is done once: each run is a fork of this process that runs the command
line with other descriptors as its standard output and error.
"""

import io
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import redraft.training.run  # noqa: F401
from redraft.cli import main
from redraft.training.checkpoint import damage
from redraft.training.config import RunConfig


def start(recipe, out, connect):
    """Run the command line in a fork whose output `connect` has set up."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    torch.set_num_threads(1)
    try:
        connect()
        main(["train", str(recipe), "--out", str(out)])
    except SystemExit as done:
        code = done.code
    except BaseException:
        Path(f"{out}.txt").write_text(traceback.format_exc())
    os._exit(code)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def broken_pipe():
    """Return the end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def to(open_output, *numbers):
    def connect():
        output = open_output()
        for number in numbers:
            os.dup2(output, number)

    return connect


def closed():
    os.close(1)
    os.close(2)


def ascii_only():
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="ascii", write_through=True)


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


WAYS = {
    "the reader of stdout left": to(broken_pipe, 1),
    "the reader of stdout and stderr left": to(broken_pipe, 1, 2),
    "a full disk below stdout": to(full_disk, 1),
    "a full disk below both": to(full_disk, 1, 2),
    "both closed": closed,
    "a terminal of ASCII": ascii_only,
}


def reader_of_one_line(recipe, out):
    """Read the first line and leave, as `head -1` does."""
    reader, writer = os.pipe()
    pid = start(recipe, out, lambda: (os.close(reader), os.dup2(writer, 1)))
    os.close(writer)
    with os.fdopen(reader) as lines:
        lines.readline()
    return exit_code(pid)


def closed_terminal(recipe, out):
    """Close the terminal that a run belongs to, once it has logged: SIGHUP, and no more output."""
    master, slave = os.openpty()

    def connect():
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where the tests run under nohup
        os.close(master)
        os.close(os.open(os.ttyname(slave), os.O_RDWR))  # becomes the controlling terminal
        for number in range(3):
            os.dup2(slave, number)
        os.close(slave)

    pid = start(recipe, out, connect)
    os.close(slave)
    log = Path(out) / "log.jsonl"
    os.set_blocking(master, False)
    while not (log.exists() and log.read_text()):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended by itself"
        try:
            os.read(master, 10**6)
        except BlockingIOError:
            os.sched_yield()
    os.close(master)
    return {"code": exit_code(pid), "damage": [damage(path) for path in Path(out).glob("checkpoint-*")]}


if __name__ == "__main__":
    recipe = Path(sys.argv[1])
    config = RunConfig.read(recipe)
    out = Path(config.out)
    assert exit_code(start(recipe, f"{out}-whole", to(lambda: os.open(os.devnull, os.O_WRONLY), 1, 2))) == 0
    expected = load_file(f"{out}-whole/model.safetensors")
    runs = {way: exit_code(start(recipe, f"{out}-{i}", connect)) for i, (way, connect) in enumerate(WAYS.items())}
    runs["head"] = reader_of_one_line(recipe, f"{out}-{len(WAYS)}")
    found = {}
    for i, (way, code) in enumerate(runs.items()):
        weights = load_file(f"{out}-{i}/model.safetensors") if code == 0 else {}
        error = Path(f"{out}-{i}.txt")
        found[way] = error.read_text() if error.exists() else code
        if code == 0 and not all(torch.equal(expected[name], weights[name]) for name in expected):
            found[way] = "other weights"
    longer = replace(config, train=replace(config.train, max_steps=10**6, save_every=10**6))
    recipe.write_text(json.dumps(asdict(longer)))
    print(json.dumps({"runs": found, "closed terminal": closed_terminal(recipe, f"{out}-terminal")}))
