"""Kill `redraft train` and go on with it, again and again: `python kills.py random|each RECIPE`, printing JSON.

Importing takes longer than the training between two kills, so it is done once: each start is a fork of this process
that runs the command line. `random` kills 20 times, after a random number of steps or of changes of a file. `each`
kills at each change of a file, of a run that begins and of one that goes on, and then lets it end. No clock is read.
"""

import json
import os
import random
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

import redraft.cli.train
import redraft.training.run  # noqa: F401
from redraft.cli import main
from redraft.training.callbacks import read_log
from redraft.training.checkpoint import damage
from redraft.training.config import RECIPE_FILE, RunConfig
from redraft.training.ema import WeightAverage

NUM_KILLS, MOST_STEPS, MOST_CHANGES = 20, 25, 60  # so that 20 of them do not come to the end
LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")
CHANGES = ("os.mkdir", "os.rename", "os.rmdir", "os.remove")


def start(recipe, run, *, die_at=None, die_in_step=None):
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
    if die_in_step is not None:
        die_before_average(die_in_step)
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


def die_before_average(number):
    """Die in the n-th step, between the update of the weights and that of their average."""
    update, steps = WeightAverage.update, []

    def count(self):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self)

    WeightAverage.update = count


def random_moment(chance):
    if chance.random() < 0.5:
        return {"die_in_step": chance.randint(1, MOST_STEPS)}
    return {"die_at": chance.randint(1, MOST_CHANGES)}


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
    chance, rounds = random.Random(0), []
    expected = whole(recipe, run)
    for _ in range(NUM_KILLS):
        moment = random_moment(chance)
        rounds.append({"moment": moment, "code": exit_code(start(recipe, run, **moment)), "step": newest(run)})
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
