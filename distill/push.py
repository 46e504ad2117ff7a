"""Push: a finished run to a Hub repository, in one commit, and never over another's work.

What goes up: the files of `student/` and, where there is one, of `lora/`, at the repository's root;
the model card, written afresh from the run unless `card.md` lies in its folder; the sample grid.
A file that is there already, by its hash, is not sent again, so an interrupted push resumes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from students.card import GRID, card, require_finished
from students.export import SIDECAR
from teachers.errors import UserError

RECORD = "hub.json"  # in the run's folder: its name on the Hub, and the commits it made there
MARK = "run"  # in the uploaded sidecar: which run the files are of
KEPT = {".gitattributes"}  # the Hub's own, in every new repository
TRIES, WAIT, LONGEST = 4, 1.0, 30.0  # of a request; the pause doubles from WAIT to LONGEST seconds
TRANSIENT = {408, 429, 500, 502, 503, 504}

Content = Path | bytes
T = TypeVar("T")


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
        good = repo.count("/") == 1
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


def as_argument(content: Content) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def as_bytes(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def same(content: Content, there: Any) -> bool:
    """Whether the repository's file has this content, by its sha256 (LFS) or its git hash."""
    if there is None:
        return False
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if there.size != size:
        return False
    if there.lfs is not None:
        return digest(content, hashlib.sha256()) == there.lfs.sha256
    return digest(content, hashlib.sha1(b"blob %d\0" % size)) == there.blob_id


def digest(content: Content, hasher: Any) -> str:
    if isinstance(content, bytes):
        hasher.update(content)
    else:
        with content.open("rb") as file:
            while part := file.read(1 << 20):
                hasher.update(part)
    return hasher.hexdigest()


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
            kept = json.loads(path.read_text())
            return cls(path, str(kept["run"]), dict(kept["commits"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"push: {path} is damaged; delete it, and push with --overwrite"
            ) from None

    def write(self, key: str, commit: str, files: Mapping[str, Content]) -> None:
        self.commits[key] = {"commit": commit, "files": sorted(files)}
        self.save()

    def save(self) -> None:
        draft = self.path.with_name(f".{self.path.name}")
        draft.write_text(json.dumps({"run": self.run, "commits": self.commits}, indent=2) + "\n")
        draft.replace(self.path)


# ---- the Hub


class Remote:
    """A branch of a repository on the Hub; each request is retried when the fault may pass."""

    def __init__(self, api: Any, repo: str, revision: str) -> None:
        self.api, self.repo, self.revision = api, repo, revision
        self.key = f"{repo}@{revision}"
        self.url = f"{api.endpoint}/{repo}" + (f"/tree/{revision}" * (revision != "main"))

    def open(self, private: bool) -> bool:
        """Make the repository and the branch where they are missing; whether the branch is new."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = retried(lambda: self.api.model_info(self.repo))
        except RepositoryNotFoundError as error:
            if status_of(error) == 401:
                raise  # the token, and not the repository
            info = None
        if info is None:
            retried(lambda: self.api.create_repo(self.repo, private=private or None, exist_ok=True))
        elif private and not info.private:
            raise UserError(
                f"push: {self.repo} exists and is public; leave out --private, or make it private "
                "in its settings first"
            )
        try:
            self.head()
        except RevisionNotFoundError:
            retried(lambda: self.api.create_branch(self.repo, branch=self.revision, exist_ok=True))
            return True
        return False

    def head(self) -> str:
        """The branch's newest commit."""
        return retried(lambda: self.api.model_info(self.repo, revision=self.revision)).sha

    def files(self) -> dict[str, Any]:
        """The files of the branch, with their hashes."""

        def listed() -> dict[str, Any]:
            tree = self.api.list_repo_tree(self.repo, recursive=True, revision=self.revision)
            return {entry.path: entry for entry in tree if "blob_id" in vars(entry)}

        return retried(listed)

    def mark(self) -> str | None:
        """Which run the repository's sidecar names."""
        with tempfile.TemporaryDirectory() as scratch:
            path = retried(
                lambda: self.api.hf_hub_download(
                    self.repo, SIDECAR, revision=self.revision, local_dir=scratch
                )
            )
            try:
                return json.loads(Path(path).read_text()).get(MARK)
            except (ValueError, AttributeError):
                return None

    def commit(
        self, operations: list[Any], message: str, parent: str, files: Mapping[str, Content]
    ) -> str:
        """Commit on top of `parent`; after a fault that may have struck behind it, look first."""

        from huggingface_hub import CommitOperationAdd as Add

        def attempt() -> str:
            if (head := self.head()) != parent:
                there = self.files()
                if all(same(content, there.get(name)) for name, content in files.items()):
                    return head  # an earlier attempt did arrive
                raise moved(self.key)
            # an addition that was sent once remembers it; each attempt asks the Hub afresh
            again = [
                Add(o.path_in_repo, o.path_or_fileobj) if isinstance(o, Add) else o
                for o in operations
            ]
            try:
                return self.api.create_commit(
                    self.repo,
                    again,
                    commit_message=message,
                    revision=self.revision,
                    parent_commit=parent,
                ).oid
            except Exception as error:
                if status_of(error) in (409, 412):
                    raise moved(self.key) from None
                raise

        return retried(attempt)


def moved(key: str) -> UserError:
    return UserError(
        f"push: {key} was changed by somebody else meanwhile; nothing was committed: "
        "look at it, then push again"
    )


def retried(request: Callable[[], T]) -> T:
    """The request's answer, asked for again after faults that may pass, with growing pauses."""
    wait = WAIT
    for attempt in range(1, TRIES + 1):
        try:
            return request()
        except Exception as error:
            if attempt == TRIES or not passing(error):
                raise
            time.sleep(min(asked(error) or wait, LONGEST))
            wait = min(2 * wait, LONGEST)
    raise AssertionError


def passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    return unreachable(error) or isinstance(error, json.JSONDecodeError)  # a proxy's own page


def unreachable(error: Exception) -> bool:
    """Whether the connection failed: no name, refused, dropped, timed out."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    # files of our own that cannot be read are OSErrors with a path; the transport's have none
    local = isinstance(error, OSError) and error.filename is not None
    return isinstance(error, HTTPError | OSError) and not local


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error of the Hub's carries."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def asked(error: Exception) -> float:
    """How long the server asked us to wait, in seconds; 0 if it did not."""
    response = getattr(error, "response", None)
    after = "" if response is None else response.headers.get("Retry-After", "")
    return float(after) if after.isdecimal() else 0.0


@contextmanager
def quiet() -> Iterator[None]:
    """No logs, warnings or bars: the client's and its transport's repeat what the server said."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before, bars = logging.root.manager.disable, not are_progress_bars_disabled()
    logging.disable(logging.CRITICAL)
    disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
        if bars:
            enable_progress_bars()


@contextmanager
def in_one_line(repo: str, token: str) -> Iterator[None]:
    """What the Hub and the network refuse, as the user's one line; never with the token in it."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled:
        raise UserError("push: HF_HUB_OFFLINE is set; unset it to push") from None
    except (HTTPError, OSError, ValueError, KeyError) as error:
        status, said = status_of(error), first_line(error, token)
        if status == 401:
            line = "the Hub refused the token; renew HF_TOKEN, or `hf auth login` again"
        elif status == 403:
            line = f"this token may not write to {repo}; give it write access to that owner"
        elif status == 404:
            line = f"the Hub finds no {repo}, or does not show it to this token"
        elif status is not None:
            line = f"the Hub answered {status} for {repo}: {said}; push again to go on"
        elif unreachable(error):
            line = f"the Hub cannot be reached ({said}); push again to go on"
        else:
            line = f"{repo}: {said}"
        raise UserError(f"push: {line}") from None


def first_line(error: Exception, token: str) -> str:
    """What an error says, without the token, short enough for a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(token, "…")[:200]
