"""Teachers of the Hub: of a repository, only the files that its pipeline is loaded from."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from os.path import isdir, isfile
from pathlib import Path, PurePosixPath
from typing import Any

from teachers.errors import UserError, clipped, nearest, teacher_at
from teachers.storage.components import LOADED, WEIGHTS, variant_of
from teachers.storage.files import home, read_json
from teachers.teacher import TERMS
from teachers.text import first_line

INDEX = "model_index.json"
ROOT = (INDEX, "fewstep.json", *TERMS)  # at the top of a repository
SETTINGS = {".json", ".txt", ".model", ".jinja"}  # configs, vocabularies and chat templates
SINGLE = {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf"}  # how single files end


def fetch(source: str) -> Path:
    """The folder of a repository on the Hub, its files downloaded once.

    Raises:
        UserError: there is none, it is not to be had, or it holds no pipeline in safetensors.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    who = teacher_at(source)
    try:
        names = [s.rfilename for s in HfApi().model_info(source).siblings or []]
        index = read_json(Path(hf_hub_download(source, INDEX)), who) if INDEX in names else None
    except UserError:
        raise
    except Exception as error:  # the Hub's own and the transport's, which differ by version
        try:
            return Path(snapshot_download(source, local_files_only=True))
        except Exception:  # nothing is kept of it: what the Hub said is what counts
            raise UserError(f"{who}: {nowhere(source)}; {refused(source, error)}") from None
    files = wanted(index, names, who)
    try:
        return Path(snapshot_download(source, allow_patterns=[escaped(name) for name in files]))
    except Exception as error:  # as above
        raise UserError(f"{who}: {refused(source, error)}") from None


def wanted(index: dict[str, Any] | None, names: Iterable[str], who: str) -> list[str]:
    """Which files of a repository its pipeline is loaded from.

    Of each part that `index` names these are its settings and its safetensors: the plain ones
    where there are any, else those of a variant. Pickles, other frameworks' weights, other
    variants and single files of all weights are left.

    Args:
        index: What model_index.json holds; None where there is no such file.
        names: Of all files, as paths from the top.

    Raises:
        UserError: there is no pipeline, or a part of it is there as a pickle alone.
    """
    names = sorted(names)
    top = [n for n in names if "/" not in n]
    files = [n for n in top if any(fnmatchcase(n, pattern) for pattern in ROOT)]
    if index is None:
        if "config.json" not in top:
            raise UserError(
                f"{who}: the repository has no {INDEX}, so it is no diffusers pipeline; {single()}"
            )
        return sorted({*files, *needed(top)})
    for part, entry in index.items():
        if not isinstance(entry, list) or part == "safety_checker" or entry[:1] in ([], [None]):
            continue
        inside = [n for n in names if str(PurePosixPath(n).parent) == part]
        inside = inside or top  # old pipelines keep their only network beside the index
        found = needed(inside)
        if entry[0] in LOADED and not any(n.endswith(".safetensors") for n in found):
            pickles = [n for n in inside if n.endswith((".bin", ".pt", ".ckpt"))]
            if pickles:
                raise UserError(
                    f"{who}: the repository holds {part} as a pickle alone ({clipped(pickles[0])}),"
                    " and pickles are never loaded; take one with safetensors"
                )
        files += found
    return sorted(set(files))


def needed(inside: list[str]) -> list[str]:
    """Of the files in one folder, the settings and one form of the safetensors."""
    bare = {PurePosixPath(n).name: n for n in inside}
    variant = variant_of(bare)
    ending = ".safetensors.index.json"
    if variant is not None:
        ending = f".safetensors.index.{variant}.json"
    found = []
    for name, path in bare.items():
        if match := WEIGHTS.fullmatch(name):
            keep = match["variant"] == variant
        elif ".index." in name:  # of weights in several files: those that are taken, or others
            keep = name.endswith(ending)
        else:
            keep = PurePosixPath(name).suffix in SETTINGS
        if keep:
            found.append(path)
    return found


def escaped(name: str) -> str:
    """A name as a pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def nowhere(source: str) -> str:
    """That there is no such folder here, with the nearest name beside where it was looked for."""
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
    """Why a repository is not to be had, and what can be done, in a line's end."""
    from huggingface_hub import errors

    at = clipped(source)
    if isinstance(error, errors.GatedRepoError):
        return f"on the Hub it is gated: accept its terms at hf.co/{at}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "nor is it on the Hub, or it is private there (`hf auth login`)"
    if isinstance(error, errors.HFValidationError):
        return "nor is it a name that the Hub allows (OWNER/NAME)"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub is not asked, as HF_HUB_OFFLINE is set, and no copy of it is kept here"
    said = clipped(first_line(error))
    return f"and the Hub could not be asked ({said}), and no whole copy of it is kept here"


def single(file: str = "FILE.safetensors") -> str:
    """How a single file of all weights becomes a folder."""
    return (
        "convert a single file once, in Python: StableDiffusionPipeline (or the pipeline of its "
        f"family).from_single_file({clipped(file)!r}).save_pretrained('FOLDER'), and give FOLDER"
    )


def refuse_file(source: str, who: str) -> None:
    """Refuse a single file of all weights, which is no folder.

    Raises:
        UserError: the source's name ends as one.
    """
    path = home(source, "teacher")
    if path.suffix.lower() in SINGLE and not isdir(path):
        what = "is a single file" if isfile(path) else "names a single file, which is not there"
        raise UserError(f"{who}: it {what}; teachers are diffusers folders: {single(source)}")
