"""A folder has one writer, whichever command it is and however its process ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from redraft.folders import LOCK_FILE, one_writer

HOLD = "import sys; from pathlib import Path; from redraft.folders import one_writer\n"
HOLD += "with one_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def holder(folder):
    """Start a process that holds a folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_is_refused_in_one_line_that_names_the_process_until_it_ends(tmp_path):
    folder = tmp_path / "deep" / "run"
    with holder(folder) as process:
        with pytest.raises(ValueError, match=f"process {process.pid} on .* is writing to .*run. Wait") as told:
            one_writer(folder).__enter__()
        assert "\n" not in str(told.value)
        process.communicate()
    assert list(tmp_path.iterdir()) == []  # folders that were made for it and stayed empty
    with one_writer(folder):
        assert (folder / LOCK_FILE).exists()


def test_a_killed_process_holds_nothing(tmp_path):
    with holder(tmp_path / "run") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with one_writer(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_what_is_written_stays_and_the_lock_goes_also_after_an_error(tmp_path):
    run = tmp_path / "a" / "run"
    with pytest.raises(FileExistsError), one_writer(run):
        (run / "weights").mkdir() or (run / "weights").mkdir()
    assert [path.name for path in run.iterdir()] == ["weights"]


def test_a_lock_file_that_its_holder_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    flock, taken = fcntl.flock, []

    def late(file, how):
        if not taken:  # the holder removes the file between our opening and our locking it
            (tmp_path / LOCK_FILE).unlink()
        taken.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with one_writer(tmp_path):
        assert len(taken) == 2
        with pytest.raises(ValueError, match="is writing to"):
            one_writer(tmp_path).__enter__()


def test_a_conversion_writes_into_no_folder_that_another_process_holds_or_has_filled(tmp_path, model_folder):
    import redraft

    with one_writer(tmp_path / "out"), pytest.raises(ValueError, match="is writing to .*out. Wait for it"):
        redraft.convert(model_folder, tmp_path / "out")
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / LOCK_FILE).touch()  # by a conversion that was killed
    redraft.convert(model_folder, tmp_path / "left")
    assert not (tmp_path / "left" / LOCK_FILE).exists()
    with pytest.raises(ValueError, match="left exists and is not an empty folder; name a new one"):
        redraft.convert(model_folder, tmp_path / "left")


def test_an_evaluation_writes_into_no_folder_that_another_process_holds(tmp_path, model_folder, capsys):
    from redraft.cli import main

    out = tmp_path / "out"
    with one_writer(out), pytest.raises(SystemExit) as done:
        main(["eval", str(model_folder), "--tasks", "arithmetic", "--out", str(out)])
    assert done.value.code == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with one_writer(tmp_path / "run"):
        pass
    assert f"run cannot be locked ({os.strerror(number)}): let no other command write there" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [("file", "is a file"), ("file/deeper", "Not a directory"), ("a" * 300, "File name too long")],
)
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{message}.*Choose another --out"):
        one_writer(tmp_path / name).__enter__()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_read_only_folder_and_a_full_disk_are_one_line(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)  # root, as whom tests may run, writes into read-only folders
    with pytest.raises(ValueError, match=f"cannot write to .*run: {os.strerror(number)}. Choose another --out"):
        one_writer(tmp_path / "run").__enter__()
    assert not Path(tmp_path / "run").exists()
