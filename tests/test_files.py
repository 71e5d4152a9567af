"""Files that are written: whole lines, an earlier file kept, a single writer, named errors."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medusa_jax.errors import InputError
from medusa_jax.files import (
    Lines,
    OutputError,
    check_directory,
    check_new_directory,
    check_output,
    locked,
    writing,
)


def test_lines_keep_an_earlier_file_until_they_are_complete(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("before\n")
    with pytest.raises(KeyError), Lines(path) as lines:
        lines.write("half")
        assert path.read_text() == "before\n"
        raise KeyError
    assert path.read_text() == "before\n"
    assert (tmp_path / "out.jsonl.partial").read_text() == "half\n"
    with Lines(path) as lines:
        lines.write("one")
        lines.write("two")
    assert path.read_text() == "one\ntwo\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_lines_go_on_and_follow_links(tmp_path):
    (tmp_path / "real").write_text("a\n")
    (tmp_path / "link").symlink_to("real")
    with Lines(tmp_path / "link", append=True) as lines:
        lines.write("b")
    with Lines(tmp_path / "link") as lines:
        lines.write("c\udcff")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"c?\n"


def test_a_line_that_does_not_fit_is_cut_off_whole(tmp_path):
    path = tmp_path / "out"
    program = (  # the limit on the size of a file stands for a full disk
        "import resource, signal, sys\n"
        "from medusa_jax.files import Lines\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "with Lines(sys.argv[1]) as lines:\n"
        "    lines.write('first')\n"
        "    try: lines.write('x' * 30)\n"
        "    except RuntimeError as error: print(type(error).__name__, error)\n"
        "    lines.write('last')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.stdout == f"OutputError {path} could not be written: file too large\n", done.stderr
    assert path.read_text() == "first\nlast\n"


def test_an_error_of_the_system_names_the_file():
    full = "/dev/full could not be written: no space left on device"
    with pytest.raises(OutputError, match=full), Lines("/dev/full") as lines:
        lines.write("x")
    with pytest.raises(BrokenPipeError), writing("a pipe"):
        raise BrokenPipeError


@pytest.mark.parametrize("name", ["same.jsonl", "link.jsonl", "hard.jsonl", "./same.jsonl"])
def test_an_output_is_no_input(tmp_path, name):
    given = tmp_path / "same.jsonl"
    given.write_text("prompts")
    (tmp_path / "link.jsonl").symlink_to(given)
    (tmp_path / "hard.jsonl").hardlink_to(given)
    with pytest.raises(InputError, match="which is read"):
        check_output(f"{tmp_path}/{name}", [None, given])
    assert given.read_text() == "prompts"


def test_places_that_cannot_be_written_are_refused(tmp_path):
    for path, reason in ((tmp_path, "directory"), ("", "directory"),
                         (tmp_path / "no" / "x", "does not exist")):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            check_output(path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a directory"):
        check_directory(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        check_output("/proc/nothing")
    check_output(tmp_path / "new")
    check_output("/dev/null")
    check_directory(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_new_directory_is_new_and_below_directories(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("gone")
    for name, reason in ((".", "exists already"), ("", "exists already"), ("file", "exists"),
                         ("nowhere", "exists"), ("file/out", "is a file, not a directory"),
                         ("file/a/b", "is a file, not a directory")):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            check_new_directory(tmp_path / name if name else "")
    check_new_directory(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def _hold(path: Path, held, release) -> None:
    with locked(path, "the run"):
        held.set()
        release.wait(20)


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / ".lock"
    forks = multiprocessing.get_context("spawn")
    held, release = forks.Event(), forks.Event()
    other = forks.Process(target=_hold, args=(path, held, release))
    other.start()
    assert held.wait(20)
    owner = rf"the run is written by process {other.pid} on \w"
    with pytest.raises(InputError, match=owner), locked(path, "the run"):
        pass
    other.kill()
    other.join()
    with locked(path, "the run"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "no space left on device"),
        (OSError("odd"), "odd"),
        (RuntimeError("I/O error: No space (os error 28)"), "no space left on device"),
        (ValueError("serializing: (os error 13)"), "permission denied"),
    ],
)
def test_errors_of_the_system_name_the_file_whichever_library_raises_them(error, reason):
    with pytest.raises(OutputError, match=f"^x could not be written: {reason}$"), writing("x"):
        raise error


def test_other_errors_stay_what_they_are():
    for error in (ValueError("28"), BrokenPipeError()):
        with pytest.raises(type(error)), writing("x"):
            raise error


def test_a_file_that_another_process_writes_is_refused(tmp_path):
    """Also where its first lines are written, and where it is only about to be replaced."""
    path = tmp_path / "out"
    with Lines(path) as mine:
        for line in ("", "first"):
            if line:
                mine.write(line)
            with pytest.raises(InputError, match="out is being written by another process"):
                Lines(path)
    with Lines(path), pytest.raises(InputError, match="by another process"):
        Lines(path)
    with Lines(path, append=True) as lines:
        lines.write("second")
    assert path.read_text() == "second\n"
