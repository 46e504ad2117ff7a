"""`distill reference`: the statistics of real pictures that protocols compare with.

Each kind of features is a file of its own, so what was made before a stop is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.console import print_line, with_bar
from eval.errors import MetricError, unknown
from eval.images import files_in, is_unread
from eval.protocols import reference, spec
from eval.protocols.reference import Reference
from eval.protocols.spec import Need
from teachers.errors import UserError, nearest


@dataclass(frozen=True)
class ReferenceRequest:
    """What protocols ask for of one set of real pictures.

    Args:
        name: Theirs for the set.
        count: Of its pictures.
        protocols: Their names, in words.
    """

    name: str
    count: int
    protocols: str
    needs: Sequence[Need]

    @property
    def side(self) -> int | None:
        """Of the pictures in pixels, where some protocol takes them as they are."""
        return next((n.side for n in self.needs if n.side is not None), None)


def wanted(name: str, protocol: str | None = None) -> ReferenceRequest:
    """What a protocol, or else every one that compares with the set, asks for.

    Raises:
        UserError: the protocol compares with something else, or none does with this.
        MetricError: there is no such protocol.
    """
    specs = {k: spec.spec(spec.FOLDER / f"{k}.yaml") for k in spec.names()}
    if protocol is not None and protocol not in specs:
        raise unknown("protocol", protocol, specs)
    of_files = {
        k: v.reference
        for k, v in specs.items()
        if v.reference is not None and v.reference.name not in spec.EMBEDDED
    }
    if protocol is not None and protocol not in of_files:
        raise UserError(f"--protocol {protocol}: its reference comes with it; none is to be made")
    if protocol is not None and of_files[protocol].name != name:
        theirs = of_files[protocol].name
        raise UserError(f"--protocol {protocol}: it compares with {theirs!r}, not with {name!r}")
    if name not in (known := {v.name for v in of_files.values()}):
        raise UserError(f"reference {name!r}: no protocol's; {nearest(name, known)}")
    takers = [k for k, v in of_files.items() if v.name == name and protocol in (None, k)]
    needs: dict[object, Need] = {}
    for need in (n for k in takers for n in specs[k].needs(k)):
        if need.features not in needs or need.vectors > needs[need.features].vectors:
            needs[need.features] = need
    count = of_files[takers[0]].count
    return ReferenceRequest(name, count, ", ".join(takers), list(needs.values()))


def from_pictures(asked: ReferenceRequest, folder: Path) -> list[Path]:
    """The files of statistics of a folder's pictures, made where they are not there yet.

    Published moments that are there already are left, where they are enough.

    Raises:
        MetricError: the pictures are not those that the protocol takes, or weights are missing.
        UserError: statistics of other pictures are there.
    """
    name, paths = asked.name, reference.listed(asked.name, folder)
    unread = [p for p in files_in(folder) if is_unread(p)]
    beside = f"{len(unread):,} of a format that is not read, such as {unread[0]}" if unread else ""
    if len(paths) != asked.count:
        raise MetricError(
            f"reference {name}: {len(paths):,} pictures in {folder}; "
            f"{asked.protocols} takes {asked.count:,}" + f" (and {beside})" * bool(unread)
        )
    if unread:
        print_line(f"left out: {beside}")
    looked = with_bar(reference.hashes(name, paths, asked.side), len(paths), "reading the folder")
    content = reference.digest(folder, paths, looked)
    found = {need.features: there(asked, need, content) for need in asked.needs}
    lacking = [features for features, path in found.items() if path is None]
    for path in filter(None, found.values()):
        print_line(f"{path} is there already")
    for features in lacking:  # weights that are not to be had are said before the long work
        features(next(reference.chunks(name, paths[:1])))
    for features in lacking:
        chunks = reference.chunks(name, paths)
        watched = with_bar(chunks, len(paths), f"features by {features.rule}", len)
        path = reference.place(name, features, None, content)
        reference.measure(name, watched, features, content).save(path)
        found[features] = path
    return [path for path in found.values() if path is not None]


def there(asked: ReferenceRequest, need: Need, content: str) -> Path | None:
    """The file that serves a need already; None if there is none, or it is to be made anew.

    Args:
        content: Of the pictures.

    Raises:
        UserError: one is there, of other pictures.
    """
    own = reference.place(asked.name, need.features, None, content)
    for path in reference.kept(asked.name, need.features):
        try:
            known = Reference.load(path, need.features)
        except MetricError:  # damaged, or by an older rule
            known = None
        if known is None and path == own:
            return None
        published = known is not None and not len(known.features)
        if path == own or (published and not need.vectors):
            return path
        raise UserError(f"reference {asked.name}: {path} is not of these pictures; delete it first")
    return None


def from_moments(
    asked: ReferenceRequest, file: Path, features: str | None
) -> tuple[Path, list[Need]]:
    """The file of statistics of published moments, and what they leave to be made of pictures.

    Args:
        features: Which of the protocol's they are of; None where their length says it.

    Raises:
        MetricError: the file holds no moments, or not of these features.
        UserError: they may be of several, or the features themselves are needed.
    """
    length = len(reference.moments_of(file)[0])
    by_name = {need.features.name: need for need in asked.needs}
    fit = {k: v for k, v in by_name.items() if v.features.dim == length}
    if features is not None and features not in by_name:
        raise UserError(f"--features {features!r}: {nearest(features, by_name)}")
    if features is None and len(fit) > 1:
        raise UserError(f"--features: missing; {file} may be of {' or '.join(fit)}; say which")
    if features is None and not fit:
        dims = ", ".join(f"{k} of {v.features.dim}" for k, v in by_name.items())
        raise UserError(f"{file}: mu holds {length} numbers; {asked.protocols} takes {dims}")
    need = by_name[features or next(iter(fit))]
    if need.vectors:
        raise UserError(
            f"{file}: {need.metric} needs the features of pictures and not their moments alone; "
            "give the folder of pictures"
        )
    made = reference.published(asked.name, file, need.features, asked.count)
    path = reference.place(asked.name, need.features, None, made.content)
    others = [p for p in reference.kept(asked.name, need.features) if p != path]
    if others:
        raise UserError(f"reference {asked.name}: {others[0]} is there already; delete it first")
    made.save(path)
    rest = [v for v in asked.needs if v is not need]
    return path, [v for v in rest if not reference.kept(asked.name, v.features)]
