"""Texts that a model was trained with, read out of its authors' own file.

A model that was trained to answer one long question wants it letter by letter. The file is parsed and never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from rlr_peft.errors import RewardError


def constant_in(reward_name: str, path: Path, name: str) -> str:
    """The text that a module assigns to a name.

    Raises:
        RewardError: it assigns none.
    """
    for node in _nodes(reward_name, path):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Constant(value=str(text))) if target == name:
                return text
    raise _is_another(reward_name, path, f"a text called {name}")


def template_in(reward_name: str, path: Path, variable: str) -> str:
    """The longest f-string of a module in which a variable stands, with `{prompt}` in the variable's place.

    Raises:
        RewardError: there is none.
    """
    found = [text for node in _nodes(reward_name, path) if (text := _template(node, variable)) is not None]
    if not found:
        raise _is_another(reward_name, path, f"an f-string with {{{variable}}}")
    return max(found, key=len)


def _template(node: ast.AST, variable: str) -> str | None:
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name) and part.value.id == variable:
            parts.append("{prompt}")
        else:
            return None
    return "".join(parts) if "{prompt}" in parts else None


def _nodes(reward_name: str, path: Path) -> Iterator[ast.AST]:
    try:
        return ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, ValueError):
        raise _is_another(reward_name, path, "Python code") from None


def _is_another(reward_name: str, path: Path, expected: str) -> RewardError:
    return RewardError(f"reward '{reward_name}': expected {expected} in {path}; it is another file: get it again")
