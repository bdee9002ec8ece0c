# SPDX-License-Identifier: Apache-2.0
"""Look at, check, copy and pack bundles of compiled graphs. STORE is a folder or s3://bucket/prefix.

ls STORE                          bundles with target, model, graphs and size
verify STORE [KEY]                read every file and compare its sha256; exit code 1 if one is damaged or missing
push FOLDER s3://… [KEY]          copy to S3; what is there whole is not sent again, large files are continued,
                                  damaged ones replaced
pull s3://… FOLDER [KEY]          the other way round
diff STORE KEY KEY                fields in which two bundles differ; exit code 1 if there are any
export STORE FILE.tar[.gz] [KEY]  one bundle as one file
import FILE.tar[.gz] STORE        the inverse; refuses everything but an intact bundle
KEY is the start of a key, as long as it is unique; without it: all bundles (verify, push, pull), or the only one.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_paged.cli.arguments import memory_size
from neuron_paged.cli.output import STDOUT, check_file_target, check_json_target, table, write_json
from neuron_paged.errors import GraphError

if TYPE_CHECKING:
    from compile.bundle import Bundle
    from compile.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Actions of `neuron-paged bundle`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))
    for name, (_, operands, text) in _ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        for operand in operands:
            optional = operand == "[KEY]"
            action.add_argument(
                operand.strip("[]").lower(), nargs="?" if optional else None, metavar=operand.strip("[]")
            )
        if name in ("ls", "verify", "diff"):
            action.add_argument("--json", metavar="FILE", help='write the result as JSON ("-": to standard output)')
        if name == "import":
            action.add_argument("--max-size", type=memory_size, metavar="SIZE", help="of the unpacked files (64GiB)")


def run(args: argparse.Namespace) -> int:
    """Do the action; errors of the compile layer in one line."""
    from compile.errors import CompileError

    check_json_target(getattr(args, "json", None))
    try:
        return _ACTIONS[args.action][0](args)
    except CompileError as error:
        raise GraphError(str(error)) from error


def _open(location: str, *, create: bool = False) -> "Store":
    from compile.store import open_store

    return open_store(location, create=create)


def _chosen(store: "Store", key: str | None) -> list["Bundle"]:
    """The bundle of a key, or all of them; manifests that can't be read are an error."""
    from compile.bundle_store import list_bundles, pick_bundle, require_bundles
    from compile.errors import BundleError

    if key is not None:
        return [pick_bundle(store, key)]
    require_bundles(store)
    bundles, problems = list_bundles(store)
    if problems:
        raise BundleError(problems[0])
    return bundles


def _ls(args: argparse.Namespace) -> int:
    from compile.bundle_store import list_bundles

    bundles, problems = list_bundles(_open(args.store))
    rows = [_row(bundle) for bundle in bundles]
    if args.json != STDOUT:
        if rows:
            print(
                table(
                    ["bundle", "target", "compiler", "ranks", "model", "graphs", "MiB", "built"],
                    [[r["key"][:12], *list(r.values())[1:]] for r in rows],
                )
            )
        else:
            print("no bundles")
    for problem in problems:
        print(f"unreadable: {problem}", file=sys.stderr)
    write_json(args.json, rows)
    return 1 if problems else 0


def _row(bundle: "Bundle") -> dict[str, Any]:
    fields = bundle.fields
    return {
        "key": bundle.key,
        "target": fields.get("target"),
        "compiler": fields.get("compiler"),
        "ranks": fields.get("tensor_parallel"),
        "model": bundle.built.get("model"),
        "graphs": len(bundle.graphs),
        "mib": bundle.num_bytes / 2**20,
        "built": bundle.built.get("at"),
    }


def _verify(args: argparse.Namespace) -> int:
    from compile.bundle_store import list_bundles, pick_bundle, require_bundles, verify_bundle

    store = _open(args.store)
    require_bundles(store)
    bundles, problems = ([pick_bundle(store, args.key)], []) if args.key else list_bundles(store)
    found = {bundle.key: verify_bundle(store, bundle) for bundle in bundles}
    for key, lines in found.items():
        if args.json != STDOUT:
            print(f"{key[:12]}: {'whole' if not lines else f'{len(lines)} damaged files'}")
        problems += lines
    for line in problems:
        print(f"damaged: {line}", file=sys.stderr)
    write_json(args.json, {"bundles": found, "problems": problems})
    return 1 if problems else 0


def _push(args: argparse.Namespace) -> int:
    return _copy(args.folder, args.store, args.key)


def _pull(args: argparse.Namespace) -> int:
    return _copy(args.store, args.folder, args.key)


def _copy(source: str, target: str, key: str | None) -> int:
    from compile.bundle_store import copy_bundle

    origin = _open(source)
    chosen = _chosen(origin, key)
    destination = _open(target, create=True)
    for bundle in chosen:
        new = copy_bundle(origin, destination, bundle, lambda line: print(line, file=sys.stderr, flush=True))
        print(f"{destination.location}: bundle {bundle.key[:12]} {'copied' if new else 'is there already'}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from compile.bundle import differences
    from compile.bundle_store import pick_bundle

    store = _open(args.store)
    one, other = pick_bundle(store, args.key1), pick_bundle(store, args.key2)
    lines = differences(one.fields, other.fields)
    for name, here, there in (("only in the first", one, other), ("only in the second", other, one)):
        if extra := sorted(set(here.graphs) - set(there.graphs)):
            lines.append(f"buckets {name}: {', '.join(extra)}")
    if args.json != STDOUT:
        print("\n".join(lines) or "no difference")
    write_json(args.json, lines)
    return 1 if lines else 0


def _export(args: argparse.Namespace) -> int:
    from compile.bundle_archive import export_bundle
    from compile.bundle_store import pick_bundle

    check_file_target("FILE", args.file)
    store = _open(args.store)
    bundle = pick_bundle(store, args.key)
    export_bundle(store, bundle, Path(args.file))
    print(f"{args.file}: bundle {bundle.key[:12]}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from compile.bundle_archive import DEFAULT_MAX_BYTES, import_bundle

    bundle = import_bundle(args.store, Path(args.file), max_bytes=args.max_size or DEFAULT_MAX_BYTES)
    print(f"{args.store}: bundle {bundle.key[:12]}")
    return 0


_ACTIONS: dict[str, tuple[Callable[[argparse.Namespace], int], tuple[str, ...], str]] = {
    "ls": (_ls, ("STORE",), "list bundles"),
    "verify": (_verify, ("STORE", "[KEY]"), "compare every file with its sha256"),
    "push": (_push, ("FOLDER", "STORE", "[KEY]"), "copy bundles from a folder to a store"),
    "pull": (_pull, ("STORE", "FOLDER", "[KEY]"), "copy bundles from a store to a folder"),
    "diff": (_diff, ("STORE", "KEY1", "KEY2"), "fields in which two bundles differ"),
    "export": (_export, ("STORE", "FILE", "[KEY]"), "write one bundle to a .tar or .tar.gz file"),
    "import": (_import, ("FILE", "STORE"), "read a bundle from a .tar or .tar.gz file"),
}
