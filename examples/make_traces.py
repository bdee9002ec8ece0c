# SPDX-License-Identifier: Apache-2.0
"""Writes the sample traces beside this file, examples/traces/: the input of `neuron-paged plan-buckets --trace`.

Length distributions and rates are those of `neuron-paged bench buckets`; the seed is fixed, so the files never change.
A trace of your own has the same fields, taken from a server's log.
"""

import sys
from pathlib import Path

from neuron_paged.bench.traffic import sample_trace
from neuron_paged.planning.trace import write_trace

SEED = 17
FILES = {"sharegpt.csv": ("sharegpt", 400), "alpaca.csv": ("alpaca", 400), "long.jsonl": ("long", 300)}


def main(folder: Path) -> None:
    for name, (sample, num_requests) in FILES.items():
        write_trace(folder / name, sample_trace(sample, num_requests, SEED))
        print(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "traces")
