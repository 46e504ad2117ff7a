"""Statistics of real images, in files that record how they were computed.

A file is safetensors: `features` (K, D) float32, the moments `mean` (D,) and `cov` (D, D) float64,
and a JSON header with the set's name, the rule of the features and a hash of the images. A metric
refuses statistics of another rule.
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
from eval.images import files_in, is_first_of_many, is_image, is_plain, open_image, size_of, to_srgb
from eval.metrics.base import checked
from eval.metrics.features import NamedFeatures
from eval.metrics.fid import Moments
from eval.stream import MomentSums, Reservoir

CHUNK = 256
ROUNDING = 1e-6  # relative tolerance for symmetry and negative eigenvalues of published moments


@dataclass(frozen=True)
class Reference:
    """The statistics of real images.

    name: the data set's.
    rule: how the features were computed: extractor, version, resize.
    content: the SHA-256 of the images.
    features: a random choice of feature vectors, (K, D) float32.
    """

    name: str
    rule: str
    content: str
    moments: Moments
    features: Tensor

    def save(self, path: Path) -> None:
        """Write it to a draft that is then renamed, so that no partial file exists."""
        head = {"name": self.name, "rule": self.rule, "content": self.content}
        tensors = {"mean": self.moments.mean, "cov": self.moments.cov, "features": self.features}
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        draft = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        # save_file would make a file that only its owner can read
        draft.write_bytes(save(tensors, {"reference": json.dumps({**head, "n": self.moments.n})}))
        draft.rename(path)

    @classmethod
    def load(cls, path: Path, features: NamedFeatures) -> Reference:
        """The statistics in a file, if they have the rule of `features`.

        Raises:
            MetricError: it is not such a file, or they have another rule.
        """
        try:
            with safe_open(path, "pt") as f:
                head = json.loads((f.metadata() or {})["reference"])
                tensors = {k: f.get_tensor(k) for k in ("mean", "cov", "features")}
                n, rule = head.pop("n"), head["rule"]
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise MetricError(
                f"reference {path}: not a file of reference statistics; delete it"
            ) from error
        if rule != features.rule:
            raise MetricError(
                f"reference {path.name}: made by {rule!r}, and the metric needs {features.rule!r}; "
                "make it again"
            )
        return cls(
            **head,
            moments=Moments(tensors["mean"], tensors["cov"], n),
            features=tensors["features"],
        )


def measure(
    name: str, chunks: Iterable[Tensor], features: NamedFeatures, content: str, keep: int = 50_000
) -> Reference:
    """Statistics of uint8 images that come in chunks (N, C, H, W).

    Args:
        keep: The number of feature vectors to keep.

    Raises:
        MetricError: the number of images does not exceed that of features.
    """
    sums, reservoir, first = MomentSums(), Reservoir(keep), 0
    for images in chunks:
        values = checked(features(images))
        sums.add(values, first)
        reservoir.add(values, first)
        first += len(images)
    moments = Moments.from_sums(sums)
    return Reference(name, features.rule, content, moments, reservoir.features)


def of_folder(
    name: str, folder: Path, features: NamedFeatures, keep: int = 50_000, root: Path | None = None
) -> Reference:
    """Statistics of all images in a folder, from the cache if they are there.

    The cache's key is a hash of all files, so a changed image leads to new statistics. Images of
    different sizes are read one at a time.

    Raises:
        MetricError: the folder holds no images, or no more than there are features.
    """
    paths = image_paths(name, folder)
    content = digest(folder, paths, hashes(name, paths))
    path = path_of(name, features, root, content)
    if path.exists():
        return Reference.load(path, features)
    statistics = measure(name, chunks(name, paths), features, content, keep)
    statistics.save(path)
    return statistics


def image_paths(name: str, folder: Path) -> list[Path]:
    """The images of a folder and its subfolders, sorted, without hidden files.

    Raises:
        MetricError: there are none, or a folder cannot be read.
    """
    try:
        paths = [p for p in files_in(folder) if is_image(p)] if folder.is_dir() else []
    except OSError as error:
        raise MetricError(
            f"reference {name}: {error.filename}: {error.strerror}; make it readable"
        ) from error
    if not paths:
        raise MetricError(f"reference {name}: no images in {folder}; give the folder of images")
    return paths


def hashes(name: str, paths: Iterable[Path], side: int | None = None) -> Iterator[str]:
    """The SHA-256 of each file, after a check of its header.

    The hash of an image that is not shown as it is stored has a suffix, because earlier versions
    computed statistics of the stored pixels.

    Args:
        side: The side that images must have in pixels; None for any.

    Raises:
        MetricError: a file is no image, or holds several, or has another side.
    """
    for path in paths:
        with _image(name, path) as f:
            width, height = size_of(f)
            plain, several = is_plain(f), is_first_of_many(f)
        if several:
            raise MetricError(
                f"reference {name}: {path} holds several frames; save one of them as a file"
            )
        if side is not None and (width, height) != (side, side):
            raise MetricError(
                f"reference {name}: {path} is {width}×{height} pixels; "
                f"the protocol takes {side}×{side}"
            )
        yield fetch.sha256(path) + ("" if plain else " shown")


def digest(folder: Path, paths: Sequence[Path], hashes: Iterable[str]) -> str:
    """One SHA-256 of the names and contents of all files."""
    total = hashlib.sha256()
    for path, content in zip(paths, hashes, strict=True):
        total.update(f"{path.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


def published(name: str, path: Path, features: NamedFeatures, n: int) -> Reference:
    """Published moments: an .npz of `mu` (D,) and `sigma` (D, D), of n images.

    The caller guarantees that they have the rule of `features`, because without the images nothing
    can check it. There are no feature vectors, which metrics of neighbours need.

    Raises:
        MetricError: the file is not such an .npz, or D is not that of `features`.
    """
    mean, cov = moments_of(path)
    if len(mean) != features.dim:
        raise MetricError(
            f"reference {path}: mu holds {len(mean)} numbers; give moments of {features.name}, "
            f"which has {features.dim}"
        )
    content = fetch.sha256(path)
    return Reference(name, features.rule, content, Moments(mean, cov, n), torch.zeros(0, len(mean)))


def moments_of(path: Path) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), in float64, of an .npz of `mu` and `sigma`.

    Raises:
        MetricError: the file is not such an .npz, or its arrays are no moments of real numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as f:
            arrays = f["mu"], f["sigma"]
    except Exception as error:  # numpy, zipfile and zlib raise over ten types for a bad file
        raise MetricError(
            f"reference {path}: not an .npz of mu and sigma; give another file"
        ) from error
    for name, values in zip(("mu", "sigma"), arrays):
        if values.dtype.kind not in "fiu":
            raise MetricError(f"reference {path}: {name} is of {values.dtype}, not of real numbers")
    mean, cov = (torch.from_numpy(v.astype(np.float64)) for v in arrays)
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
    """The images as viewers show them, as uint8 (N, 3, H, W).

    A chunk holds consecutive images of one size, up to CHUNK of them.

    Raises:
        MetricError: an image cannot be read.
    """
    part: list[Tensor] = []
    for path in paths:
        with _image(name, path) as f:
            image = torch.from_numpy(np.array(to_srgb(f))).permute(2, 0, 1)
        if part and (image.shape != part[0].shape or len(part) == CHUNK):
            yield torch.stack(part)
            part = []
        part.append(image)
    yield torch.stack(part)


@contextmanager
def _image(name: str, path: Path) -> Iterator[Image.Image]:
    """An open image file; its pixels are read on demand."""
    try:
        with open_image(path) as f:
            yield f
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "").strip() or type(error).__name__
        raise MetricError(
            f"reference {name}: {path} cannot be read ({reason}); replace it"
        ) from error


def path_of(name: str, features: NamedFeatures, root: Path | None, content: str) -> Path:
    """The file of statistics of that name and content."""
    folder = root or fetch.cache() / "references"
    return folder / f"{name}.{features.name}.{content[:16]}.safetensors"


def find(name: str, features: NamedFeatures, n: int, root: Path | None = None) -> Reference:
    """The statistics of n images, by the name of their set.

    Raises:
        MetricError: there are none, or several, or they have another number or rule.
    """
    paths, folder = files_of(name, features, root), path_of(name, features, root, "").parent
    if not paths:
        raise MetricError(
            f"reference {name}: no statistics by {features.name} in {folder}; "
            f"make them from its {n:,} images: distill reference {name} FOLDER"
        )
    if len(paths) > 1:
        raise MetricError(
            f"reference {name}: {len(paths)} files by {features.name} in {folder}, of "
            "different images; delete all but one"
        )
    statistics = Reference.load(paths[0], features)
    if statistics.moments.n != n:
        raise MetricError(
            f"reference {name}: {paths[0].name} is of {statistics.moments.n} images; "
            f"make it of {n}, which the protocol takes"
        )
    return statistics


def files_of(name: str, features: NamedFeatures, root: Path | None = None) -> list[Path]:
    """The files of statistics of that name by these features, of any images."""
    pattern = path_of(name, features, root, "*")
    return sorted(pattern.parent.glob(pattern.name))
