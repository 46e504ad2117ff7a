"""Push: a finished run to a Hub repository, in one commit, and never over another's work.

What goes up: the files of `student/` and, where there is one, of `lora/`, at the repository's root;
the model card, written afresh from the run unless `card.md` lies in its folder; the sample grid.
A file that is there already, by its hash, is not sent again, so an interrupted push resumes.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from distill.files import write
from distill.publish.card import GRID, card, require_finished
from distill.publish.hub import (
    MARK,
    Content,
    Remote,
    as_argument,
    as_bytes,
    in_one_line,
    quiet,
    same,
)
from students.export.folder import SIDECAR
from teachers.errors import UserError

RECORD = "hub.json"  # in the run's folder: its name on the Hub, and the commits it made there
KEPT = {".gitattributes"}  # the Hub's own, in every new repository


@dataclass(frozen=True)
class Pushed:
    """What a push did: where the files are, the commit, and how many were sent."""

    url: str
    commit: str
    sent: int
    deleted: int
    present: int  # files that were there already


def push(
    run: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = "main",
    message: str = "",
    overwrite: bool = False,
    licence_override: str = "",
) -> Pushed:
    """Upload a finished run to the model repository `repo` ("OWNER/NAME").

    The token is `HF_TOKEN`'s or the one that `hf auth login` stored. The commit names its parent,
    so a push that somebody else's commit overtakes changes nothing.

    Args:
        private: Make a new repository private; an existing public one is then refused.
        revision: The branch, made from main if there is none of that name.
        overwrite: Replace what is there, whoever put it there.
        licence_override: Why the result may be shared though the teacher's licence says no.

    Raises:
        UserError: the run is not finished, its teacher's licence forbids it, the name or the token
            is refused, the repository holds something else or has moved, or the Hub is out of
            reach. The token is in none of the messages.
    """
    from huggingface_hub import HfApi, get_token

    require_finished(run)
    check_name(repo, revision)
    record = Record.read(run)
    with quiet():  # the licence of a teacher on the Hub is asked for there
        files = local_files(run, record, repo, revision, licence_override)
    token = get_token()
    if not token:
        raise UserError("push: no token; set HF_TOKEN, or log in once with `hf auth login`")
    with quiet(), in_one_line(repo, token):
        remote = Remote(HfApi(token=token), repo, revision)
        fresh = remote.open(private)
        return send(remote, record, files, message, overwrite or fresh)


def send(
    remote: Remote, record: Record, files: Mapping[str, Content], message: str, overwrite: bool
) -> Pushed:
    """One commit that makes the branch hold `files`, on top of the head that was checked."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head, there = remote.head(), remote.files()
    last = record.commits.get(remote.key)
    changed = [name for name, content in files.items() if not same(content, there.get(name))]
    ours = set(last["files"]) if last is not None else set()
    stale = set(there) - set(files) - KEPT
    if not overwrite:
        stale &= ours
        if changed or stale:
            refuse_foreign(remote, record, last, head, set(there) - KEPT)
    if not changed and not stale:  # also when an earlier push was cut off after its commit
        record.write(remote.key, head, files)
        return Pushed(remote.url, head, 0, 0, len(files))
    operations = [CommitOperationDelete(name) for name in sorted(stale)]
    operations += [CommitOperationAdd(name, as_argument(files[name])) for name in sorted(changed)]
    commit = remote.commit(operations, message or "A few-step student", head, files)
    record.write(remote.key, commit, files)
    return Pushed(remote.url, commit, len(changed), len(stale), len(files) - len(changed))


def refuse_foreign(
    remote: Remote, record: Record, last: dict[str, Any] | None, head: str, there: set[str]
) -> None:
    """Raise unless the branch is empty, or is as this run's last push left it."""
    if not there:
        return
    if last is not None:
        if head != last["commit"]:
            raise UserError(
                f"push: {remote.key} has commits since this run's last push "
                f"({last['commit'][:7]} to {head[:7]}); --overwrite replaces them"
            )
    elif SIDECAR not in there or remote.mark() != record.run:
        raise UserError(
            f"push: {remote.key} holds files that this run did not put there; "
            "choose another name, or --overwrite them"
        )


def check_name(repo: str, revision: str) -> None:
    """Refuse what the Hub would not take as a name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        good = False
    else:
        good = repo.isascii() and repo.count("/") == 1  # versions before 1 let ü pass
    if not good:
        raise UserError(
            f"push: {repo!r} is not OWNER/NAME of letters, digits, '-', '_' and '.' "
            "(at most 96, no '--' or '..')"
        )
    if not revision or any(c.isspace() or c in "~^:?*[\\" for c in revision) or ".." in revision:
        raise UserError(f"--revision {revision!r} is not a branch name")


# ---- what is sent


def local_files(
    run: Path, record: Record, repo: str, revision: str, override: str
) -> dict[str, Content]:
    """What the repository is to hold, by path in it."""
    files: dict[str, Content] = {}
    for part in ("student", "lora"):
        for path in sorted((run / part).rglob("*")):
            name = path.relative_to(run / part).as_posix()
            if path.is_file() and not any(p.startswith(".") for p in PurePath(name).parts):
                files[name] = portable_json(path) if path.suffix == ".json" else path
    made = card(
        run, repo, override, revision
    )  # also checks the licence, which one's own card does not lift
    files["README.md"] = run / "card.md" if (run / "card.md").is_file() else made.text.encode()
    if made.grid is not None:
        files[GRID] = made.grid
    if made.licence.file is not None:
        files[made.licence.file.name] = made.licence.file
    sidecar = json.loads(as_bytes(files[SIDECAR]))
    files[SIDECAR] = json.dumps({**sidecar, MARK: record.run}, indent=2).encode() + b"\n"
    return files


def portable_json(path: Path) -> bytes:
    """A JSON file without this machine's folders: an absolute path becomes its last name."""
    text = path.read_bytes()
    try:
        before = json.loads(text)
    except ValueError:
        raise UserError(f"push: {path} is not valid JSON; export the run again") from None
    after = portable(before)
    return text if before == after else json.dumps(after, indent=2).encode() + b"\n"


def portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    if isinstance(value, str) and (value.startswith("~/") or PurePath(value).is_absolute()):
        return PurePath(value).name
    return value


@dataclass
class Record:
    """A run's memory of its pushes: its own name, and its last commit in each repository."""

    path: Path
    run: str
    commits: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, run: Path) -> Record:
        path = run / RECORD
        if not path.exists():
            made = cls(path, secrets.token_hex(8), {})
            made.save()  # before anything is sent: what a cut-off push left is known as ours
            return made
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, str(kept["run"]), dict(kept["commits"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"push: {path} is damaged; delete it, and push with --overwrite"
            ) from None

    def write(self, key: str, commit: str, files: Mapping[str, Content]) -> None:
        self.commits[key] = {"commit": commit, "files": sorted(files)}
        self.save()

    def save(self) -> None:
        tree = {"run": self.run, "commits": self.commits}
        write(self.path, json.dumps(tree, indent=2) + "\n")
