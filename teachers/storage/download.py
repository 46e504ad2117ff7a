"""Download teachers from the Hub: only the files that the pipeline is loaded from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from os.path import isdir, isfile
from pathlib import Path, PurePosixPath
from typing import Any

from teachers.errors import UserError, clipped, nearest, teacher_at
from teachers.storage.components import LOADED
from teachers.storage.files import home, read_json
from teachers.storage.variants import WEIGHTS, check_asked, variant_of
from teachers.teacher import TERMS

INDEX = "model_index.json"
ROOT = (INDEX, "fewstep.json", *TERMS)  # at the top of a repository
SETTINGS = {".json", ".txt", ".model", ".jinja"}  # configs, vocabularies and chat templates
SINGLE = {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf"}  # how single files end


def fetch(source: str, keep: Callable[[str], bool] = lambda path: True) -> Path:
    """Download a Hub repository to the cache and return its folder.

    Args:
        keep: Whether one of the files that a pipeline is loaded from is needed.

    Raises:
        UserError: it does not exist, is not accessible, or holds no pipeline in safetensors.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    who = teacher_at(source)
    try:
        names = [s.rfilename for s in HfApi().model_info(source).siblings or []]
        index = read_json(Path(hf_hub_download(source, INDEX)), who) if INDEX in names else None
    except UserError:
        raise
    except Exception as error:  # Hub and network errors differ by version
        try:
            return Path(snapshot_download(source, local_files_only=True))
        except Exception:  # not in the cache: report the Hub's error
            raise UserError(f"{who}: {nowhere(source)}; {refused(source, error)}") from None
    check_asked(source, (PurePosixPath(name).name for name in names))
    files = [name for name in wanted(index, names, who) if keep(name)]
    try:
        return Path(snapshot_download(source, allow_patterns=[escaped(name) for name in files]))
    except Exception as error:  # as above
        raise UserError(f"{who}: {refused(source, error)}") from None


def wanted(index: dict[str, Any] | None, names: Iterable[str], who: str) -> list[str]:
    """The files of a repository that its pipeline is loaded from.

    These are the settings and safetensors of each component in `index`: one variant, or plain
    files, as `variants.variant_of` chooses. Pickles, weights of other frameworks, other variants
    and single-file checkpoints are skipped.

    Args:
        index: The content of model_index.json; None if there is no such file.
        names: Paths of all files in the repository.

    Raises:
        UserError: there is no pipeline, or a component exists only as a pickle.
    """
    names = sorted(names)
    top = [n for n in names if "/" not in n]
    files = [n for n in top if any(fnmatchcase(n, pattern) for pattern in ROOT)]
    if index is None:
        if "config.json" not in top:
            raise UserError(
                f"{who}: no {INDEX} in the repository: not a diffusers pipeline; {single()}"
            )
        return sorted({*files, *needed(top)})
    for part, entry in index.items():
        if not isinstance(entry, list) or part == "safety_checker" or entry[:1] in ([], [None]):
            continue
        inside = [n for n in names if str(PurePosixPath(n).parent) == part]
        inside = inside or top  # old pipelines keep their only network beside the index
        part_files = needed(inside)
        if entry[0] in LOADED and not any(n.endswith(".safetensors") for n in part_files):
            pickles = [n for n in inside if n.endswith((".bin", ".pt", ".ckpt"))]
            if pickles:
                raise UserError(
                    f"{who}: the repository holds {part} only as a pickle ({clipped(pickles[0])}), "
                    "which is never loaded; give a repository with safetensors"
                )
        files += part_files
    return sorted(set(files))


def needed(inside: list[str]) -> list[str]:
    """The settings files of one folder, and one variant of its safetensors."""
    bare = {PurePosixPath(n).name: n for n in inside}
    variant = variant_of(bare)
    ending = ".safetensors.index.json"
    if variant is not None:
        ending = f".safetensors.index.{variant}.json"
    files = []
    for name, path in bare.items():
        if match := WEIGHTS.fullmatch(name):
            keep = match["variant"] == variant
        elif ".index." in name:  # the index of sharded weights
            keep = name.endswith(ending)
        else:
            keep = PurePosixPath(name).suffix in SETTINGS
        if keep:
            files.append(path)
    return files


def escaped(name: str) -> str:
    """A glob pattern that matches exactly this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def nowhere(source: str) -> str:
    """ "no such folder here", with the nearest name in the parent folder."""
    folder = home(source, "teacher")
    line = "no such folder here"
    if not isdir(folder.parent):
        return line
    beside = [p.name for p in folder.parent.iterdir() if p.is_dir() and p.name[:1] != "."]
    close = nearest(folder.name, beside)
    if not close.startswith("did you mean"):
        return f"{line}, though there is {clipped(folder.parent)}"
    return f"{line}; {close} in {clipped(folder.parent)}"


def refused(source: str, error: Exception) -> str:
    """Why a repository is not accessible, and the remedy; the end of an error line."""
    from huggingface_hub import errors

    at = clipped(source)
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated on the Hub; accept its terms at hf.co/{at}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it is not on the Hub either, or is private there (`hf auth login`)"
    if isinstance(error, errors.HFValidationError):
        return "it is not a valid Hub name either (OWNER/NAME)"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and the cache has no copy; unset it, or give a folder"
    fault = clipped((str(error).strip().splitlines() or [type(error).__name__])[0])
    return f"the Hub could not be reached ({fault}) and the cache has no whole copy; try again"


def single(file: str = "FILE.safetensors") -> str:
    """What to do with a single-file checkpoint that is not read as it is."""
    return (
        "give the path of a .safetensors file on this machine, or convert the file once, in "
        "Python: StableDiffusionPipeline (or the pipeline of its "
        f"family).from_single_file({clipped(file)!r}).save_pretrained('FOLDER'), and give FOLDER"
    )


def refuse_file(source: str, who: str) -> None:
    """Refuse a single file of a kind that is not read, and one that is not there.

    Raises:
        UserError: the source has the suffix of a weights file.
    """
    path = home(source, "teacher")
    if path.suffix.lower() not in SINGLE or isdir(path):
        return
    if not isfile(path):
        raise UserError(f"{who}: this file does not exist; give the path of one that does")
    raise UserError(
        f"{who}: {path.suffix} is a single file of a kind that is not read; {single(source)}"
    )
