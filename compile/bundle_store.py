# SPDX-License-Identifier: Apache-2.0
"""Bundles in stores: publish, find, read, copy and verify them. Nothing is visible before it is complete: files first,
then the graph's entry, the bundle's manifest last.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from compile.bundle import (
    MAX_MANIFEST_BYTES,
    Bundle,
    Fields,
    FileRef,
    Graph,
    bundle_key,
    digest,
    graph_key,
    misses,
    needed,
)
from compile.errors import BundleError, BundleMissError
from compile.store import LocalStore, ObjectMissingError, Store, file_sha256, remove_temporary, temporary_folder

# What builds a bundle, for messages.
BUILD_COMMAND = "neuron-paged compile --model … --target … --store …"
Progress = Callable[[str], None]


def _manifest_name(key: str) -> str:
    return f"bundles/{key}.json"


def read_manifest(store: Store, name: str) -> Bundle:
    """The manifest at bundles/KEY.json. BundleError if it is damaged, foreign or under another name."""
    what = f"{store.location}: {name}"
    num_bytes = store.size(name)
    if num_bytes is None:
        raise BundleError(f"{what}: no such bundle.")
    if num_bytes > MAX_MANIFEST_BYTES:
        raise BundleError(f"{what}: got a manifest of {num_bytes} bytes, need at most {MAX_MANIFEST_BYTES}.")
    bundle = Bundle.from_bytes(store.read(name), what)
    if _manifest_name(bundle.key) != name:
        raise BundleError(f"{what}: its fields have the key {bundle.key[:12]}…; the manifest was changed or renamed.")
    return bundle


def list_bundles(store: Store) -> tuple[list[Bundle], list[str]]:
    """All bundles, and one line per manifest that can't be read."""
    bundles, problems = [], []
    for name in store.names("bundles"):
        try:
            bundles.append(read_manifest(store, name))
        except BundleError as error:
            problems.append(str(error))
    return bundles, problems


def pick_bundle(store: Store, prefix: str | None) -> Bundle:
    """The bundle whose key starts with prefix; None: the only one. BundleError if none or several match."""
    if prefix is not None and (not prefix or not all(c in "0123456789abcdef" for c in prefix) or len(prefix) > 64):
        raise BundleError(f"bundle: got {prefix!r}, need the start of a key as `bundle ls` shows it.")
    names = [name for name in store.names("bundles") if name.startswith(_manifest_name(prefix or "")[:-5])]
    if not names:
        raise BundleError(
            f"{store.location}: no bundle{f' {prefix}' if prefix else ''}; `bundle ls` shows what is there."
        )
    if len(names) > 1:
        keys = ", ".join(Path(name).stem[:12] for name in names[:5])
        raise BundleError(
            f"{store.location}: got {len(names)} bundles ({keys}, …), need one; name the start of its key."
        )
    return read_manifest(store, names[0])


def find_bundle(store: Store, wanted: Fields, buckets: Iterable[str] = ()) -> Bundle:
    """A bundle with all fields of `wanted` and all buckets; more buckets are fine, the smallest such bundle is taken.

    Raises BundleMissError, which names the nearest bundle and what differs; BundleError if several bundles differ in
    fields that `wanted` leaves open.
    """
    names = sorted(buckets)
    exact = _manifest_name(bundle_key(wanted, names))
    if store.size(exact) is not None:
        return read_manifest(store, exact)
    bundles, problems = list_bundles(store)
    found = [bundle for bundle in bundles if not misses(bundle, wanted, names)]
    if found:
        open_fields = {digest(bundle.fields) for bundle in found}
        if len(open_fields) > 1:
            raise BundleError(
                f"{store.location}: {len(found)} bundles fit (such as {found[0].key[:12]} and {found[1].key[:12]}); "
                "name more settings, such as dtype or num_blocks."
            )
        return min(found, key=lambda bundle: (len(bundle.graphs), bundle.key))
    damaged = f" ({len(problems)} unreadable: {problems[0]})" if problems else ""
    if not bundles:
        raise BundleMissError(f"{store.location}: no bundle in this store{damaged}. Build it: {BUILD_COMMAND}.")
    lines, bundle = min(((misses(b, wanted, names), b) for b in bundles), key=lambda pair: (len(pair[0]), pair[1].key))
    shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
    raise BundleMissError(
        f"{store.location}: no bundle for these settings{damaged}. The nearest, {bundle.key[:12]}, differs "
        f"(there → here) in {shown}. Build it: {BUILD_COMMAND}.",
        needed(bundle, wanted, names),
    )


def require_bundles(store: Store) -> None:
    """BundleMissError if the store has no bundle at all; reads none."""
    if not store.names("bundles"):
        raise BundleMissError(f"{store.location}: no bundle in this store. Build it: {BUILD_COMMAND}.")


def read_file(store: Store, ref: FileRef, what: str) -> bytes:
    """Contents of one file, checked against its sha256."""
    try:
        return ref.check(store.read(ref.blob), f"{store.location}: {what}")
    except ObjectMissingError as error:
        raise BundleError(f"{store.location}: {what} is missing ({ref.blob[:18]}…); pull or compile again.") from error


def read_graph(store: Store, graph: Graph) -> dict[str, bytes]:
    """All files of a graph, checked."""
    return {path: read_file(store, ref, f"{graph.bucket}/{path}") for path, ref in graph.files.items()}


def publish_graph(store: Store, fields: Fields, bucket: str, files: Mapping[str, bytes]) -> Graph:
    """Write a graph's files, then its entry. If another writer was first and its files are whole, it returns theirs."""
    refs = {path: FileRef.of(content) for path, content in files.items()}
    for path, ref in refs.items():
        put_file(store, ref, files[path])
    graph, name = Graph(bucket, refs), f"graphs/{graph_key(fields, bucket)}.json"
    entry = {"bucket": bucket, "files": graph.to_json()}
    content = json.dumps({**entry, "sha256": digest(entry)}).encode()
    if not store.put_new(name, content):
        theirs = finished_graph(store, fields, bucket)
        if theirs is not None:
            return theirs
        store.replace(name, content)  # an entry whose files are damaged
    return graph


def finished_graph(store: Store, fields: Fields, bucket: str) -> Graph | None:
    """The graph if somebody compiled it and all its files are there and whole, else None."""
    name = f"graphs/{graph_key(fields, bucket)}.json"
    try:
        entry = json.loads(store.read(name))
        stated = entry.pop("sha256")
        if stated != digest(entry) or entry["bucket"] != bucket:
            return None
        graph = Graph.from_json(bucket, entry["files"])
    except (ObjectMissingError, BundleError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return graph if all(is_whole(store, ref) for ref in graph.files.values()) else None


def publish_bundle(store: Store, bundle: Bundle) -> bool:
    """Write the manifest; False if the bundle was there already, with the same costs_us if this one has any.

    BundleError unless all files are there.
    """
    for ref in bundle.files.values():
        if store.size(ref.blob) != ref.num_bytes:
            raise BundleError(f"{store.location}: {ref.blob[:18]}… is missing or truncated; run again.")
    name = _manifest_name(bundle.key)
    if store.put_new(name, bundle.to_bytes()):
        return True
    try:
        there = read_manifest(store, name)
        same = not bundle.costs_us or there.costs_us == bundle.costs_us
        if same and all(is_whole(store, ref) for ref in there.files.values()):
            return False
    except BundleError:
        pass
    store.replace(name, bundle.to_bytes())
    return True


def copy_bundle(source: Store, target: Store, bundle: Bundle, progress: Progress = lambda line: None) -> bool:
    """Copy a bundle's files, then its manifest; what the target has already is kept. False if nothing was to be done.

    Interrupted at any point, the target shows nothing new, and the next call goes on where this one stopped.
    Raises BundleError if a file of the source is missing or damaged, StoreError.
    """
    with temporary_folder("bundle") as folder:
        scratch = target.scratch() if isinstance(target, LocalStore) else folder
        todo = [ref for ref in bundle.files.values() if not is_whole(target, ref)]
        for number, ref in enumerate(todo, 1):
            progress(f"file {number} of {len(todo)}, {ref.num_bytes} bytes")
            path = _checked_path(source, ref, scratch)
            try:
                put_file(target, ref, path)
            finally:
                if path.parent == scratch:
                    remove_temporary(path)
    return publish_bundle(target, bundle) or bool(todo)


def _checked_path(store: Store, ref: FileRef, scratch: Path) -> Path:
    """A file with the checked contents; one that came damaged is fetched a second time."""
    for attempt in (1, 2):
        try:
            path = store.local_path(ref.blob, scratch)
        except ObjectMissingError as error:
            raise BundleError(
                f"{store.location}: {ref.blob[:18]}… is missing; the bundle there is incomplete."
            ) from error
        if path.stat().st_size == ref.num_bytes and file_sha256(path) == ref.sha256:
            return path
        if path.parent == scratch:
            remove_temporary(path)
        elif attempt == 1:
            break
    raise BundleError(f"{store.location}: {ref.blob[:18]}… is damaged; compile it again or restore it.")


def put_file(store: Store, ref: FileRef, content: bytes | Path) -> None:
    """Write a file with the contents of `ref`, unless the store has it whole."""
    if not store.put_new(ref.blob, content) and not is_whole(store, ref):
        store.replace(ref.blob, content)


def is_whole(store: Store, ref: FileRef) -> bool:
    """Whether the store has the file. Only an object whose sha256 the store does not know is transferred for it."""
    if store.size(ref.blob) != ref.num_bytes:
        return False
    try:
        known = store.sha256(ref.blob)
        if known is not None:
            return known == ref.sha256
        with temporary_folder("whole") as folder:
            return file_sha256(store.local_path(ref.blob, folder)) == ref.sha256
    except ObjectMissingError:
        return False


def verify_bundle(store: Store, bundle: Bundle) -> list[str]:
    """Read every file; one line per file that is missing or damaged."""
    problems = []
    with temporary_folder("verify") as folder:
        for graph in bundle.graphs.values():
            for path, ref in graph.files.items():
                try:
                    copy = _checked_path(store, ref, folder)
                    if copy.parent == folder:
                        remove_temporary(copy)
                except BundleError as error:
                    problems.append(f"{graph.bucket}/{path}: {error}")
    return problems
