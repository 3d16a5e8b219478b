"""What each figure means: the docstring under its field in types.py, so that nothing is said twice."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache

from megatron_rlsc import types


@cache
def meanings() -> Mapping[str, str]:
    """{tag: its field's docstring}."""
    found: dict[str, str] = {}
    for record in ast.parse(inspect.getsource(types)).body:
        if not isinstance(record, ast.ClassDef):
            continue
        for field, after in zip(record.body, record.body[1:]):
            match field, after:
                case (
                    ast.AnnAssign(value=ast.Call(func=ast.Name(id="_tag"), args=[ast.Constant(value=tag)])),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[str(tag)] = inspect.cleandoc(text).replace("\n", " ")
    return found
