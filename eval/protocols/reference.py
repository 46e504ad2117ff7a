"""Statistics of real pictures, kept with the protocol that they were made by.

A file is safetensors: `features` (K, D) float32, the moments `mean` (D,) and `cov` (D, D) float64,
and a JSON header that says of what, how, and of which pictures. Statistics made by one rule are
refused where another is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eval import fetch
from eval.errors import MetricError
from eval.images import files_in, is_first_of_many, is_image, is_plain, opened, shown, size_of
from eval.metrics.base import checked
from eval.metrics.features import Named
from eval.metrics.fid import Moments
from eval.stream import Reservoir, Tally

CHUNK = 256
ROUNDING = 1e-6  # how far published moments may be from symmetric and from positive, relatively


@dataclass(frozen=True)
class Reference:
    """What metrics need of real pictures.

    name: of the data set.
    rule: how features were made: extractor, version, resize.
    content: the SHA-256 of the pictures.
    features: of as many as were kept, (K, D) float32.
    """

    name: str
    rule: str
    content: str
    moments: Moments
    features: Tensor

    def save(self, path: Path) -> None:
        """Write it to a file, aside and renamed, so that none is ever there in part."""
        head = {"name": self.name, "rule": self.rule, "content": self.content}
        tensors = {"mean": self.moments.mean, "cov": self.moments.cov, "features": self.features}
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        aside = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        # by way of bytes: save_file's own files are their owner's alone to read
        aside.write_bytes(save(tensors, {"reference": json.dumps({**head, "n": self.moments.n})}))
        aside.rename(path)

    @classmethod
    def load(cls, path: Path, features: Named) -> Reference:
        """The statistics in a file, made by the rule of `features`.

        Raises:
            MetricError: it is no such file, or they were made by another rule.
        """
        try:
            with safe_open(path, "pt") as f:
                head = json.loads((f.metadata() or {})["reference"])
                tensors = {k: f.get_tensor(k) for k in ("mean", "cov", "features")}
                n, rule = head.pop("n"), head["rule"]
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise MetricError(f"reference {path}: not a file of reference statistics") from error
        if rule != features.rule:
            raise MetricError(
                f"reference {path.name}: made by {rule!r}, asked for by {features.rule!r}; "
                "figures of two rules cannot be compared, make it anew"
            )
        return cls(
            **head,
            moments=Moments(tensors["mean"], tensors["cov"], n),
            features=tensors["features"],
        )


def measure(
    name: str, chunks: Iterable[Tensor], features: Named, content: str, keep: int = 50_000
) -> Reference:
    """Statistics of uint8 pictures that come in chunks (N, C, H, W).

    Raises:
        MetricError: they are no more than the features.
    """
    tally, kept, first = Tally(), Reservoir(keep), 0
    for images in chunks:
        found = checked(features(images))
        tally.add(found, first)
        kept.add(found, first)
        first += len(images)
    return Reference(name, features.rule, content, Moments.counted(tally), kept.kept)


def of_folder(
    name: str, folder: Path, features: Named, keep: int = 50_000, root: Path | None = None
) -> Reference:
    """Statistics of all pictures in a folder, from the cache where they are there.

    The key is the content of all its files, so a changed picture makes them anew. Pictures of
    several sizes are read one at a time.

    Raises:
        MetricError: the folder holds no pictures, or no more than the features.
    """
    paths = listed(name, folder)
    content = digest(folder, paths, hashes(name, paths))
    path = place(name, features, root, content)
    if path.exists():
        return Reference.load(path, features)
    made = measure(name, chunks(name, paths), features, content, keep)
    made.save(path)
    return made


def listed(name: str, folder: Path) -> list[Path]:
    """The pictures of a folder and the folders in it, in their order; hidden files are none.

    Raises:
        MetricError: there are none, or a folder cannot be looked into.
    """
    try:
        paths = [p for p in files_in(folder) if is_image(p)] if folder.is_dir() else []
    except OSError as error:
        raise MetricError(f"reference {name}: {error.filename}: {error.strerror}") from error
    if not paths:
        raise MetricError(f"reference {name}: no pictures in {folder}")
    return paths


def hashes(name: str, paths: Iterable[Path], side: int | None = None) -> Iterator[str]:
    """The SHA-256 of each file, after a look at its header.

    That of a picture which is not shown as it is stored ends in a word, so that statistics by a
    reader that took the stored pixels are not taken for those of what is shown.

    Raises:
        MetricError: one is no picture, or several, or not side × side where a side is asked for.
    """
    for path in paths:
        with _opened(name, path) as f:
            width, height = size_of(f)
            plain, several = is_plain(f), is_first_of_many(f)
        if several:
            raise MetricError(
                f"reference {name}: {path} holds several frames; keep one of them, in a file "
                "that holds no other"
            )
        if side is not None and (width, height) != (side, side):
            raise MetricError(
                f"reference {name}: {path} is {width}×{height} pixels; "
                f"the protocol takes {side}×{side}"
            )
        yield fetch.sha256(path) + ("" if plain else " shown")


def digest(folder: Path, paths: Sequence[Path], hashes: Iterable[str]) -> str:
    """One SHA-256 of all files, by name and content."""
    whole = hashlib.sha256()
    for path, content in zip(paths, hashes, strict=True):
        whole.update(f"{path.relative_to(folder)} {content}\n".encode())
    return whole.hexdigest()


def published(name: str, path: Path, features: Named, n: int) -> Reference:
    """Moments that others publish, an .npz of `mu` (D,) and `sigma` (D, D), of n pictures.

    That they were made by the rule of `features` is the caller's word; no pictures are there to
    check it, and no features for metrics of neighbours.

    Raises:
        MetricError: the file is not such, or D is not that of `features`.
    """
    mean, cov = moments_of(path)
    if len(mean) != features.dim:
        raise MetricError(
            f"reference {path}: mu holds {len(mean)} numbers; {features.name} gives {features.dim}"
        )
    content = fetch.sha256(path)
    return Reference(name, features.rule, content, Moments(mean, cov, n), torch.zeros(0, len(mean)))


def moments_of(path: Path) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), in float64, of an .npz of `mu` and `sigma`.

    Raises:
        MetricError: the file is not such, or they are no moments of real numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as f:
            found = f["mu"], f["sigma"]
    except Exception as error:  # numpy, zipfile and zlib raise over ten types for a bad file
        raise MetricError(f"reference {path}: not an .npz of mu and sigma") from error
    for name, values in zip(("mu", "sigma"), found):
        if values.dtype.kind not in "fiu":
            raise MetricError(f"reference {path}: {name} is of {values.dtype}, not of real numbers")
    mean, cov = (torch.from_numpy(v.astype(np.float64)) for v in found)
    if mean.dim() != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise MetricError(
            f"reference {path}: sigma is {tuple(cov.shape)} where mu is {tuple(mean.shape)}"
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(cov).all()):
        raise MetricError(f"reference {path}: mu or sigma holds NaN or infinity")
    if (cov - cov.T).abs().max() > ROUNDING * cov.abs().max():
        raise MetricError(f"reference {path}: sigma is no covariance: it is not symmetric")
    spectrum = torch.linalg.eigvalsh(cov)
    if spectrum[0] < -ROUNDING * spectrum[-1].abs():
        raise MetricError(
            f"reference {path}: sigma is no covariance: it has the eigenvalue {spectrum[0]:.3g}"
        )
    return mean, cov


def chunks(name: str, paths: Iterable[Path]) -> Iterator[Tensor]:
    """The pictures as viewers show them, as uint8 (N, 3, H, W).

    As many come at a time as are of one size, up to CHUNK.

    Raises:
        MetricError: one cannot be read.
    """
    part: list[Tensor] = []
    for path in paths:
        with _opened(name, path) as f:
            image = torch.from_numpy(np.array(shown(f))).permute(2, 0, 1)
        if part and (image.shape != part[0].shape or len(part) == CHUNK):
            yield torch.stack(part)
            part = []
        part.append(image)
    yield torch.stack(part)


@contextmanager
def _opened(name: str, path: Path) -> Iterator[Image.Image]:
    """A picture whose pixels are read when they are asked for."""
    try:
        with opened(path) as f:
            yield f
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "").strip() or type(error).__name__
        raise MetricError(f"reference {name}: {path} cannot be read ({reason})") from error


def place(name: str, features: Named, root: Path | None, content: str) -> Path:
    """Where statistics of that name and content are kept."""
    folder = root or fetch.cache() / "references"
    return folder / f"{name}.{features.name}.{content[:16]}.safetensors"


def find(name: str, features: Named, n: int, root: Path | None = None) -> Reference:
    """The statistics of n pictures that a protocol asks for by name.

    Raises:
        MetricError: there are none, several, those of another number, or by another rule.
    """
    paths, folder = kept(name, features, root), place(name, features, root, "").parent
    if not paths:
        raise MetricError(
            f"reference {name}: no statistics by {features.name} in {folder}; "
            f"make them from its {n:,} pictures: distill reference {name} FOLDER"
        )
    if len(paths) > 1:
        raise MetricError(
            f"reference {name}: {len(paths)} files by {features.name} in {folder}, of "
            "different pictures; delete all but one"
        )
    found = Reference.load(paths[0], features)
    if found.moments.n != n:
        raise MetricError(
            f"reference {name}: {found.moments.n} pictures in {paths[0].name}; "
            f"the protocol takes {n}"
        )
    return found


def kept(name: str, features: Named, root: Path | None = None) -> list[Path]:
    """The files of statistics of that name by these features, of whichever pictures."""
    pattern = place(name, features, root, "*")
    return sorted(pattern.parent.glob(pattern.name))
