"""The source of a user's network, for a folder that needs no code of ours.

A file that imports nothing of ours is copied. Of another one, the parts are taken that the class of
the network needs: its definition, the definitions that it names, and theirs, word for word.
"""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from students.own_network import is_plain
from teachers.denoiser import Network
from teachers.errors import UserError
from teachers.storage.plugin import is_installed

OURS = ("teachers", "students", "distill", "eval")
RESERVED = ("sampler.py", "call.py")  # of a student's folder
FUTURE = "from __future__ import annotations\n"


class Sources(NamedTuple):
    """What a sampler needs to build and call a network.

    file, module: Of the backbone's class: the file's name, or the installed package's module.
    files: The content of every file by its name.
    call: The name of the file with the function `call`; None where the backbone is called plainly.
    attributes: The values that `call` reads from its object beside the backbone.
    """

    file: str | None
    module: str | None
    files: dict[str, str]
    call: str | None
    attributes: dict[str, Any]


def sources_of(network: Network, who: str) -> Sources:
    """The sources of a network's backbone and of its `call`.

    Raises:
        UserError: a part of them cannot stand without our packages.
    """
    kind = type(network.backbone)
    if "<locals>" in kind.__qualname__ or "." in kind.__qualname__:
        raise UserError(
            f"{who}: {kind.__qualname__} is defined inside another definition; define the "
            "network's class at the top of its file, which a student's folder has a copy of"
        )
    path = file_of(kind, who)
    files = {} if path is None else standalone(path, [kind.__name__], who)
    if clash := next((k for k in files if k in RESERVED or is_installed(Path(k).stem)), None):
        raise UserError(
            f"{who}: {clash} would hide another module in a student's folder; rename your file"
        )
    call, attributes = None, {}
    if type(network).call is not Network.call:
        call, text, attributes = call_of(network, who)
        files |= {k: v for k, v in text.items() if k == call or k not in files}
    name, module = (None, kind.__module__) if path is None else (path.name, None)
    return Sources(name, module, files, call, attributes)


def file_of(kind: type, who: str) -> Path | None:
    """The file of a user's or of our own class; None where it belongs to an installed package.

    Raises:
        UserError: it is in a package that is not installed, or has no file.
    """
    try:
        path = Path(inspect.getfile(kind)).resolve()
    except (TypeError, OSError):
        raise UserError(
            f"{who}: {kind.__name__} has no source file; define it in a file of its own"
        ) from None
    if kind.__module__.partition(".")[0] in OURS:  # a student's folder does not need it installed
        return path
    places = [Path(sysconfig.get_path(k)).resolve() for k in ("purelib", "platlib", "stdlib")]
    if any(place in path.parents for place in places):
        return None
    if package := getattr(sys.modules[kind.__module__], "__package__", ""):
        raise UserError(
            f"{who}: {kind.__name__} is in the package {package!r}, which is not installed, so a "
            "student's folder could not import it; pip install it, or put the class in one file"
        )
    return path


def standalone(path: Path, names: Iterable[str], who: str) -> dict[str, str]:
    """A file's text, or the parts of it that these names need, and that of its neighbours.

    Raises:
        UserError: they need something of ours.
    """
    text = source_text(path, who)
    tree = ast.parse(text)
    if any(of_ours(node) for node in imports_of(tree.body)):
        text = part_of(text, names, path, who)
    files = {path.name: text}
    todo = neighbours(ast.parse(text).body, path.parent)
    for neighbour in todo:
        if neighbour.name in files:
            continue
        files[neighbour.name] = text = source_text(neighbour, who)
        body = ast.parse(text).body
        if any(of_ours(node) for node in imports_of(body)):
            raise UserError(
                f"{who}: {path.name} imports {neighbour.name}, which imports this project's "
                "packages; move what the network needs to a file that does not"
            )
        todo += neighbours(body, path.parent)
    return files


def source_text(path: Path, who: str) -> str:
    """The text of a Python file.

    Raises:
        UserError: it is not in UTF-8, as a student's folder has it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # ast.parse takes no byte-order mark
    except UnicodeDecodeError:
        raise UserError(f"{who}: {path.name} is not in UTF-8; save it as UTF-8") from None


def neighbours(body: list[ast.stmt], folder: Path) -> list[Path]:
    """The files in a folder that code imports; not those that an installed module goes before."""
    files = [folder / f"{m}.py" for m in modules_of(body) if not is_installed(m)]
    return [file for file in files if file.is_file()]


def imports_of(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported: those outside functions."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports_of([n for n in ast.iter_child_nodes(node)
                                   if isinstance(n, ast.stmt)])  # fmt: skip


def of_ours(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import is one of this project's packages."""
    return any(name in OURS for name in roots_of(node))


def roots_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The top-level modules that an import names."""
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").partition(".")[0]]
    return [alias.name.partition(".")[0] for alias in node.names]


def modules_of(body: list[ast.stmt]) -> list[str]:
    """The top-level modules that a file imports."""
    return [name for node in imports_of(body) for name in roots_of(node)]


def part_of(text: str, names: Iterable[str], path: Path, who: str) -> str:
    """The statements of a module that these names need, word for word and in order.

    Raises:
        UserError: one of them is an import of ours.
    """
    # Python's lines end at \n alone; str.splitlines also splits at a form feed and others
    body, lines = ast.parse(text).body, text.split("\n")
    defined: dict[str, list[int]] = {}
    for i, node in enumerate(body):
        for name in stored_in(node):
            defined.setdefault(name, []).append(i)
    needed, todo = set[int](), list(names)
    while todo:
        name = todo.pop()
        for i in defined.get(name, ()):
            if i in needed:
                continue
            node = body[i]
            if isinstance(node, ast.Import | ast.ImportFrom) and of_ours(node):
                raise UserError(
                    f"{who}: in {path.name} the network needs {name} of this project, which a "
                    "student's folder does not contain; let it use torch alone"
                )
            needed.add(i)
            todo += loaded_in(node)
    parts = [FUTURE]
    for i in sorted(needed):
        node = body[i]
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)])
        blank = "" if isinstance(node, ast.Import | ast.ImportFrom) else "\n"
        parts.append(blank + "\n".join(lines[first - 1 : node.end_lineno]) + "\n")
    return "".join(parts)


def stored_in(node: ast.stmt) -> set[str]:
    """The names that a statement of a module defines there."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.alias):
            names.add(part.asname or part.name.partition(".")[0])
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        elif isinstance(part, ast.FunctionDef | ast.ClassDef):
            names.add(part.name)
    return names


def loaded_in(node: ast.AST) -> set[str]:
    """The names that code reads; those in annotations are not, since no one evaluates them."""
    names, todo = set[str](), [node]
    while todo:
        part = todo.pop()
        if isinstance(part, ast.Name):
            names.add(part.id)
        for field, value in ast.iter_fields(part):
            if field in ("annotation", "returns"):
                continue
            values = value if isinstance(value, list) else [value]
            todo += [v for v in values if isinstance(v, ast.AST)]
    return names


def call_of(network: Network, who: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """A network's own `call` as a function in a file.

    Returns:
        The file's name, the content of files by name, and the plain values that it reads of self.

    Raises:
        UserError: it reads something else of self, or needs something of ours.
    """
    kind = type(network)
    where = f"{who}: {kind.__name__}.call"
    text = textwrap.dedent(inspect.getsource(kind.call))
    function = ast.parse(text).body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 5:
        raise UserError(f"{where}: expected a method call(self, x_t, t, cond, s)")
    this, loaded = function.args.args[0].arg, loaded_in(function)
    attributes: dict[str, Any] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == this:
            value = getattr(network, node.attr, None)
            if node.attr == "backbone":
                continue
            if not is_plain(value):
                raise UserError(
                    f"{where}: it reads self.{node.attr}, which a student's folder cannot hold; "
                    "move it into the backbone"
                )
            attributes[node.attr] = value
    if "super" in loaded:
        raise UserError(f"{where}: it calls super(), which a student's folder lacks; write it out")
    path = Path(inspect.getfile(kind)).resolve()
    names = loaded - {a.arg for a in function.args.args}
    part = part_of(source_text(path, who), names, path, who)
    beside = standalone_imports(part, path, who)
    return "call.py", {"call.py": f"{part}\n\n{text}", **beside}, attributes


def standalone_imports(text: str, path: Path, who: str) -> dict[str, str]:
    """The files beside `path` that a text imports."""
    files: dict[str, str] = {}
    for neighbour in neighbours(ast.parse(text).body, path.parent):
        files |= standalone(neighbour, [], who)
    return files
