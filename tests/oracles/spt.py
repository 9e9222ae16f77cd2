"""Sparse attention and its choice of keys in float64 loops, straight from the definitions.

q is (b, h, n, d), k (b, h, m, d), v (b, h, m, dv), keep (b, h, n, m) bool; all numpy.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def weights(q: Array, k: Array, keep: NDArray[np.bool_], scale: float) -> Array:
    """Return the dense (b, h, n, m) softmax with minus infinity where ``keep`` is False."""
    p = np.zeros(keep.shape)
    for b, h, i in np.ndindex(*keep.shape[:3]):
        chosen = np.flatnonzero(keep[b, h, i])
        if len(chosen):
            s = scale * (k[b, h, chosen] @ q[b, h, i])
            e = np.exp(s - s.max())
            p[b, h, i, chosen] = e / e.sum()
    return p


def attention(
    q: Array, k: Array, v: Array, keep: NDArray[np.bool_], scale: float, kept: Array | float = 1.0
) -> Array:
    """Return the output; ``kept`` are the factors of dropout, (b, h, n, m)."""
    return (weights(q, k, keep, scale) * kept) @ v


def gradients(
    q: Array,
    k: Array,
    v: Array,
    keep: NDArray[np.bool_],
    scale: float,
    grad_output: Array,
    kept: Array | float = 1.0,
    *,
    clamp_row_dot: bool = False,
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v; ``clamp_row_dot`` is the prototype's defect."""
    p = weights(q, k, keep, scale)
    grad_p = (grad_output @ v.swapaxes(-1, -2)) * kept
    row_dot = (p * grad_p).sum(-1, keepdims=True)
    if clamp_row_dot:
        row_dot = np.maximum(row_dot, 1e-9)
    grad_s = scale * p * (grad_p - row_dot)
    return grad_s @ k, grad_s.swapaxes(-1, -2) @ q, (p * kept).swapaxes(-1, -2) @ grad_output


def counted_attention(q: Array, k: Array, v: Array, keep: NDArray[np.bool_], scale: float) -> Array:
    """Return one head's (n, dv) output where the empty slots of short rows count key 0 again.

    This is the prototype's third defect: all rows have as many slots as the longest.
    """
    num_slots = int(keep.sum(-1).max())
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        row = np.zeros(num_slots, dtype=np.int64)
        row[: keep[i].sum()] = np.flatnonzero(keep[i])
        s = scale * (k[row] @ q[i])
        e = np.exp(s - s.max())
        out[i] = (e / e.sum()) @ v[row]
    return out


def scramble(output: Array) -> Array:
    """Lay (b, h, n, d) out as the prototype does: swap the last two axes, then view them wrongly.

    The result is read as (b, h, n, d) again.
    """
    b, h, n, d = output.shape
    buffer = np.ascontiguousarray(output.swapaxes(-1, -2))
    return buffer.reshape(b, n, h, d).swapaxes(1, 2)


def select(
    scores: NDArray, visible: NDArray[np.bool_], num_keys: list[int], first: int, kind: str
) -> list[list[int]]:
    """Return the ascending keys of each row of (n, m) scores by a stable sort of the visible.

    Row i keeps num_keys[i], its own key first; it stands at key first + i where kind is "self", at
    its last visible key where it is "causal", and nowhere where it is "cross". Ties go to the
    nearest, before the query first.
    """
    chosen = []
    for i in range(len(scores)):
        seen = [j for j in range(scores.shape[1]) if visible[i, j]]
        own = {"causal": max(seen, default=0), "self": first + i, "cross": len(scores[0])}[kind]
        nearest = max((j for j in seen if j <= own and kind != "cross"), default=None)
        seen.sort(key=lambda j, own=own: (abs(j - own), j > own))
        seen.sort(key=lambda j, row=scores[i]: row[j], reverse=True)
        seen.sort(key=lambda j, nearest=nearest: j != nearest)
        chosen.append(sorted(seen[: num_keys[i]]))
    return chosen


def select_blocks(
    scores: NDArray,
    group: int,
    size: int,
    first: int,
    keep_ratio: float,
    kind: str,
    always_keep: int = 0,
) -> list[list[int]]:
    """Return the ascending key blocks of each block of ``group`` queries; scores (b, h, n, m).

    A block's own queries vote by their mean where kind is "self"; its first and those before it
    elsewhere. The blocks of the query itself, of the first ``always_keep`` keys and of as many up
    to the query's first are always kept.
    """
    b, h, n, m = scores.shape
    num_blocks = -(-m // size)
    chosen = []
    for x, y, start in np.ndindex(b, h, -(-n // group)):
        begin = start * group
        voters = range(max(0, begin - group + 1), begin + 1)
        if kind == "self":
            voters = range(begin, min(n, begin + group))
        votes = [
            float(scores[x, y, voters, j * size : (j + 1) * size].mean()) for j in range(num_blocks)
        ]
        position = begin + first
        own = position // size
        seen = list(range(num_blocks))
        if kind == "causal":
            last = min(position + group, m) - 1
            seen = [j for j in seen if j * size <= last]
        always = {j for j in seen if j * size < always_keep}
        if kind != "cross":
            num_recent = max(0, -(-(always_keep - 1) // size))
            always |= {j for j in seen if own - num_recent <= j <= own}
        kept = max(1, 2 * always_keep, int(np.ceil(keep_ratio * len(seen) * size - 1e-9)))
        num_kept = max(-(-kept // size), len(always))
        seen.sort(key=lambda j, votes=votes: votes[j], reverse=True)
        seen.sort(key=lambda j, always=always: j not in always)
        chosen.append(sorted(seen[:num_kept]))
    return chosen


def match_scores(codes_q: NDArray, codes_k: NDArray) -> NDArray[np.int64]:
    """Return (n, m) counts of equal codes of (n, s) and (m, s)."""
    return np.array([[int((a == b).sum()) for b in codes_k] for a in codes_q])


def adc_scores(q: Array, codebook: Array, codes_k: NDArray) -> Array:
    """Return (n, m) products of (n, d) queries with decoded keys."""
    decoded = np.array([np.concatenate([codebook[s, c] for s, c in enumerate(r)]) for r in codes_k])
    return q @ decoded.T


def nearest_codeword(z: Array, codebook: Array) -> NDArray[np.int64]:
    """Return (n, s) numbers of the nearest codewords of (n, d), the lowest among equals."""
    num_subspaces, num_codewords, width = codebook.shape
    codes = np.zeros((len(z), num_subspaces), dtype=np.int64)
    for i, s in np.ndindex(*codes.shape):
        piece = z[i, s * width : (s + 1) * width]
        distances = [float(((piece - codebook[s, c]) ** 2).sum()) for c in range(num_codewords)]
        codes[i, s] = distances.index(min(distances))
    return codes
