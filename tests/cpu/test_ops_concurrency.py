# SPDX-License-Identifier: Apache-2.0
"""The CPU operators from several threads, in a forked child, with and without OpenMP, and with a cold cache."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from neuron_paged.ops.cpu_kernels import openmp
from tests.cpu.ops_oracle import Shape, make_case

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import os, sys
import torch
from tests.cpu.ops_oracle import Shape, assert_accurate, make_case
import neuron_paged.ops
case = make_case(Shape((900, 40), (9, 1)))
assert_accurate(case, case.run())
{body}
print("right")
"""


def run_child(body="", **environment):
    result = subprocess.run(
        [sys.executable, "-c", CHILD.format(body=body)],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "right"


def test_two_python_threads_get_their_own_answers():
    cases = [make_case(Shape((700, 3, 90), (1, 3, 40), seed=seed)) for seed in range(4)]
    expected = [case.run() for case in cases]
    wrong = []

    def call(index):
        for _ in range(30):
            if not torch.equal(cases[index].run(), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_computes_without_the_parents_threads():
    run_child(  # the child compares with numpy, because torch's own operators may wait for the missing threads
        """
import numpy as np
expected = case.run().numpy()
child = os.fork()
if child == 0:
    os._exit(0 if np.allclose(case.run().numpy(), expected, atol=1e-6) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert np.array_equal(case.run().numpy(), expected)
"""
    )


def test_worker_runs_on_torchs_openmp_pool_or_python_threads():
    """Whichever is found, calls are right; on Linux torch's wheels bring GNU OpenMP."""
    if sys.platform == "linux":
        assert openmp.runtime_name() == "torch's OpenMP pool"
    run_child(
        """
from neuron_paged.ops.cpu_kernels import openmp
openmp._gomp_parallel = lambda: None
torch.set_num_threads(3)
assert openmp.runtime_name() == "Python threads"
assert_accurate(case, case.run())
"""
    )


@pytest.mark.slow
def test_compiles_into_a_cold_cache_and_again_from_it(tmp_path):
    run_child(NUMBA_CACHE_DIR=str(tmp_path))
    compiled = sorted(path.name for path in tmp_path.rglob("*.nbc"))
    assert compiled
    run_child(NUMBA_CACHE_DIR=str(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*.nbc")) == compiled
