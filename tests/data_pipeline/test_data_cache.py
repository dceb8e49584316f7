"""Processes that are killed or run at once. One child imports redraft and forks, so that a run costs milliseconds."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import redraft
from redraft.data.cache import cache_key, cached_folder, is_whole

COMMON = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from filelock import FileLock
from tokenizers import trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.data.tokenizer import tokenizer_fingerprint
from redraft.data.cache import is_whole

source, folder = sys.argv[1], os.path.join(os.environ["XDG_CACHE_HOME"], "redraft", "data")
config = DataConfig(source=source, vocab_size=300, seq_len=32, validation_fraction=0.2)

def digest(data):
    digest = hashlib.sha256(tokenizer_fingerprint(data.tokenizer).encode())
    for dataset in (data.train, data.validation):
        for column in dataset.windows.columns().values():
            digest.update(column.tobytes())
    return digest.hexdigest()

def fork(work):
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def result(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

KILL = """
def run_and_die_at(event_number):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove") and folder in str(arguments[0]):
            seen += 1
            if seen == event_number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    prepare(config)

def run_whole():
    Path(folder).with_suffix(".digest").write_text(digest(prepare(config)))

outcomes, digests, kills = set(), set(), 0
while True:
    shutil.rmtree(folder, ignore_errors=True)
    code = result(fork(lambda: run_and_die_at(kills + 1)))
    outcomes.add(code)
    if code == 0:
        break
    kills += 1
    left = [path for path in Path(folder).glob("*") if path.is_dir() and path.suffix != ".partial"]
    assert all(map(is_whole, left)), (kills, left)
    assert result(fork(run_whole)) == 0, kills
    digests.add(Path(folder).with_suffix(".digest").read_text())
    assert not list(Path(folder).glob("*.partial")), kills
print(json.dumps({"kills": kills, "outcomes": sorted(outcomes), "digests": len(digests)}))
"""

AT_ONCE = """
def run(index):
    Path(f"{folder}.{index}").write_text(digest(prepare(config)))

pids = [fork(lambda: run(index)) for index in range(4)]
codes = [result(pid) for pid in pids]
digests = {Path(f"{folder}.{index}").read_text() for index in range(4)}
whole = [is_whole(path) for path in Path(folder).iterdir() if path.is_dir()]
print(json.dumps({"codes": codes, "digests": len(digests), "whole": whole}))
"""


def run_child(script: str, source: Path) -> dict:
    environment = os.environ | {
        "PYTHONPATH": str(Path(redraft.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    child = subprocess.run(
        [sys.executable, "-c", COMMON + script, str(source)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_leaves_no_cache_that_is_taken_for_whole(corpus):
    outcome = run_child(KILL, corpus)
    assert outcome["kills"] > 20
    assert outcome["outcomes"] == [-9, 0]
    assert outcome["digests"] == 1


@pytest.mark.slow
def test_processes_that_prepare_at_once_all_end_with_the_same_whole_cache(corpus):
    outcome = run_child(AT_ONCE, corpus)
    assert outcome == {"codes": [0] * 4, "digests": 1, "whole": [True, True]}


def build_two_files(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"abc")
    (folder / "b.bin").write_bytes(b"")


def test_a_whole_cache_is_not_built_again(tmp_path):
    builds = []
    for _ in range(3):
        cached_folder(tmp_path / "x", build=lambda folder: (builds.append(folder), build_two_files(folder)))
    assert len(builds) == 1


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "manifest"])
def test_a_damaged_cache_is_built_again_and_says_so(tmp_path, caplog, damage):
    folder = cached_folder(tmp_path / "x", build=build_two_files)
    if damage == "manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "remove":
        (folder / "b.bin").unlink()
    else:
        (folder / "a.bin").write_bytes(b"ab" if damage == "truncate" else b"abd")
    assert not is_whole(folder)
    with caplog.at_level(logging.WARNING):
        cached_folder(folder, build=build_two_files)
    assert "is damaged and is built again" in caplog.text
    assert is_whole(folder)
    assert (folder / "a.bin").read_bytes() == b"abc"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "a").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_folder(tmp_path / "x", build=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["x.lock"]


def test_a_cache_below_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the cache to .*file' .*. Set XDG_CACHE_HOME to another folder"):
        cached_folder(tmp_path / "file" / "x", build=build_two_files)


def test_the_key_depends_on_values_and_not_on_their_order():
    assert cache_key(a=1, b="x") == cache_key(b="x", a=1) != cache_key(a=2, b="x")
