"""Processes in which exports are checked, forked from those that have imported what they need.

An export is checked in a process that has only stock packages. To import diffusers takes it six
seconds, and to draw with a small student a tenth of one. Here they are imported once, under `-I` as
well and without our packages, and each check is a fork of that process, with its own folder,
environment and output files. `real()` leaves the checks to processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from students.export import folder, formats, own_folder

DIFFUSERS = """
import diffusers, peft, safetensors.torch, torch, transformers
from diffusers import (
    ConsistencyModelPipeline, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
"""
# By the options of Python: what the exports of pipelines have, and those of networks of one's own.
IMPORTS = {"-I": DIFFUSERS, "-IB": "import safetensors.torch, torch"}
SERVER = """
import json, os, sys, traceback


def play(job):
    for number, name in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = ["-c", *job["words"]]
    try:
        exec(job["code"], {"__name__": "__main__"})
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


replies = os.fdopen(os.dup(1), "w")
print("ready", file=replies, flush=True)
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        code = play(json.loads(line))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)
"""
REAL: list[bool] = []  # not empty: checks run in processes of their own


class Server:
    """A process that has imported packages; started when it is first needed.

    Args:
        flags: Of Python.
    """

    def __init__(self, flags: str) -> None:
        self.flags = flags
        self.process: Any = None

    def run(self, code: str, words: list[str], cwd: str, env: dict[str, str]) -> Any:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, self.flags, "-c", IMPORTS[self.flags] + SERVER],
                stdin=subprocess.PIPE, cwd="/", text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            assert self.process.stdout.readline() == "ready\n"
        with tempfile.TemporaryDirectory() as scratch:
            files = {k: str(Path(scratch, k)) for k in ("stdout", "stderr")}
            job = {"code": code, "words": words, "cwd": cwd, "env": env, **files}
            print(json.dumps(job), file=self.process.stdin, flush=True)
            code_ = int(self.process.stdout.readline())
            texts = {k: Path(p).read_text(errors="replace") for k, p in files.items()}
        return subprocess.CompletedProcess(words, code_, **texts)

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


class Subprocess:
    """The module `subprocess`, as the exports use it."""

    def __init__(self) -> None:
        self.servers = {flags: Server(flags) for flags in IMPORTS}

    def run(self, command: list[str], **options: Any) -> Any:
        (_, flags, c, code), words = command[:4], command[4:]
        own = any('"own": true' in word for word in words)  # diffusers copies its source, by an
        if REAL or own:  # environment variable that it reads when it is imported
            return subprocess.run(command, **options)
        assert c == "-c"
        return self.servers[flags].run(code, words, options["cwd"], options["env"])


@contextmanager
def checks() -> Iterator[None]:
    """Within it, exports are checked in forks."""
    stand_in = Subprocess()
    try:
        with ExitStack() as stack:
            for module in (folder, formats, own_folder):
                stack.enter_context(patch.object(module, "subprocess", stand_in))
            yield
    finally:
        for server in stand_in.servers.values():
            server.close()


@contextmanager
def real() -> Iterator[None]:
    """Within it, a process of its own checks each export."""
    REAL.append(True)
    try:
        yield
    finally:
        REAL.pop()
