"""A branch of a Hub repository: its files by hash, commits, retries, and errors in one line."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from students.export.folder import SIDECAR
from teachers.errors import UserError

RUN_KEY = "run"  # of the uploaded sidecar: the id of the run that the files come from
ATTEMPTS = 4  # of each request
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between attempts; the wait doubles each time
TRANSIENT = {408, 429, 500, 502, 503, 504}  # HTTP statuses after which a request is repeated

Content = Path | bytes
T = TypeVar("T")


def is_unchanged(content: Content, entry: Any) -> bool:
    """Whether a file of the repository has this content.

    Args:
        entry: Of `list_repo_tree`, with the sha256 of an LFS file or the git hash of another;
            None if the repository has no such file.
    """
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    if entry is None or entry.size != size_of(content):
        return False
    if entry.lfs is None:
        return git_hash(as_bytes(content)) == entry.blob_id
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        return sha_fileobj(file).hex() == entry.lfs.sha256


def size_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def as_bytes(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


class Remote:
    """A branch of a repository on the Hub; each request is repeated after transient faults."""

    def __init__(self, api: Any, repo: str, revision: str) -> None:
        self.api, self.repo, self.revision = api, repo, revision
        self.key = f"{repo}@{revision}"
        self.url = f"{api.endpoint}/{repo}" + (f"/tree/{revision}" * (revision != "main"))

    def create(self, private: bool) -> bool:
        """Create the repository and the branch if they do not exist.

        Returns:
            Whether the branch is new.

        Raises:
            UserError: `private` is asked of a public repository.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = with_retries(lambda: self.api.model_info(self.repo))
        except RepositoryNotFoundError as error:
            if status_of(error) == 401:
                raise  # the token is wrong; the repository may exist
            info = None
        if info is None:
            with_retries(
                lambda: self.api.create_repo(self.repo, private=private or None, exist_ok=True)
            )
        elif private and not info.private:
            raise UserError(
                f"push: {self.repo} exists and is public; leave out --private, or make it private "
                "in its settings first"
            )
        try:
            self.head()
        except RevisionNotFoundError:
            with_retries(
                lambda: self.api.create_branch(self.repo, branch=self.revision, exist_ok=True)
            )
            return True
        return False

    def head(self) -> str:
        """The id of the branch's newest commit."""
        return with_retries(lambda: self.api.model_info(self.repo, revision=self.revision)).sha

    def files(self) -> dict[str, Any]:
        """The files of the branch by path, with their sizes and hashes."""

        def request() -> dict[str, Any]:
            tree = self.api.list_repo_tree(self.repo, recursive=True, revision=self.revision)
            return {entry.path: entry for entry in tree if "blob_id" in vars(entry)}

        return with_retries(request)

    def run_id(self) -> str | None:
        """The id of the run whose student the branch holds; None if the sidecar has none."""
        with tempfile.TemporaryDirectory() as scratch:
            path = with_retries(
                lambda: self.api.hf_hub_download(
                    self.repo, SIDECAR, revision=self.revision, local_dir=scratch
                )
            )
            try:
                return json.loads(Path(path).read_text(encoding="utf-8")).get(RUN_KEY)
            except (ValueError, AttributeError, RecursionError):
                return None

    def commit(
        self, operations: list[Any], message: str, parent: str, files: Mapping[str, Content]
    ) -> str:
        """Commit on top of `parent` and return the new commit's id.

        The answer to a commit can be lost although the Hub made it. So each attempt looks first
        whether the branch already holds `files`.

        Raises:
            UserError: the branch has other commits since `parent`.
        """
        from huggingface_hub import CommitOperationAdd as Add

        def attempt() -> str:
            if (head := self.head()) != parent:
                entries = self.files()
                if all(is_unchanged(v, entries.get(name)) for name, v in files.items()):
                    return head  # an earlier attempt succeeded
                raise overtaken(self.key)
            # an Add remembers what an earlier attempt uploaded; a new one asks the Hub again
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
                    raise overtaken(self.key) from None
                raise

        return with_retries(attempt)


def overtaken(key: str) -> UserError:
    return UserError(
        f"push: {key} was changed by somebody else during the push; nothing was committed: "
        "look at the change, then push again"
    )


def with_retries(request: Callable[[], T]) -> T:
    """The request's answer; after transient faults it is repeated, with growing waits.

    huggingface_hub repeats uploads, but not the requests around them (docs/decisions/0010).
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except Exception as error:
            cause = underlying(error)
            if attempt == ATTEMPTS or not is_transient(cause):
                raise cause from cause.__cause__
            time.sleep(min(retry_after(cause) or wait, LONGEST_WAIT))
            wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError


def underlying(error: Exception) -> Exception:
    """The HTTP error inside the RuntimeError that huggingface_hub before 1 raises for LFS files."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    # a proxy may answer with a page of its own, which is no JSON
    return is_connection_error(error) or isinstance(error, json.JSONDecodeError)


def is_connection_error(error: Exception) -> bool:
    """Whether the Hub could not be reached: unknown host, refused, dropped, timed out."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    # an OSError about a local file has a file name; one about a connection has none
    local = isinstance(error, OSError) and error.filename is not None
    return isinstance(error, HTTPError | OSError) and not local


def status_of(error: Exception) -> int | None:
    """The HTTP status of an error's response; None if it has no response."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def retry_after(error: Exception) -> float:
    """The seconds that the server's Retry-After header asks to wait; 0 without one."""
    response = getattr(error, "response", None)
    seconds = "" if response is None else response.headers.get("Retry-After", "")
    return float(seconds) if seconds.isdecimal() else 0.0


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off logs, warnings and bars, in which the client repeats the server's words."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    level, had_bars = logging.root.manager.disable, not are_progress_bars_disabled()
    logging.disable(logging.CRITICAL)
    disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
        if had_bars:
            enable_progress_bars()


@contextmanager
def user_errors(repo: str, token: str) -> Iterator[None]:
    """Raise errors of the Hub and the network as one-line UserErrors, without the token."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled:
        raise UserError("push: HF_HUB_OFFLINE is set; unset it to push") from None
    except (HTTPError, OSError, ValueError, KeyError) as error:
        status, reason = status_of(error), redacted(error, token)
        if status == 401:
            line = "the Hub refused the token; renew HF_TOKEN, or run `hf auth login` again"
        elif status == 403:
            line = f"this token may not write to {repo}; give it write access to that owner"
        elif status == 404:
            line = f"the Hub finds no {repo}, or does not show it to this token; check the name"
        elif status is not None:
            line = f"the Hub answered {status} for {repo}: {reason}; push again to continue"
        elif is_connection_error(error):
            line = f"the Hub cannot be reached ({reason}); push again to continue"
        else:
            line = f"{repo}: {reason}"
        raise UserError(f"push: {line}") from None


def redacted(error: Exception, token: str) -> str:
    """An error's message on one line of at most 200 characters, without the token."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(token, "…")[:200]
