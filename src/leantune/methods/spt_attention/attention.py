"""The codebooks and the sparse forward of one attention module.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width, s subspaces, e codewords,
w = d / s width of a subspace, r vectors.
"""

from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.distributed import broadcast
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import ConfigError, UnsupportedError
from leantune.methods.spt_attention.config import SPTAttention
from leantune.ops.random import stream_of
from leantune.ops.sparse_attention.attention import sparse_attention
from leantune.ops.sparse_attention.blocks import BlockList, choose_blocks
from leantune.ops.sparse_attention.codebooks import kmeans, quantise
from leantune.ops.sparse_attention.top_keys import AttentionKind, Visibility, top_keys

# Vectors of one codebook that k-means sees; 64 MB at width 64 with its transients.
_MAX_VECTORS = 2**14
_KMEANS_STEPS = 10


class SparseAttention(nn.Module):
    """The codebooks of one attention module, and its sparse forward; a child of that module.

    Attributes:
        codebooks: (hk, s, e, w) float32, one for each key head.
        is_calibrated: whether the codebooks have been set.
        collected: the vectors (hk, r, d) of each batch while calibrating; else None.
    """

    codebooks: Tensor

    def __init__(
        self, site: Site, shape: tuple[int, int, int, int], config: SPTAttention, runtime: Runtime
    ) -> None:
        super().__init__()
        self.name = site.name
        self.is_cross = site.is_cross
        self.config = config
        self.runtime = runtime
        self.stream = stream_of(site.name)
        self.is_calibrated = False
        self.collected: list[Tensor] | None = None
        books = torch.zeros(shape, device=next(site.module.parameters()).device)
        self.register_buffer("codebooks", books, persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        *,
        is_causal: bool,
        scale: float,
        dropout: float,
    ) -> Tensor | None:
        """Return the output, (b, h, n, dv), or None where attention should run dense.

        Raises:
            UnsupportedError: a mask of unknown shape or kind, or key heads that do not divide
                the heads.
            ConfigError: the codebooks are not calibrated.
        """
        config, n = self.config, q.shape[2]
        if q.shape[1] % k.shape[1]:
            raise UnsupportedError(
                f"SPTAttention: query heads must be a multiple of the {k.shape[1]} key heads, got "
                f"{q.shape[1]} at {self.name}; leave it out with sites="
            )
        if is_causal and mask is None and 1 < n < k.shape[2]:
            # A cache allocated in full, filled up to the queries.
            k, v, bias = k[:, :, :n], v[:, :, :n], None if bias is None else bias[..., :n]
        visibility, bias = self._read_mask(q, k, mask, bias, is_causal)
        if self.collected is not None:
            self.collected.append(self._vectors(q, k, visibility))
            return None
        num_keys = k.shape[2]
        if self.runtime.is_exact or config.budget.limit(num_keys) >= num_keys:
            return None
        how: dict[str, Any] = {"scale": scale, "bias": bias}
        if dropout > 0:
            key = self.runtime.key(q.device)._replace(stream=self.stream)
            how |= {"dropout": dropout, "key": key}
        chosen = self._choose(q, k, visibility)
        return sparse_attention(q, k, v, chosen, visibility, **how)

    def _choose(self, q: Tensor, k: Tensor, visibility: Visibility) -> Tensor | BlockList:
        config = self.config
        if config.granularity == "block":
            num_lists = q.shape[1] if config.share_choice == "head" else k.shape[1]
            how = (config.budget, visibility, config.block_size)
            return choose_blocks(q, k, *how, num_lists=num_lists)
        if not self.is_calibrated:
            raise ConfigError(
                "SPTAttention: codebooks must be calibrated before the model runs, got none at "
                f"{self.name}; call session.calibrate(batches) in every process (the trainer "
                "callback does so by itself), or run dense inside session.exact()"
            )
        factors = quantise(q, k, self.codebooks, config.scorer)
        return top_keys(factors, q, k.shape[2], config.budget, visibility)

    def _read_mask(
        self, q: Tensor, k: Tensor, mask: Any, bias: Tensor | None, is_causal: bool
    ) -> tuple[Visibility, Tensor | None]:
        """Return a mask as what is visible, and added to the bias where the mask is additive."""
        kind: AttentionKind = "cross" if self.is_cross else "causal" if is_causal else "self"
        if mask is None:
            return Visibility(kind, None), bias
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] == shape[3]
        fits = fits and all(a in (1, b) for a, b in zip(mask.shape, shape, strict=True))
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            what = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask)
            raise UnsupportedError(
                "SPTAttention: attention_mask must be boolean or additive and broadcast to (batch, "
                f"heads, queries, keys) = {shape}, got {what} at {self.name}; give the model a "
                "(batch, keys) mask of 0 and 1, or one of these"
            )
        if mask.dtype == torch.bool:
            return Visibility(kind, mask), bias
        visible = mask > torch.finfo(mask.dtype).min / 2
        extra = mask.masked_fill(~visible, 0.0)
        return Visibility(kind, visible), extra if bias is None else bias + extra

    def _vectors(self, q: Tensor, k: Tensor, visibility: Visibility) -> Tensor:
        """Return the vectors (hk, r, d) that each codebook is for: of real tokens, and thinned."""
        num_books = len(self.codebooks)
        is_real = None
        if visibility.mask is not None:
            is_real = visibility.mask.any(1).any(1).expand(len(k), -1)  # (b, m)
        found = []
        for x in (q, k):
            grouped = x.unflatten(1, (num_books, -1)).permute(1, 0, 3, 2, 4)
            if is_real is not None and is_real.shape == grouped.shape[1:3]:
                grouped = grouped[:, is_real][:, None]
            found.append(grouped.flatten(1, 3))
        return _thin(torch.cat(found, 1))

    def init_codebooks(self) -> None:
        """Set the codebooks by k-means of the collected vectors, evenly thinned.

        Raises:
            ConfigError: fewer vectors than codewords.
        """
        num_subspaces, num_codewords = self.codebooks.shape[1:3]
        found = self.collected or [self.codebooks.new_zeros(1, 0)]
        vectors = _thin(torch.cat(found, 1))
        if vectors.shape[1] < num_codewords:
            raise ConfigError(
                f"SPTAttention: calibration must give at least num_codewords = {num_codewords} "
                f"vectors to a codebook, got {vectors.shape[1]} at {self.name}; show "
                "session.calibrate more tokens, or lower num_codewords"
            )
        seed, how = self.runtime.seed, (num_subspaces, num_codewords, _KMEANS_STEPS)
        books = [kmeans(x, *how, seed=seed, stream=self.stream + i) for i, x in enumerate(vectors)]
        self.codebooks.copy_(broadcast(torch.stack(books)))
        self.is_calibrated = True

    def load_codebooks(self, books: Tensor) -> None:
        """Take codebooks from a saved state.

        Raises:
            ConfigError: another shape, or a number that is not finite.
        """
        is_right = books.shape == self.codebooks.shape and books.is_floating_point()
        if not (is_right and bool(torch.isfinite(books).all())):
            raise ConfigError(
                f"SPTAttention: codebooks must be finite and of shape "
                f"{tuple(self.codebooks.shape)}, got {tuple(books.shape)} in the saved state of "
                f"{self.name}; load onto the base model that was saved from"
            )
        self.codebooks.copy_(books)
        self.is_calibrated = True


def _thin(vectors: Tensor) -> Tensor:
    """Return evenly spaced ones of too many vectors (hk, r, d)."""
    step = -(-vectors.shape[1] // _MAX_VECTORS)
    return vectors[:, :: max(1, step)]
