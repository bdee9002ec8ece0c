# SPDX-License-Identifier: Apache-2.0
"""A build of small graphs with the stand-in compiler, and a process that runs one on a store beside others."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from compile.build import Build, NeuronBackend
from compile.bundle import Bundle
from compile.claims import Claims
from compile.lowered_graph import LoweredGraph, Manifest
from compile.neuronx_cc import find_compiler
from compile.neuronx_cc_flags import default_flags
from compile.store import Store, open_store

STAND_IN = Path(__file__).parent / "stand_ins" / "neuronx-cc"
FIELDS = {"model": {"layers": 2}, "target": "trn2", "lnc": 2, "compiler": "neuronx-cc 2.27.5334.0"}
BUCKETS = [f"decode_table-{n}x4" for n in range(1, 9)]


def lower(names: Sequence[str], mark: bytes = b"SLOW") -> list[LoweredGraph]:
    """Graphs whose bytes steer the stand-in; a bucket named "…-13x…" can't be compiled."""
    return [
        LoweredGraph(name.encode() + (b"EVRF015" if "-13x" in name else mark), Manifest(name, (), (), {}))
        for name in names
    ]


def build(store: Store, buckets: Sequence[str] = BUCKETS, **options) -> Build:
    compiler = find_compiler(str(STAND_IN))
    flags = {phase: default_flags(phase, compiler.version) for phase in ("prefill", "decode")}
    backend = NeuronBackend(compiler, "trn2", 2, flags, max_jobs=2, timeout_s=options.pop("timeout_s", 60))
    claims = Claims(store, lease_s=options.pop("lease_s", 600.0))
    return Build(
        store, FIELDS, buckets, options.pop("lower", lower), backend, claims, batch_size=2, wait_s=0.1, **options
    )


def starts() -> list[str]:
    """Buckets that compilers were started for, in order; STAND_IN_STARTS names their file."""
    path = Path(os.environ["STAND_IN_STARTS"])
    return [line.split()[1].rpartition("-")[0] for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """STORE LEASE"""
    bundle: Bundle = build(open_store(sys.argv[1], create=True), lease_s=float(sys.argv[2])).run()
    print(bundle.key)


if __name__ == "__main__":
    main()
