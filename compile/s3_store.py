# SPDX-License-Identifier: Apache-2.0
"""S3Store: a store under s3://bucket/prefix. Conditional puts decide races; large objects go up in parts that a later
run continues, and come down by ranges. Needs boto3; endpoint, region and credentials are boto3's own settings.
"""

import base64
import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compile.errors import MissingPackageError, StoreError
from compile.store import ObjectMissingError, check_name, file_errors, file_sha256, locked

PART_BYTES = 16 * 2**20  # S3 takes parts of 5 MiB to 5 GiB, 10 000 at most; larger objects get larger parts
_MAX_PARTS = 10_000
_CHUNK_BYTES = 2**20
_ATTEMPTS = 8
_NOTE = "sha256"  # in an object's metadata
_LOCATION = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
_CREDENTIALS = "run `aws configure`, set AWS_PROFILE, or use an instance role"


class S3Store:
    """See compile.store.Store. location: s3://bucket[/prefix]."""

    def __init__(self, location: str, *, part_bytes: int = PART_BYTES) -> None:
        found = _LOCATION.fullmatch(location)
        if found is None:
            raise StoreError(f"store: got {location!r}, need s3://bucket or s3://bucket/prefix.")
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            raise MissingPackageError(
                f"store {location}: boto3 can't be imported ({error}). Install it: pip install 'neuron-paged[aws]'."
            ) from error
        self._bucket, self._prefix = found[1], (found[2] or "").strip("/")
        self._part_bytes = part_bytes
        retries: Any = {"mode": "standard", "max_attempts": _ATTEMPTS}
        try:
            config = Config(retries=retries, connect_timeout=10, read_timeout=60)
            self._s3 = boto3.session.Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise StoreError(f"store {location}: {error}") from error

    @property
    def location(self) -> str:
        return f"s3://{self._bucket}" + (f"/{self._prefix}" if self._prefix else "")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{check_name(name)}" if self._prefix else check_name(name)

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(name)}

    def read(self, name: str) -> bytes:
        for attempt in range(_ATTEMPTS):
            with self._errors(name), contextlib.suppress(*_broken_streams(attempt)):
                return self._s3.get_object(**self._at(name))["Body"].read()
            time.sleep(_pause_s(attempt))
        raise AssertionError("the last attempt returns or raises")

    def size(self, name: str) -> int | None:
        try:
            with self._errors(name):
                return int(self._s3.head_object(**self._at(name))["ContentLength"])
        except ObjectMissingError:
            return None

    def sha256(self, name: str) -> str | None:
        """S3 checks and keeps the sha256 of what is sent whole. Of what is sent in parts it checks each part's, so the
        whole's is the one noted at the beginning."""
        with self._errors(name):
            head = self._s3.head_object(**self._at(name), ChecksumMode="ENABLED")
        checksum = head.get("ChecksumSHA256")
        if checksum is not None and "-" not in head["ETag"]:
            return base64.b64decode(checksum).hex()
        noted: str | None = head.get("Metadata", {}).get(_NOTE)
        return noted

    def names(self, folder: str) -> list[str]:
        prefix = (f"{self._prefix}/" if self._prefix else "") + f"{folder}/"
        found = []
        with self._errors(folder):
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                found += [folder + "/" + item["Key"].removeprefix(prefix) for item in page.get("Contents", ())]
        valid = []
        for name in found:
            with contextlib.suppress(ValueError):
                valid.append(check_name(name))
        return sorted(valid)

    def local_path(self, name: str, scratch: Path) -> Path:
        """Downloads into scratch/NAME.part, continuing what an earlier run left, and gives it a name of its own."""
        with file_errors(f"folder {scratch}"):
            part = scratch / f"{name.replace('/', '-')}.part"
            target = part.with_suffix(f".{uuid.uuid4().hex}")
            with locked(part) as file:
                if file is not None:
                    self._download(name, file)
                    os.replace(part, target)
                    return target
            with target.open("xb") as own:  # another process downloads it now: take our own copy
                self._download(name, own)
            return target

    def _download(self, name: str, file: Any) -> None:
        total = self.size(name)
        if total is None:
            raise ObjectMissingError(f"store {self.location}: no {name}.")
        if os.fstat(file.fileno()).st_size > total:
            file.truncate(0)
        for attempt in range(_ATTEMPTS):
            have = os.fstat(file.fileno()).st_size
            if have == total:
                return
            with self._errors(name), contextlib.suppress(*_broken_streams(attempt)):
                body = self._s3.get_object(**self._at(name), Range=f"bytes={have}-")["Body"]
                for chunk in body.iter_chunks(_CHUNK_BYTES):
                    file.write(chunk)
                    file.flush()
                continue
            file.flush()
            time.sleep(_pause_s(attempt))
        raise StoreError(f"store {self.location}: {name} ended early {_ATTEMPTS} times; run again to continue it.")

    def put_new(self, name: str, content: bytes | Path) -> bool:
        if self.size(name) is not None:
            return False
        if isinstance(content, Path) and content.stat().st_size > self._part_bytes:
            return self._put_parts(name, content)
        body = content if isinstance(content, bytes) else content.read_bytes()
        for attempt in range(_ATTEMPTS):
            try:
                with self._errors(name):
                    self._s3.put_object(**self._at(name), **_checked(body), IfNoneMatch="*")
                    return True
            except _LostRaceError:
                return False
            except _ConflictError:
                if self.size(name) is not None:
                    return False
                time.sleep(_pause_s(attempt))
        raise StoreError(f"store {self.location}: {name} is written by others all the time; run again.")

    def replace(self, name: str, content: bytes | Path) -> None:
        if isinstance(content, Path) and content.stat().st_size > self._part_bytes:
            self._put_parts(name, content, over=True)
            return
        with self._errors(name):
            body = content if isinstance(content, bytes) else content.read_bytes()
            self._s3.put_object(**self._at(name), **_checked(body))

    def delete(self, name: str) -> None:
        with self._errors(name):
            self._s3.delete_object(**self._at(name))

    def _put_parts(self, name: str, path: Path, *, over: bool = False) -> bool:
        """Multipart upload, continuing one of this content that an earlier run began. over: whatever is there."""
        num_bytes, sha256 = path.stat().st_size, file_sha256(path)
        condition = {} if over else {"IfNoneMatch": "*"}
        part_bytes = max(self._part_bytes, -(-num_bytes // _MAX_PARTS))
        for attempt in range(_ATTEMPTS):
            upload_id = ""
            try:
                with self._errors(name):
                    upload_id, there = self._begun_upload(name, sha256)
                    parts = []
                    with path.open("rb") as file:
                        for number in range(1, -(-num_bytes // part_bytes) + 1):
                            part = file.read(part_bytes)
                            checksum = _base64_sha256(part)
                            if not _is_part(there.get(number, {}), part, checksum):
                                there[number] = self._s3.upload_part(
                                    **self._at(name), UploadId=upload_id, PartNumber=number, Body=part,
                                    ChecksumSHA256=checksum,
                                )  # fmt: skip
                            tag = there[number]["ETag"]
                            parts.append({"PartNumber": number, "ETag": tag, "ChecksumSHA256": checksum})
                    self._s3.complete_multipart_upload(
                        **self._at(name), UploadId=upload_id, MultipartUpload={"Parts": parts}, **condition
                    )
                    return True
            except _LostRaceError:
                self._abort(name, upload_id)
                return False
            except (_ConflictError, _UploadGoneError) as error:
                if not over and self.size(name) is not None:
                    return False
                if isinstance(error, _ConflictError):  # S3 wants all of it again then, in a new upload
                    self._abort(name, upload_id)
                time.sleep(_pause_s(attempt))
        raise StoreError(f"store {self.location}: {name} could not be uploaded in {_ATTEMPTS} attempts; run again.")

    def _abort(self, name: str, upload_id: str) -> None:
        with contextlib.suppress(StoreError), self._errors(name):
            self._s3.abort_multipart_upload(**self._at(name), UploadId=upload_id)

    def _begun_upload(self, name: str, sha256: str) -> tuple[str, dict[int, dict[str, Any]]]:
        """(upload id, {part number: S3's word on it}) of an unfinished upload of this object, or a new one.

        Names are those of contents, so whoever began it meant this content; parts that differ are sent again.
        """
        key = self._key(name)
        listing = self._s3.list_multipart_uploads(Bucket=self._bucket, Prefix=key)
        for upload in listing.get("Uploads", ()):
            if upload["Key"] != key or upload.get("ChecksumAlgorithm") != "SHA256":
                continue
            pages = self._s3.get_paginator("list_parts").paginate(**self._at(name), UploadId=upload["UploadId"])
            return upload["UploadId"], {p["PartNumber"]: p for page in pages for p in page.get("Parts", ())}
        begun = self._s3.create_multipart_upload(
            **self._at(name), ChecksumAlgorithm="SHA256", Metadata={_NOTE: sha256}
        )
        return begun["UploadId"], {}

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """botocore's errors as StoreError with what to do."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except ClientError as error:
            raise self._client_error(error, name) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreError(f"store {self.location}: no AWS credentials found; {_CREDENTIALS}.") from error
        except BotoCoreError as error:
            raise StoreError(f"store {self.location}: {error}") from error

    def _client_error(self, error: Any, name: str) -> StoreError:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        where = f"store {self.location}"
        if code == "NoSuchBucket":
            return StoreError(f"{where}: no bucket {self._bucket}; create it, or correct the name or the account.")
        if code in ("NoSuchUpload", "InvalidPart"):
            return _UploadGoneError(f"{where}: {name}: the upload was ended or changed by somebody else.")
        if code == "PreconditionFailed" or status == 412:
            return _LostRaceError(f"{where}: {name} exists.")
        if code in ("ConditionalRequestConflict", "OperationAborted") or status == 409:
            return _ConflictError(f"{where}: {name} is being written.")
        if code in ("NoSuchKey", "404", "NotFound") or status == 404:
            return ObjectMissingError(f"{where}: no {name}.")
        if code in ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"):
            return StoreError(f"{where}: AWS refuses the credentials ({code}); {_CREDENTIALS}.")
        if status == 403:
            return StoreError(
                f"{where}: access denied ({name}); the identity needs s3:ListBucket and s3:GetObject, to write also "
                "s3:PutObject, s3:ListBucketMultipartUploads, s3:ListMultipartUploadParts and "
                "s3:AbortMultipartUpload, to compile also s3:DeleteObject (claims)."
            )
        if code == "NotImplemented" or status == 501:
            return StoreError(f"{where}: this S3 service lacks conditional writes; many writers can't share it safely.")
        text = error.response.get("Error", {}).get("Message", "")
        return StoreError(f"{where}: {name}: S3 answers {status} {code} {text}; run again to continue.")


class _LostRaceError(StoreError):
    """The object exists; somebody else wrote it."""


class _ConflictError(StoreError):
    """Somebody else writes the object now."""


class _UploadGoneError(StoreError):
    """The multipart upload was completed, aborted or given other parts by somebody else."""


def _broken_streams(attempt: int) -> tuple[type[BaseException], ...]:
    """What an answer that breaks off raises (botocore retries requests, not bodies); nothing in the last attempt, so
    that it gets through."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    return (IncompleteReadError, ReadTimeoutError, ResponseStreamingError) if attempt < _ATTEMPTS - 1 else ()


def _is_part(there: dict[str, Any], part: bytes, checksum: str) -> bool:
    """Whether S3 has this part: by its sha256, or by the MD5 that services without checksums give as ETag; ETags of
    encrypted parts (KMS) are none."""
    if there.get("Size") != len(part):
        return False
    if "ChecksumSHA256" in there:
        return bool(there["ChecksumSHA256"] == checksum)
    return bool(there["ETag"] == f'"{hashlib.md5(part, usedforsecurity=False).hexdigest()}"')


def _base64_sha256(content: bytes) -> str:
    """As S3 takes it."""
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _checked(body: bytes) -> dict[str, Any]:
    """A body that S3 checks, also noted for services that don't keep checksums."""
    return {
        "Body": body,
        "ChecksumAlgorithm": "SHA256",
        "ChecksumSHA256": _base64_sha256(body),
        "Metadata": {_NOTE: hashlib.sha256(body).hexdigest()},
    }


def _pause_s(attempt: int) -> float:
    return min(0.05 * 2**attempt, 5.0)
