"""Write a recipe's reference curves from a few good runs with different seeds.

python benchmarks/curves.py digits/dmd2 runs/a runs/b runs/c
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from distill.config.recipe import Recipe, shipped
from distill.report.curves import REFERENCES, changes, recipe_tree, record
from teachers.errors import UserError, nearest


def main(name: str, *runs: str) -> None:
    if name not in shipped():
        raise SystemExit(f"recipe {name!r} is unknown: {nearest(name, shipped())}")
    try:
        tree = record([Path(run) for run in runs], name)
        if key := next(changes(Recipe.load(name).tree(), recipe_tree(Path(runs[0]))), None):
            raise UserError(f"{runs[0]}: {key} differs from {name}; give runs of {name}")
    except UserError as error:
        raise SystemExit(str(error)) from None
    path = REFERENCES / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
