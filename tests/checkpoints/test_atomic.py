"""A directory is there whole or not at all, and an earlier directory until then."""

from pathlib import Path

import pytest

from medusa_jax.checkpoints.atomic import Replacing, copy_file
from medusa_jax.files import OutputError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory with an earlier file."""
    place = tmp_path / "heads"
    place.mkdir()
    (place / "old").touch()
    return place


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def test_a_new_directory_takes_the_place_of_the_earlier(target: Path):
    with Replacing(target) as new:
        (new / "file").touch()
        assert names(target) == ["old"]
    assert names(target) == ["file"]
    assert names(target.parent) == ["heads"]


def test_of_a_failure_nothing_stays(target: Path):
    with pytest.raises(KeyError), Replacing(target) as new:
        (new / "file").touch()
        raise KeyError
    assert (names(target), names(target.parent)) == (["old"], ["heads"])


def test_what_killed_processes_have_left_is_removed(target: Path):
    for left in ("heads.tmp", "heads.old"):
        (target.parent / left).mkdir()
        (target.parent / left / "half").touch()
    with Replacing(target) as new:
        assert names(new) == []
    assert names(target.parent) == ["heads"]


def test_a_directory_that_cannot_take_its_place_leaves_the_earlier(target: Path):
    with (
        pytest.raises(OutputError, match=f"{target} could not be written"),
        Replacing(target) as new,
    ):
        new.rmdir()
    assert (names(target), names(target.parent)) == (["old"], ["heads"])


def test_a_link_stays_a_link(target: Path):
    link = target.parent / "link"
    link.symlink_to(target)
    with Replacing(link) as new:
        (new / "file").touch()
    assert link.is_symlink()
    assert (names(target), names(target.parent)) == (["file"], ["heads", "link"])


def test_missing_parents_are_made_and_files_are_no_parents(tmp_path: Path):
    with Replacing(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for place in ("file/out", "file/a/out"):
        with pytest.raises(
            OutputError, match=f"{tmp_path / place} could not be written: (not a dir|file exists)"
        ):
            Replacing(tmp_path / place).__enter__()


def test_a_process_that_does_not_write_changes_nothing(target: Path):
    with Replacing(target, write=False) as new:
        assert new == target.with_name("heads.tmp")
    assert (names(target), names(target.parent)) == (["old"], ["heads"])


def test_a_copy_names_its_place(tmp_path: Path):
    (tmp_path / "a").write_text("text")
    copy_file(tmp_path / "a", tmp_path / "folder" / "b")
    assert (tmp_path / "folder" / "b").read_text() == "text"
    with pytest.raises(OutputError, match="/dev/full could not be written: no space left"):
        copy_file(tmp_path / "a", Path("/dev/full"))
