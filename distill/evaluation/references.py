"""`distill reference`: the statistics of real images that protocols compare with.

Each kind of features has a file of its own. A call that was cut off does not repeat finished files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.console import print_line, with_bar
from eval.errors import MetricError, unknown
from eval.images import files_in, is_unread
from eval.metrics.features import NamedFeatures
from eval.protocols import reference, spec
from eval.protocols.reference import Reference
from eval.protocols.spec import FeatureRequest
from teachers.errors import UserError, nearest


@dataclass(frozen=True)
class ReferenceRequest:
    """What protocols need of one set of real images.

    Args:
        name: The set's name in the protocols.
        count: The number of its images.
        protocols: The names of the protocols, in one text.
        features: What is computed from the images, once for each kind of features.
    """

    name: str
    count: int
    protocols: str
    features: Sequence[FeatureRequest]

    @property
    def side(self) -> int | None:
        """The side of the images in pixels, if a protocol takes them without a resize."""
        return next((v.side for v in self.features if v.side is not None), None)


def request_for(name: str, protocol: str | None = None) -> ReferenceRequest:
    """What one protocol, or every protocol that compares with the set, needs of it.

    Raises:
        UserError: the protocol compares with another set, or no protocol compares with this one.
        MetricError: there is no such protocol.
    """
    specs = {k: spec.spec(spec.FOLDER / f"{k}.yaml") for k in spec.names()}
    sets = {k: v.reference for k, v in specs.items() if v.reference is not None}
    sets = {k: v for k, v in sets.items() if v.name not in spec.EMBEDDED}
    if protocol is not None:
        check_protocol(protocol, name, specs, {k: v.name for k, v in sets.items()})
    if name not in (known := {v.name for v in sets.values()}):
        raise UserError(f"reference {name!r}: no protocol has it; {nearest(name, known)}")
    names = [k for k, v in sets.items() if v.name == name and protocol in (None, k)]
    features = most_demanding(v for k in names for v in specs[k].feature_requests(k))
    return ReferenceRequest(name, sets[names[0]].count, ", ".join(names), features)


def check_protocol(protocol: str, name: str, known: Iterable[str], sets: Mapping[str, str]) -> None:
    """Refuse a protocol that does not compare with the set.

    Args:
        sets: The set of each protocol that compares with one that is not embedded.

    Raises:
        UserError: it compares with another set, or with an embedded one.
        MetricError: there is no such protocol.
    """
    if protocol not in known:
        raise unknown("protocol", protocol, known)
    if protocol not in sets:
        raise UserError(f"--protocol {protocol}: it needs no statistics of files; leave it out")
    if sets[protocol] != name:
        raise UserError(
            f"--protocol {protocol}: it compares with {sets[protocol]!r}, not with {name!r}; "
            "give the one or the other"
        )


def most_demanding(requests: Iterable[FeatureRequest]) -> list[FeatureRequest]:
    """One request for each kind of features: one that needs the vectors, if there is any."""
    chosen: dict[NamedFeatures, FeatureRequest] = {}
    for request in requests:
        before = chosen.get(request.features)
        if before is None or request.vectors > before.vectors:
            chosen[request.features] = request
    return list(chosen.values())


def from_images(request: ReferenceRequest, folder: Path) -> list[Path]:
    """The files of statistics of a folder's images; computes those that are missing.

    Published moments that exist already are kept where they suffice.

    Raises:
        MetricError: the images are not those that the protocol takes, or weights are missing.
        UserError: statistics of other images exist.
    """
    name, paths = request.name, reference.image_paths(request.name, folder)
    unread = [p for p in files_in(folder) if is_unread(p)]
    ignored = f"{len(unread):,} in unsupported formats, such as {unread[0]}" if unread else ""
    if len(paths) != request.count:
        raise MetricError(
            f"reference {name}: {len(paths):,} images in {folder}; "
            f"{request.protocols} takes {request.count:,}" + f" (and {ignored})" * bool(unread)
        )
    if unread:
        print_line(f"left out: {ignored}")
    hashes = with_bar(reference.hashes(name, paths, request.side), len(paths), "reading the folder")
    content = reference.digest(folder, paths, hashes)
    files = {v.features: existing_file(request, v, content) for v in request.features}
    missing = [features for features, path in files.items() if path is None]
    for path in filter(None, files.values()):
        print_line(f"{path} exists already")
    for features in missing:  # missing weights are an error before the long computation
        features(next(reference.chunks(name, paths[:1])))
    for features in missing:
        chunks = reference.chunks(name, paths)
        chunks = with_bar(chunks, len(paths), f"features by {features.rule}", len)
        path = reference.path_of(name, features, None, content)
        reference.measure(name, chunks, features, content).save(path)
        files[features] = path
    return [path for path in files.values() if path is not None]


def existing_file(request: ReferenceRequest, need: FeatureRequest, content: str) -> Path | None:
    """The file that serves a request already; None if it is to be computed.

    Args:
        content: The hash of the images.

    Raises:
        UserError: a file of other images exists.
    """
    exact = reference.path_of(request.name, need.features, None, content)
    for path in reference.files_of(request.name, need.features):
        try:
            known = Reference.load(path, need.features)
        except MetricError:  # damaged, or by an older rule
            known = None
        if known is None and path == exact:
            return None
        published = known is not None and not len(known.features)
        if path == exact or (published and not need.vectors):
            return path
        raise UserError(f"reference {request.name}: {path} is of other images; delete it first")
    return None


def from_moments(
    request: ReferenceRequest, file: Path, features: str | None
) -> tuple[Path, list[FeatureRequest]]:
    """The file of statistics of published moments, and the requests that still need the images.

    Args:
        features: The name of the moments' features; None where their length determines it.

    Raises:
        MetricError: the file holds no moments, or not of these features.
        UserError: the features are ambiguous, or a metric needs the feature vectors.
    """
    need = request_of_moments(request, file, features)
    if need.vectors:
        raise UserError(
            f"{file}: {need.metric} needs the features of the images, and these are moments alone; "
            "give the folder of images"
        )
    statistics = reference.published(request.name, file, need.features, request.count)
    path = reference.path_of(request.name, need.features, None, statistics.content)
    others = [p for p in reference.files_of(request.name, need.features) if p != path]
    if others:
        raise UserError(f"reference {request.name}: {others[0]} exists already; delete it first")
    statistics.save(path)
    rest = [v for v in request.features if v is not need]
    return path, [v for v in rest if not reference.files_of(request.name, v.features)]


def request_of_moments(
    request: ReferenceRequest, file: Path, features: str | None
) -> FeatureRequest:
    """The request that moments in a file serve: by the name of its features, or by their number.

    Raises:
        MetricError: the file holds no moments.
        UserError: there are no such features, none of this number, or several.
    """
    length = len(reference.moments_of(file)[0])
    by_name = {v.features.name: v for v in request.features}
    if features is not None:
        if features not in by_name:
            raise UserError(f"--features {features!r}: {nearest(features, by_name)}")
        return by_name[features]
    names = [k for k, v in by_name.items() if v.features.dim == length]
    if len(names) > 1:
        raise UserError(
            f"--features: missing; {file} may be of {' or '.join(names)}; name one of them"
        )
    if not names:
        dims = ", ".join(f"{k} of {v.features.dim}" for k, v in by_name.items())
        raise UserError(
            f"{file}: mu holds {length} numbers; give moments that {request.protocols} takes: "
            f"{dims}"
        )
    return by_name[names[0]]
