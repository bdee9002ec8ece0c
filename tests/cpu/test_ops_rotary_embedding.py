# SPDX-License-Identifier: Apache-2.0
"""rotary_embedding on the CPU against its reference and against complex multiplication in fp64."""

import pytest
import torch

import neuron_paged.ops  # noqa: F401
from nki_kernels.rotary_embedding_ref import rotary_embedding_ref

OPS = torch.ops.neuron_paged


def angles(max_positions=200, rot_dim=64):
    inverse_frequencies = 10000.0 ** (-torch.arange(0, rot_dim, 2).double() / rot_dim)
    return torch.arange(max_positions).double()[:, None] * inverse_frequencies


def cos_sin(max_positions=200, rot_dim=64):
    angle = angles(max_positions, rot_dim)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def by_complex_numbers(positions, x, rot_dim, interleaved):
    rotated, rest = x.double()[..., :rot_dim], x.double()[..., rot_dim:]
    pairs = rotated.unflatten(-1, (-1, 2)) if interleaved else rotated.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles(200, rot_dim)[positions.long()])[:, None]
    pairs = torch.view_as_real(turned)
    return torch.cat([pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2), rest], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, rot_dim", [(64, 64), (80, 80), (96, 32), (128, 128), (33, 6)])
@pytest.mark.parametrize("num_tokens", [1, 7, 150])
def test_rotary_embedding_accurate(dtype, interleaved, head_dim, rot_dim, num_tokens):
    positions = torch.randint(0, 200, (num_tokens,), dtype=torch.int32)
    query, key = (torch.randn(num_tokens, heads, head_dim).to(dtype) for heads in (9, 3))
    table = cos_sin(200, rot_dim)
    reference = rotary_embedding_ref(positions, query, key, table, interleaved=interleaved)
    got = OPS.rotary_embedding(positions, query, key, table, interleaved=interleaved)
    for x, y, source in zip(got, reference, (query, key), strict=True):
        truth = by_complex_numbers(positions, source, rot_dim, interleaved)
        assert x.dtype == dtype and x.shape == source.shape
        assert (y.double() - truth).abs().max() < 1e-5
        baseline = (truth.to(dtype).double() - truth).abs().max()
        assert (x.double() - truth).abs().max() <= 2 * baseline + 1e-5


def test_rotary_embedding_views_of_fused_projection_and_inputs_untouched():
    fused = torch.randn(70, 15, 64)
    before = fused.clone()
    positions = torch.arange(70, dtype=torch.int32)
    got = OPS.rotary_embedding(positions, fused[:, :9], fused[:, 9:12], cos_sin())
    expected = OPS.rotary_embedding(positions, fused[:, :9].contiguous(), fused[:, 9:12].contiguous(), cos_sin())
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert torch.equal(fused, before)


@pytest.mark.parametrize("bad", [-1, 200, 2**31 - 1])
def test_rotary_embedding_bad_position(bad):
    query, key = torch.randn(2, 9, 64), torch.randn(2, 3, 64)
    with pytest.raises(ValueError, match=r"positions\[1\]: got -?\d+, need 0\.\.199"):
        OPS.rotary_embedding(torch.tensor([0, bad], dtype=torch.int32), query, key, cos_sin())
