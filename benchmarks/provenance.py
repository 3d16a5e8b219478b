"""Where and when a figure was made."""

from __future__ import annotations

import os
from datetime import date
from importlib.metadata import version
from pathlib import Path


def describe(*packages: str) -> str:
    """`2026-11-21, 2 cores of AMD EPYC, torch 2.13.0`"""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unknown CPU")
    return ", ".join(
        [f"{date.today()}", f"{os.cpu_count()} cores of {model}", *(f"{name} {version(name)}" for name in packages)]
    )
