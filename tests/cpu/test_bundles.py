# SPDX-License-Identifier: Apache-2.0
"""Bundles in a local folder: keys, races, kills, damage, full disks, archives, and what a miss says."""

import gzip
import io
import json
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compile.bundle import Bundle, FileRef, Graph, bundle_key, canonical_json, differences, digest, graph_key
from compile.bundle_archive import export_bundle, import_bundle
from compile.bundle_store import (
    copy_bundle,
    find_bundle,
    finished_graph,
    list_bundles,
    pick_bundle,
    publish_bundle,
    publish_graph,
    read_graph,
    read_manifest,
    verify_bundle,
)
from compile.claims import Claims
from compile.errors import BundleError, BundleMissError, StoreError
from compile.process_identity import is_known_dead
from compile.store import LocalStore, open_store
from tests.cpu.bundle_samples import BUCKETS, FIELDS, graph_files, publish

ROOT = Path(__file__).resolve().parents[2]
PRINT_IDENTITY = (
    "import json, time; from compile.process_identity import own_identity;"
    "print(json.dumps(own_identity()), flush=True); time.sleep(60)"
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    found = open_store(tmp_path / "store", create=True)
    assert isinstance(found, LocalStore)
    return found


def run_sample(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.cpu.bundle_samples", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def assert_whole_or_absent(location: Path) -> int:
    """Every visible bundle is complete; how many there are."""
    if not location.is_dir():
        return 0
    store = open_store(location)
    bundles, problems = list_bundles(store)
    assert problems == [] and [p for b in bundles for p in verify_bundle(store, b)] == []
    return len(bundles)


# --- keys ------------------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.text(min_size=1, max_size=4), PLAIN, max_size=5), seed=st.randoms())
def test_key_order_never_changes_a_key_and_values_always_do(fields: dict, seed: random.Random) -> None:
    items = list(fields.items())
    seed.shuffle(items)
    assert graph_key(fields, "b") == graph_key(dict(items), "b")
    assert graph_key(fields, "b") != graph_key(fields, "c")
    assert graph_key({**fields, "new": 0}, "b") != graph_key(fields, "b")
    for name in fields:
        assert graph_key({**fields, name: [fields[name], "other"]}, "b") != graph_key(fields, "b")
    assert json.loads(canonical_json(fields)) == fields


def test_bundle_key_knows_buckets_but_not_their_order() -> None:
    assert bundle_key(FIELDS, BUCKETS) == bundle_key(FIELDS, reversed(BUCKETS))
    assert bundle_key(FIELDS, BUCKETS) != bundle_key(FIELDS, BUCKETS[:1])


def test_differences_name_nested_fields() -> None:
    other = json.loads(json.dumps(FIELDS))
    other["model"]["num_blocks"] = 30
    del other["tensor_parallel"]
    assert differences(FIELDS, other) == ["model.num_blocks: 24 → 30", "tensor_parallel: 1 → absent"]
    assert differences(FIELDS, other, partial=True) == ["model.num_blocks: 24 → 30"]


# --- publishing and reading ------------------------------------------------------------------------------------------


def test_round_trip(store: LocalStore) -> None:
    bundle = publish(store)
    assert read_manifest(store, f"bundles/{bundle.key}.json") == bundle
    assert pick_bundle(store, bundle.key[:8]) == pick_bundle(store, None) == bundle
    for bucket in BUCKETS:
        assert read_graph(store, bundle.graphs[bucket]) == graph_files(bucket)
        assert finished_graph(store, FIELDS, bucket) == bundle.graphs[bucket]
    assert verify_bundle(store, bundle) == []
    assert not list(Path(store.location, "tmp").iterdir())


def test_modelled_times_travel_with_the_bundle_and_the_latest_are_kept(store: LocalStore, tmp_path: Path) -> None:
    bundle = publish(store)
    name, copy = f"bundles/{bundle.key}.json", open_store(tmp_path / "copy", create=True)
    copy_bundle(store, copy, bundle)
    for costs_us in ({BUCKETS[0]: 12.5, BUCKETS[1]: 3.0}, {BUCKETS[0]: 13.0}):
        timed = replace(bundle, costs_us=costs_us)
        assert timed.key == bundle.key and publish_bundle(store, timed) and not publish_bundle(store, timed)
        assert not publish_bundle(store, bundle)  # whoever knows no times takes none away
        assert copy_bundle(store, copy, read_manifest(store, name)) and read_manifest(copy, name) == timed


def test_a_second_writer_takes_the_first_ones_files(store: LocalStore) -> None:
    publish(store)
    graph = publish_graph(store, FIELDS, BUCKETS[0], graph_files(BUCKETS[0], salt=1))
    assert read_graph(store, graph) == graph_files(BUCKETS[0])


def test_a_miss_names_the_nearest_bundle_and_what_differs(store: LocalStore) -> None:
    with pytest.raises(BundleMissError, match="no bundle in this store"):
        find_bundle(store, FIELDS, BUCKETS)
    publish(store, {**FIELDS, "target": "trn1", "compiler": "neuronx-cc 2.26.6360.0"})
    near = publish(store)
    wanted = {**FIELDS, "compiler": "neuronx-cc 2.25.3371.0"}
    with pytest.raises(BundleMissError) as caught:
        find_bundle(store, wanted, [*BUCKETS, "decode_table-8x4"])
    text = str(caught.value)
    assert near.key[:12] in text and "compiler: neuronx-cc 2.27.5334.0 → neuronx-cc 2.25.3371.0" in text
    assert (
        "buckets: no decode_table-8x4" in text
        and "neuron-paged compile" in text
        and "target" not in text.split("Build")[0]
    )


def test_a_miss_names_the_bundle_that_can_not_be_read(store: LocalStore) -> None:
    damaged, other = publish(store), publish(store, {**FIELDS, "target": "trn3"})
    path = Path(store.location, f"bundles/{damaged.key}.json")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-20])
    wanted = {name: value for name, value in FIELDS.items() if name != "tensor_parallel"}
    with pytest.raises(BundleMissError, match=rf"1 unreadable: .*{damaged.key}.*nearest, {other.key[:12]}"):
        find_bundle(store, wanted)


def test_open_fields_and_more_buckets_are_found(store: LocalStore) -> None:
    bundle = publish(store)
    wanted = {"target": "trn2", "model": {"config": FIELDS["model"]["config"]}}
    assert find_bundle(store, wanted, BUCKETS[:1]) == bundle
    publish(store, {**FIELDS, "model": {**FIELDS["model"], "num_blocks": 99}})
    with pytest.raises(BundleError, match="2 bundles fit"):
        find_bundle(store, wanted)


def test_read_only_stores_serve(store: LocalStore) -> None:
    bundle = publish(store)
    folders = [Path(store.location), *(p for p in Path(store.location).rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    code = (
        "import os, sys\n"
        "from compile.bundle_store import find_bundle, read_graph\nfrom compile.store import open_store\n"
        "from tests.cpu.bundle_samples import *\n"
        "os.getuid() == 0 and os.setuid(65534)\n"  # root may write anywhere
        "store = open_store(sys.argv[1]); b = find_bundle(store, FIELDS, BUCKETS)\n"
        "assert all(read_graph(store, g) for g in b.graphs.values())\n"
        "try: publish(store, {**FIELDS, 'x': 1})\nexcept Exception as e: print(type(e).__name__, e)"
    )
    for parent in Path(store.location).parents:  # pytest's folders are private to their owner
        if parent.owner() != "root" or str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", code, store.location], cwd=ROOT, capture_output=True, text=True)
    for folder in folders:
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("StoreError") and "permission denied" in done.stdout
    assert verify_bundle(store, bundle) == []


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(path: Path, way: str) -> None:
    content = bytearray(path.read_bytes())
    if way == "flip":
        content[len(content) // 2] ^= 4
    elif way == "truncate":
        del content[-7:]
    path.unlink()
    if way != "remove":
        path.write_bytes(content)


@pytest.mark.parametrize("way", ["flip", "truncate", "remove"])
def test_damaged_files_are_found_and_made_whole_by_the_next_run(store: LocalStore, way: str, tmp_path: Path) -> None:
    bundle = publish(store)
    good = open_store(tmp_path / "good", create=True)
    copy_bundle(store, good, bundle)
    ref = bundle.graphs[BUCKETS[0]].files["graph.neff"]
    damage(Path(store.location, ref.blob), way)
    assert len(verify_bundle(store, bundle)) == 1
    assert f"{BUCKETS[0]}/graph.neff" in verify_bundle(store, bundle)[0]
    assert finished_graph(store, FIELDS, BUCKETS[0]) is None and finished_graph(store, FIELDS, BUCKETS[1])
    with pytest.raises(BundleError):
        read_graph(store, bundle.graphs[BUCKETS[0]])
    with pytest.raises(BundleError, match="missing|damaged"):
        copy_bundle(store, open_store(tmp_path / "other", create=True), bundle)
    assert assert_whole_or_absent(tmp_path / "other") == 0
    copy_bundle(good, store, bundle)
    assert verify_bundle(store, bundle) == []
    damage(Path(store.location, ref.blob), way)
    again = publish(store, salt=5)  # compiled anew: another NEFF
    assert again.key == bundle.key and verify_bundle(store, read_manifest(store, f"bundles/{again.key}.json")) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v["fields"].update(target="trn3"), "digest"),
        (lambda v: v.update(format="neuron-paged bundle 9"), "need 'neuron-paged bundle 1'"),
        (lambda v: v.update(format="something else"), "not a bundle's manifest"),
        (lambda v: v["graphs"].clear(), "digest"),
    ],
)
def test_changed_manifests_are_refused(store: LocalStore, change, says: str) -> None:
    bundle = publish(store)
    path = Path(store.location, f"bundles/{bundle.key}.json")
    values = json.loads(path.read_text())
    change(values)
    path.unlink()
    path.write_text(json.dumps(values))
    with pytest.raises(BundleError, match=says):
        read_manifest(store, f"bundles/{bundle.key}.json")
    assert len(list_bundles(store)[1]) == 1


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_manifest_is_found_or_harmless(place: int, bit: int) -> None:
    bundle = Bundle(FIELDS, {}, {"at": "now"})
    content = bytearray(bundle.to_bytes())
    content[place % len(content)] ^= 1 << bit
    try:
        assert Bundle.from_bytes(bytes(content), "x") == bundle
    except BundleError:
        pass


def signed(change) -> bytes:
    """A manifest that was changed and has the digest of what it says now."""
    graph = Graph(BUCKETS[0], {"graph.neff": FileRef.of(b"x")})
    values = json.loads(Bundle(FIELDS, {BUCKETS[0]: graph}, {}).to_bytes())
    del values["sha256"]
    change(values)
    return json.dumps({**values, "sha256": digest(values)}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"format": "neuron-paged bundle 1", "fields": {"a": NaN}, "sha256": ""}', "damaged"),
        (b'{"format": "neuron-paged bundle 1", "fields": {"a": "\\ud800"}, "sha256": ""}', "damaged"),
        (signed(lambda v: v.update(fields=[1])), "fields is list"),
        (signed(lambda v: v.update(built="x")), "built is str"),
        (signed(lambda v: v.pop("graphs")), "lacks a part"),
        (signed(lambda v: v.update(costs_us={"x": "slow"})), "lacks a part"),
        (signed(lambda v: v["graphs"][BUCKETS[0]].update(other={**vars(FileRef.of(b"x")), "bytes": 9})), "two"),
    ],
)
def test_manifests_that_nobody_here_wrote_are_one_error(content: bytes, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        Bundle.from_bytes(content, "x")


def test_foreign_files_are_no_bundles(store: LocalStore, tmp_path: Path) -> None:
    folder = Path(store.location, "bundles")
    folder.mkdir()
    (folder / "readme.txt").write_text("hello")
    (folder / f"{'0' * 64}.json").write_bytes(b"\xff\xfe")
    assert list_bundles(store)[0] == [] and len(list_bundles(store)[1]) == 1
    for location in (tmp_path / "nothing", "http://example.com/x", __file__, "s3://A/b", "s3:/a/b", "S3://a"):
        with pytest.raises(StoreError, match="store"):
            open_store(location, create=str(location).lower().startswith(("s3", "http")))
    with pytest.raises(BundleError, match="start of a key"):
        pick_bundle(store, "../../etc")


# --- races, kills, full disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8])
def test_racing_publishers_leave_one_whole_bundle(tmp_path: Path, count: int) -> None:
    location = tmp_path / "store"
    writers = [run_sample("publish", location, 200_000, salt) for salt in range(count)]
    while any(writer.poll() is None for writer in writers):
        assert_whole_or_absent(location)
    assert [writer.wait() for writer in writers] == [0] * count
    assert assert_whole_or_absent(location) == 1


@pytest.mark.parametrize("what", ["publish", "copy"])
def test_killed_at_random_points_nothing_partial_shows(tmp_path: Path, what: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    publish(open_store(source, create=True), num_bytes=3_000_000)
    arguments = ["publish", target, 3_000_000, 0] if what == "publish" else ["copy", source, target]
    start = time.monotonic()
    assert run_sample(*arguments).wait() == 0
    whole_s = time.monotonic() - start
    assert assert_whole_or_absent(target) == 1
    rng = random.Random(1)
    rounds = killed = 0
    while rounds < 8 or not killed:  # on a busy machine the first run may be slow and all others done too early
        rounds += 1
        subprocess.run(["rm", "-rf", str(target)], check=True)
        child = run_sample(*arguments)
        time.sleep(whole_s * (0.4 + 0.6 * rng.random()) * 0.95 ** max(0, rounds - 8))
        child.kill()
        killed += child.wait() != 0
        assert_whole_or_absent(target)
        assert run_sample(*arguments).wait() == 0
        assert assert_whole_or_absent(target) == 1


def test_files_that_may_not_grow_end_in_one_error_and_the_next_run_completes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    publish(open_store(source, create=True), num_bytes=300_000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    child = run_sample("copy", source, target, preexec_fn=limit)
    _, errors = child.communicate()
    assert child.returncode == 1 and "ulimit -f" in errors.splitlines()[-1]
    assert assert_whole_or_absent(target) == 0 and not list((target / "tmp").iterdir())
    assert run_sample("copy", source, target).wait() == 0
    assert assert_whole_or_absent(target) == 1


def test_a_full_disk_ends_in_one_error_and_the_next_run_completes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        source = open_store(tmp_path / "source", create=True)
        bundle = publish(source, num_bytes=700_000)
        with pytest.raises(StoreError, match="no space left"):
            copy_bundle(source, open_store(disk / "store", create=True), bundle)
        assert assert_whole_or_absent(disk / "store") == 0
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert copy_bundle(source, open_store(disk / "store"), bundle)
        assert assert_whole_or_absent(disk / "store") == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- claims ----------------------------------------------------------------------------------------------------------


def test_claims_are_exclusive_until_they_run_out(store: LocalStore) -> None:
    now = 1000.0
    first, second = (Claims(store, lease_s=60, clock=lambda: now) for _ in range(2))
    key = graph_key(FIELDS, "b")
    assert first.take(key) and not second.take(key) and not first.take(key)
    now += 30
    first.renew()
    now += 40
    assert not second.take(key)
    now += 61
    assert second.take(key) and not first.take(key)
    second.release(key)
    assert store.names("claims") == [] and first.take(key)
    first.release_all()
    assert store.names("claims") == []


def test_a_store_that_is_away_for_a_while_costs_no_claim(store: LocalStore, tmp_path: Path) -> None:
    now, key, folder = 1000.0, graph_key(FIELDS, "b"), Path(store.location) / "claims"
    ours, others = (Claims(store, lease_s=60, clock=lambda: now) for _ in range(2))
    assert ours.take(key)
    folder.rename(tmp_path / "away")
    folder.write_text("")
    now += 21
    ours.renew()
    folder.unlink()
    (tmp_path / "away").rename(folder)
    now += 21
    ours.renew()
    now += 50
    assert not others.take(key)
    now += 11
    assert others.take(key)


def test_a_claim_from_a_clock_far_ahead_counts_for_one_lease(store: LocalStore) -> None:
    now, key = 1000.0, graph_key(FIELDS, "b")
    ahead, ours = Claims(store, lease_s=60, clock=lambda: now + 10**6), Claims(store, lease_s=600, clock=lambda: now)
    assert ahead.take(key) and not ours.take(key)
    now += 50
    ahead.renew()  # it lives: another lease from here
    assert not ours.take(key)
    holder = ours.holder(key)
    assert holder is not None and holder.owner == ahead.owner and holder.seconds_left == 60
    now += 59
    assert not ours.take(key)
    now += 1
    assert ours.take(key)


def test_claims_of_ended_processes_of_this_host_are_void_others_are_not(store: LocalStore) -> None:
    child = subprocess.Popen([sys.executable, "-c", PRINT_IDENTITY], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    identity = json.loads(child.stdout.readline())
    key = graph_key(FIELDS, "b")

    def is_free(process: object) -> bool:
        claim = {"owner": "x", "expires": time.time() + 600, "lease_s": 600, "process": process}
        store.replace(f"claims/{key}.0.json", json.dumps(claim).encode())
        claims = Claims(store)
        taken = claims.take(key)
        claims.release_all()
        return taken

    assert not is_free(identity)
    assert is_free({**identity, "started": identity["started"] - 1})  # its pid was given to another process
    child.kill()
    while not is_known_dead(identity):  # also as a zombie, before anybody waits for it
        time.sleep(0.01)
    assert is_free(identity)
    child.wait()
    assert is_free(identity)
    rebooted, machine = {**identity, "boot": "another"}, identity["machine"]
    assert is_free(rebooted) == (machine != "")  # containers don't know their machine
    for foreign in ({**rebooted, "machine": machine + "x"}, {**identity, "pid_namespace": "pid:[1]"}, None, "x", {}):
        assert not is_free(foreign)


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b.tar", "b.tar.gz"])
def test_archives_round_trip(store: LocalStore, tmp_path: Path, name: str) -> None:
    bundle = publish(store)
    export_bundle(store, bundle, tmp_path / name)
    target = open_store(tmp_path / "target", create=True)
    assert import_bundle(target.location, tmp_path / name) == bundle
    assert verify_bundle(target, bundle) == []
    assert import_bundle(target.location, tmp_path / name) == bundle
    if name == "b.tar":
        before = (tmp_path / name).read_bytes()
        export_bundle(target, bundle, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_a_place_that_cannot_be_written_is_one_error(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, no_folder = publish(store), tmp_path / "file"
    no_folder.write_bytes(b"")
    with pytest.raises(StoreError, match="b.tar: can't be written: Not a directory"):
        export_bundle(store, bundle, no_folder / "b.tar")
    export_bundle(store, bundle, tmp_path / "b.tar")
    monkeypatch.setattr(tempfile, "tempdir", str(no_folder))
    with pytest.raises(StoreError, match="TMPDIR"):
        import_bundle(tmp_path / "target", tmp_path / "b.tar")


def test_import_makes_a_damaged_file_whole_again(store: LocalStore, tmp_path: Path) -> None:
    bundle = publish(store)
    export_bundle(store, bundle, tmp_path / "b.tar")
    for path in Path(store.location, "bundles").iterdir():
        path.unlink()
    for path in Path(store.location, "blobs").iterdir():  # same size, other contents
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.chmod(0o644)
        path.write_bytes(content)
    assert verify_bundle(store, import_bundle(store.location, tmp_path / "b.tar")) == []


def archive(path: Path, members: list[tuple[str, bytes | None]], manifest: bytes | None = None) -> Path:
    """A tar of (name, contents); None makes a symbolic link to /etc/passwd."""
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def test_hostile_archives_are_refused(store: LocalStore, tmp_path: Path) -> None:
    bundle = publish(store)
    first = (f"bundles/{bundle.key}.json", bundle.to_bytes())
    blobs = [(name, Path(store.location, name).read_bytes()) for name in bundle.files]
    cases: list[tuple[list[tuple[str, bytes | None]], str]] = [
        ([first, *blobs, ("../../evil", b"x")], "not a file that the manifest names"),
        ([first, *blobs, ("/etc/cron.d/x", b"x")], "not a file that the manifest names"),
        ([first, (blobs[0][0], None), *blobs[1:]], "not a file that the manifest names"),
        ([first, (blobs[0][0], blobs[0][1] + b"0")], "bytes, need"),
        ([first, (blobs[0][0], b"\0" * len(blobs[0][1]))], "damaged"),
        ([first, *blobs, blobs[0]], "not a file that the manifest names"),
        ([first, *blobs[1:]], "lacks 1 files"),
        ([*blobs, first], "first member"),
        ([("bundles/../../x.json", bundle.to_bytes())], "does not have the key"),
        ([(f"bundles/{'0' * 64}.json", bundle.to_bytes())], "does not have the key"),
        ([], "first member"),
    ]
    target = tmp_path / "target"
    for members, says in cases:
        with pytest.raises(BundleError, match=says):
            import_bundle(target, archive(tmp_path / "bad.tar", members))
    assert {p.name for p in tmp_path.iterdir()} == {"store", "bad.tar"}  # nothing is left behind, not even a folder
    (tmp_path / "cut.tar").write_bytes(archive(tmp_path / "x.tar", [first, *blobs]).read_bytes()[:40_000])
    (tmp_path / "noise.tar").write_bytes(random.Random(1).randbytes(30_000))
    for name in ("cut.tar", "noise.tar", "nothing.tar"):
        with pytest.raises(BundleError):
            import_bundle(target, tmp_path / name)
    assert not target.exists()


def test_archive_bombs_stop_at_the_manifests_word(store: LocalStore, tmp_path: Path) -> None:
    bundle = publish(store)
    with pytest.raises(BundleError, match="--max-size"):
        export_bundle(store, bundle, tmp_path / "b.tar")
        import_bundle(tmp_path / "t", tmp_path / "b.tar", max_bytes=1000)
    # 200 MB of zeros in some kB of gzip, under the name of a small file.
    name = next(iter(bundle.files))
    info = tarfile.TarInfo(name)
    info.size = 200_000_000
    with gzip.open(tmp_path / "bomb.tar.gz", "wb") as file:
        with tarfile.open(fileobj=file, mode="w|") as members:
            manifest = tarfile.TarInfo(f"bundles/{bundle.key}.json")
            manifest.size = len(bundle.to_bytes())
            members.addfile(manifest, io.BytesIO(bundle.to_bytes()))
            members.addfile(info, open("/dev/zero", "rb"))
    with pytest.raises(BundleError, match="has 200000000 bytes"):
        import_bundle(tmp_path / "t", tmp_path / "bomb.tar.gz")


def test_a_manifest_may_not_name_files_outside(store: LocalStore) -> None:
    bundle = publish(store)
    graph = bundle.graphs[BUCKETS[0]]
    for path in ("../x", "/etc/x", "a/../../x", "a\\b"):
        bad = replace(bundle, graphs={BUCKETS[0]: replace(graph, files={path: graph.files["graph.hlo"]})})
        with pytest.raises(BundleError, match="relative path"):
            Bundle.from_bytes(bad.to_bytes(), "x")


def test_no_pickle_in_bundles() -> None:
    for name in ("bundle", "bundle_store", "bundle_archive", "store", "s3_store", "claims"):
        assert "pickle" not in (ROOT / "compile" / f"{name}.py").read_text()
