"""Students whose network is not the teacher's but another one: built in, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from students.architecture.dsno import dsno
from students.architecture.get import KEY, get
from students.own_network import is_own
from teachers.denoiser import Network
from teachers.errors import UserError, clipped, nearest
from teachers.storage.plugin import called, is_function
from teachers.teacher import Teacher

NETWORKS: dict[str, Callable[[Teacher], Network]] = {"dsno": dsno, "get": get}  # built in


def host_teacher(teacher: Teacher, name: str) -> Teacher:
    """The teacher with another network in the place of its own: what its students are copies of.

    Args:
        name: Of NETWORKS, or "path/to/file.py:function", a function of the teacher that returns a
            `Network` in its process.

    Raises:
        UserError: there is no such network, or what the function returns is none.
    """
    if is_function(name):
        network = called(name, KEY, teacher)
    elif name in NETWORKS:
        network = NETWORKS[name](teacher)
    else:
        raise UserError(
            f"{KEY}: {clipped(name)!r} is unknown; {nearest(name, [*NETWORKS])}, or write "
            "path/to/file.py:function"
        )
    place = f"{KEY}: {clipped(name)!r}"
    if not isinstance(network, Network) or not is_own(network):
        raise UserError(
            f"{place} returned a {type(network).__name__}; return Network(backbone, "
            "teacher.denoiser.process, 'x') of a torch module of your own"
        )
    process = teacher.denoiser.process
    if network.process is not process and repr(network.process) != repr(process):
        raise UserError(
            f"{place} has the process {clipped(repr(network.process))}, and the teacher another; "
            "give it teacher.denoiser.process"
        )
    return replace(teacher, denoiser=network.eval().requires_grad_(False))
