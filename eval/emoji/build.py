"""Build the emoji set: `python -m eval.emoji.build FILE`, two minutes on one core.

It needs npm for the packages and resvg-py (0.5.0) for drawing. The file holds pictures of 80
pixels, from which `eval.emoji.grid` draws at 64 with small changes of place, size and angle. The
card beside it, a JSON file, holds versions, hashes, licences and counts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.emoji.concepts import Concept, code_of, concepts
from eval.emoji.packages import LABELS, STYLES, Package, read_json, unpack
from eval.errors import MetricError
from eval.fetch import cache

SIDE = 80  # pixels of a stored picture
HELD_OUT = 0.05  # share of cells
COLUMNS = 40  # pictures in a row of a stored sheet
ROWS = 25  # rows in a stored sheet
Renderer = Callable[[str], Image.Image | None]


def svg_renderer(root: Path, codes: dict[str, str], side: int) -> Renderer:
    """Draws pictures of an Iconify package from their code points.

    Args:
        codes: The name of each code's icon.
    """
    try:
        from resvg_py import svg_to_bytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MetricError("resvg_py: it is missing; run: pip install 'fewstep[emoji]'") from None
    icons = read_json(root / "icons.json")

    def render(code: str) -> Image.Image | None:
        name = codes.get(code, "")
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if (icon := icons["icons"].get(name)) is None:
            return None
        size = [icon.get(k, icons.get(k, 16)) for k in ("width", "height")]
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {size[0]} {size[1]}"
        body = icon["body"].replace("currentColor", "#222")
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{size[0]}" height="{size[1]}">{body}</svg>'
        )
        png = svg_to_bytes(svg_string=svg, width=4 * side, height=4 * side)
        return Image.open(io.BytesIO(bytes(png)))

    return render


def file_renderer(root: Path) -> Renderer:
    """Reads the pictures of a package of image files, named by code points."""
    files = {code_of(path.stem): path for path in (root / "assets").iterdir()}
    return lambda code: Image.open(files[code]) if code in files else None


def on_white(picture: Image.Image, side: int) -> np.ndarray:
    """uint8 (side, side, 3): the picture on white, resized with antialiasing."""
    picture = picture.convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    return np.asarray(page.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))


def render_all(folder: Path, kept: list[Concept]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """All pictures (N, SIDE, SIDE, 3), with their pairs (concept, style)."""
    roots = {style: unpack(package, folder) for style, package in STYLES.items()}
    codes = {
        style: {code_of(code): name for code, name in read_json(root / "chars.json").items()}
        for style, root in roots.items()
        if (root / "chars.json").exists()
    }
    codes["blob"] = codes["noto"]  # version 1 uses the same names
    pictures, cells = [], []
    for j, (style, root) in enumerate(roots.items()):
        render = file_renderer(root) if style == "3d" else svg_renderer(root, codes[style], SIDE)
        for i, concept in enumerate(kept):
            picture = render(concept.code)
            if picture is not None:
                pictures.append(on_white(picture, SIDE))
                cells.append((i, j))
    return np.stack(pictures), cells


def distinct(pictures: np.ndarray) -> list[int]:
    """The indices of pictures that are no exact copy of an earlier picture."""
    seen: set[str] = set()
    keep = []
    for n, picture in enumerate(pictures):
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            keep.append(n)
    return keep


def split(kept: list[Concept], cells: list[tuple[int, int]]) -> np.ndarray:
    """True for each held-out cell: by the hash of its style and code, about 5 %.

    A cell is held out only if its concept stays in another style.
    """
    styles = list(STYLES)
    left = Counter(i for i, _ in cells)
    flags = np.zeros(len(cells), bool)
    order = sorted(range(len(cells)), key=lambda n: _hash(styles[cells[n][1]], kept[cells[n][0]]))
    for n in order[: round(HELD_OUT * len(cells))]:
        if left[cells[n][0]] > 1:
            left[cells[n][0]] -= 1
            flags[n] = True
    return flags


def _hash(style: str, concept: Concept) -> str:
    return hashlib.sha256(f"{style}/{concept.code}".encode()).hexdigest()


def sheets(pictures: np.ndarray) -> list[bytes]:
    """Lossless WebP sheets of pictures in rows; the last sheet ends in white."""
    per, side, parts = COLUMNS * ROWS, pictures.shape[1], []
    for start in range(0, len(pictures), per):
        page = np.full((per, side, side, 3), 255, np.uint8)
        chunk = pictures[start : start + per]
        page[: len(chunk)] = chunk
        page = page.reshape(ROWS, COLUMNS, side, side, 3).transpose(0, 2, 1, 3, 4)
        file = io.BytesIO()
        Image.fromarray(page.reshape(ROWS * side, COLUMNS * side, 3)).save(
            file, "WEBP", lossless=True, quality=100, method=4
        )
        parts.append(file.getvalue())
    return parts


def card(kept: list[Concept], cells: Any, held: np.ndarray, dropped: Counter) -> dict[str, Any]:
    """What the set is: packages with licences, counts, splits."""

    def source(package: Package) -> dict[str, str]:
        return {
            "package": package.name, "version": package.version, "sha256": package.digest,
            "licence": package.licence, "upstream": package.upstream,
        }  # fmt: skip

    styles = list(STYLES)
    return {
        "labels": source(LABELS),
        "styles": {style: source(package) for style, package in STYLES.items()},
        "concepts": len(kept),
        "pictures": len(cells),
        "pictures_of_style": dict(Counter(styles[j] for _, j in cells)),
        "concepts_in_styles": dict(sorted(Counter(Counter(i for i, _ in cells).values()).items())),
        "held_out": int(held.sum()),
        "held_out_of_style": dict(Counter(styles[j] for (_, j), h in zip(cells, held) if h)),
        "left_out": dict(dropped),
        "mirrored_concepts": sum(c.mirrors for c in kept),
    }


def build(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of the set's file, and its card. `folder` holds the packages."""
    root = unpack(LABELS, folder)
    groups = read_json(root / "meta" / "groups.json")
    kept, dropped = concepts(read_json(root / "en" / "data.json"), groups)
    pictures, cells = render_all(folder, kept)
    keep = distinct(pictures)
    dropped["exact copies of a picture"] = len(cells) - len(keep)
    pictures, cells = pictures[keep], [cells[n] for n in keep]
    used = sorted({i for i, _ in cells})
    dropped["in none of the styles"] = len(kept) - len(used)
    kept, place = [kept[i] for i in used], {i: n for n, i in enumerate(used)}
    cells = [(place[i], j) for i, j in cells]
    held = split(kept, cells)
    text = json.dumps(
        {
            "styles": list(STYLES),
            "columns": COLUMNS,
            "side": SIDE,
            "concepts": [[c.code, c.label, c.tags, c.group, c.mirrors] for c in kept],
        }
    )
    arrays = {
        "concept": np.array([i for i, _ in cells], np.int32),
        "style": np.array([j for _, j in cells], np.int32),
        "held_out": held,
        "text": np.frombuffer(text.encode(), np.uint8),
    }
    for n, sheet in enumerate(sheets(pictures)):
        arrays[f"sheet{n}"] = np.frombuffer(sheet, np.uint8)
    return arrays, card(kept, cells, held, dropped)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the emoji set.")
    parser.add_argument("file", type=Path, help="the .npz to write")
    parser.add_argument("--packages", type=Path, default=cache() / "emoji", help="their folder")
    args = parser.parse_args()
    arrays, facts = build(args.packages)
    np.savez(args.file, **arrays)  # pyright: ignore[reportArgumentType]
    text = json.dumps(facts, indent=1)
    args.file.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
