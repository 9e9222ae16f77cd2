"""The Triton kernel of a draw: programs score rows, and the last of them to finish selects.

Dimension letters: n rows, k kept rows, d features, t token positions. ``ops.rows`` says what is
computed; what is written here is how. Scores are read in blocks, again for each step of the
selection, so one path serves every n.
"""

import torch
import triton
import triton.language as tl

from leantune.ops.random import DRAW_STEP, MULTIPLIERS

_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_MULTIPLIER_2 = tl.constexpr(MULTIPLIERS[2])
_DRAW_STEP, _MASK32 = tl.constexpr(DRAW_STEP), tl.constexpr(0xFFFFFFFF)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_UNITS, _ONE, _LOG_ONE = tl.constexpr(2.0**30), tl.constexpr(1 << 30), tl.constexpr(30)
_MOST_STEPS = tl.constexpr(64)
_ONE_ABOVE, _LOG_ABOVE = tl.constexpr(1 << 46), tl.constexpr(46)


@triton.jit
def _norms(x_ptr, stride, d, rows, in_range, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the L2 norms of rows, (ROWS,) float32."""
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    starts = rows.to(tl.int64) * stride
    for first in range(0, d, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        here = in_range[:, None] & (columns < d)[None, :]
        x = tl.load(x_ptr + starts[:, None] + columns[None, :], here, 0.0).to(tl.float32)
        squares += x * x
    return tl.sqrt_rn(tl.sum(squares, 1))


@triton.jit
def _words(counter_ptr, word, places):
    """Return the random words of a key at some places, int64, as ``ops.random.words`` does."""
    x = ((word & _MASK32) ^ places) * _MULTIPLIER_0
    x = (x ^ (x >> 32)) & _MASK32
    x ^= (tl.load(counter_ptr) * _DRAW_STEP + ((word >> 32) & _MASK32)) & _MASK32
    x = ((x * _MULTIPLIER_1) ^ ((x * _MULTIPLIER_1) >> 32)) & _MASK32
    return ((x * _MULTIPLIER_2) ^ ((x * _MULTIPLIER_2) >> 32)) & _MASK32


@triton.jit
def _mix_floor(scores_ptr, real_ptr, n, share, BLOCK: tl.constexpr):
    """Add ``share`` times the mean score of the real rows to each of them, in place."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        here = offsets < n - first
        total += tl.load(scores_ptr + first + offsets, here, 0.0, cache_modifier=".cg")
        if real_ptr is not None:
            here &= tl.load(real_ptr + first + offsets, here, 0).to(tl.int1)
        count += here.to(tl.int32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    even = (tl.maximum(mean, _TINY) * share).to(tl.float32)
    for first in range(0, n, BLOCK):
        here = offsets < n - first
        if real_ptr is not None:
            here &= tl.load(real_ptr + first + offsets, here, 0).to(tl.int1)
        score = tl.load(scores_ptr + first + offsets, here, 0.0, cache_modifier=".cg")
        tl.store(scores_ptr + first + offsets, score + even, here)
    tl.debug_barrier()


@triton.jit
def _weigh(scores_ptr, n, SPAN: tl.constexpr):
    """Turn scores into whole numbers up to 2**30 in place; return their sum, and 0.

    Where some score is not finite, each whole number is 0, and NaN is returned for 0.
    """
    offsets = tl.arange(0, SPAN)
    largest = tl.full((), _TINY, tl.float32)
    for first in range(0, n, SPAN):
        here = offsets < n - first
        score = tl.load(scores_ptr + first + offsets, here, 0.0, cache_modifier=".cg")
        tops = tl.where(score < float("inf"), score, float("inf"))
        largest = tl.maximum(largest, tl.max(tops, 0))
    total = tl.full((), 0, tl.int64)
    for first in range(0, n, SPAN):
        here = offsets < n - first
        score = tl.load(scores_ptr + first + offsets, here, 0.0, cache_modifier=".cg")
        score = tl.where(score < float("inf"), score, 0.0)
        mass = (tl.math.div_rn(score, largest) * _UNITS).to(tl.int32)
        # At most 24 significant bits: exact in float32.
        tl.store(scores_ptr + first + offsets, mass.to(tl.float32), here)
        total += tl.sum(mass.to(tl.int64), 0)
    tl.debug_barrier()
    return total, tl.where(largest < float("inf"), 0.0, float("nan"))


@triton.jit
def _threshold(mass_ptr, total, n, k, SPAN: tl.constexpr):
    """Return tau, float64: ``sum(min(1, mass / tau)) = k``, by a fixed point from above.

    With the rows above tau kept for certain, the others share what is left of k. That lowers tau,
    and a step that finds no more rows above it is the last one.
    """
    offsets = tl.arange(0, SPAN)
    tau = total.to(tl.float64) / k.to(tl.float64)
    count = 0
    step = 0
    while step < _MOST_STEPS:
        cut = tl.minimum(tau, _UNITS).to(tl.int32)
        found = tl.full((), 0, tl.int32)
        tail = tl.full((), 0, tl.int64)
        for first in range(0, n, SPAN):
            mass = tl.load(mass_ptr + first + offsets, offsets < n - first, 0.0).to(tl.int32)
            above = mass > cut
            # One sum for both: what is counted lies above what up to 2**15 masses add up to.
            both = tl.sum(tl.where(above, _ONE_ABOVE, mass.to(tl.int64)), 0).to(tl.int64)
            found += (both >> _LOG_ABOVE).to(tl.int32)
            tail += both & (_ONE_ABOVE - 1)
        tau = tail.to(tl.float64) / (k - found).to(tl.float64)
        step = tl.where(found == count, _MOST_STEPS, step + 1)
        count = found
    return tau


@triton.jit
def _lay_out(mass_ptr, indices_ptr, weights_ptr, n, k, tau, start, nothing, BLOCK: tl.constexpr):
    """Lay probabilities side by side and write the rows that k points at distance 1 hit.

    A point lies at each multiple of 1 on the axis that begins at ``start``, in units of 2**-30. A
    row is at most 1 long, so it is hit once at most.
    """
    offsets = tl.arange(0, BLOCK)
    unit = tl.maximum(tau * (1.0 / _UNITS), 1.0 / _UNITS).to(tl.float32)
    edge = start
    for first in range(0, n, BLOCK):
        here = offsets < n - first
        mass = tl.load(mass_ptr + first + offsets, here, 0.0)
        chance = tl.minimum(tl.math.div_rn(mass, unit), _UNITS).to(tl.int32)
        length = chance.to(tl.int64)
        ends = edge + tl.cumsum(length, 0)
        slots = ((ends >> _LOG_ONE) - 1).to(tl.int32)
        hit = here & (slots >= ((ends - length) >> _LOG_ONE).to(tl.int32)) & (slots < k)
        weight = tl.math.div_rn(tl.full((BLOCK,), _UNITS, tl.float32), chance.to(tl.float32))
        tl.store(indices_ptr + slots, first + offsets, hit)
        tl.store(weights_ptr + slots, weight, hit)
        edge += tl.sum(length, 0)
    # Points that lie beyond the last row.
    filled = tl.minimum(edge >> _LOG_ONE, k).to(tl.int32)
    for first in range(filled, k, BLOCK):
        here = offsets < k - first
        tl.store(indices_ptr + first + offsets, tl.zeros((BLOCK,), tl.int32) + (n - 1), here)
        tl.store(weights_ptr + first + offsets, tl.zeros((BLOCK,), tl.float32) + nothing, here)


@triton.jit
def _least_kept(mass_ptr, n, k, BLOCK: tl.constexpr):
    """Return the k-th largest mass, bit by bit, and how many rows of that mass are among the k."""
    offsets = tl.arange(0, BLOCK)
    least = 0
    bit = _ONE
    while bit > 0:
        counts = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, n, BLOCK):
            mass = tl.load(mass_ptr + first + offsets, offsets < n - first, -1.0).to(tl.int32)
            counts += (mass >= least + bit).to(tl.int32)
        least += tl.where(tl.sum(counts, 0) >= k, bit, 0)
        bit >>= 1
    above = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        mass = tl.load(mass_ptr + first + offsets, offsets < n - first, -1.0).to(tl.int32)
        above += (mass > least).to(tl.int32)
    return least, k - tl.sum(above, 0)


@triton.jit
def _replace(
    mass_ptr,
    edges_ptr,
    counter_ptr,
    indices_ptr,
    weights_ptr,
    word,
    n,
    k,
    cut,
    num_level,
    nothing,
    BLOCK: tl.constexpr,
):
    """Keep the rows above a mass and some on its level; draw others for the places that are left.

    Each drawn one is found in the running sums of what is not kept, by halving.
    """
    offsets = tl.arange(0, BLOCK)
    edge = tl.full((), 0, tl.int64)
    kept = tl.full((), 0, tl.int32)
    level = tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK):
        here = offsets < n - first
        mass = tl.load(mass_ptr + first + offsets, here, -1.0).to(tl.int32)
        on_level = (mass == cut).to(tl.int32)
        is_kept = (mass > cut) | ((mass == cut) & (level + tl.cumsum(on_level, 0) <= num_level))
        slots = kept + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        tl.store(indices_ptr + slots, first + offsets, is_kept)
        tl.store(weights_ptr + slots, tl.where(mass > 0, 1.0, 0.0) + nothing, is_kept)
        lengths = tl.where(is_kept, 0, mass).to(tl.int64)
        tl.store(edges_ptr + first + offsets, edge + tl.cumsum(lengths, 0), here)
        edge += tl.sum(tl.where(here, lengths, 0), 0)
        kept += tl.sum(is_kept.to(tl.int32), 0)
        level += tl.sum(on_level, 0)
    tl.debug_barrier()
    tail = edge.to(tl.float64)
    share = (tail / (k - kept).to(tl.float64)).to(tl.float32)
    for first in range(kept, k, BLOCK):
        here = offsets < k - first
        unit = _words(counter_ptr, word, first + offsets).to(tl.float64) * 2.0**-32
        low = tl.zeros((BLOCK,), tl.int32)
        high = low + n
        span = n
        while span > 0:
            middle = (low + high) >> 1
            is_open = low < high
            edges = tl.load(edges_ptr + middle, is_open, 0).to(tl.float64)
            is_below = edges <= unit * tail
            low = tl.where(is_open & is_below, middle + 1, low)
            high = tl.where(is_below, high, middle)
            span >>= 1
        rows = tl.minimum(low, n - 1)
        mass = tl.maximum(tl.load(mass_ptr + rows, here, 1.0), 1.0)
        tl.store(indices_ptr + first + offsets, rows, here)
        tl.store(weights_ptr + first + offsets, tl.math.div_rn(share, mass) + nothing, here)


@triton.jit
def _select(
    scores_ptr,
    edges_ptr,
    counter_ptr,
    indices_ptr,
    weights_ptr,
    word,
    n,
    k,
    ESTIMATOR: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select k rows by their scores, which are used up."""
    total, nothing = _weigh(scores_ptr, n, SPAN)
    if ESTIMATOR == "systematic":
        tau = _threshold(scores_ptr, total, n, k, SPAN)
        start = (_words(counter_ptr, word, 0) >> 8) << 6
        _lay_out(scores_ptr, indices_ptr, weights_ptr, n, k, tau, start, nothing, BLOCK)
    else:
        cut, num_level = _ONE, 0
        if ESTIMATOR == "wta":
            # Whole numbers above the cut reach tau.
            tau = _threshold(scores_ptr, total, n, k, SPAN)
            # A constant is float32 on a GPU, which has no 2**30 + 1.
            tau = tl.minimum(tl.maximum(tau, 1.0), 2.0 * _UNITS)
            cut = (tl.ceil(tau) - 1.0).to(tl.int32)
        elif ESTIMATOR == "topk":
            cut, num_level = _least_kept(scores_ptr, n, k, BLOCK)
        pointers = scores_ptr, edges_ptr, counter_ptr, indices_ptr, weights_ptr
        _replace(*pointers, word, n, k, cut, num_level, nothing, BLOCK)


@triton.jit(do_not_specialize=["k", "word", "ticket"])
def draw(
    x_ptr,
    x_stride,
    d,
    grad_ptr,
    grad_stride,
    grad_size,
    real_ptr,
    scores_ptr,
    edges_ptr,
    counter_ptr,
    tickets_ptr,
    indices_ptr,
    weights_ptr,
    word: tl.int64,  # type: ignore
    n,
    k,
    ticket,
    share,
    ESTIMATOR: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score ROWS rows; the last program to finish selects k, where anything is to be selected."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    in_range = tl.arange(0, ROWS) < n - first
    if x_ptr is None:
        scores = tl.load(grad_ptr + rows, in_range, 0.0)
    else:
        scores = _norms(x_ptr, x_stride, d, rows, in_range, ROWS, WIDTH)
        if grad_stride is not None:
            scores *= _norms(grad_ptr, grad_stride, grad_size, rows, in_range, ROWS, WIDTH)
        elif grad_ptr is not None:
            scores *= tl.load(grad_ptr + rows % grad_size, in_range, 0.0)
    if real_ptr is not None:
        scores = tl.where(tl.load(real_ptr + rows, in_range, 0).to(tl.int1), scores, 0.0)
    tl.store(scores_ptr + rows, scores, in_range)
    if indices_ptr is not None:
        # Every thread's scores are written before one of them takes the ticket for all.
        tl.debug_barrier()
        if tl.atomic_add(tickets_ptr + ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(tickets_ptr + ticket, 0)
            if share is not None:
                _mix_floor(scores_ptr, real_ptr, n, share, BLOCK)
            pointers = scores_ptr, edges_ptr, counter_ptr, indices_ptr, weights_ptr
            _select(*pointers, word, n, k, ESTIMATOR, SPAN, BLOCK)
