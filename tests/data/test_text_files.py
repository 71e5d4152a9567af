"""Text files with bounds, read once: what is too large, no file, or a pipe."""

import gzip
import os
import threading
from pathlib import Path

import pytest

from medusa_jax.data import text_files
from medusa_jax.data.corpus import Corpus
from medusa_jax.data.prompts import count_requests, read_requests
from medusa_jax.data.text_files import check_readable, numbered_lines
from medusa_jax.errors import InputError


def test_lines_and_their_numbers(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfa\r\n\n \nb\xe2\x80\xa8c\nlast")
    assert list(numbered_lines(file)) == [(1, "a\n"), (4, "b\u2028c\n"), (5, "last")]


def test_a_line_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    """Of two gigabytes in one line, no more is read than a line may have."""
    file, zeros = tmp_path / "p.jsonl.gz", gzip.compress(b"a" * 2**24)
    file.write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "') + zeros * 128)
    monkeypatch.setattr(text_files, "MOST_LINE", 2**20)
    requests = read_requests(file)
    assert next(requests).turns == ("a",)
    with pytest.raises(InputError, match=rf"^{file}, line 2 has more than 1,048,576 characters"):
        next(requests)
    with pytest.raises(InputError, match="line 2 has more than"):
        list(Corpus([str(file)]))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_file_that_is_read_whole_has_a_bound(tmp_path, monkeypatch, name):
    file, content = tmp_path / name, b'[{"text": "Once upon a time"}]'
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert len(list(Corpus([str(file)]))) == 1
    monkeypatch.setattr(text_files, "MOST_WHOLE", 20)
    with pytest.raises(InputError, match=rf"^{file} has more than 20 characters.*JSON Lines"):
        list(Corpus([str(file)]))


@pytest.mark.parametrize("place", ["fifo", "pipe"])
def test_a_pipe_is_read_once(tmp_path, place):
    lines = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    if place == "fifo":
        path = str(tmp_path / "fifo")
        os.mkfifo(path)
        threading.Thread(target=Path(path).write_bytes, args=(lines,)).start()
    else:
        reader, writer = os.pipe()
        os.write(writer, lines)
        os.close(writer)
        path = f"/dev/fd/{reader}"
    check_readable(path, "--prompts")
    assert count_requests(path) is None
    assert [request.turns for request in read_requests(path)] == [("a",), ("b",)]


def test_what_is_no_file_to_read(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path, message in [
        (tmp_path, "expected a file, not a directory"),
        ("", "expected a file, not a directory"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "loop", "does not exist|cannot be read"),
        ("a" * 5000, "cannot be read: .*too long"),
    ]:
        with pytest.raises(InputError, match=f"^--prompts {path}.*({message})"):
            check_readable(path, "--prompts")
