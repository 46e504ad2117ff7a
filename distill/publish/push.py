"""Upload a finished run to a Hub repository, in one commit that replaces nobody else's work.

The repository's root gets the files of `student/` and `lora/`, the model card (the run's `card.md`
if it has one, else a new one), the sample grid and the licence. A file whose hash is already in the
repository is not uploaded again, so an interrupted push continues where it stopped.
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
    RUN_KEY,
    Content,
    Remote,
    as_bytes,
    is_unchanged,
    quiet,
    user_errors,
)
from students.export.folder import SIDECAR
from teachers.errors import UserError

RECORD = "hub.json"  # in the run's folder: the run's id and its commits on the Hub
HUB_FILES = {".gitattributes"}  # made by the Hub in every new repository


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the branch's URL, its commit, and numbers of files."""

    url: str
    commit: str
    uploaded: int
    deleted: int
    unchanged: int


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

    The token comes from `HF_TOKEN` or `hf auth login`. The commit names its parent: if somebody
    else commits first, the push changes nothing.

    Args:
        private: Create the repository as a private one; an existing public one is refused.
        revision: The branch; a new one starts at main.
        overwrite: Replace all files in the repository, whoever made them.
        licence_override: Why the student may be shared although the teacher's licence forbids it.

    Raises:
        UserError: the run is not finished, the teacher's licence forbids sharing, the name or the
            token is refused, the repository holds files of somebody else, or the Hub cannot be
            reached. No message contains the token.
    """
    from huggingface_hub import HfApi, get_token

    require_finished(run)
    check_name(repo, revision)
    record = PushRecord.read(run)
    with quiet():  # downloads the licence of a teacher on the Hub
        files = local_files(run, record, repo, revision, licence_override)
    token = get_token()
    if not token:
        raise UserError("push: no token; set HF_TOKEN, or run `hf auth login` once")
    with quiet(), user_errors(repo, token):
        remote = Remote(HfApi(token=token), repo, revision)
        is_new = remote.create(private)
        return commit_files(remote, record, files, message, overwrite or is_new)


def commit_files(
    remote: Remote, record: PushRecord, files: Mapping[str, Content], message: str, overwrite: bool
) -> Pushed:
    """Make the branch hold `files` in one commit on top of the head that was checked."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head, entries = remote.head(), remote.files()
    last = record.commits.get(remote.key)
    changed = [name for name, v in files.items() if not is_unchanged(v, entries.get(name))]
    stale = set(entries) - set(files) - HUB_FILES
    if not overwrite:
        stale &= set(last["files"]) if last is not None else set()
        if changed or stale:
            check_ownership(remote, record, last, head, set(entries) - HUB_FILES)
    if not changed and not stale:  # or an earlier push was stopped right after its commit
        record.write(remote.key, head, files)
        return Pushed(remote.url, head, 0, 0, len(files))
    operations = [CommitOperationDelete(name) for name in sorted(stale)]
    operations += [CommitOperationAdd(name, files[name]) for name in sorted(changed)]
    commit = remote.commit(operations, message or "A few-step student", head, files)
    record.write(remote.key, commit, files)
    return Pushed(remote.url, commit, len(changed), len(stale), len(files) - len(changed))


def check_ownership(
    remote: Remote, record: PushRecord, last: dict[str, Any] | None, head: str, names: set[str]
) -> None:
    """Refuse a branch with files, unless it is as this run's last push left it.

    Args:
        last: What the record says of the last push to this branch; None without one.
        names: The files of the branch, without the Hub's own.

    Raises:
        UserError: the files, or commits since the last push, are somebody else's.
    """
    if not names:
        return
    if last is not None:
        if head != last["commit"]:
            raise UserError(
                f"push: {remote.key} has commits since this run's last push "
                f"({last['commit'][:7]} to {head[:7]}); add --overwrite to replace them"
            )
    elif SIDECAR not in names or remote.run_id() != record.run:
        raise UserError(
            f"push: {remote.key} holds files that this run did not upload; "
            "choose another name, or add --overwrite to replace them"
        )


def check_name(repo: str, revision: str) -> None:
    """Refuse a repository or branch name that the Hub does not accept."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        valid = False
    else:
        valid = repo.isascii() and repo.count("/") == 1  # versions before 1 accept ü
    if not valid:
        raise UserError(
            f"push: {repo!r} is not OWNER/NAME; use letters, digits, '-', '_' and '.' "
            "(at most 96, no '--' or '..')"
        )
    if not revision or any(c.isspace() or c in "~^:?*[\\" for c in revision) or ".." in revision:
        raise UserError(
            f"--revision {revision!r}: not a branch name; leave out blanks, '..' and ~^:?*[\\"
        )


# ---- the files


def local_files(
    run: Path, record: PushRecord, repo: str, revision: str, override: str
) -> dict[str, Content]:
    """The files that the repository should hold, by their path in it.

    Raises:
        UserError: the teacher's licence forbids sharing, also when the run has its own card.md.
    """
    files: dict[str, Content] = {}
    for part in ("student", "lora"):
        for path in sorted((run / part).rglob("*")):
            name = path.relative_to(run / part).as_posix()
            if path.is_file() and not any(p.startswith(".") for p in PurePath(name).parts):
                files[name] = portable_json(path) if path.suffix == ".json" else path
    new_card = card(run, repo, override, revision)
    files["README.md"] = run / "card.md" if (run / "card.md").is_file() else new_card.text.encode()
    if new_card.grid is not None:
        files[GRID] = new_card.grid
    if new_card.licence.file is not None:
        files[new_card.licence.file.name] = new_card.licence.file
    sidecar = json.loads(as_bytes(files[SIDECAR]))
    files[SIDECAR] = json.dumps({**sidecar, RUN_KEY: record.run}, indent=2).encode() + b"\n"
    return files


def portable_json(path: Path) -> bytes:
    """A JSON file in which each absolute path is replaced by its last part."""
    text = path.read_bytes()
    try:
        tree = json.loads(text)
    except ValueError:
        raise UserError(f"push: {path} is not valid JSON; export the run again") from None
    replaced = portable(tree)
    return text if tree == replaced else json.dumps(replaced, indent=2).encode() + b"\n"


def portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    if isinstance(value, str) and (value.startswith("~/") or PurePath(value).is_absolute()):
        return PurePath(value).name
    return value


@dataclass
class PushRecord:
    """The file in a run's folder that remembers its pushes.

    Attributes:
        run: A random id of the run.
        commits: By "REPO@BRANCH", the last commit of this run there, with the names of its files.
    """

    path: Path
    run: str
    commits: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, run: Path) -> PushRecord:
        path = run / RECORD
        if not path.exists():
            record = cls(path, secrets.token_hex(8), {})
            record.save()  # before any upload, so that an interrupted push is recognised later
            return record
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, str(tree["run"]), dict(tree["commits"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"push: {path} is damaged; delete it, and add --overwrite") from None

    def write(self, key: str, commit: str, files: Mapping[str, Content]) -> None:
        self.commits[key] = {"commit": commit, "files": sorted(files)}
        self.save()

    def save(self) -> None:
        write(self.path, json.dumps({"run": self.run, "commits": self.commits}, indent=2) + "\n")
