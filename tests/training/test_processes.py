"""Many processes equal one, their checkpoints are those of one, and a job whose process dies says so and ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from accelerate.utils.other import get_free_port
from test_trainer import (
    OBJECTIVES,
    QUIET,
    assert_close,
    evaluations,
    finish,
    gradient_norms,
    launched,
    losses,
    on_conversations,
    over_passes,
    wait_for_log,
    weights,
    with_train,
)
from test_trainer import cache as cache
from test_trainer import config as config
from test_trainer import corpus as corpus

from redraft.cli.train import main
from redraft.training.checkpoint import damage
from redraft.training.config import ObjectiveConfig
from redraft.training.launch import KINDS as LAUNCHES
from redraft.training.launch import _describe_failure, check_division, config_file
from redraft.training.run import run


def launch_all(kind, configs):
    """Run configs in two processes, one after the other; those whose folder ends on -resumed go on."""
    paths = []
    for one in configs:
        paths.append(Path(one.out).with_suffix(".json"))
        paths[-1].write_text(json.dumps(asdict(one)))
    code = "import sys; from redraft.training.launch import launch; "
    code += f"sys.exit(launch({kind!r}, 2, sys.argv[1:], module='many_runs'))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def on_pairs(config):
    """The same run on preference pairs."""
    rows = [{"prompt": f"{i}?", "chosen": f"YES {i % 7} !", "rejected": f"no {i % 5}"} for i in range(60)]
    source = Path(config.out).with_suffix(".pairs.jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(config.data, kind="preference", source=str(source), seq_len=64, vocab_size=270)
    return replace(config, out=f"{config.out}-preference", data=data, objective=ObjectiveConfig(num_samples=2))


def stopped_at(one, step, *, out):
    """Copy a run as it was when it had written the checkpoint of a step."""
    shutil.copytree(one.out, out)
    (Path(out) / "model.safetensors").unlink()
    for folder in Path(out).glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
    return replace(one, out=out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one_whatever_the_objective_and_resume_each_others_checkpoints(config, kind):
    torch.set_num_threads(1)
    config = with_train(config, max_steps=4, accumulation=2, learning_rate=1e-3)
    ones = {
        name: replace(config, out=f"{config.out}-{name}", objective=objective) for name, objective in OBJECTIVES.items()
    }
    ones["preference"] = on_pairs(config)
    ones["passes"] = with_train(over_passes(config), max_steps=6, accumulation=1)  # three steps to a pass
    ones["passes"] = replace(ones["passes"], out=f"{config.out}-passes")
    ones["grouped"] = on_conversations(replace(config, out=f"{config.out}-grouped"))
    if kind == "ddp":
        ones["muon"] = replace(with_train(config, optimizer="muon"), out=f"{config.out}-muon")
    for one in ones.values():
        run(one, console=QUIET)
    masked = ones["masked"]
    twos = {name: replace(one, out=f"{one.out}-two") for name, one in ones.items()}
    in_two = stopped_at(masked, 2, out=f"{masked.out}-resumed")
    later = stopped_at(ones["passes"], 4, out=f"{masked.out}-later-resumed")
    skips = replace(with_train(masked, save_every=1), out=f"{masked.out}-skips")
    coarse = replace(with_train(masked, precision="bfloat16"), out=f"{masked.out}-coarse")
    launch_all(kind, [*twos.values(), in_two, later, skips, coarse])
    sharded = set(Path(twos["masked"].out, "sharded.txt").read_text().split())
    assert sharded == (set(weights(masked.out)) if kind == "fsdp2" else set())
    coarse_steps = {name: twos.pop(name) for name in ("muon",) if name in twos}  # Muon enlarges rounding
    for name, two in coarse_steps.items():
        assert losses(two.out) == pytest.approx(losses(ones[name].out), abs=1e-3)
        assert_close(weights(ones[name].out), weights(two.out), 1e-4)
    for name, two in twos.items():
        assert losses(two.out) == pytest.approx(losses(ones[name].out), abs=1e-5), name
        assert gradient_norms(two.out) == pytest.approx(gradient_norms(ones[name].out), rel=1e-5, abs=1e-5), name
        assert evaluations(two.out) == pytest.approx(evaluations(ones[name].out), abs=1e-5), name
        assert_close(weights(ones[name].out), weights(two.out), 1e-5)
    in_one = stopped_at(twos["masked"], 2, out=f"{masked.out}-back")
    run(in_one, resume=True, console=QUIET)
    for resumed, whole in ((in_two, masked), (in_one, masked), (later, ones["passes"])):
        assert losses(resumed.out) == pytest.approx(losses(whole.out), abs=1e-5)
        assert_close(weights(whole.out), weights(resumed.out), 1e-5)

    a, b, c = (Path(skips.out, f"checkpoint-{step}") for step in (1, 2, 3))
    assert_close(weights(a), weights(b), 0)
    assert any(not torch.equal(value, weights(c)[name]) for name, value in weights(b).items())
    moments = [torch.load(folder / "optimizer.pt")["state"] for folder in (a, b)]
    for number, values in moments[0].items():
        assert_close(values, moments[1][number], 0)
    assert losses(coarse.out) == pytest.approx(losses(masked.out), rel=0.02)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_one_line(config):
    config = with_train(config, max_steps=100_000, save_every=100_000, warmup=0.0)
    with launched(config, flags=["--launch", "ddp", "--processes", "2"]) as process:
        wait_for_log(process, config, lines=3)
        workers = [child for child in psutil.Process(process.pid).children() if "redraft.cli" in child.cmdline()]
        assert len(workers) == 2
        workers[1].kill()
        output = finish(process, code=128 + 9)
    last = output.splitlines()[-1]
    assert f"of 2 (pid {workers[1].pid}) was killed by SIGKILL" in last
    assert "Traceback" not in output
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_a_checkpoint(config):
    config = with_train(config, max_steps=100_000, save_every=100_000, warmup=0.0)
    with launched(config, flags=["--launch", "fsdp2", "--processes", "2"]) as process:
        wait_for_log(process, config, lines=3)
        process.send_signal(signal.SIGTERM)
        output = finish(process, code=128 + 15)
    assert "To continue: redraft train" in output
    assert "Traceback" not in output
    (checkpoint,) = Path(config.out).glob("checkpoint-*")
    assert damage(checkpoint) is None


@pytest.mark.slow
def test_a_mistake_found_by_the_processes_is_told_once(config, tmp_path):
    config = replace(config, data=replace(config.data, source=str(tmp_path / "nowhere")))
    with launched(config, flags=["--launch", "fsdp2", "--processes", "2"]) as process:
        output = finish(process, code=2)
    assert output.count("nowhere") == 1
    assert "Traceback" not in output


@pytest.mark.slow
def test_muon_over_sharded_weights_is_refused(config):
    with launched(with_train(config, optimizer="muon"), flags=["--launch", "fsdp2", "--processes", "2"]) as process:
        output = finish(process, code=2)
    assert output.count("muon needs whole matrices; got sharded weights. Use adamw, or ddp.") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ((-15, -9), "process 1 of 2 .pid 101. was killed by SIGKILL"),
        ((-6, -11), "process 1 of 2 .pid 101. was killed by SIGSEGV"),
        ((1, -9), "process 1 of 2 .pid 101. was killed by SIGKILL"),
        ((1, 3), "process 1 of 2 .pid 101. ended with exit code 3: KeyError: 'here'"),
        ((-15, 3), "process 1 of 2 .pid 101. ended with exit code 3: KeyError: 'here'"),
    ],
)
def test_the_process_that_failed_is_told_from_those_that_fell_with_it(tmp_path, codes, cause):
    for rank, text in enumerate(["RuntimeError: Connection closed by peer", "KeyError: 'here'"]):
        path = tmp_path / "run" / "attempt_0" / str(rank) / "stderr.log"
        path.parent.mkdir(parents=True)
        path.write_text(f"Traceback\n{text}\n")
    failures = {
        rank: SimpleNamespace(exitcode=code, pid=100 + rank, local_rank=rank) for rank, code in enumerate(codes)
    }
    code, reason = _describe_failure(failures, 2, tmp_path)
    assert re.match(cause, reason)
    assert code == (codes[1] if codes[1] > 0 else 128 - codes[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--launch ddp --processes 3", "must be a multiple of the number of processes.*got 2 and 3"),
        ("--launch fsdp2 --processes 0", "--processes must be at least 1; got 0"),
        ("--launch=fsdp --processes 2", "--launch 'fsdp'.*ddp, fsdp2, deepspeed"),
        ("--launch ddp", "--launch and --processes go together; got ddp and None"),
        ("--launch ddp --processes two", "argument --processes: invalid int value: 'two'. See --help"),
        ("--processes 2", "--launch and --processes go together; got None and 2"),
        ("--launch deepspeed --processes 2", "DeepSpeed, which is not installed"),
    ],
)
def test_a_launch_that_cannot_be_is_told_before_anything_is_started(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["stdlib-tiny", "--smoke", "--out", str(tmp_path / "run"), *flags.split()])
    assert not (tmp_path / "run").exists()


def test_stages_of_latent_thinking_cannot_be_launched():
    with pytest.raises(ValueError, match="latent stages train in one process; got --launch fsdp2"):
        main(["latent-autoencoder", "--launch", "fsdp2", "--processes", "2"])


@pytest.mark.parametrize("kind", LAUNCHES)
def test_the_configurations_that_ship_are_accelerates(kind):
    read = load_config_from_file(str(config_file(kind)))
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(config_file(kind)), "--num_processes", "2", "--module", "x"])
    args, defaults, _ = _validate_launch_command(args)
    assert args.num_processes == 2
    if kind == "deepspeed":
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
        args.num_machines, args.machine_rank, args.main_process_ip = 2, 1, "127.0.0.1"
        command, _ = prepare_deepspeed_cmd_env(args)
        assert command is None  # each node starts its own: no `deepspeed --hostfile`, which logs in to the others
        assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "1", 1)
    else:
        environment = prepare_multi_gpu_env(args)
        assert environment.get("FSDP_VERSION") == ("2" if kind == "fsdp2" else None)
    assert read.mixed_precision == "no"  # the recipe decides


def test_the_slurm_template_shares_its_batch_evenly_as_it_ships():
    script = config_file("ddp").with_name("slurm.sh").read_text()
    nodes, gpus, batch = (
        int(re.search(rf"^{name}=(\d+)", script, flags=re.MULTILINE)[1])
        for name in ("#SBATCH --nodes", "GPUS_PER_NODE", "BATCH")
    )
    check_division(batch, nodes * gpus)


# What the template asks of SLURM, for two nodes that are both this machine.
SLURM = {
    "scontrol": "echo 127.0.0.1; echo other",
    "srun": """shift
        SLURM_NNODES=2 SLURM_NODEID=0 "$@" & first=$!
        SLURM_NNODES=2 SLURM_NODEID=1 "$@" & second=$!
        wait $first && wait $second""",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_slurm_template_trains_over_two_nodes_as_one_process_does_and_goes_on(config, tmp_path, kind):
    run(config, console=QUIET)
    recipe, out = tmp_path / "recipe.json", tmp_path / "nodes"
    recipe.write_text(json.dumps(asdict(config)))
    script = config_file(kind).with_name("slurm.sh").read_text()
    filled = {"RECIPE": recipe, "OUT": out, "KIND": kind, "GPUS_PER_NODE": 1, "BATCH": config.train.batch_size}
    for name, value in filled.items():
        script = re.sub(rf"^{name}=\S+", f"{name}={value}", script, flags=re.MULTILINE)
    script = script.replace("--main_process_port 29500", f"--main_process_port {get_free_port()}")
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "SLURM_JOB_NODELIST": "node[1-2]", "OMP_NUM_THREADS": "1"}
    begin = partial(subprocess.run, ["bash", "-c", script], capture_output=True, text=True)
    done = begin(env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(out) == pytest.approx(losses(config.out), abs=1e-5)
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-6")
    done = begin(env=environment, check=False)  # the requeued job
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(out) == pytest.approx(losses(config.out), abs=1e-5)
    assert_close(weights(config.out), weights(out), 1e-5)
