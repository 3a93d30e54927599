"""The loop's own lines for the page: read from its file, coloured, and which of them run in a step of each phase."""

import ast
import inspect
import io
import keyword
import textwrap
import tokenize
from collections.abc import Callable
from pathlib import Path

ROLES = {"x_content": "content", "layout": "layout", "layout_k": "layout", "x": "mixed", "nu": "nu", "K_max": "mark"}
ROLES |= {"K_min": "mark"}


def listing(function: Callable) -> dict:
    """The source of a loop, read from its file, for the page: lines of coloured pieces, without the docstring, and per
    phase the lines that run in a step and the one that makes x."""
    source, first = inspect.getsourcelines(function)
    text = textwrap.dedent("".join(source))
    tree = ast.parse(text).body[0]
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    hidden = range(tree.body[0].lineno, body[0].lineno) if len(body) < len(tree.body) else range(0)
    pieces = coloured(text)
    lines = [
        {"number": first + i - 1, "pieces": pieces[i]}
        for i in range(1, len(source) + 1)
        if i not in hidden and pieces[i]
    ]
    phases = {}
    for phase in ("start", "layout", "mixing", "content"):
        ran, marked = running(tree, phase)
        phases[phase] = {"ran": sorted(first + i - 1 for i in ran), "marked": first + marked - 1}
    return {"name": function.__name__, "file": Path(inspect.getfile(function)).name, "lines": lines, "phases": phases}


def running(tree: ast.FunctionDef, phase: str) -> tuple[set[int], int]:
    """The lines of a loop that run in a step of that phase, and the line that makes its x.

    The step is the `yield` that names the phase, or the only one there is. The lines around it are those of the blocks
    that it stands in. "start" is what comes before the loop.
    """
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.For))
    if phase == "start":
        before = [node.lineno for node in tree.body if isinstance(node, ast.Assign) and node.lineno < loop.lineno]
        return set(before or [tree.lineno]), (before or [tree.lineno])[-1]
    path = path_to_yield(loop, phase) or path_to_yield(loop, None)
    ran, marked = {loop.lineno}, loop.lineno
    for block in path:
        for node in block:
            is_compound = isinstance(node, ast.If)
            ran |= {node.lineno} if is_compound else set(range(node.lineno, node.end_lineno + 1))
            if isinstance(node, ast.Assign) and "x" in [
                n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)
            ]:
                marked = node.lineno
    return ran, marked


def path_to_yield(node: ast.AST, phase: str | None) -> list[list[ast.stmt]] | None:
    """The blocks of statements, from the outermost to the innermost, that lead to the yield of a phase."""
    for block in (getattr(node, "body", []), getattr(node, "orelse", [])):
        for statement in block:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield):
                named = [n.value for n in ast.walk(statement) if isinstance(n, ast.Constant)]
                if phase is None or phase in named:
                    return [block]
            elif isinstance(statement, ast.If) and (inner := path_to_yield(statement, phase)):
                return [block, *inner]
    return None


def coloured(text: str) -> dict[int, list[list[str]]]:
    """Line number, from 1 -> its pieces [role, text], which make up the line."""
    lines = text.splitlines()
    pieces: dict[int, list[list[str]]] = {i + 1: [] for i in range(len(lines))}
    ends = dict.fromkeys(pieces, 0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (line, begin), (last, end) = token.start, token.end
        if line != last or not token.string.strip():
            continue
        if gap := lines[line - 1][ends[line] : begin]:
            pieces[line].append(["", gap])
        pieces[line].append([role_of(token), token.string])
        ends[line] = end
    return pieces


def role_of(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.COMMENT:
        return "comment"
    if token.type == tokenize.STRING:
        return "text"
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else ROLES.get(token.string, "")
    return ""
