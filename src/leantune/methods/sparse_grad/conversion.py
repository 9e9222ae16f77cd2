"""A model under SparseGrad: its layers put in and taken out, calibrated, saved and refreshed.

Legend: d_out and d_in the sides of a weight, r_out and r_in those of the leading block.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leantune.core.ranks import (
    is_several,
    is_sharded,
    of_first_rank,
    sharded_with_root,
    sum_over_ranks,
)
from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.core.swap import Swap, swap, with_rule
from leantune.errors import ConfigError, SiteError, UnsupportedError
from leantune.measure import calibration_step
from leantune.methods.sparse_grad import maths
from leantune.methods.sparse_grad.layer import (
    Bases,
    Collect,
    Layer,
    RotatedLinear,
    leading,
    not_calibrated,
    with_outliers,
)
from leantune.methods.sparse_grad.warm_up import WarmUp

if TYPE_CHECKING:
    from leantune.methods.sparse_grad import SparseGrad


Grams = dict[str, tuple[Tensor, Tensor]]


class Conversion:
    """All layers that one config converted: a reversible change, and the state that it carries."""

    def __init__(self, session: Session, sites: list[Site], config: "SparseGrad") -> None:
        self.session, self.config = session, config
        self.name = f"sparse_grad.{sites[0].name}"
        self.layers = [Layer(site, config) for site in sites]
        self.swaps: list[Swap] = []
        self.flags: list[bool] = []
        self.mask_id: str | None = None
        for site, layer in zip(sites, self.layers, strict=True):
            self._put_in(site, layer)
        session.keep_state(self.name, self)
        session.at_forward_begin(self.begin)  # type: ignore[misc]
        self._hook = session.model.register_state_dict_pre_hook(self._before_state_dict)

    def _put_in(self, site: Site, layer: Layer) -> None:
        weight: Any = site.module.weight
        trained = layer.make_parameter(weight)
        is_step = self.config.selection == "step"
        kind = RotatedLinear if is_step else None
        self.flags.append(weight.requires_grad)
        weight.requires_grad_(False)
        layer.module = new = with_rule(site.module, trained, layer, self.session, kind)
        # Frozen parameters and not buffers, which a measurement would put back to older values.
        if is_step:
            self.session.sparse_parameters[trained] = self.config.bias_correction == "per_entry"
        else:
            new.applied = nn.Parameter(torch.zeros_like(trained), requires_grad=False)
        if self.config.selection == "refreshed":
            new.refreshes = nn.Parameter(torch.zeros(1, device=weight.device), requires_grad=False)
        self.swaps.append(swap(self.session.model, site.name, new))

    def undo(self) -> None:
        self.update()
        self._hook.remove()
        for change, flag in zip(reversed(self.swaps), reversed(self.flags), strict=True):
            change.undo()
            for name in ("trained", "applied", "refreshes"):
                change.old._parameters.pop(name, None)
            change.old.weight.requires_grad_(flag)  # type: ignore[union-attr, operator]

    def merge(self) -> None:
        self.undo()

    # -- every forward ---------------------------------------------------------------------

    @torch.compiler.disable
    def begin(self) -> None:
        """Bring dense weights up to date before a forward, and check that training may begin."""
        if self.session.model.training and torch.is_grad_enabled():
            if not self.is_calibrated and self.layers[0].collect is None:
                raise not_calibrated()
            self._check_mask()
            if self.config.selection == "refreshed":
                is_next = (self.session.step + 1) % self.config.refresh_steps == 0
                for layer in self.layers:
                    layer.wants_scores = is_next
        if self.config.selection != "step":
            self._refuse_gathered()
            self.update()
        elif is_several():
            raise UnsupportedError(
                "SparseGrad: selection must be 'fixed', 'refreshed' or 'block' in several "
                "processes, which cannot share sparse gradients, got 'step'"
            )

    def _refuse_gathered(self) -> None:
        whole = [layer.name for layer in self.layers if not is_sharded(layer.module.weight)]
        name = sharded_with_root(self.session.model, whole)
        if name is not None:
            raise UnsupportedError(
                "SparseGrad: fully_shard must be called on every block before the model, got "
                f"{name} sharded with the model itself, whose gathered weight would lose what has "
                "been trained; call fully_shard(block) for each block first"
            )

    def update(self) -> None:
        """Bring all dense weights up to date with what has been trained."""
        for layer in self.layers:
            layer.update()

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.update()

    def _check_mask(self) -> None:
        """Refuse an optimiser whose state was saved with another mask; groups carry its id."""
        optimizer = self.session.watched_optimizer
        if optimizer is None or self.mask_id is None:
            return
        has_state = any(layer.module.trained in optimizer.state for layer in self.layers)
        for group in optimizer.param_groups:
            if not has_state:
                group[self.name] = self.mask_id
            elif group.setdefault(self.name, self.mask_id) != self.mask_id:
                raise ConfigError(
                    f"SparseGrad: mask must be the one that the optimiser's state was saved with "
                    f"({group[self.name]}), got {self.mask_id}; load the session that was saved "
                    "beside it, or start a new optimiser"
                )

    def on_step(self, step: int) -> None:
        """Bring dense weights up to date while they are in shards; exchange entries in time."""
        if self.config.selection != "step":
            self.update()
        is_refreshed = self.config.selection == "refreshed" and self.is_calibrated
        if not is_refreshed or step % self.config.refresh_steps:
            return
        optimizer = self.session.watched_optimizer
        for layer in self.layers:
            state = {} if optimizer is None else optimizer.state.get(layer.module.trained, {})
            layer.refresh(state)
        self._name_mask()
        for group in () if optimizer is None else optimizer.param_groups:
            group[self.name] = self.mask_id

    def _name_mask(self) -> None:
        digest = hashlib.blake2b(digest_size=8)
        for layer in self.layers:
            if layer.indices is not None:
                digest.update(layer.indices.cpu().numpy().tobytes())
        self.mask_id = digest.hexdigest()

    # -- calibration -----------------------------------------------------------------------

    @property
    def is_calibrated(self) -> bool:
        return self.layers[0].bases is not None

    def calibrate(self, batches: list[Any]) -> None:
        """Find bases and masks from the gradients of ``batches``; no parameter moves unless the
        config asks for it, and then on the first of the two passes over them."""
        grams: Grams = {}
        largest: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        normalize = self.config.normalize

        def add_gram(layer: Layer, grad: Tensor) -> None:
            add_to_grams(grams, layer.group, grad, normalize)
            top = grad.abs().amax()
            largest[layer.name] = torch.maximum(largest.get(layer.name, top), top)

        def add_moment(layer: Layer, grad: Tensor) -> None:
            q_out, q_in = bases[layer.group].on(grad)
            total = moments.setdefault(layer.name, torch.zeros_like(grad, dtype=q_out.dtype))
            maths.accumulate_second_moment(total, grad, q_out, q_in, normalize)

        rate = self.config.calibration_learning_rate
        if rate and is_several():
            raise UnsupportedError(
                "SparseGrad: calibration_learning_rate must be 0 in several processes, which would "
                f"each move the model by their own batches, got {rate:g}; train some steps before "
                "lt.apply instead"
            )
        if rate:
            warm_up = WarmUp(self.session.model, self.layers, rate)
            self.show(batches, warm_up.watching(add_gram), warm_up.step)
            warm_up.end()
        else:
            self.show(batches, add_gram)
        self._check_gradients(largest)
        # Processes count as one: sums go by the order of layers, which is the same in all.
        groups = dict.fromkeys(layer.group for layer in self.layers)
        bases = bases_of({g: tuple(map(sum_over_ranks, grams[g])) for g in groups})  # type: ignore[misc]
        for pair in bases.values():
            pair.q_out, pair.q_in = of_first_rank(pair.q_out), of_first_rank(pair.q_in)
        is_block = self.config.selection == "block"
        if self.config.selection in ("fixed", "refreshed") or self.config.num_outliers:
            self.show(batches, add_moment)
            moments = {n.name: sum_over_ranks(moments[n.name]) for n in self.layers}
        thin: dict[Any, Bases] = {}
        for layer in self.layers:
            whole, moment = bases[layer.group], moments.get(layer.name)
            if is_block and moment is None:
                key = layer.group, layer.block
                thin[key] = thin.get(key) or leading(whole, *layer.block)
                layer.use(thin[key], None)
            elif moment is None:
                layer.use(whole, None)
                layer.rotate_weight()
            elif is_block:
                layer.use(*with_outliers(whole, layer.block, moment, self.config.num_outliers))
            else:
                layer.use(whole, maths.top_entries(moment, layer.num_entries))
        self._name_mask()

    def show(
        self, batches: list[Any], collect: Collect, step: Callable[[], None] | None = None
    ) -> None:
        """Run exact forwards and backwards, and hand every layer's weight gradient over.

        Gradients are (d_out, d_in) of the plain weight. No trace is left but what ``step`` does,
        which is called after each batch while the gradients are there.
        """
        waiting = [n for c in conversions(self.session) for n in c.layers if n.bases is None]
        for layer in (*waiting, *self.layers):
            layer.collect = collect if layer in self.layers else _ignore
        try:
            for batch in batches:
                with self.session.exact():
                    calibration_step("SparseGrad", self.session.model, batch, step)
        finally:
            for layer in (*waiting, *self.layers):
                layer.collect = None

    def _check_gradients(self, largest: dict[str, Tensor]) -> None:
        trained = self.layers[0].module.trained
        like = torch.zeros((), dtype=trained.dtype, device=trained.device)
        tops = torch.stack([largest.get(layer.name, like).to(like) for layer in self.layers])
        # Summed, so that all processes raise or none does.
        for layer, top in zip(self.layers, sum_over_ranks(tops).tolist(), strict=True):
            if not 0 < top < float("inf"):
                what = "zero in every batch" if top == 0 else f"a largest entry of {top}"
                raise ConfigError(
                    f"SparseGrad: gradient of {layer.name} must be finite and not zero in "
                    f"calibration, got {what}; show batches with labels whose loss is finite and "
                    "depends on this layer, or leave it out with sites="
                )

    # -- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        for layer in self.layers if self.is_calibrated else ():
            assert layer.bases is not None
            owner = owners.setdefault(id(layer.bases), layer.name)
            if owner == layer.name:
                out[f"{owner}:q_out"], out[f"{owner}:q_in"] = layer.bases.q_out, layer.bases.q_in
            out[f"{layer.name}:basis"] = torch.tensor([n.name for n in self.layers].index(owner))
            if layer.start is not None:
                out[f"{layer.name}:start"] = layer.start
            if layer.indices is not None:
                out[f"{layer.name}:indices"] = layer.indices
            if layer.history is not None:
                out[f"{layer.name}:dropped"], out[f"{layer.name}:reached"] = layer.history
                out[f"{layer.name}:refreshes"] = torch.tensor(layer.num_refreshes)
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            return
        wanted = {layer.name for layer in self.layers}
        found = {key.rpartition(":")[0] for key in state}
        if wanted != found:
            raise _other_model(f"bases of {min(wanted ^ found)!r} on one side only")
        bases: dict[str, Bases] = {}
        for layer in self.layers:
            owner = self.layers[int(state[f"{layer.name}:basis"])].name
            pair = (state.get(f"{owner}:q_out"), state.get(f"{owner}:q_in"))
            for q, d in zip(pair, layer.shape, strict=True):
                if q is None or q.shape[0] != d:
                    shape = None if q is None else tuple(q.shape)
                    raise _other_model(f"a basis of shape {shape} for {d} features of {layer.name}")
            device = layer.module.weight.device
            if owner not in bases:
                bases[owner] = Bases(*(q.to(device) for q in pair))  # type: ignore[union-attr]
            indices = state.get(f"{layer.name}:indices")
            expected = layer.module.trained.numel() if indices is None else len(indices)
            self._check_numbers(layer, bases[owner], expected)
            layer.use(bases[owner], None if indices is None else indices.to(device))
            layer.start_from(state.get(f"{layer.name}:start"))
            if f"{layer.name}:dropped" in state:
                layer.history = state[f"{layer.name}:dropped"], state[f"{layer.name}:reached"]
                layer.num_refreshes = int(state[f"{layer.name}:refreshes"])
                layer.is_history_in_weight = False
        self._name_mask()

    def _check_numbers(self, layer: Layer, bases: Bases, num_entries: int) -> None:
        if not bool(torch.isfinite(bases.q_out).all() & torch.isfinite(bases.q_in).all()):
            raise _other_model(f"NaN or infinite entries in a basis of {layer.name}")
        if num_entries != layer.module.trained.numel():
            wanted = layer.module.trained.numel()
            raise _other_model(f"{num_entries} entries for the {wanted} of {layer.name}")


def add_to_grams(grams: Grams, key: str, grad: Tensor, normalize: bool) -> None:
    """Add one gradient (d_out, d_in) to the two Gram matrices under ``key``, made where missing."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if key not in grams:
        gram_out, gram_in = (torch.zeros(d, d, dtype=dtype, device=grad.device) for d in grad.shape)
        grams[key] = gram_out, gram_in
    maths.accumulate_grams(*grams[key], grad, normalize)


def bases_of(grams: Grams) -> dict[str, Bases]:
    """Return the complete bases of each pair of Gram matrices."""
    return {key: Bases(maths.basis(out), maths.basis(inn)) for key, (out, inn) in grams.items()}


def _ignore(layer: Layer, grad: Tensor) -> None:
    """Stand by while another config's layers are calibrated."""


def _other_model(got: str) -> ConfigError:
    return ConfigError(
        f"SparseGrad: state must belong to this model and recipe, got {got}; load it onto the "
        "model that it was calibrated on, or calibrate anew"
    )


def attach(
    model: nn.Module, sites: list[Site], config: "SparseGrad", session: Session
) -> Conversion:
    """Convert the chosen linears; tied weights are refused, since others would train them too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    tied = [owners[id(s.module.weight)] for s in sites if len(owners[id(s.module.weight)]) > 1]
    if tied:
        raise SiteError(
            f"SparseGrad: weights must not be tied, got {' = '.join(tied[0])} ({len(tied)} such "
            "sites); leave them out with sites=, or untie them"
        )
    return Conversion(session, sites, config)


def conversions(session: Session) -> list[Conversion]:
    """Return the conversions of a session, one for each config of this method."""
    return [change for change in session.changes if isinstance(change, Conversion)]


def on_step(session: Session, step: int) -> None:
    """Let every conversion exchange its entries where it is time."""
    for change in conversions(session):
        change.on_step(step)


def calibrate(session: Session, batches: Iterable[Any]) -> None:
    """Calibrate what has no bases yet; trained values would mean nothing in others.

    Raises:
        ConfigError: no batches, or a layer whose gradient is zero or not finite.
    """
    waiting = [change for change in conversions(session) if not change.is_calibrated]
    if not waiting:
        return
    shown = list(islice(batches, max(c.config.num_calibration_steps for c in waiting)))
    if not shown:
        raise ConfigError(
            "SparseGrad: calibration must see at least one batch, got none; give "
            "session.calibrate a list of training batches"
        )
    for change in waiting:
        change.calibrate(shown[: change.config.num_calibration_steps])
