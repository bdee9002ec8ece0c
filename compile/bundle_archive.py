# SPDX-License-Identifier: Apache-2.0
"""A bundle as one tar file (plain or .gz): its manifest first, then exactly the files that it names.

Import trusts nothing: the manifest bounds every name and size, links and foreign names are refused, each file is
checked against its sha256, and the manifest is published last.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from compile.bundle import MAX_MANIFEST_BYTES, Bundle, FileRef
from compile.bundle_store import publish_bundle, put_file, read_file
from compile.errors import BundleError, StoreError
from compile.store import Store, file_errors, open_store, remove_temporary, temporary_folder

# NEFFs are tens to hundreds of MB and a bundle has some dozens; whoever has more says so.
DEFAULT_MAX_BYTES = 64 * 2**30
_CHUNK_BYTES = 2**20


def export_bundle(store: Store, bundle: Bundle, target: Path) -> None:
    """Write the bundle to a .tar or .tar.gz file, which appears whole or not at all; equal bundles, equal .tar files.

    Raises BundleError if a file of the store is missing or damaged, StoreError.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with tarfile.open(temporary, "w:gz" if _is_gzip(target) else "w") as archive:
            _add(archive, f"bundles/{bundle.key}.json", bundle.to_bytes())
            for name, ref in sorted(bundle.files.items()):
                _add(archive, name, read_file(store, ref, f"{name[:18]}…"))
        os.replace(temporary, target)
    except OSError as error:
        raise StoreError(f"{target}: can't be written: {error.strerror or error}.") from error
    finally:
        remove_temporary(temporary)


def _is_gzip(target: Path) -> bool:
    return target.name.endswith((".tar.gz", ".tgz"))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # owner, time and mode stay at fixed values
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def import_bundle(location: str | Path, source: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Bundle:
    """Publish the bundle of an archive in the store at a folder or s3:// location, which is made if it is not there.

    The archive is read twice: nothing is written before all of it is known to be good. max_bytes: of all its files,
    unpacked. Raises BundleError for anything but an intact bundle, StoreError.
    """
    with temporary_folder("import") as scratch:
        file = scratch / "file"
        _read_archive(source, file, max_bytes, lambda ref: None)
        store = open_store(location, create=True)
        bundle = _read_archive(source, file, max_bytes, lambda ref: put_file(store, ref, file))
    publish_bundle(store, bundle)
    return bundle


def _read_archive(source: Path, scratch: Path, max_bytes: int, take: Callable[[FileRef], None]) -> Bundle:
    """take: called for each file when its checked contents are in `scratch`."""
    with _opened(source) as archive:
        first = archive.next()
        if first is None or not first.name.startswith("bundles/") or not first.isreg():
            raise BundleError(f"{source}: the first member is no bundle's manifest; need a file of `bundle export`.")
        if first.size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{source}: got a manifest of {first.size} bytes, need at most {MAX_MANIFEST_BYTES}.")
        bundle = Bundle.from_bytes(_member(archive, first).read(), f"{source}: {first.name}")
        if first.name != f"bundles/{bundle.key}.json":
            raise BundleError(f"{source}: {first.name} does not have the key of its fields; it was changed.")
        if bundle.num_bytes > max_bytes:
            raise BundleError(f"{source}: unpacks to {bundle.num_bytes} bytes, need at most {max_bytes} (--max-size).")
        missing = bundle.files
        while (member := archive.next()) is not None:
            ref = missing.pop(member.name, None)
            if ref is None or not member.isreg():
                raise BundleError(f"{source}: {member.name!r} is not a file that the manifest names; refused.")
            if member.size != ref.num_bytes:
                raise BundleError(f"{source}: {member.name[:18]}… has {member.size} bytes, need {ref.num_bytes}.")
            _copy(_member(archive, member), scratch)
            ref.check_file(scratch, f"{source}: {ref.blob[:18]}…")
            take(ref)
        if missing:
            raise BundleError(f"{source}: lacks {len(missing)} files, such as {min(missing)[:18]}…; copy it again.")
    return bundle


def _copy(member: IO[bytes], scratch: Path) -> None:
    with scratch.open("wb") as file:
        while chunk := member.read(_CHUNK_BYTES):
            with file_errors(f"folder {scratch.parent}"):
                file.write(chunk)
                file.flush()


@contextmanager
def _opened(source: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(source, "r|*") as archive:  # a stream: members are read in order, none is unpacked ahead
            yield archive
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise BundleError(f"{source}: no such file.") from error
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{source}: can't be read as a tar file ({reason}); copy it again.") from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file is not None, "regular members have contents"
    return file
