"""Who works on rows: the reference, or the kernels, by device, dtype and environment."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leantune.errors import ConfigError, UnsupportedError
from leantune.ops import backend, rows

ON_CPU = torch.zeros(2, 2)


def on_cuda(dtype: torch.dtype) -> Tensor:
    return cast(Tensor, _Like(dtype))


class _Like(Tensor):
    """What the choice asks of a tensor, answered as on a GPU."""

    @staticmethod
    def __new__(cls: Any, dtype: torch.dtype) -> Any:
        return torch.Tensor._make_subclass(cls, torch.zeros(1, dtype=dtype))

    device = cast(Any, SimpleNamespace(type="cuda"))


@pytest.fixture
def kernels() -> Any:
    return pytest.importorskip("leantune.ops.rows_triton")


def test_the_device_and_the_dtype_choose(kernels: Any) -> None:
    assert backend.row_functions(ON_CPU) is rows
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert backend.row_functions(on_cuda(dtype)) is kernels
    assert backend.row_functions(on_cuda(torch.float64)) is rows
    with FakeTensorMode():
        assert backend.row_functions(torch.empty(2, 2, device="cuda")) is rows


def test_without_triton_the_reference_serves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert backend.row_functions(on_cuda(torch.float32)) is rows
    assert backend.num_launches() == 0


def test_the_environment_can_do_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_FORCED", "reference")
    assert backend.row_functions(on_cuda(torch.float32)) is rows


def test_the_interpreter_serves_the_cpu_if_asked(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_IS_INTERPRETED", True)
    assert backend.row_functions(ON_CPU) is rows
    monkeypatch.setattr(backend, "_FORCED", "triton")
    assert backend.row_functions(ON_CPU) is kernels
    assert backend.row_functions(ON_CPU.double()) is rows


def test_what_cannot_be_done_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_FORCED", "cuda")
    with pytest.raises(ConfigError, match=r"LEANTUNE_KERNELS: must be .* got 'cuda'"):
        backend.row_functions(ON_CPU)
    monkeypatch.setattr(backend, "_FORCED", "triton")
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    with pytest.raises(UnsupportedError, match="a tensor lies on cpu; unset it"):
        backend.row_functions(ON_CPU)
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.raises(UnsupportedError, match="triton is not installed"):
        backend.row_functions(on_cuda(torch.float32))
