"""Every kernel compiles for an A100 and an H100, on any machine, as it would be launched."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leantune.ops.random import RandomKey

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("leantune.ops.rows_triton")

MOST_SPILLED_BYTES = 64
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
FEW, MANY = 1000, 16384
"""Rows that four warps select from, and more."""
KEY = RandomKey(1, torch.zeros((), dtype=torch.int64, device="meta"))


def new(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def draw_in_forward(n: int, d: int, dtype: torch.dtype) -> None:
    kernels.draw_rows(new(n, d, dtype=dtype), max(n // 10, 1), KEY, grad=new(max(n // 8, 1)))


def draw_in_backward(n: int, d: int, dtype: torch.dtype) -> None:
    x, grad = new(n, d, dtype=dtype), new(n, d, dtype=dtype)
    kernels.draw_rows(x, n // 10, KEY, grad=grad, real=new(n, dtype=torch.bool), floor=0.1)


def sample(n: int, d: int, dtype: torch.dtype) -> None:
    kernels.sample_rows(new(n), n // 10, KEY)


def sample_wta(n: int, d: int, dtype: torch.dtype) -> None:
    kernels.sample_rows(new(n), n // 10, KEY, estimator="wta")


def sample_crs(n: int, d: int, dtype: torch.dtype) -> None:
    kernels.sample_rows(new(n), n // 10, KEY, real=new(n, dtype=torch.bool), estimator="crs")


def sample_topk(n: int, d: int, dtype: torch.dtype) -> None:
    kernels.sample_rows(new(n), n // 10, KEY, estimator="topk")


def score(n: int, d: int, dtype: torch.dtype) -> None:
    kernels.row_norms(new(n, d, dtype=dtype))


def pick(n: int, d: int, dtype: torch.dtype) -> None:
    kernels.pick_rows(new(n, d, dtype=dtype), new(9, dtype=torch.int32), new(9), dtype)


def update(n: int, d: int, dtype: torch.dtype) -> None:
    kernels.update_norms(new(max(n // 8, 1)), new(n), 0.9, new(n, dtype=torch.bool))


# Each width of a tile and each dtype; a width that is no multiple of 16 loads number by number.
TILES = [(2048, BRAIN), (2048, FULL), (200, HALF), (50, FULL), (333, BRAIN)]
SAMPLES = sample, sample_wta, sample_crs, sample_topk
CASES = [
    *((draw_in_backward, n, d, dtype) for n in (FEW, MANY) for d, dtype in TILES),
    *((draw_in_forward, MANY, 2048, dtype) for dtype in (HALF, BRAIN, FULL)),
    *((call, n, 0, FULL) for call in SAMPLES for n in (FEW, MANY)),
    *((score, MANY, d, dtype) for d, dtype in TILES),
    *((pick, MANY, d, dtype) for d, dtype in TILES),
    *((update, n, 0, FULL) for n in (FEW, MANY)),
    *((call, 1, 1, FULL) for call in (draw_in_forward, pick, update)),
]
NAMES = [f"{call.__name__}-{n}-{d}-{str(dtype)[6:]}" for call, n, d, dtype in CASES]
QUICK = [(draw_in_forward, MANY, 2048, BRAIN), (pick, MANY, 333, BRAIN), (update, MANY, 0, FULL)]


def source_of(kernel: Any, args: tuple[Any, ...]) -> Any:
    """Return a kernel as these arguments would have it compiled at a launch."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, (param, arg) in enumerate(zip(kernel.params, args, strict=True)):
        specializes = not param.do_not_specialize
        if param.is_constexpr or arg is None or (specializes and isinstance(arg, int) and arg == 1):
            signature[param.name], constants[(place,)] = "constexpr", arg
            continue
        if isinstance(arg, Tensor):
            signature[param.name] = TYPES[arg.dtype]
        else:
            of_value = "fp32" if isinstance(arg, float) else "i32"
            signature[param.name] = param.annotation_type or of_value
        is_aligned = isinstance(arg, Tensor) or (isinstance(arg, int) and arg % 16 == 0)
        if specializes and is_aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(kernel, signature, constants, attributes)


def build(
    call: Callable[..., None],
    size: tuple[Any, ...],
    arch: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Any,
    **options: int,
) -> tuple[int, int]:
    """Compile what a call would launch; return its registers, and the bytes that it spills."""
    launches = []

    def launch(kernel: Any, grid: Any, where: Tensor, *args: Any, num_warps: int) -> None:
        launches.append((kernel, args, num_warps))

    monkeypatch.setattr(kernels, "_launch", launch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    call(*size)
    ((kernel, args, num_warps),) = launches
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    source = source_of(kernel, args)
    options = {"num_warps": num_warps, **kernels._OPTIONS, **options}
    built = triton.compile(source, target=target, options=options)
    assert built.asm["cubin"]
    log = capfd.readouterr().out
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", log)]
    assert len(registers) == len(spilled) == 1, log
    print(f"{registers[0]} registers, {spilled[0]} bytes spilled, {built.metadata.shared} shared")
    return registers[0], spilled[0]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case[0].__name__)
def test_the_usual_launches_compile(
    case: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Any,
) -> None:
    _, spilled = build(case[0], case[1:], 90, monkeypatch, capfd, tmp_path)
    assert spilled <= MOST_SPILLED_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_launch_compiles(
    case: tuple[Any, ...],
    arch: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Any,
) -> None:
    registers, spilled = build(case[0], case[1:], arch, monkeypatch, capfd, tmp_path)
    assert registers > 0 and spilled <= MOST_SPILLED_BYTES


def test_spills_are_seen(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    _, spilled = build(update, (MANY, 0, FULL), 90, monkeypatch, capfd, tmp_path, maxnreg=24)
    assert spilled > MOST_SPILLED_BYTES


def test_a_kernel_that_does_not_build_is_seen(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    def broken(n: int) -> None:
        kernels._launch(kernels._pick, (1,), KEY.counter, *[None] * 9, num_warps=4)

    with pytest.raises(triton.CompilationError):
        build(broken, (1,), 90, monkeypatch, capfd, tmp_path)


class Kernel:
    """Stands for one of Triton's, and notes which way it was launched and with what."""

    __name__ = "kernel"
    params = tuple(SimpleNamespace(num=i, do_not_specialize=i == 1) for i in range(3))

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.launched.append(("looked at", grid, args))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: self.kernel.launched.append(("compiled", grid, args))


def test_what_was_compiled_is_launched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, where = Kernel(), SimpleNamespace(is_cuda=True, get_device=lambda: 0)
    rows = torch.zeros(64)
    assert rows.data_ptr() % 16 == 0

    def launch(*args: Any) -> str:
        kernels._launch(kernel, (7,), where, *args, num_warps=4)
        how, grid, seen = kernel.launched[-1]
        assert grid == ((7,) if how == "looked at" else (7, 1, 1)) and seen is not args
        assert all(a is b for a, b in zip(seen, args, strict=True))
        return how

    assert launch(rows, 3, 16) == "looked at"
    # The second argument is one that no kernel is compiled for.
    assert launch(torch.ones(64), 4, 16) == "compiled"
    assert launch(rows[1:], 3, 16) == "looked at"  # not aligned
    assert launch(rows.double(), 3, 16) == "looked at"
    assert launch(None, 3, 16) == "looked at"
    assert launch(rows, 3, 17) == "looked at"
    assert launch(rows[1:], 9, 16) == launch(rows, 9, 17) == "compiled"
