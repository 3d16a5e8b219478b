"""A folder is there as a whole or not at all, also after a kill at the worst moments."""

from __future__ import annotations

import pytest

from megatron_rlsc.conversion.atomic import whole_folder


def write(path, text, **options):
    with whole_folder(path, **options) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(text)


def test_appears_when_it_is_complete(tmp_path):
    with whole_folder(tmp_path / "a" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"


def test_an_empty_folder_is_not_in_use(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "x")
    assert (tmp_path / "out/deep/file").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    write(tmp_path / "out", "old")
    with pytest.raises(error):
        with whole_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "file").touch()
            raise error
    assert (tmp_path / "out/deep/file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_in_use(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="in use: name another, or overwrite it"):
        write(tmp_path / "out", "new")
    with pytest.raises(ValueError, match="it is a file"):
        write(tmp_path / "out/deep/file", "new", overwrite=True)
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out/deep/file").read_text() == "new"


def test_what_a_killed_run_left_is_cleared(tmp_path):
    """Killed while it wrote; between its two renames; and after them, before it removed the old folder."""
    write(tmp_path / ".out.partial", "half")
    write(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (tmp_path / "out").rename(tmp_path / ".out.previous")
    with pytest.raises(ValueError, match="in use"):
        write(tmp_path / "out", "newer")
    assert (tmp_path / "out/deep/file").read_text() == "new"

    write(tmp_path / ".out.previous", "old")
    write(tmp_path / "out", "newer", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/deep/file").read_text() == "newer"
