"""The command, run in a process of its own or in this one."""

import os
import subprocess
import sys

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
