# SPDX-License-Identifier: Apache-2.0
"""Small bundles for tests of stores, and a process that publishes or copies one and can be killed at any moment."""

import random
import sys

from compile.bundle import Bundle, Graph
from compile.bundle_store import copy_bundle, list_bundles, publish_bundle, publish_graph
from compile.store import Store, open_store

FIELDS = {
    "model": {"config": {"num_layers": 2, "rope": [1.0, 0.5]}, "num_blocks": 24},
    "target": "trn2",
    "compiler": "neuronx-cc 2.27.5334.0",
    "kernels": "ab" * 32,
    "flags": {"decode": ["--optlevel=2"], "prefill": ["--optlevel=1"]},
    "tensor_parallel": 1,
}
BUCKETS = ("decode_table-2x4", "prefill_table-1x16x4")


def graph_files(bucket: str, num_bytes: int = 50_000, salt: int = 0) -> dict[str, bytes]:
    """Files as of one graph. salt: two compilers' NEFFs of one graph differ."""
    common = random.Random(bucket).randbytes(2000)
    neff = random.Random(f"{bucket}{salt}").randbytes(num_bytes)
    return {"graph.hlo": common, "graph.neff": neff, "kernels/k.bin": b"kernel", "manifest.json": bucket.encode()}


def publish(store: Store, fields: dict = FIELDS, *, num_bytes: int = 50_000, salt: int = 0) -> Bundle:
    """Publish a whole bundle, as `neuron-paged compile` does."""
    graphs: dict[str, Graph] = {}
    for bucket in BUCKETS:
        graphs[bucket] = publish_graph(store, fields, bucket, graph_files(bucket, num_bytes, salt))
    bundle = Bundle(fields, graphs, {"by": f"writer {salt}"})
    publish_bundle(store, bundle)
    return bundle


def main() -> None:
    """publish STORE BYTES SALT | copy SOURCE TARGET"""
    if sys.argv[1] == "publish":
        publish(open_store(sys.argv[2], create=True), num_bytes=int(sys.argv[3]), salt=int(sys.argv[4]))
    else:
        source, target = open_store(sys.argv[2]), open_store(sys.argv[3], create=True)
        for bundle in list_bundles(source)[0]:
            copy_bundle(source, target, bundle)


if __name__ == "__main__":
    main()
