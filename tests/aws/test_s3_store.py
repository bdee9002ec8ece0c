# SPDX-License-Identifier: Apache-2.0
"""Bundles under s3://, on moto's server on loopback: races, kills, continued parts, throttling, broken answers."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from compile.bundle_store import copy_bundle, finished_graph, list_bundles, publish_graph, verify_bundle
from compile.claims import Claims
from compile.errors import BundleError, StoreError
from compile.s3_store import S3Store, _base64_sha256, _is_part
from compile.store import open_store
from tests.aws.s3_server import FaultyProxy
from tests.cpu.bundle_samples import BUCKETS, FIELDS, graph_files, publish

ROOT = Path(__file__).resolve().parents[2]
PART = 5 * 2**20


def run_sample(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.cpu.bundle_samples", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def assert_whole_or_absent(location: str) -> int:
    store = open_store(location)
    bundles, problems = list_bundles(store)
    assert problems == [] and [p for b in bundles for p in verify_bundle(store, b)] == []
    return len(bundles)


def test_round_trip_and_listing(bucket: str, tmp_path: Path) -> None:
    location = f"s3://{bucket}/team/models"
    local, remote, copy = (
        open_store(tmp_path / "a", create=True),
        open_store(location),
        open_store(tmp_path / "b", create=True),
    )
    bundle = publish(local)
    assert list_bundles(remote) == ([], [])
    assert copy_bundle(local, remote, bundle) and not copy_bundle(local, remote, bundle)
    assert list_bundles(remote) == ([bundle], []) == list_bundles(local)
    assert copy_bundle(remote, copy, bundle) and verify_bundle(copy, bundle) == []
    assert list_bundles(open_store(f"s3://{bucket}")) == ([], [])
    keys = [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket=bucket)["Contents"]]
    assert all(key.startswith("team/models/") for key in keys)
    assert not list((tmp_path / "b" / "tmp").iterdir())


def test_a_losing_writer_takes_the_winners_files(bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    publish(store)
    graph = publish_graph(store, FIELDS, BUCKETS[0], graph_files(BUCKETS[0], salt=1))
    assert store.read(graph.files["graph.neff"].blob) == graph_files(BUCKETS[0])["graph.neff"]


def test_large_files_go_in_parts_and_a_begun_upload_is_continued(bucket: str, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3 * PART + 17)
    file = tmp_path / "file"
    file.write_bytes(content)
    name = "blobs/" + "a" * 64
    client = boto3.client("s3")
    upload = client.create_multipart_upload(Bucket=bucket, Key=name, ChecksumAlgorithm="SHA256")["UploadId"]
    for number in (1, 2):  # the second part is damaged
        body = content[(number - 1) * PART : number * PART] if number == 1 else b"\0" * PART
        client.upload_part(Bucket=bucket, Key=name, UploadId=upload, PartNumber=number, Body=body)
    store = S3Store(f"s3://{bucket}", part_bytes=PART)
    sent: list[int] = []
    store._s3.meta.events.register("before-call.s3.UploadPart", lambda params, **_: sent.append(1))
    assert store.put_new(name, file) and len(sent) == 3
    assert store.read(name) == content and not store.put_new(name, file)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


def test_a_begun_download_is_continued(bucket: str, tmp_path: Path) -> None:
    store = open_store(f"s3://{bucket}")
    content = random.Random(0).randbytes(300_000)
    name = "blobs/" + "b" * 64
    store.put_new(name, content)
    (tmp_path / f"blobs-{'b' * 64}.part").write_bytes(content[:123_456])
    ranges: list[str] = []
    assert isinstance(store, S3Store)
    store._s3.meta.events.register(
        "before-call.s3.GetObject", lambda params, **_: ranges.append(params["headers"].get("Range"))
    )
    assert store.local_path(name, tmp_path).read_bytes() == content and ranges == ["bytes=123456-"]


@pytest.mark.parametrize("count", [2, 8])
def test_racing_publishers_leave_one_whole_bundle(bucket: str, count: int) -> None:
    location = f"s3://{bucket}/race"
    writers = [run_sample("publish", location, 100_000, salt) for salt in range(count)]
    while any(writer.poll() is None for writer in writers):
        assert_whole_or_absent(location)
    assert [writer.wait() for writer in writers] == [0] * count
    assert assert_whole_or_absent(location) == 1


def test_processes_pull_into_one_folder_at_once(bucket: str, tmp_path: Path) -> None:
    remote, target = f"s3://{bucket}", tmp_path / "pulled"
    publish(open_store(remote), num_bytes=3_000_000)
    pulls = [run_sample("copy", remote, target) for _ in range(6)]
    failed = [errors for pull in pulls if (errors := pull.communicate()[1]) or pull.returncode]
    assert failed == [] and assert_whole_or_absent(str(target)) == 1 and not list((target / "tmp").iterdir())


@pytest.mark.parametrize("way", ["push", "pull"])
def test_killed_at_random_points_nothing_partial_shows(bucket: str, tmp_path: Path, way: str) -> None:
    local, remote = tmp_path / "local", f"s3://{bucket}/kill"
    publish(open_store(local, create=True), num_bytes=18_000_000)  # parts, both ways
    if way == "pull":
        assert run_sample("copy", local, remote).wait() == 0
    rng = random.Random(2)
    attempt = killed = 0
    while attempt < 4 or not killed:  # on a fast machine all may be done when they would be killed: then sooner
        target = f"{remote}-{attempt}" if way == "push" else str(tmp_path / f"pulled-{attempt}")
        arguments = ["copy", local, target] if way == "push" else ["copy", remote, target]
        child = run_sample(*arguments)
        time.sleep((0.4 + 1.6 * rng.random()) * 0.9 ** max(0, attempt - 3))
        attempt += 1
        child.kill()
        killed += child.wait() != 0
        if way == "push" or Path(target).is_dir():
            assert_whole_or_absent(target)
        assert run_sample(*arguments).wait() == 0
        assert assert_whole_or_absent(target) == 1


def test_throttling_errors_and_broken_answers_are_ridden_out(
    bucket: str, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = open_store(tmp_path / "a", create=True)
    bundle = publish(local, num_bytes=200_000)
    with FaultyProxy(s3_url, {"503": 0.1, "500": 0.06, "cut": 0.3, "drop": 0.05}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        remote = open_store(f"s3://{bucket}")
        assert copy_bundle(local, remote, bundle)
        for attempt in range(3):
            copy = open_store(tmp_path / f"b{attempt}", create=True)
            assert copy_bundle(remote, copy, bundle) and verify_bundle(copy, bundle) == []
        assert all(proxy.counts.values()), proxy.counts


def test_a_claim_whose_answer_got_lost_is_held(bucket: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(s3_url, {"lost": 0.5}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        claims, others = Claims(open_store(f"s3://{bucket}")), Claims(open_store(f"s3://{bucket}"))
        keys = [digit * 64 for digit in "0123456789"]
        assert all(claims.take(key) for key in keys) and not any(others.take(key) for key in keys)
        assert proxy.counts["lost"]
        claims.release_all()
        assert open_store(f"s3://{bucket}").names("claims") == []


def test_conflicting_writes_are_tried_again_with_a_new_upload(
    bucket: str, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, client = tmp_path / "file", boto3.client("s3")
    file.write_bytes(random.Random(0).randbytes(PART + 17))
    with FaultyProxy(s3_url, {"409": 0.7}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = S3Store(f"s3://{bucket}", part_bytes=PART)
        uploads: list[int] = []
        store._s3.meta.events.register("before-call.s3.CreateMultipartUpload", lambda **_: uploads.append(1))
        assert store.put_new("blobs/" + "a" * 64, file) and store.put_new("blobs/" + "b" * 64, b"small")
        assert store.read("blobs/" + "a" * 64) == file.read_bytes()
        assert proxy.counts["409"] >= len(uploads) - 1 > 0
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


def test_encrypted_parts_are_known_by_their_sha256() -> None:
    part = {"PartNumber": 1, "Size": 3, "ETag": '"no MD5 under KMS"', "ChecksumSHA256": _base64_sha256(b"abc")}
    assert _is_part(part, b"abc", _base64_sha256(b"abc")) and not _is_part(part, b"abd", _base64_sha256(b"abd"))


def test_a_service_that_only_fails_ends_in_one_error(bucket: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compile.s3_store._ATTEMPTS", 2)
    with FaultyProxy(s3_url, {"503": 1.0}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        with pytest.raises(StoreError, match="503 SlowDown.*run again to continue"):
            open_store(f"s3://{bucket}").names("bundles")


@pytest.mark.parametrize("way", ["flip", "truncate", "remove"])
def test_damaged_objects_are_never_taken(bucket: str, tmp_path: Path, way: str) -> None:
    remote = open_store(f"s3://{bucket}")
    bundle = publish(remote)
    ref = bundle.graphs[BUCKETS[0]].files["graph.neff"]
    content = bytearray(remote.read(ref.blob))
    content[1000] ^= 1
    remote.delete(ref.blob)
    if way != "remove":
        remote.put_new(ref.blob, bytes(content if way == "flip" else content[:-1]))
    target = tmp_path / "t"
    with pytest.raises(BundleError, match="damaged|missing"):
        copy_bundle(remote, open_store(target, create=True), bundle)
    assert list_bundles(open_store(target)) == ([], []) and len(verify_bundle(remote, bundle)) == 1


@pytest.mark.parametrize("way", ["by us", "by others", "in parts"])
def test_a_push_repairs_damage_of_the_right_size(bucket: str, tmp_path: Path, way: str) -> None:
    local, remote = open_store(tmp_path / "a", create=True), S3Store(f"s3://{bucket}/x", part_bytes=PART)
    bundle = publish(local, num_bytes=PART + 99 if way == "in parts" else 50_000)
    assert copy_bundle(local, remote, bundle) and not copy_bundle(local, remote, bundle)
    ref = bundle.graphs[BUCKETS[0]].files["graph.neff"]
    damaged = bytearray(local.read(ref.blob))
    damaged[1000] ^= 1
    if way == "by others":  # S3 knows no sha256 then
        boto3.client("s3").put_object(Bucket=bucket, Key=f"x/{ref.blob}", Body=bytes(damaged))
        assert remote.sha256(ref.blob) is None
    else:
        (tmp_path / "damaged").write_bytes(damaged)
        remote.replace(ref.blob, tmp_path / "damaged")
    assert remote.size(ref.blob) == ref.num_bytes
    (problem,) = verify_bundle(remote, bundle)
    assert f"{BUCKETS[0]}/graph.neff" in problem and "damaged" in problem
    assert finished_graph(remote, FIELDS, BUCKETS[0]) is None  # a build would not take it either
    assert copy_bundle(local, remote, bundle)
    assert verify_bundle(remote, bundle) == [] and not copy_bundle(local, remote, bundle)
    assert remote.sha256(ref.blob) == ref.sha256


def test_good_files_that_others_put_there_are_read_not_sent(bucket: str, tmp_path: Path) -> None:
    local, remote = open_store(tmp_path / "a", create=True), S3Store(f"s3://{bucket}")
    bundle = publish(local)
    for folder in ("blobs", "graphs", "bundles"):
        for name in local.names(folder):
            boto3.client("s3").put_object(Bucket=bucket, Key=name, Body=local.read(name))
    puts: list[str] = []
    remote._s3.meta.events.register("before-call.s3.PutObject", lambda params, **_: puts.append(params["url_path"]))
    assert not copy_bundle(local, remote, bundle) and puts == []


def test_claims_are_exclusive(bucket: str) -> None:
    now = 0.0
    first, second = (Claims(open_store(f"s3://{bucket}/x"), lease_s=60, clock=lambda: now) for _ in range(2))
    key = "c" * 64
    assert first.take(key) and not second.take(key)
    now = 61.0
    assert second.take(key) and not first.take(key)
    second.release(key)
    assert first.take(key)


def test_one_clear_error_each(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no bucket no-such-bucket-here; create it"):
        open_store("s3://no-such-bucket-here/x").names("bundles")
    with pytest.raises(StoreError, match="no bucket no-such-bucket-here"):
        open_store("s3://no-such-bucket-here/x").put_new("blobs/" + "0" * 64, b"x")
    with pytest.raises(StoreError, match="need s3://bucket"):
        open_store("s3://Bad_Bucket!/x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="no AWS credentials found; run `aws configure`"):
        open_store(f"s3://{bucket}").names("bundles")
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(StoreError, match="no-such-profile"):
        open_store(f"s3://{bucket}")
    assert "AWS_PROFILE" in os.environ
