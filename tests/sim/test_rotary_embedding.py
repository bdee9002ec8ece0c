# SPDX-License-Identifier: Apache-2.0
"""rotary_embedding in the strict simulator against its reference in fp64, within twice torch's own error."""

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nki_kernels import simulator
from nki_kernels.rotary_embedding import check_rotary_embedding, rotary_embedding
from nki_kernels.rotary_embedding_ref import rotary_embedding_ref
from nki_kernels.support import UnsupportedShapeError

sys.path.insert(0, str(Path(__file__).parent))
from kernel_arrays import NUMPY, TORCH, assert_as_exact, bits, to_torch  # noqa: E402


def cos_sin_table(max_positions: int, rot_dim: int) -> np.ndarray:
    angle = np.arange(max_positions)[:, None] * 10000.0 ** (-np.arange(0, rot_dim, 2) / rot_dim)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def rotate(x: np.ndarray, positions: np.ndarray, table: np.ndarray, interleaved: bool, dtype) -> np.ndarray:
    """Complex rotation in `dtype`: an oracle that shares no code with the reference."""
    cos, sin = torch.from_numpy(table[positions]).to(dtype)[:, None, :].chunk(2, dim=-1)
    rot_dim = table.shape[1]
    y = to_torch(x).to(dtype).clone()
    first = slice(0, rot_dim, 2) if interleaved else slice(0, rot_dim // 2)
    second = slice(1, rot_dim, 2) if interleaved else slice(rot_dim // 2, rot_dim)
    a, b = y[..., first].clone(), y[..., second].clone()
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y.double().numpy()


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rot_dim", "dtype"),
    [
        (1, 4, 1, 64, 64, "float32"),
        (5, 32, 8, 128, 128, "bfloat16"),
        (128, 6, 2, 96, 32, "float16"),
        (200, 8, 2, 128, 64, "bfloat16"),
        (33, 3, 3, 256, 256, "bfloat16"),
        (300, 2, 1, 80, 80, "float32"),
    ],
)
def test_rotation(target, interleaved, num_tokens, num_heads, num_kv_heads, head_dim, rot_dim, dtype):
    rng = np.random.default_rng(num_tokens)
    query = rng.standard_normal((num_tokens, num_heads, head_dim)).astype(NUMPY[dtype])
    key = rng.standard_normal((num_tokens, num_kv_heads, head_dim)).astype(NUMPY[dtype])
    positions = rng.integers(0, 5000, num_tokens).astype(np.int32)
    positions[0] = 4999
    table = cos_sin_table(5000, rot_dim)
    result = simulator.run(
        rotary_embedding, positions, query, key, table, interleaved=interleaved, target=target, strict=True
    )
    assert result.report.diagnostics == []
    for x, actual in zip((query, key), result.outputs, strict=True):
        exact = rotate(x, positions, table, interleaved, torch.float64)
        assert_as_exact(actual, rotate(x, positions, table, interleaved, TORCH[dtype]), exact)
        np.testing.assert_array_equal(bits(actual[..., rot_dim:]), bits(x[..., rot_dim:]))
    reference = rotary_embedding_ref(
        *(to_torch(x) for x in (positions, query, key, table)), interleaved=interleaved
    )
    for x, ref in zip((query, key), reference, strict=True):
        np.testing.assert_allclose(ref, rotate(x, positions, table, interleaved, torch.float64), atol=1e-5)


def test_two_cores_rotate_half_of_the_tokens_each():
    rng = np.random.default_rng(1)
    query, key = (rng.standard_normal((301, heads, 64)).astype(NUMPY["bfloat16"]) for heads in (4, 2))
    arguments = rng.integers(0, 500, 301).astype(np.int32), query, key, cos_sin_table(500, 64)
    one, two = (simulator.run(rotary_embedding, *arguments, grid=cores, strict=True) for cores in (1, 2))
    for x, y in zip(one.outputs, two.outputs, strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))
    assert two.report.total_ns < 0.8 * one.report.total_ns


def test_parameters_are_those_of_the_reference():
    ours = inspect.signature(rotary_embedding.__wrapped__).parameters
    assert list(ours) == list(inspect.signature(rotary_embedding_ref).parameters)


def test_a_position_past_the_table_is_an_error():
    query = np.ones((2, 1, 64), np.float32)
    with pytest.raises(simulator.OutOfBoundsError, match="index 10"):
        simulator.run(rotary_embedding, np.array([3, 10], np.int32), query, query, cos_sin_table(10, 64), strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rot_dim": 130}, "rot_dim: got 130, need 2..128. Nearest supported: 128."),
        ({"rot_dim": 31}, "rot_dim: got 31, need an even number. Nearest supported: 30."),
        ({"num_heads": 96}, "num_heads + num_kv_heads: got 104, need 1..64. Nearest supported: 64."),
        ({"dtype": "float8_e4m3"}, "dtype: got float8_e4m3"),
    ],
)
def test_unsupported_shapes_are_refused_by_name(change, message):
    shape = {
        "num_tokens": 8,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rot_dim": 128,
        "max_positions": 4096,
        "dtype": "bfloat16",
    }
    check_rotary_embedding(**shape)
    with pytest.raises(UnsupportedShapeError) as error:
        check_rotary_embedding(**(shape | change))
    assert message in str(error.value)
