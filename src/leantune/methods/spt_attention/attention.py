"""The state and the sparse forward of one attention module.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width, s subspaces, e codewords,
w = d / s width of a subspace, c codebooks (1 or hk).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leantune.core.ranks import is_several, mean_over_ranks, of_first_rank
from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.errors import ConfigError, UnsupportedError
from leantune.methods.spt_attention.pq import Quantised, quantisation_loss
from leantune.ops.autocast import autocast_off
from leantune.ops.choice import View, choose, choose_blocks, expand_blocks, query_block
from leantune.ops.codebooks import kmeans, moving_step
from leantune.ops.flex import flex_blocks
from leantune.ops.rows import stream_of
from leantune.ops.sparse import Dropout, sparse_attention

if TYPE_CHECKING:
    from leantune.methods.spt_attention import SPTAttention

# Vectors of one codebook that k-means sees; 64 MB at width 64 with its transients.
_MAX_VECTORS = 2**14
_KMEANS_STEPS = 10


@dataclass
class Run:
    """What the sites of one method share.

    Args:
        num_forwards: training forwards of the model so far, counted on the host.
        collected: site name -> vectors by codebook, while calibrating; else None.
    """

    session: Session
    config: "SPTAttention"
    num_forwards: int = 0
    collected: dict[str, list[list[Tensor]]] | None = None

    @property
    def has_moved(self) -> bool:
        """Whether the last training forward moved codebooks."""
        config, now = self.config, self.num_forwards
        return config.pq_loss == "none" and now > 0 and _is_due(now, config.refresh_steps)


class KeyChoice(nn.Module):
    """The codebooks of one attention module, and its sparse forward; a child of that module."""

    codebooks: Tensor  # (c, s, e, w) float32

    def __init__(self, site: Site, shape: tuple[int, int, int, int], run: Run) -> None:
        super().__init__()
        self.name = site.name
        self.is_cross = site.is_cross
        self.run = run
        self.is_ready = False
        self.last_forward = 0
        self.stream = stream_of(site.name)
        books = torch.zeros(shape, device=next(site.module.parameters()).device)
        if run.config.pq_loss == "spt":
            self.codebooks = nn.Parameter(books)
        else:
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
            UnsupportedError: a mask of unknown shape or kind.
            ConfigError: fewer vectors than codewords for a first codebook.
        """
        config, session, n = self.run.config, self.run.session, q.shape[2]
        hides_later = is_causal and mask is None and n > 1
        if hides_later and k.shape[2] > n:
            # A cache allocated in full, filled up to the queries.
            k, v, bias = k[:, :, :n], v[:, :, :n], None if bias is None else bias[..., :n]
        view, bias = self._view(q, k, mask, bias, is_causal)
        if self.run.collected is not None:
            mine = self.run.collected.setdefault(self.name, [[] for _ in self.codebooks])
            for have, new in zip(mine, self._vectors(q, k, view), strict=True):
                have.append(new)
            return None
        num_keys = k.shape[2]
        if not session.is_sampling or config.rule.limit(num_keys) >= num_keys:
            return None
        self._update(q, k, view)
        features = Quantised.of(q, k, self.codebooks, config.metric, config.scorer)
        noise = None
        if dropout > 0:
            noise = Dropout(dropout, session.current_draw(q.device), self.stream)
        how = {"scale": scale, "bias": bias, "dropout": noise, "is_causal": view.hides_later(n)}
        if config.granularity == "token":
            picked = choose(features, q, num_keys, config.rule, view, in_bits=bias is not None)
            return sparse_attention(q, k, v, picked, **how)
        size = config.block_size
        blocks = choose_blocks(features, q, num_keys, config.rule, view, size)
        is_aligned = query_block(view, n, num_keys, size) == size
        if q.is_cuda and is_aligned and bias is None and noise is None:
            return flex_blocks(q, k, v, blocks, view, size, scale)
        picked = expand_blocks(blocks, q, num_keys, view, size)
        return sparse_attention(q, k, v, picked, block_size=size if is_aligned else None, **how)

    def _view(
        self, q: Tensor, k: Tensor, mask: Any, bias: Tensor | None, is_causal: bool
    ) -> tuple[View, Tensor | None]:
        """Read a mask as what is visible, and as a bias where it is additive."""
        place = "cross" if self.is_cross else "causal" if is_causal else "self"
        if mask is None:
            return View(place, None), bias
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] == shape[3]
        fits = fits and all(a in (1, b) for a, b in zip(mask.shape, shape, strict=True))
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            what = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask)
            raise UnsupportedError(
                "SPTAttention: attention_mask must be boolean or additive and broadcast to (batch, "
                f"heads, queries, keys) = {shape}, got {what} at {self.name}; give the model a "
                "(batch, keys) mask of 0 and 1, or such a one"
            )
        if mask.dtype == torch.bool:
            return View(place, mask), bias
        visible = mask > torch.finfo(mask.dtype).min / 2
        extra = mask.masked_fill(~visible, 0.0)
        return View(place, visible), extra if bias is None else bias + extra

    @torch.no_grad()
    def _vectors(self, q: Tensor, k: Tensor, view: View) -> list[Tensor]:
        """Return the vectors that each codebook is for, real tokens only and not too many."""
        num_books = len(self.codebooks)
        groups = [[] for _ in range(num_books)]
        is_real = None
        if view.mask is not None:
            is_real = view.mask.any(1).any(1).expand(len(k), -1)  # (b, m)
        for x in (q, k):
            for group, part in zip(groups, x.chunk(num_books, 1), strict=True):
                rows = part.transpose(1, 2)  # (b, tokens, heads, d)
                if is_real is not None and is_real.shape == rows.shape[:2]:
                    rows = rows[is_real]
                group.append(rows.reshape(-1, x.shape[-1]))
        return [_thin(torch.cat(group)) for group in groups]

    def _update(self, q: Tensor, k: Tensor, view: View) -> None:
        """Start the codebooks or move them on, once in a forward: a recomputed one finds them
        as they were."""
        config, now = self.run.config, self.run.num_forwards
        is_new = self.training and now != self.last_forward
        with autocast_off(q):
            if not self.is_ready:
                self._refuse_late_start()
                self.start(self._vectors(q, k, view))
            elif config.pq_loss == "none" and is_new and _is_due(now, config.refresh_steps):
                pairs = zip(self._vectors(q, k, view), self.codebooks, strict=True)
                moved = [moving_step(x, book.float(), config.refresh_decay) for x, book in pairs]
                self.codebooks.copy_(torch.stack(moved))
            if config.pq_loss == "spt" and self.training:
                self._add_loss(q, k, is_new)
        if self.training:
            self.last_forward = now

    def _refuse_late_start(self) -> None:
        # A short batch runs dense: not all processes may come here in one forward.
        if is_several():
            raise ConfigError(
                "SPTAttention: codebooks must be calibrated before several processes run the "
                f"model, got none at {self.name}; call session.calibrate(batches) in all of them "
                "(the trainer callback does so by itself)"
            )

    @torch.no_grad()
    def start(self, vectors: list[Tensor]) -> None:
        """Set the codebooks by k-means of the vectors (n, d) of each, evenly thinned.

        Raises:
            ConfigError: fewer vectors than codewords.
        """
        num_subspaces, num_codewords = self.codebooks.shape[1:3]
        for i, x in enumerate(vectors):
            if len(x) < num_codewords:
                raise ConfigError(
                    f"SPTAttention: calibration must give at least num_codewords = "
                    f"{num_codewords} vectors to a codebook, got {len(x)} at {self.name}; show "
                    "session.calibrate more tokens, or lower num_codewords"
                )
            seed = self.run.session.seed
            book = kmeans(
                _thin(x),
                num_subspaces,
                num_codewords,
                _KMEANS_STEPS,
                seed=seed,
                stream=self.stream + i,
            )
            self.codebooks[i].copy_(of_first_rank(book))
        self.is_ready = True

    @torch.no_grad()
    def agree(self) -> None:
        """Give all processes one codebook after each has moved its own."""
        self.codebooks.copy_(mean_over_ranks(self.codebooks))

    def _add_loss(self, q: Tensor, k: Tensor, is_new: bool) -> None:
        session, config = self.run.session, self.run.config
        if not torch.is_grad_enabled():
            if session.model.training:
                raise UnsupportedError(
                    "SPTAttention: pq_loss must be 'none' under reentrant checkpointing, whose "
                    "first pass has no gradient, got 'spt'; pass use_reentrant=False"
                )
            return
        terms = [
            quantisation_loss(part.float(), book)
            for x in (q, k)
            for part, book in zip(x.chunk(len(self.codebooks), 1), self.codebooks, strict=True)
        ]
        loss = config.pq_loss_weight * torch.stack(terms).sum() / len(self.codebooks)
        # A recomputed forward makes the same graph again, but the loss counts once.
        if is_new:
            session.add_auxiliary_loss(loss)


def _is_due(now: int, steps: int) -> bool:
    return steps > 0 and now % steps == 0


def _thin(vectors: Tensor) -> Tensor:
    """Take evenly spaced ones of too many vectors (n, d)."""
    step = -(-len(vectors) // _MAX_VECTORS)
    return vectors[:: max(1, step)]


@dataclass
class State:
    """What a resumed run needs of one site."""

    choice: KeyChoice

    def state_dict(self) -> dict[str, Tensor]:
        if not self.choice.is_ready:
            return {}
        counts = torch.tensor([self.choice.run.num_forwards, self.choice.last_forward])
        return {"codebooks": self.choice.codebooks.detach(), "counts": counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.choice.is_ready = "codebooks" in state
        if not self.choice.is_ready:
            return
        books, mine = state["codebooks"], self.choice.codebooks
        if books.shape != mine.shape or not bool(torch.isfinite(books).all()):
            raise ConfigError(
                f"SPTAttention: codebooks must be finite and of shape {tuple(mine.shape)}, got "
                f"{tuple(books.shape)} in the saved state of {self.choice.name}; load onto the "
                "base model that was saved from"
            )
        with torch.no_grad():
            mine.copy_(books)
        self.choice.run.num_forwards, self.choice.last_forward = map(int, state["counts"])
