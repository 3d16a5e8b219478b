"""A run's settings as a TOML recipe, and as flags over one.

A flag is a field's name with dashes (`--tensor-model-parallel-size 2`); a recipe holds the same fields under their
section (`[parallel]`). The libraries of the command line are imported where it is read: the policy runs without them.
"""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from pathlib import Path
from typing import Any

from megatron_rlsc.config import Config


def load_recipe(path: Path) -> Config:
    """Reads a TOML recipe. Unknown sections and keys, and values of the wrong type, raise ValueError with the name."""
    import dacite

    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no recipe at {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    try:
        return dacite.from_dict(
            Config, raw, dacite.Config(strict=True, cast=[Path, tuple], type_hooks={float: _to_float})
        )
    except dacite.UnexpectedDataError as error:
        raise ValueError(f"{path}: unknown {', '.join(sorted(error.keys))}; `--help` lists what there is") from None
    except dacite.DaciteError as error:
        raise ValueError(f"{path}: {error}") from None


def _to_float(value: Any) -> Any:
    """TOML's `1` is a rate as good as `1.0`."""
    return float(value) if type(value) is int else value


def dump_recipe(config: Config) -> str:
    """The config as a TOML recipe that `load_recipe` reads back; unset fields are left out."""
    import tomli_w

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items() if item is not None}
        return str(value) if isinstance(value, Path) else value

    return tomli_w.dumps(plain(dataclasses.asdict(config)))


def parse_config(argv: list[str] | None = None, *, console_outputs: bool = True) -> Config:
    """`--config RECIPE.toml` first, wherever it stands, then the flags over it.

    Raises ValueError on bad values, and SystemExit after `--help` and on unknown flags; those are silent without
    `console_outputs`, for all ranks but one.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    default = Config()
    for i, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            if "=" not in word and i + 1 == len(argv):
                raise ValueError("--config needs the path of a TOML recipe")
            path = word.partition("=")[2] or argv[i + 1]
            del argv[i : i + (1 if "=" in word else 2)]
            default = load_recipe(Path(path))
            break
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[Config],
        prog="python -m megatron_rlsc",
        description=f"{Config.__doc__}\n\n--config RECIPE.toml is read first, flags override it.",
        default=default,
        args=argv,
        console_outputs=console_outputs,
    )
