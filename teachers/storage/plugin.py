"""Import a user's module, or a function in it, from a file path."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from teachers.errors import UserError, clipped, nearest
from teachers.storage.files import home


def import_file(path: Path) -> ModuleType:
    """Import the module in a file, once.

    Raises:
        FileNotFoundError: there is no such file. Errors of the module itself pass through.
    """
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # a file imports its neighbours, as a script does
        sys.path.append(folder)
    # files of one name in two folders are two modules: code is looked up by its module's name
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = "_".join(["fewstep_user", re.sub(r"\W", "_", path.stem), digest])
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file in {Path.cwd()}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with settings_kept():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # never reuse a half-imported module
        raise
    return module


@contextmanager
def settings_kept() -> Iterator[None]:
    """Within it, a user's code may change torch's settings and the working folder; not for others.

    Scripts for sampling switch gradients off, without which nothing would learn.
    """
    gradients, dtype, folder = torch.is_grad_enabled(), torch.get_default_dtype(), Path.cwd()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        os.chdir(folder)


def is_installed(name: str) -> bool:
    """Whether Python finds a module of this name before the files beside a user's."""
    places = [sysconfig.get_path(k) for k in ("purelib", "platlib")]
    return name in sys.stdlib_module_names or PathFinder.find_spec(name, places) is not None


def is_function(place: Any) -> bool:
    """Whether a recipe's value names a function in a file: "path/to/file.py:function"."""
    return isinstance(place, str) and place.rpartition(":")[0].endswith(".py")


def function_at(place: str, key: str) -> Callable[..., Any]:
    """The function that "path/to/file.py:function" names.

    Args:
        key: The recipe key or option that it was given for, which begins error messages.

    Raises:
        UserError: there is no such file or function, or importing the file raises an exception.
    """
    where, (file, _, name) = f"{key}: {clipped(place)!r}", place.rpartition(":")
    if not is_function(place):
        raise UserError(f"{where} names no function; write path/to/file.py:function")
    if not home(file, key).is_file():
        raise UserError(f"{where}: no such file in {Path.cwd()}; write path/to/file.py:function")
    try:
        module = import_file(home(file, key))
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: it raised {clipped(reason, 200)}; correct it") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UserError(f"{where}: no function {clipped(name)!r} in it; {nearest(name, known)}")
    return function


def called(place: str, key: str, *args: Any) -> Any:
    """What the function that "path/to/file.py:function" names returns for these arguments.

    Raises:
        UserError: as `function_at`, or it raises an exception.
    """
    function = function_at(place, key)
    try:
        with settings_kept():
            return function(*args)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{key}: {clipped(place)!r} raised {clipped(reason, 200)}; correct it"
        ) from None
