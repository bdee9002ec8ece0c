# SPDX-License-Identifier: Apache-2.0
"""Stores: named objects that appear whole or not at all, in a local folder or under s3://.

An object is written once: many writers may race for a name and exactly one wins. Owns the local folder; s3_store.py
owns S3.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from compile.errors import StoreError

# bundles: manifests, each written after its files. graphs: finished graphs, for whoever resumes. blobs: files by
# sha256. claims: who compiles what now.
_NAME = re.compile(r"(bundles|graphs)/[0-9a-f]{64}\.json|blobs/[0-9a-f]{64}|claims/[0-9a-f]{64}\.\d+\.json")
_ABANDONED_S = 24 * 3600.0
_CHUNK_BYTES = 2**20


class ObjectMissingError(StoreError):
    """The store has no such object."""


class Store(Protocol):
    """Named objects. Every method raises StoreError if the store can't be reached, read or written."""

    @property
    def location(self) -> str:
        """For messages: the folder, or s3://bucket/prefix."""
        ...

    def read(self, name: str) -> bytes:
        """Contents. Raises ObjectMissingError."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes, None if there is no such object."""
        ...

    def sha256(self, name: str) -> str | None:
        """Of the contents, in hexadecimal, from what the store knows without a transfer; None if it does not.

        Raises ObjectMissingError.
        """
        ...

    def names(self, folder: str) -> list[str]:
        """All names below "bundles", "graphs", "blobs" or "claims", sorted."""
        ...

    def local_path(self, name: str, scratch: Path) -> Path:
        """A file with the contents: the store's own, or a copy in `scratch` that is continued if it was begun."""
        ...

    def put_new(self, name: str, content: bytes | Path) -> bool:
        """Write unless it exists; False if it does, whoever wrote it."""
        ...

    def replace(self, name: str, content: bytes | Path) -> None:
        """Write, whether or not it exists."""
        ...

    def delete(self, name: str) -> None:
        """Remove it if it exists."""
        ...


def check_name(name: str) -> str:
    """The name. ValueError unless it is one that stores use."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"store: got object name {name!r}, need bundles/…, graphs/…, blobs/… or claims/….")
    return name


def file_sha256(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def open_store(location: str | Path, *, create: bool = False) -> Store:
    """The store at a folder or s3://bucket[/prefix]. create: make the folder if it is not there.

    Raises StoreError, MissingPackageError (s3:// without boto3).
    """
    if str(location).startswith("s3://"):
        from compile.s3_store import S3Store

        return S3Store(str(location))
    path = _local_folder(location)
    if not path.is_dir():
        if not create:
            raise StoreError(f"store: no folder {path}; name one that `neuron-paged compile` or `bundle pull` made.")
        try:
            with file_errors(f"store {path}"):
                path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # below /proc, say
            raise StoreError(f"store: {path} can't be made; choose another folder.") from None
    return LocalStore(path)


def check_target(location: str | Path) -> None:
    """StoreError if a store is not there and can't be made, or S3 does not answer; makes nothing. See open_store."""
    if str(location).startswith("s3://"):
        open_store(location).names("claims")
        return
    path = _local_folder(location)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(f"store {path}: can't write to {there}; choose another folder.")


def _local_folder(location: str | Path) -> Path:
    text = str(location)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # with one slash it is a slip, and would make a folder "s3:"
        raise StoreError(f"store: got {text!r}, need a folder or s3://bucket/prefix.")
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise StoreError(f"store: {path} is not a folder, need one or s3://bucket/prefix.")
    return path


class LocalStore:
    """A folder; may be read-only for readers. Works on network file systems that rename atomically."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def location(self) -> str:
        return str(self._folder)

    def read(self, name: str) -> bytes:
        try:
            with file_errors(f"store {self.location}: {name}"):
                return (self._folder / check_name(name)).read_bytes()
        except FileNotFoundError:
            raise ObjectMissingError(f"store {self.location}: no {name}.") from None

    def size(self, name: str) -> int | None:
        try:
            with file_errors(f"store {self.location}: {name}"):
                return (self._folder / check_name(name)).stat().st_size
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str | None:
        try:
            with file_errors(f"store {self.location}: {name}"):
                return file_sha256(self._folder / check_name(name))
        except FileNotFoundError:
            raise ObjectMissingError(f"store {self.location}: no {name}.") from None

    def names(self, folder: str) -> list[str]:
        try:
            with file_errors(f"store {self.location}"):
                found = [f"{folder}/{entry.name}" for entry in os.scandir(self._folder / folder)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if _NAME.fullmatch(name))

    def local_path(self, name: str, scratch: Path) -> Path:
        path = self._folder / check_name(name)
        if not path.is_file():
            raise ObjectMissingError(f"store {self.location}: no {name}.")
        return path

    def put_new(self, name: str, content: bytes | Path) -> bool:
        return self._put(name, content, _publish_new)

    def replace(self, name: str, content: bytes | Path) -> None:
        self._put(name, content, _publish_over)

    def delete(self, name: str) -> None:
        with file_errors(f"store {self.location}: {name}"):
            (self._folder / check_name(name)).unlink(missing_ok=True)

    def scratch(self) -> Path:
        """Folder for unfinished files, on the store's own file system; what was abandoned a day ago is removed."""
        folder = self._folder / "tmp"
        with file_errors(f"store {self.location}"):
            folder.mkdir(parents=True, exist_ok=True)
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):
                    if entry.is_file() and time.time() - entry.stat().st_mtime > _ABANDONED_S:
                        os.unlink(entry.path)
        return folder

    def _put(self, name: str, content: bytes | Path, publish: Callable[[Path, Path], bool]) -> bool:
        target = self._folder / check_name(name)
        if publish is _publish_new and target.exists():
            return False
        scratch = self.scratch()
        temporary = scratch / f"{os.getpid()}-{time.monotonic_ns()}"
        with file_errors(f"store {self.location}: {name}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    _write(file, content)
                    file.flush()
                    os.fsync(file.fileno())
                published = publish(temporary, target)
            finally:
                remove_temporary(temporary)
            _sync_folder(target.parent)
        return published


def _write(file: BinaryIO, content: bytes | Path) -> None:
    if isinstance(content, bytes):
        file.write(content)
        return
    with content.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            file.write(chunk)


def _publish_new(temporary: Path, target: Path) -> bool:
    try:
        os.link(temporary, target)
        return True
    except FileExistsError:  # NFS says so too of a link that it made when the first answer got lost
        return temporary.stat().st_nlink > 1
    except OSError as error:  # a file system without hard links: the last of racing writers wins, each one whole
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if target.exists():
            return False
        os.rename(temporary, target)
        return True


def _publish_over(temporary: Path, target: Path) -> bool:
    os.replace(temporary, target)
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems can't
        pass
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BinaryIO | None]:
    """The file opened for reading and appending, held by this process alone; None if another process holds it, or held
    it until now and moved it away."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError:
            is_ours = False
        yield file if is_ours else None


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """An empty folder outside any store, removed afterwards. StoreError if there is no place for one."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f"neuron-paged-{purpose}-")
    except OSError as error:
        raise StoreError(
            f"temporary folder: none can be made ({error.strerror}); set TMPDIR to a folder that can be written."
        ) from error
    with folder as name:
        yield Path(name)


def remove_temporary(path: Path) -> None:
    """Remove a file if it is there. Silent, for use in `finally`: the error that led there says more."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def file_errors(what: str) -> Iterator[None]:
    """Errors of the file system as StoreError with what to do, except for files that are not there."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        advice = {
            errno.ENOSPC: "no space left; free some and run again, finished parts are kept",
            errno.EDQUOT: "the disk quota is used up; free some space and run again",
            errno.EFBIG: "the file would outgrow this process's limit; raise `ulimit -f` and run again",
            errno.EROFS: "the file system is read-only; choose another folder to write to",
            errno.EACCES: "permission denied; choose another folder or change its mode",
        }.get(error.errno or 0, error.strerror or str(error))
        raise StoreError(f"{what}: {advice}.") from error
