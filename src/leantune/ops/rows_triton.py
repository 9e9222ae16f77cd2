"""Triton kernels of :mod:`leantune.ops.rows`: the same functions, each in one launch.

Dimension letters: n rows, k kept rows, d features, t token positions.

Rows are float16, bfloat16 or float32. Equal scores and keys give the bits of the reference where no
floor is mixed in; norms agree to the rounding of float32 sums. Where a score is not finite, which
rows are drawn beside the NaN weights differs.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from itertools import cycle
from operator import itemgetter
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling

from leantune.errors import UnsupportedError
from leantune.ops.draw_triton import draw
from leantune.ops.launches_triton import sees_launches
from leantune.ops.random import RandomKey, mixed
from leantune.ops.rows import Estimator

LAUNCHES = Counter[str]()
"""How often each kernel was launched."""

_NUM_TICKETS = 4096
"""Draws that may be under way at once: each takes its turn's ticket, and leaves it at 0."""
_turn = cycle(range(_NUM_TICKETS))

_SPAN = 16384
"""Scores that a program goes over at a time where they need not be in order: in flight at once."""
_OPTIONS = {"enable_fp_fusion": True}
"""What Triton does by itself up to 3.9, which warns that a later version will not."""


@triton.jit(do_not_specialize=["k"])
def _pick(
    grad_ptr,
    stride,
    indices_ptr,
    weights_ptr,
    out_ptr,
    k,
    d,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gather ROWS rows of WIDTH columns and multiply each by its weight in float32."""
    first = tl.program_id(0) * ROWS
    slots = first + tl.arange(0, ROWS)
    in_range = tl.arange(0, ROWS) < k - first
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = in_range[:, None] & (columns < d)[None, :]
    starts = tl.load(indices_ptr + slots, in_range, 0).to(tl.int64) * stride
    weights = tl.load(weights_ptr + slots, in_range, 0.0)
    grad = tl.load(grad_ptr + starts[:, None] + columns[None, :], here, 0.0).to(tl.float32)
    places = slots.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(out_ptr + places, (grad * weights[:, None]).to(out_ptr.dtype.element_ty), here)


@triton.jit
def _update(
    guess_ptr,
    norms_ptr,
    real_ptr,
    n,
    t,
    decay,
    SEQUENCES: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Average squared norms over everything, then at POSITIONS positions, whose guess is moved."""
    BLOCK: tl.constexpr = SEQUENCES * POSITIONS
    offsets = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        here = offsets < n - first
        if real_ptr is not None:
            here &= tl.load(real_ptr + first + offsets, here, 0).to(tl.int1)
        norm = tl.load(norms_ptr + first + offsets, here, 0.0)
        squares += norm * norm
        counts += here.to(tl.int32)
    mean = tl.sum(squares, 0) / tl.sum(counts, 0).to(tl.float32)
    positions = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    sequences = tl.arange(0, SEQUENCES)
    square = tl.zeros((SEQUENCES, POSITIONS), tl.float32)
    count = tl.zeros((SEQUENCES, POSITIONS), tl.int32)
    for first in range(0, n // t, SEQUENCES):
        here = (sequences < n // t - first)[:, None] & (positions < t)[None, :]
        places = (first + sequences).to(tl.int64)[:, None] * t + positions[None, :]
        if real_ptr is not None:
            here &= tl.load(real_ptr + places, here, 0).to(tl.int1)
        norm = tl.load(norms_ptr + places, here, 0.0)
        square += norm * norm
        count += here.to(tl.int32)
    ratio = tl.sum(square, 0) / tl.sum(count, 0).to(tl.float32) / mean
    guess = tl.load(guess_ptr + positions, positions < t, 0.0)
    new = tl.sqrt_rn(decay * guess * guess + (1.0 - decay) * ratio)
    # A position without a real row has a ratio of NaN; an infinite mean would make ratios 0.
    is_known = new + 0.0 * mean < float("inf")
    tl.store(guess_ptr + positions, new, (positions < t) & is_known)


F = TypeVar("F", bound=Callable[..., Any])


def _registered(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Register a launcher as an operation, which is what a compiler gets to see.

    Eager calls go straight to the launcher: an operation costs the host several times as much.
    """

    def register(eager: F) -> F:
        name = f"leantune::{eager.__name__.removeprefix('_')}"
        operation = torch.library.custom_op(name, eager, mutates_args=mutates)
        operation.register_fake(fake)

        @wraps(eager)
        def call(*args: Any) -> Any:
            return operation(*args) if is_compiling() else eager(*args)

        return cast(F, call)

    return register


def row_norms(x2d: Tensor) -> Tensor:
    """See :func:`leantune.ops.rows.row_norms`."""
    return score_rows(x2d)


@_registered(lambda x2d, grad=None: x2d.new_empty(len(x2d), dtype=torch.float32))
def score_rows(x2d: Tensor, grad: Tensor | None = None) -> Tensor:
    """See :func:`leantune.ops.rows.score_rows`."""
    scores = torch.empty(len(x2d), dtype=torch.float32, device=x2d.device)
    _launch_draw(x2d, grad, None, scores)
    return scores


def draw_rows(
    x2d: Tensor,
    k: int,
    key: RandomKey,
    *,
    grad: Tensor | None = None,
    real: Tensor | None = None,
    floor: float = 0.0,
    estimator: Estimator = "systematic",
) -> tuple[Tensor, Tensor]:
    """See :func:`leantune.ops.rows.draw_rows`."""
    seed, stream = _signed(key.seed), _signed(key.stream)
    return _draw_rows(x2d, grad, real, key.counter, seed, stream, k, floor, estimator)


def sample_rows(
    scores: Tensor,
    k: int,
    key: RandomKey,
    *,
    real: Tensor | None = None,
    floor: float = 0.0,
    estimator: Estimator = "systematic",
) -> tuple[Tensor, Tensor]:
    """See :func:`leantune.ops.rows.sample_rows`."""
    seed, stream = _signed(key.seed), _signed(key.stream)
    return _draw_rows(None, scores, real, key.counter, seed, stream, k, floor, estimator)


def _empty_draw(counter: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # Where nothing is launched, rows are picked all the same.
    make = torch.zeros if sees_launches() else torch.empty
    indices = make(k, dtype=torch.int32, device=counter.device)
    return indices, torch.empty(k, dtype=torch.float32, device=counter.device)


@_registered(lambda *args: _empty_draw(args[3], args[6]))
def _draw_rows(
    x2d: Tensor | None,
    grad: Tensor | None,
    real: Tensor | None,
    counter: Tensor,
    seed: int,
    stream: int,
    k: int,
    floor: float,
    estimator: str,
) -> tuple[Tensor, Tensor]:
    source = grad if x2d is None else x2d
    assert source is not None
    n, device = source.shape[0], source.device
    assert 1 <= k <= n, (k, n)
    scratch = torch.empty(n, dtype=torch.float32, device=device)
    indices, weights = _empty_draw(counter, k)
    edges = None
    if estimator != "systematic":
        edges = torch.empty(n, dtype=torch.int64, device=device)
    share = floor / (1 - floor) if floor > 0 else None
    word, tickets = _word(seed, stream), _tickets(device)
    selection = edges, counter, tickets, indices, weights, word, k, next(_turn), share, estimator
    _launch_draw(x2d, grad, real, scratch, *selection)
    return indices, weights


@cache
def _tickets(device: torch.device) -> Tensor:
    tickets = torch.zeros(_NUM_TICKETS, dtype=torch.int32, device=device)
    if tickets.is_cuda:
        # Other streams take tickets, too. While a graph is captured this fails: warm up first.
        torch.cuda.current_stream(device).synchronize()
    return tickets


def _empty_rows(grad: Tensor, indices: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(indices.shape[0], grad.shape[1], dtype=dtype, device=grad.device)


@_registered(_empty_rows)
def pick_rows(grad_output: Tensor, indices: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`leantune.ops.rows.pick_rows`."""
    grad = _with_dense_rows(grad_output)
    k, d = indices.shape[0], grad.shape[1]
    picked = _empty_rows(grad, indices, weights, dtype)
    rows, width = _tile(d, 4)
    grid = _ceil_div(k, rows), _ceil_div(d, width)
    args = grad, grad.stride(0), indices.contiguous(), weights.contiguous(), picked, k, d
    _launch(_pick, grid, grad, *args, rows, width, num_warps=4)
    return picked


@_registered(lambda *args: None, mutates=("guess",))
def update_norms(
    guess: Tensor, grad_norms: Tensor, decay: float, real: Tensor | None = None
) -> None:
    """See :func:`leantune.ops.rows.update_norms`."""
    assert guess.is_contiguous()
    n, t = len(grad_norms), len(guess)
    real = None if real is None else real.contiguous()
    sequences, positions = 32, 128
    grid = (_ceil_div(t, positions),)
    args = guess, grad_norms.contiguous(), real, n, t, decay
    _launch(_update, grid, guess, *args, sequences, positions, num_warps=4)


def _launch_draw(
    x2d: Tensor | None,
    grad: Tensor | None,
    real: Tensor | None,
    scores: Tensor,
    edges: Tensor | None = None,
    counter: Tensor | None = None,
    tickets: Tensor | None = None,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
    word: int = 0,
    k: int = 0,
    ticket: int = 0,
    share: float | None = None,
    estimator: str = "systematic",
) -> None:
    """Score rows, and select some where there is room for them."""
    n = scores.shape[0]
    if n >= 2**31:
        raise UnsupportedError(f"rows: n must be below 2**31, got {n}; split the batch")
    block, num_warps = (1024, 4) if n <= 1024 else (4096, 16)
    rows, width = block, 1
    x_stride, d, grad_stride, grad_size = 0, 0, None, 0
    if x2d is not None:
        x2d = _with_dense_rows(x2d)
        x_stride, d = x2d.stride(0), x2d.shape[1]
    if grad is not None:
        grad_size = grad.shape[-1]
        if grad.ndim == 2:
            grad = _with_dense_rows(grad)
            grad_stride = grad.stride(0)
        else:
            grad = grad.contiguous()
    if x2d is not None:
        widest = d if grad_stride is None else max(d, grad_size)
        rows, width = _tile(widest, num_warps)
    real = None if real is None else real.contiguous()
    args = x2d, x_stride, d, grad, grad_stride, grad_size, real, scores, edges, counter, tickets
    span = _SPAN if n > block else block
    sizes = estimator, rows, width, span, block
    grid = (_ceil_div(n, rows),)
    selection = indices, weights, word, n, k, ticket, share
    _launch(draw, grid, scores, *args, *selection, *sizes, num_warps=num_warps)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # Triton's own costs the host more than the rest of a launch


def _with_dense_rows(x2d: Tensor) -> Tensor:
    return x2d if x2d.stride(1) == 1 or x2d.shape[1] == 1 else x2d.contiguous()


def _tile(width: int, num_warps: int) -> tuple[int, int]:
    """Return rows and columns of a tile: large, and no register short."""
    if width > 256:
        return num_warps, 1024
    return (2 * num_warps, 256) if width > 64 else (8 * num_warps, 64)


def _signed(value: int) -> int:
    """Return an integer modulo 2**64 as the signed one that an operation and a kernel take."""
    return (value + 2**63) % 2**64 - 2**63


@cache
def _word(seed: int, stream: int) -> int:
    """Return what of a key's numbers depends on neither counter nor device."""
    return _signed(mixed(seed, stream))


_compiled: dict[tuple[Any, ...], Any] = {}
"""What a kernel was compiled for -> the compiled kernel."""


def _launch(kernel: Any, grid: tuple[int, ...], where: Tensor, *args: Any, num_warps: int) -> None:
    """Launch a kernel; one that was compiled before goes past Triton's look at each argument.

    That look costs the host several times what the launch itself does.
    """
    LAUNCHES[kernel.__name__] += 1
    if sees_launches() or not where.is_cuda:
        kernel[grid](*args, num_warps=num_warps, **_OPTIONS)
        return
    device = where.get_device()
    key = kernel.__name__, device, num_warps, *map(_kind, _specialised(kernel)(args))
    compiled = _compiled.get(key)
    is_current = device == torch.cuda.current_device()
    with nullcontext() if is_current else torch.cuda.device(device):
        if compiled is None:
            _compiled[key] = kernel[grid](*args, num_warps=num_warps, **_OPTIONS)
        else:
            compiled[(*grid, 1, 1)[:3]](*args)


@cache
def _specialised(kernel: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what picks the arguments that a kernel is compiled for."""
    return itemgetter(*(p.num for p in kernel.params if not p.do_not_specialize))


def _kind(arg: Any) -> Any:
    """Return what of an argument Triton compiles for, or more: of a number its value."""
    return (arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else arg
