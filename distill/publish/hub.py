"""The Hub as a push sees it: a branch, its files by hash, retries, and refusals in one line."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from students.export.folder import SIDECAR
from teachers.errors import UserError

MARK = "run"  # in the uploaded sidecar: which run the files are of
TRIES, WAIT, LONGEST = 4, 1.0, 30.0  # of a request; the pause doubles from WAIT to LONGEST seconds
TRANSIENT = {408, 429, 500, 502, 503, 504}

Content = Path | bytes
T = TypeVar("T")


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
                return json.loads(Path(path).read_text(encoding="utf-8")).get(MARK)
            except (ValueError, AttributeError, RecursionError):
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
            fault = bare(error)
            if attempt == TRIES or not passing(fault):
                raise fault from fault.__cause__
            time.sleep(min(asked(fault) or wait, LONGEST))
            wait = min(2 * wait, LONGEST)
    raise AssertionError


def bare(error: Exception) -> Exception:
    """The fault itself: huggingface_hub before 1 hides that of a large file in a RuntimeError."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


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
