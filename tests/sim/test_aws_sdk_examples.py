# SPDX-License-Identifier: Apache-2.0
"""The SDK documentation's example kernels, unchanged, against fp64 numpy. Needs AWS_NEURON_SDK_PATH."""

import sys
from pathlib import Path

import numpy as np
import pytest

from nki_kernels import simulator

sys.path.insert(0, str(Path(__file__).parent))
from aws_kernels import relative_error, sdk_example  # noqa: E402

TARGETS = ["trn1", "trn2", "trn3"]


@pytest.mark.parametrize("target", TARGETS)
def test_tensor_addition(target):
    kernel = sdk_example("tensor_addition/tensor_addition_nki_kernels.py").nki_tensor_add
    a, b = np.random.default_rng(0).standard_normal((2, 256, 1024), dtype=np.float32)
    np.testing.assert_array_equal(simulator.run(kernel, a, b, target=target).outputs, a + b)


@pytest.mark.parametrize("target", TARGETS)
def test_transpose2d(target):
    kernel = sdk_example("transpose2d/transpose2d_nki_kernels.py").tensor_transpose2D_kernel_
    a = np.arange(60, dtype=np.int8).reshape(5, 12)
    out = simulator.run(kernel, a, (3, 4), target=target).outputs
    np.testing.assert_array_equal(out, a.reshape(5, 3, 4).transpose(0, 2, 1).reshape(5, 12))


@pytest.mark.parametrize("target", TARGETS)
def test_average_pool(target):
    kernel = sdk_example("average_pool2d/average_pool2d_nki_kernels.py").tensor_avgpool_kernel
    a = np.arange(72, dtype=np.float16).reshape(2, 6, 6)
    out = simulator.run(kernel, a, 2, target=target).outputs
    np.testing.assert_array_equal(out, a.reshape(2, 3, 2, 3, 2).mean(axis=(2, 4)))


MATMULS = [
    ("basic", 128, 64, 512),
    ("tiled", 256, 256, 1024),
    ("hoist_load", 256, 256, 1024),
    ("block_free_dimension", 256, 512, 2048),
    ("fully_optimized", 1024, 2048, 1024),
]


@pytest.mark.parametrize("target", ["trn1", "trn2"])
@pytest.mark.parametrize("name,k,m,n", MATMULS)
def test_matmul(name, k, m, n, target):
    module = sdk_example("matrix_multiplication/matrix_multiplication_nki_kernels.py")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((k, m), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)
    out = simulator.run(getattr(module, f"nki_matmul_{name}_"), a, b, target=target).outputs
    assert relative_error(out, a.astype(np.float64).T @ b) < 1e-6


@pytest.mark.parametrize("version", [1, 2, 3])
def test_mamba(version):
    kernel = getattr(sdk_example("fused_mamba/mamba_nki_kernels.py"), f"mamba_v{version}")
    rng = np.random.default_rng(2)
    batch, channels, states, length = 1, 128, 3, 512
    delta = 0.1 * rng.random((batch, channels, length), dtype=np.float32)
    u = rng.standard_normal((batch, channels, length), dtype=np.float32)
    a = -rng.random((channels, states), dtype=np.float32)
    b, c = rng.standard_normal((2, batch, states, length), dtype=np.float32)
    expected = np.zeros((batch, channels, length))
    for s in range(states):
        state = np.zeros((batch, channels))
        for t in range(length):
            state = (
                np.exp(delta[:, :, t].astype(np.float64) * a[:, s]) * state + delta[:, :, t] * u[:, :, t] * b[:, s, t]
            )
            expected[:, :, t] += state * c[:, s, t]
    assert relative_error(simulator.run(kernel, delta, u, a, b, c).outputs, expected) < 1e-5
