"""The command, run in a process of its own or in this one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import __main__ as cli

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "distill", *map(str, words)],
        capture_output=True,
        text=True,
        env=ENV,
        **options,
    )


def called(capsys, *words):
    """Exit code, stdout and stderr of the command, run in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["distill", *map(str, words)])
        cli.main()
    return stopped.value.code, *capsys.readouterr()


def launched(recipe: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """`distill run` in a process of its own, which goes on by itself."""
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "run", str(recipe), *words, "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV,
    )  # fmt: skip


def wait_for(path: Path, pattern: str, seconds: float = 120) -> None:
    """Wait until the folder holds a file of this pattern."""
    until = time.monotonic() + seconds
    while not list(path.glob(pattern)):
        assert time.monotonic() < until, f"no {pattern} in {path}"
        time.sleep(0.02)
