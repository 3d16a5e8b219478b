"""What the trainer's side and the sidecar's side must spell alike. Standard library only: both import it."""

from __future__ import annotations

from pathlib import Path

KEY_VARIABLE = "RLSC_ROLLOUT_KEY"
"""Environment variable with the key that every request must carry; never on a command line, never in a log."""
PUSH_DIR_VARIABLE = "RLSC_PUSH_DIR"
"""Environment variable with the one directory that the sidecar's workers read weights from."""
TRANSFER_BACKEND = "rlsc"
"""Our entry in vLLM's table of weight-transfer backends."""
SERVED_MODEL_NAME = "policy"


def bearer(key: str) -> dict[str, str]:
    """The header that carries the key."""
    return {"Authorization": f"Bearer {key}"}


def memory_backed_root() -> Path | None:
    """Where files live in memory, so that a push never waits for a disk; None takes the platform's temporary folder."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() else None
