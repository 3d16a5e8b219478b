"""How a setting says what is wrong with it."""

from __future__ import annotations


def require(ok: bool, message: str) -> None:
    """Raises ValueError with the message where it is not."""
    if not ok:
        raise ValueError(message)
