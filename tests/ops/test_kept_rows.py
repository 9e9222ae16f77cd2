"""Row norms are accurate, and an outer product multiplies out to the gradient it stands for."""

import numpy as np
import pytest
import torch

from leantune.ops.rows import KeptRows, OuterProduct, row_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_norms_accumulate_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(7, 4096, generator=generator) * 100).to(dtype)
    exact = np.array([np.sqrt((row**2).sum()) for row in x.double().numpy()])
    norms = row_norms(x)
    assert norms.dtype == torch.float32
    # The sum of squares of a half-precision row exceeds 65504, float16's largest number.
    error = np.abs(norms.double().numpy() / exact - 1).max()
    assert error < 1e-6
    rounded = np.abs(norms.to(torch.bfloat16).double().numpy() / exact - 1).max()
    assert not rounded < 1e-6


def test_row_norms_of_no_rows() -> None:
    assert row_norms(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outer_product_multiplies_out(dtype: torch.dtype) -> None:
    grad_rows, input_rows = torch.randn(9, 5, dtype=dtype), torch.randn(9, 3, dtype=dtype)
    got = OuterProduct(grad_rows, input_rows).dense()
    exact = sum(
        torch.outer(g, x) for g, x in zip(grad_rows.double(), input_rows.double(), strict=True)
    )
    assert got.shape == (5, 3) and got.dtype == dtype
    bound = 9 * torch.finfo(dtype).eps
    assert float((got.double() - exact).norm() / exact.norm()) <= bound
    assert not float((got.double() * 1.1 - exact).norm() / exact.norm()) <= bound


def test_scale_is_applied_outside_the_range_of_float16() -> None:
    grad_rows, input_rows = torch.full((1, 2), 100.0).half(), torch.full((1, 3), 100.0).half()
    scaled = OuterProduct(grad_rows, input_rows, torch.tensor(1000.0)).dense()
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.full((2, 3), 1e7))
    # The control: with the scale in the factors nothing finite is left.
    assert OuterProduct(grad_rows * 1000, input_rows).dense().isinf().all()


def test_kept_rows_without_indices_are_the_whole_input() -> None:
    x = torch.randn(2, 3, 4)
    kept = KeptRows(x)
    assert kept.rows is x and kept.indices is None and kept.weights is None
