"""The key of sidecars that others run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlsc.rollout.key import external_key
from megatron_rlsc.rollout.wire import KEY_VARIABLE


def test_the_file_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text("from the file\n")
    assert external_key(file) == "from the file"
    assert external_key(None) == "from the environment"


def test_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="--rollout-key-file, or RLSC_ROLLOUT_KEY"):
        external_key(None)
    with pytest.raises(ValueError, match=r"--rollout-key-file .*/key: No such file"):
        external_key(tmp_path / "key")
    (tmp_path / "key").touch(mode=0o600)
    with pytest.raises(ValueError, match="is empty"):
        external_key(tmp_path / "key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_may_read_is_refused_and_the_key_not_told(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "key"
    file.write_text("secret")
    file.chmod(mode)
    with pytest.raises(ValueError, match=f"has mode 0{mode:o}, others may read the key: chmod 600 {file}") as refused:
        external_key(file)
    assert "secret" not in str(refused.value)
