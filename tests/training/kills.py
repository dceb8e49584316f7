"""Kill `redraft train` and go on with it, again and again: `python kills.py random|each RECIPE`, printing JSON.

Importing takes longer than the training between two kills, so it is done once: each start is a fork of this process
that runs the command line. `random` kills 20 times, at a random moment or as soon as a certain file appears. `each`
kills at each change of a file, of a run that begins and of one that goes on, and then lets it end.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

import redraft.cli.train
import redraft.training.run  # noqa: F401
from redraft.cli import main
from redraft.training.callbacks import read_log
from redraft.training.checkpoint import HASHES_FILE, damage
from redraft.training.config import RECIPE_FILE, RunConfig

NUM_KILLS = 20
FILES = (
    ".saving/checkpoint-*",
    ".saving/checkpoint-*/model.safetensors",
    ".saving/checkpoint-*/optimizer.pt",
    ".saving/checkpoint-*/trainer_state.json",
    f".saving/checkpoint-*/{HASHES_FILE}",
)
LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")
CHANGES = ("os.mkdir", "os.rename", "os.rmdir", "os.remove")


def start(recipe, run, *, die_at=None):
    """Run the command line in a fork, resuming what there is; what it prints goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(run.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    torch.set_num_threads(1)
    if die_at is not None:
        die_at_change(run, die_at)
    try:
        main(["train", str(recipe), *(["--resume"] if (run / RECIPE_FILE).exists() else [])])
    except SystemExit as done:
        code = done.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def die_at_change(run, number):
    """Die at the n-th change of a file below the run; a file that is being written has been opened, and is empty."""
    seen = 0

    def count(event, arguments):
        nonlocal seen
        is_opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (is_opened or event in CHANGES) or str(run) not in str(arguments[0]):
            return
        seen += 1
        if seen == number:
            with suppress(OSError):
                os.close(os.open(arguments[0], arguments[2], 0o644)) if is_opened else None
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def wait_for_the_moment(run, chance, *, longest):
    """Wait for a random time, or for the n-th time that a file appears."""
    if chance.random() < 0.5:
        time.sleep(seconds := chance.uniform(0, longest))
        return f"{seconds:.2f} s"
    pattern, seen = chance.choice(FILES), set()
    count, end = chance.randint(1, 3), time.monotonic() + 3  # a busy machine may never show it
    while len(seen) < count and time.monotonic() < end:
        with suppress(FileNotFoundError):  # it went while we looked
            seen.update(run.glob(pattern))
    return f"{count} x {pattern}"


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def newest(run):
    """Step of the newest whole checkpoint."""
    return max((int(path.name[11:]) for path in run.glob("checkpoint-*") if damage(path) is None), default=0)


def found(run):
    """What a run ended with, to be compared with another."""
    lines = read_log(run / "log.jsonl")
    return {
        "weights": load_file(run / "model.safetensors"),
        "log": [(line["step"], name, line[name]) for line in lines for name in LOGGED if name in line],
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "damaged": [str(path) for path in run.glob("checkpoint-*") if damage(path)],
    }


def differences(run, expected):
    other = found(run)
    different = [name for name in ("files", "damaged", "log") if other[name] != expected[name]]
    if not all(torch.equal(expected["weights"][name], other["weights"][name]) for name in expected["weights"]):
        different.append("weights")
    return different


def whole(recipe, run):
    """What the run ends with when it is never killed; the run is taken away."""
    assert exit_code(start(recipe, run)) == 0, run.with_suffix(".txt").read_text()
    expected = found(run)
    shutil.rmtree(run)
    return expected


def at_random_moments(recipe, run):
    begin, chance, rounds = time.monotonic(), random.Random(0), []
    expected = whole(recipe, run)
    longest = (time.monotonic() - begin) / 8  # so that 20 of them do not come to the end
    for _ in range(NUM_KILLS):
        pid = start(recipe, run)
        moment = wait_for_the_moment(run, chance, longest=longest)
        os.kill(pid, signal.SIGKILL)
        rounds.append({"moment": moment, "code": exit_code(pid), "step": newest(run)})
    code = exit_code(start(recipe, run))
    return {"rounds": rounds, "code": code, "differences": differences(run, expected)}


def at_each_change(recipe, run):
    expected, begun, wrong, kills = whole(recipe, run), run.with_name("begun"), {}, {"new": 0, "resumed": 0}
    while True:
        kind = "resumed" if begun.exists() else "new"
        if begun.exists():
            shutil.copytree(begun, run)
        if exit_code(start(recipe, run, die_at=kills[kind] + 1)) == 0:
            return {"kills": kills, "wrong": wrong}
        kills[kind] += 1
        if newest(run) and len(read_log(run / "log.jsonl")) > newest(run):  # with lines of steps to be taken again
            begun.exists() or shutil.copytree(run, begun)
        code = exit_code(start(recipe, run))
        if different := [run.with_suffix(".txt").read_text()[-300:]] if code else differences(run, expected):
            wrong[f"{kind} {kills[kind]}"] = different
        shutil.rmtree(run)


if __name__ == "__main__":
    recipe = Path(sys.argv[2])
    kill = {"random": at_random_moments, "each": at_each_change}[sys.argv[1]]
    print(json.dumps(kill(recipe, Path(RunConfig.read(recipe).out))))
