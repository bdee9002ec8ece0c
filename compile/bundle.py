# SPDX-License-Identifier: Apache-2.0
"""Bundles: compiled graphs as plain files under a key that says what they were made from.

A manifest names the fields behind the key and, per graph, the sha256 and size of every file. Files lie in a store under
their sha256. Owns the manifest, keys and how two of them differ; stores and transfers are other files' business.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from compile.errors import BundleError
from compile.store import file_sha256

FORMAT = "neuron-paged bundle 1"
MAX_MANIFEST_BYTES = 64 * 2**20
Fields = Mapping[str, Any]  # plain values only: str, int, bool, None, lists and mappings of them


def canonical_json(value: Any) -> bytes:
    """One encoding per value: keys sorted, no spaces. TypeError for what JSON lacks, ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """sha256 of the canonical encoding, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def graph_key(fields: Fields, bucket: str) -> str:
    """Key of one graph: equal inputs, equal keys, on any machine."""
    return digest({"fields": fields, "bucket": bucket})


def bundle_key(fields: Fields, buckets: Iterable[str]) -> str:
    """Key of a bundle of these graphs; the order of the buckets does not matter."""
    return digest({"fields": fields, "buckets": sorted(set(buckets))})


@dataclass(frozen=True)
class FileRef:
    """A file by its content."""

    sha256: str
    num_bytes: int

    @property
    def blob(self) -> str:
        """Its name in a store."""
        return f"blobs/{self.sha256}"

    @classmethod
    def of(cls, content: bytes) -> "FileRef":
        return cls(hashlib.sha256(content).hexdigest(), len(content))

    def check(self, content: bytes, what: str) -> bytes:
        """The content. BundleError if it is not this file's; `what` names it."""
        got = hashlib.sha256(content).hexdigest()
        if len(content) != self.num_bytes:
            found = f"got {len(content)} bytes, need {self.num_bytes}; it is truncated or foreign"
        elif got != self.sha256:
            found = f"got sha256 {got[:16]}…, need {self.sha256[:16]}…; it is damaged"
        else:
            return content
        raise BundleError(f"{what}: {found}: compile it again or restore it.")

    def check_file(self, path: Path, what: str) -> None:
        """check() for a file too large to hold in memory."""
        if path.stat().st_size != self.num_bytes:
            raise BundleError(f"{what}: got {path.stat().st_size} bytes, need {self.num_bytes}; it is truncated.")
        if file_sha256(path) != self.sha256:
            raise BundleError(f"{what}: its contents do not have the sha256 {self.sha256[:16]}…; it is damaged.")


@dataclass(frozen=True)
class Graph:
    """One graph's files: relative path → FileRef. bucket: its name."""

    bucket: str
    files: Mapping[str, FileRef]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {path: {"sha256": ref.sha256, "bytes": ref.num_bytes} for path, ref in self.files.items()}

    @classmethod
    def from_json(cls, bucket: str, values: Mapping[str, Any]) -> "Graph":
        """The inverse of to_json; BundleError for paths that leave the graph's folder and for wrong types."""
        files = {}
        for path, entry in values.items():
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path or "\\" in path:
                raise BundleError(f"bundle: got file name {path!r}, need a relative path without '..'.")
            files[path] = FileRef(str(entry["sha256"]), int(entry["bytes"]))
            if not is_sha256(files[path].sha256) or files[path].num_bytes < 0:
                raise BundleError(f"bundle: file {path} has no valid sha256 and size.")
        return cls(bucket, files)


@dataclass(frozen=True)
class Bundle:
    """A manifest. fields: what everything was made from. Not part of the key: built (when and by what) and costs_us
    (modelled time of a step by bucket, µs, where it is known)."""

    fields: Fields
    graphs: Mapping[str, Graph]
    built: Mapping[str, str] = field(default_factory=dict)
    costs_us: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of the bundle."""
        return bundle_key(self.fields, self.graphs)

    @property
    def files(self) -> dict[str, FileRef]:
        """Every blob once, by its name in a store."""
        return {ref.blob: ref for graph in self.graphs.values() for ref in graph.files.values()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(ref.num_bytes for ref in self.files.values())

    def to_bytes(self) -> bytes:
        """The manifest file, with the digest of everything it says."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "fields": self.fields,
            "graphs": {bucket: graph.to_json() for bucket, graph in sorted(self.graphs.items())},
            "built": dict(self.built),
        }
        if self.costs_us:
            values["costs_us"] = dict(self.costs_us)
        return json.dumps({**values, "sha256": digest(values)}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, content: bytes, what: str) -> "Bundle":
        """The inverse of to_bytes. BundleError if it is foreign, damaged or of another format; `what` names it."""
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{what}: not a bundle's manifest (no JSON); it is damaged or foreign.") from error
        if not isinstance(values, dict) or not str(values.get("format", "")).startswith("neuron-paged bundle"):
            raise BundleError(f"{what}: not a bundle's manifest; need one that `neuron-paged compile` wrote.")
        if values["format"] != FORMAT:
            raise BundleError(f"{what}: got format {values['format']!r}, need {FORMAT!r}; compile again.")
        stated = values.pop("sha256", None)
        try:
            intact = stated == digest(values)
        except (ValueError, RecursionError):  # NaN, a lone surrogate, too deep: nothing that to_bytes wrote
            intact = False
        if not intact:
            raise BundleError(f"{what}: the manifest does not have the digest it states; it is damaged.")
        try:
            graphs = {bucket: Graph.from_json(bucket, graph) for bucket, graph in values["graphs"].items()}
            fields, built = values["fields"], values["built"]
            costs_us = {bucket: float(cost) for bucket, cost in values.get("costs_us", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{what}: the manifest lacks a part ({error}); it is foreign.") from error
        for name, value in (("fields", fields), ("built", built)):
            if not isinstance(value, dict):
                raise BundleError(f"{what}: {name} is {type(value).__name__}, need an object; it is foreign.")
        refs = {ref for graph in graphs.values() for ref in graph.files.values()}
        if len({ref.sha256 for ref in refs}) != len(refs):
            raise BundleError(f"{what}: the manifest gives one file two sizes; it is foreign.")
        return cls(fields, graphs, built, costs_us)


def is_sha256(text: str) -> bool:
    """Whether it is a sha256 in lower-case hexadecimal."""
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def flatten(fields: Fields, prefix: str = "") -> dict[str, Any]:
    """Nested fields as one level: {"model.num_layers": 30}; lists stay whole."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def differences(there: Fields, here: Fields, *, partial: bool = False) -> list[str]:
    """One line "name: there → here" per field that differs. partial: fields that `here` lacks don't count."""
    left, right = flatten(there), flatten(here)
    names = sorted(right if partial else left.keys() | right.keys())
    return [
        f"{name}: {_shown(left, name)} → {_shown(right, name)}" for name in names if left.get(name) != right.get(name)
    ]


def _shown(flat: Mapping[str, Any], name: str) -> str:
    if name not in flat:
        return "absent"
    value = flat[name]
    if isinstance(value, str) and is_sha256(value):
        return value[:12] + "…"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def needed(bundle: Bundle, wanted: Fields, buckets: Iterable[str]) -> dict[str, Any]:
    """Fields of `wanted` that a bundle has otherwise, flat, and under "buckets" the names that it lacks."""
    there, missing = flatten(bundle.fields), sorted(set(buckets) - set(bundle.graphs))
    found = {name: value for name, value in flatten(wanted).items() if there.get(name) != value}
    return found | ({"buckets": missing} if missing else {})


def misses(bundle: Bundle, wanted: Fields, buckets: Iterable[str]) -> list[str]:
    """Why a bundle does not serve: fields of `wanted` that differ, and buckets it lacks (one line). [] if it does."""
    lines = differences(bundle.fields, wanted, partial=True)
    missing = sorted(set(buckets) - set(bundle.graphs))
    if missing:
        named = ", ".join(missing[:4]) + (f", … ({len(missing)} in all)" if len(missing) > 4 else "")
        lines.append(f"buckets: no {named}")
    return lines
