"""Which folder is what, and which checkpoint is the newest."""

from __future__ import annotations

import pytest

from megatron_rlsc.conversion.folders import (
    TRACKER,
    hf_config_dir,
    is_megatron_checkpoint,
    latest_checkpoint,
    set_latest,
    step_dir,
)


def finish(folder, step):
    """What a completed save leaves behind."""
    step_dir(folder, step).mkdir()
    (step_dir(folder, step) / "metadata.json").touch()
    set_latest(folder, step)


def test_names_are_megatron_lms(tmp_path):
    assert step_dir(tmp_path, 12).name == "iter_0000012"
    assert step_dir(tmp_path, None).name == "release"


def test_the_newest_checkpoint(tmp_path):
    assert not is_megatron_checkpoint(tmp_path)
    finish(tmp_path, None)
    assert is_megatron_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "release"
    finish(tmp_path, 20)
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000020"
    assert (tmp_path / TRACKER).read_text() == "20"
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "release", "iter_0000020"}


def test_a_checkpoint_that_was_never_finished(tmp_path):
    step_dir(tmp_path, 5).mkdir()
    set_latest(tmp_path, 5)
    with pytest.raises(ValueError, match="names iter_0000005, which is absent or was never finished"):
        latest_checkpoint(tmp_path)
    (tmp_path / TRACKER).write_text("latest\n")
    with pytest.raises(ValueError, match="holds 'latest', neither a step nor `release`"):
        latest_checkpoint(tmp_path)


def test_where_the_config_is(tmp_path):
    with pytest.raises(ValueError, match="no model at"):
        hf_config_dir(tmp_path / "absent")
    assert hf_config_dir(tmp_path) == tmp_path  # an HF folder; read_shape says what it lacks
    finish(tmp_path, 1)
    with pytest.raises(ValueError, match=r"no hf/config\.json"):
        hf_config_dir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").touch()
    assert hf_config_dir(tmp_path) == tmp_path / "hf"
