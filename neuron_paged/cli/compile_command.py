# SPDX-License-Identifier: Apache-2.0
"""Compile a model's graphs for a target into a store, ahead of serving. Needs no weights in memory and no device.

Every bucket is one graph. What the store has already is not compiled again, so an interrupted run is just repeated, and
several machines may run the same command on one s3:// store at the same time: they share the graphs among them.
A graph that fails does not stop the others; the end lists what failed (exit code 1), and the next run tries only that.
cpu: graphs run on this machine's kind of CPU (`generate --bundle STORE`). trn1, inf2, trn2, trn3: needs neuronx-cc, and
nki 0.6 for graphs with this project's NKI kernels.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from neuron_paged.cli.arguments import (
    add_engine_arguments,
    add_model_arguments,
    engine_settings,
    memory_size,
    positive_int,
)
from neuron_paged.cli.early_checks import check_graphs, check_model
from neuron_paged.cli.output import STDOUT, check_json_target, write_json
from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.llm import split_settings
from neuron_paged.env import neuron_cc_flags
from neuron_paged.errors import GraphError, InvalidRequestError

if TYPE_CHECKING:
    from compile.bundle import Fields
    from neuron_paged.engine.bundle_builder import BuildPlan

WAIT_LINE_S = 30.0  # between two lines that say what is waited for
TARGETS = ("cpu", "trn1", "inf2", "trn2", "trn3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `neuron-paged compile`."""
    parser.add_argument("--target", choices=TARGETS, required=True, help="what the graphs are for")
    parser.add_argument("--store", required=True, metavar="STORE", help="a folder or s3://bucket/prefix")
    parser.add_argument(
        "--buckets", nargs="+", metavar="NAME", help="such as decode_table-8x16 prefill_table-8x128x16, or files of "
        "grids (default: ladders from the limits)",
    )  # fmt: skip
    parser.add_argument(
        "--graph-kernels", choices=("cpu", "nki", "plain"), help="operators as custom calls to CPU kernels, or "
        "to NKI kernels (Neuron targets; needs nki 0.6), or as plain operations (default: kernels, without nki plain)",
    )  # fmt: skip
    parser.add_argument("--nki-python", metavar="PATH", help="interpreter that has nki (default: this one)")
    parser.add_argument("--graph-python", metavar="PATH", help="interpreter that has torch_xla (default: this one)")
    parser.add_argument("--tensor-parallel", type=positive_int, default=1, metavar="N", help="ranks (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="show key, buckets and what is missing, compile nothing")
    parser.add_argument(
        "--json", metavar="FILE", help='write the bundle\'s key and graphs as JSON ("-": standard output)'
    )
    group = parser.add_argument_group("compiler")
    group.add_argument("--lnc", type=int, metavar="N", help="logical NeuronCore configuration (default: the target's)")
    group.add_argument(
        "--compiler-flags", default="", metavar="FLAGS", help="as in --compiler-flags='-O1', after NEURON_CC_FLAGS's"
    )
    group.add_argument("--compiler", default="neuronx-cc", metavar="PATH", help="the executable (default: neuronx-cc)")
    group.add_argument(
        "--allow-unknown-compiler", action="store_true", help="take a newer release for the newest known"
    )
    group.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="graphs compiled at once (default: 1)")
    group.add_argument(
        "--memory", type=memory_size, metavar="SIZE", help="budget of all compilers together, e.g. 64GiB"
    )
    group.add_argument("--timeout", type=positive_int, metavar="S", help="seconds per graph or kernel (default: none)")
    group.add_argument("--logs", metavar="FOLDER", help="keeps the logs of failed graphs (default: neuron-paged-logs)")
    group.add_argument(
        "--lease", type=positive_int, default=600, metavar="S",
        help="seconds after which another machine takes over what a dead one claimed (default: 600)",
    )  # fmt: skip
    add_model_arguments(parser)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Settle everything, compile, report."""
    check_json_target(args.json)
    from compile.bundle import bundle_key
    from compile.errors import CompileError, GraphsFailedError
    from compile.store import open_store

    try:
        plan = _plan(args)
        names = [bucket.name for bucket in plan.buckets]
        print(f"bundle {bundle_key(plan.fields, names)[:12]}: {len(names)} graphs for {args.target}", file=sys.stderr)
        for note in _notes(plan, args):
            print(note, file=sys.stderr)
        if args.target != "cpu":
            _check_hbm(plan, args.target)
        if args.dry_run:
            states = _finished(args.store, plan.fields, names)
            if args.json != STDOUT:
                print("\n".join(f"{name}: {'there' if done else 'to compile'}" for name, done in states.items()))
            write_json(args.json, {"key": bundle_key(plan.fields, names), "fields": plan.fields, "graphs": states})
            return 0
        store = open_store(args.store, create=True)
        progress = _Progress(len(names))
        bundle = plan.build(store, batch_size=max(args.jobs, 4), lease_s=args.lease, on_event=progress.report)
    except GraphsFailedError as error:
        print(
            f"{len(error.failures)} of {len(names)} graphs failed, the others are in {store.location}; the same "
            "command tries these again:", file=sys.stderr,
        )  # fmt: skip
        for bucket, reason in sorted(error.failures.items()):
            print(f"  {bucket}: {' '.join(reason.split())}", file=sys.stderr)
        write_json(args.json, {"key": bundle_key(plan.fields, names), "fields": plan.fields, "failed": error.failures})
        return 1
    except CompileError as error:
        raise GraphError(str(error)) from error
    if args.json != STDOUT:
        print(f"{store.location}: bundle {bundle.key[:12]}, {len(bundle.graphs)} graphs, {bundle.num_bytes} bytes")
    write_json(args.json, {"key": bundle.key, "fields": bundle.fields, "graphs": sorted(bundle.graphs)})
    return 0


def _notes(plan: "BuildPlan", args: argparse.Namespace) -> list[str]:
    """What may surprise whoever compiles this."""
    from compile.buckets import CopyBucket
    from neuron_paged.engine.bundle_kernels import COPIED_BLOCKS
    from neuron_paged.engine.named_buckets import planned_otherwise

    notes = []
    if plan.operators.note:
        why = plan.operators.note.rstrip(".")
        note = f"operators become plain operations, not NKI kernels ({why})"
        notes.append(f"{note}. --graph-kernels plain says so without this note.")
    if args.target != "cpu" and not any(isinstance(bucket, CopyBucket) for bucket in plan.operators.buckets):
        name = CopyBucket(COPIED_BLOCKS).name
        notes.append(f"buckets: none copies blocks, so copies (n > 1) go through the host; --buckets {name} adds one.")
    here = {"block_size": plan.fields["cache"]["block_size"]}
    if args.target != "cpu":
        here |= {"target": args.target, "lnc": plan.fields["lnc"], "tensor_parallel_size": args.tensor_parallel}
    lines = planned_otherwise(args.buckets or (), here)
    return notes + [f"{line}: its buckets may hold less and take longer than it says." for line in lines]


def _check_hbm(plan: "BuildPlan", target: str) -> None:
    """InvalidRequestError if a rank's weights and KV cache alone exceed the HBM of its logical core."""
    from neuron_paged.memory import size_text
    from neuron_paged.planning.decoder_model import decoder_model
    from neuron_paged.planning.device_memory import RUNTIME_BYTES
    from neuron_paged.planning.instances import core_hbm_bytes

    model, lnc = plan.operators.model, plan.fields["lnc"]
    sizes, ranks = decoder_model("", model.config), model.tensor_parallel_size
    embedding = 0 if model.config.tie_word_embeddings else sizes.hidden_size * -(-sizes.vocab_size // ranks)
    weights = plan.item_bytes * (sizes.rank_weights(ranks) + embedding)
    cache, there = plan.kv_cache_bytes, core_hbm_bytes(target, lnc) - RUNTIME_BYTES
    if weights + cache > there:
        raise InvalidRequestError(
            f"--target {target}: got weights of {size_text(weights)} and a KV cache of {size_text(cache)} per rank, "
            f"need at most the {size_text(there)} of HBM that a logical core (LNC {lnc}) has for them; lower "
            "--kv-cache-memory or --max-model-len, or give --tensor-parallel more ranks (plan-buckets --instance says "
            "which fit)."
        )


def _finished(location: str, fields: "Fields", names: list[str]) -> dict[str, bool]:
    """Which graphs a store has; a folder that is yet to be made has none."""
    from compile.bundle_store import finished_graph
    from compile.store import open_store

    if not location.startswith("s3://") and not Path(location).expanduser().exists():
        return dict.fromkeys(names, False)
    store = open_store(location)
    return {name: finished_graph(store, fields, name) is not None for name in names}


def _plan(args: argparse.Namespace) -> "BuildPlan":
    if args.weight_dtype != "auto":
        raise InvalidRequestError(
            f"--weight-dtype: got {args.weight_dtype!r}, graphs need auto: weights are in --dtype."
        )
    cache, scheduler = split_settings(engine_settings(args))
    try:
        from compile.neuronx_cc_flags import parse_flags

        _check_early(args)
        from neuron_paged.engine.bundle_builder import CompilerSettings, plan_build

        settings = CompilerSettings(
            lnc=args.lnc,
            flags=parse_flags(args.compiler_flags),
            environment_flags=neuron_cc_flags(),
            max_jobs=args.jobs,
            memory_bytes=args.memory,
            timeout_s=args.timeout,
            executable=args.compiler,
            log_folder=Path(args.logs or "neuron-paged-logs"),
            allow_unknown=args.allow_unknown_compiler,
            nki_python=None if args.nki_python is None else Path(args.nki_python),
        )
        return plan_build(
            args.model,
            args.target,
            dtype=args.dtype,
            cache=CacheConfig(**cache),
            scheduler=SchedulerConfig(**{k: v for k, v in scheduler.items() if k != "max_model_len"}),
            max_model_len=scheduler.get("max_model_len"),
            buckets=args.buckets,
            kernels=args.graph_kernels,
            tensor_parallel_size=args.tensor_parallel,
            python=None if args.graph_python is None else Path(args.graph_python),
            compiler=settings,
        )
    except ValueError as error:  # flags and logical cores; the project's own errors are ValueErrors too
        raise InvalidRequestError(str(error)) from error


def _check_early(args: argparse.Namespace) -> None:
    """Compiler, flags, buckets, model and store, before torch is imported. Raises as plan_build does, or StoreError."""
    from compile.executors import require_jaxlib
    from compile.lower import require_torch_xla
    from compile.neuronx_cc import find_compiler
    from compile.neuronx_cc_flags import check_lnc, flags_by_phase, parse_flags
    from compile.store import check_target, open_store

    check_model(args.model)
    check_graphs(None, args.buckets)
    if args.target == "cpu":
        require_jaxlib()
    else:
        check_lnc(args.target, args.lnc)
        version = find_compiler(args.compiler, allow_unknown=args.allow_unknown_compiler).version
        flags_by_phase(version, neuron_cc_flags(), parse_flags(args.compiler_flags))
    require_torch_xla(None if args.graph_python is None else Path(args.graph_python))
    if not args.dry_run:
        check_target(args.store)
    elif args.store.startswith("s3://"):
        open_store(args.store)


class _Progress:
    """A line per graph on standard error, and one before those that are compiled together."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._next_wait_line = total, 0, 0.0

    def report(self, event: str, bucket: str, text: str) -> None:
        if event == "waiting":
            if time.monotonic() >= self._next_wait_line:
                print(f"waiting: {text}", file=sys.stderr, flush=True)
                self._next_wait_line = time.monotonic() + WAIT_LINE_S
            return
        self._next_wait_line = 0.0
        if event == "begun":
            print(f"lowering and compiling {text}", file=sys.stderr, flush=True)
            return
        self._done += 1
        note = f": {' '.join(text.split())}" if text else ""
        print(f"[{self._done}/{self._total}] {bucket} {event}{note}", file=sys.stderr, flush=True)
