"""Python's own door: wrong arguments, sessions that have ended, and PEFT and TRL in every order."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from models import MODELS
from torch import nn

import leantune as lt
from bench.hostile.case import Cases

CASES = Cases("api")
TINY = MODELS["llama"]
TARGETS = ["q_proj", "up_proj", "down_proj"]
SPARSE = {"num_calibration_batches": 1, "density": 0.1}


def _sampled(**options: Any) -> lt.WTACRS:
    return lt.WTACRS(min_rows=2, **options)


def _session(*methods: Any) -> Any:
    return lt.apply(TINY.build(), *(methods or (_sampled(),)))


def _lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": TARGETS, **options})


def _refused(table: Mapping[str, tuple[str, Callable[[Path], Any]]]) -> None:
    for name, (tried, run) in table.items():
        CASES.add(name, "refused", tried, run)


def _same_modules(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Run, and check that a refusal moves no module."""
    before = list(model.named_modules())
    try:
        return run()
    except lt.LeantuneError:
        assert list(model.named_modules()) == before, "a module moved"
        raise


def _on_plain(*methods: Any, **options: Any) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        model = TINY.build()
        return _same_modules(model, lambda: lt.apply(model, *methods, **options))

    return run


_refused(
    {
        "model_none": ("apply(None)", lambda _: lt.apply(None)),  # type: ignore[arg-type]
        "model_name": ("apply('name')", lambda _: lt.apply("gpt2", _sampled())),  # type: ignore
        "no_method": ("apply(model)", _on_plain()),
        "method_none": ("apply(model, None)", _on_plain(None)),
        "method_name": ("apply(model, 'wta_crs')", _on_plain("wta_crs")),
        "method_class": ("apply(model, WTACRS)", _on_plain(lt.WTACRS)),
        "seed_text": ("seed='0'", _on_plain(_sampled(), seed="0")),
        "seed_float": ("seed=1.5", _on_plain(_sampled(), seed=1.5)),
        "seed_bool": ("seed=True", _on_plain(_sampled(), seed=True)),
        "seed_65_bits": ("seed=2**64", _on_plain(_sampled(), seed=2**64)),
        "seed_5000_digits": ("seed of 5,000 digits", _on_plain(_sampled(), seed=10**5000)),
        "sites_fail": (
            "a predicate that raises",
            _on_plain(_sampled(sites=lambda site: 1 / 0)),
        ),
        "sites_name": (
            "a predicate that returns a name",
            _on_plain(_sampled(sites=lambda site: site.name)),
        ),
        "sites_bad_regex": ("sites='re:['", _on_plain(_sampled(sites="re:["))),
        "sites_unknown": ("sites that match nothing", _on_plain(_sampled(sites="no_such"))),
        "same_axis": ("two methods of one axis", _on_plain(_sampled(), _sampled())),
        "calibrate_none": ("calibrate(None)", lambda _: _session().calibrate(None)),
        "calibrate_text": ("calibrate('text')", lambda _: _session().calibrate("text")),
        "calibrate_batch": ("calibrate(batch)", lambda _: _session().calibrate(TINY.batch())),
        "calibrate_empty": (
            "calibrate([])",
            lambda _: _session(lt.SparseGrad(**SPARSE)).calibrate([]),
        ),
        "calibrate_texts": (
            "calibrate(['text'])",
            lambda _: _session(lt.RoutedFFN()).calibrate(["text"]),
        ),
        "optimizer_name": ("optimizer('adam')", lambda _: _session().optimizer("adam")),
        "optimizer_module": ("optimizer(Linear)", lambda _: _session().optimizer(nn.Linear)),
        "optimizer_option": ("an option unknown to Adam", lambda _: _session().optimizer(rate=1)),
        "optimizer_lr": ("lr=-1", lambda _: _session().optimizer(lr=-1.0)),
        "save_none": ("save(None)", lambda _: _session().save(None)),
        "save_empty": ("save('')", lambda _: _session().save("")),
        "load_none": ("load(model, None)", lambda _: lt.load(TINY.build(), None)),  # type: ignore
        "load_missing": ("a folder that is not there", lambda _: lt.load(TINY.build(), "none")),
        "state_none": ("load_state_dict(None)", lambda _: _session().load_state_dict(None)),
        "state_empty": ("load_state_dict({})", lambda _: _session().load_state_dict({})),
        "callback_model": (
            "TrainerCallback(model)",
            lambda _: lt.TrainerCallback(TINY.build()),  # type: ignore[arg-type]
        ),
    }
)
_OPTIONS: dict[str, tuple[Any, str, Any]] = {
    "ratio_nan": (lt.WTACRS, "keep_ratio", float("nan")),
    "ratio_infinite": (lt.WTACRS, "keep_ratio", float("inf")),
    "ratio_bool": (lt.WTACRS, "keep_ratio", True),
    "ratio_percent": (lt.WTACRS, "keep_ratio", 30),
    "rows_huge": (lt.WTACRS, "min_rows", 10**400),
    "rows_float": (lt.WTACRS, "min_rows", 2.0),
    "rank_text": (lt.LoRA, "rank", "16"),
    "rank_zero": (lt.LoRA, "rank", 0),
    "alpha_huge": (lt.LoRA, "alpha", 10**400),
    "head_number": (lt.LoRA, "train_head", 1),
    "estimator_unknown": (lt.WTACRS, "estimator", "best"),
    "groups_bool": (lt.RoutedFFN, "num_groups", True),
    "sites_number": (lt.MeProp, "sites", 3),
    "density_huge": (lt.SparseGrad, "density", 10**5000),
}
for _name, (_kind, _option, _value) in _OPTIONS.items():
    CASES.add(
        f"option_{_name}",
        "refused",
        f"{_kind.__name__}({_option}={type(_value).__name__})",
        lambda _, kind=_kind, option=_option, value=_value: kind(**{option: value}),
    )


def _after_end(use: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        session = _session()
        session.remove()
        return use(session)

    return run


_refused(
    {
        f"ended_{name}": (f"{name} after remove", _after_end(use))
        for name, use in {
            "merge": lambda s: s.merge(),
            "save": lambda s: s.save("saved"),
            "optimizer": lambda s: s.optimizer(),
            "calibrate": lambda s: s.calibrate([]),
            "exact": lambda s: s.exact(),
            "on_step": lambda s: s.on_step(),
            "callback": lt.TrainerCallback,
        }.items()
    }
)


@CASES.refused
def nested_outer(folder: Path) -> Any:
    """A block is converted, then the model around it."""
    model = TINY.build()
    lt.apply(model.model.layers[0], _sampled(sites="linear"))
    return _same_modules(model, lambda: lt.apply(model, _sampled()))


@CASES.refused
def nested_inner(folder: Path) -> Any:
    """A model is converted, then one inside it."""
    model = TINY.build()
    lt.apply(model, _sampled())
    return _same_modules(model, lambda: lt.apply(model.model, lt.LoRA(rank=2)))


@CASES.refused
def frozen_explicit(folder: Path) -> Any:
    """SparseGrad on weights that the user froze."""
    model = TINY.build().requires_grad_(False)
    return _same_modules(model, lambda: lt.apply(model, lt.SparseGrad(sites="mlp.up")))


@CASES.refused
def frozen_sampled(folder: Path) -> Any:
    """WTACRS on linears that are all frozen."""
    model = TINY.build().requires_grad_(False)
    return _same_modules(model, lambda: lt.apply(model, _sampled(sites="linear")))


@CASES.refused
def base_beside_adapter(folder: Path) -> Any:
    """SparseGrad on the base of a PEFT model, whose file would lack it."""
    model = peft.get_peft_model(TINY.build(), _lora(target_modules=["q_proj"]))
    return _same_modules(model, lambda: lt.apply(model, lt.SparseGrad(sites="mlp.up")))


@CASES.refused
def two_adapters(folder: Path) -> Any:
    """LoRA of leantune on a model that PEFT has adapted."""
    model = peft.get_peft_model(TINY.build(), _lora())
    return _same_modules(model, lambda: lt.apply(model, lt.LoRA(rank=2)))


def _on_top(method: Any) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        session = _session(method)
        model = peft.get_peft_model(session.model, _lora())
        return _same_modules(model, lambda: TINY.train(model))

    return run


def _from_sft(folder: Path) -> Any:
    import datasets
    import trl
    from integration.tiny import llama, token_rows, tokenizer

    session = lt.apply(llama(), _sampled())
    trainer = trl.SFTTrainer(
        session.model,
        trl.SFTConfig("out", max_steps=1, report_to="none", use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_dict({"input_ids": token_rows()["input_ids"][:]}),
        processing_class=tokenizer(),
        peft_config=_lora(),
        callbacks=[lt.TrainerCallback(session)],
    )
    return trainer.train()


_refused(
    {
        "peft_on_sampled": ("WTACRS, then PEFT, then a step", _on_top(_sampled())),
        "peft_on_meprop": ("MeProp, then PEFT, then a step", _on_top(lt.MeProp())),
        "peft_on_sparse": ("SparseGrad, then PEFT, a step", _on_top(lt.SparseGrad(**SPARSE))),
        "sft_on_sampled": ("WTACRS, then SFTTrainer(peft_config=...)", _from_sft),
    }
)


def _changed(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        session = _session()
        change(session.model)
        return _same_modules(session.model, session.remove)

    return run


def _copied_block(model: Any) -> None:
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


_refused(
    {
        "replaced_linear": (
            "another linear in the place of a converted one, then remove",
            _changed(lambda m: setattr(m.model.layers[0].mlp, "up_proj", nn.Linear(16, 32))),
        ),
        "copied_block": (
            "a copied block in the place of a block, then remove",
            _changed(_copied_block),
        ),
        "compiled_linear": (
            "compile() of a converted linear, then remove",
            _changed(lambda m: m.model.layers[0].mlp.up_proj.compile()),
        ),
        "save_routed": (
            "save_pretrained of a model with routed FFNs",
            lambda _: _session(lt.RoutedFFN()).model.save_pretrained("saved"),
        ),
        "save_sparse_attention": (
            "save_pretrained of a model with sparse attention",
            lambda _: _session(lt.SPTAttention(subspace_width=4)).model.save_pretrained("saved"),
        ),
    }
)


def _kept(method: Any) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        session = _session(method)
        session.calibrate([TINY.batch(1), TINY.batch(2)])
        model = peft.get_peft_model(session.model, _lora())
        TINY.train(model)
        before = {n: p.clone() for n, p in model.named_parameters() if ".lora_" in n}
        session.remove()
        after = {n: p for n, p in model.named_parameters() if ".lora_" in n}
        assert before.keys() == after.keys() and len(before) == 12
        assert all(torch.equal(after[n], p) for n, p in before.items())

    return run


for _name, _method in {
    "checkpoint": lt.Checkpoint(),
    "routed": lt.RoutedFFN(),
    "sparse_attention": lt.SPTAttention(subspace_width=4, num_codewords=2),
}.items():
    CASES.add(f"keeps_adapter_{_name}", "works", f"{_name}, PEFT, a step, remove", _kept(_method))


def _peft_first(end: str, **options: Any) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        model: Any = peft.get_peft_model(TINY.build(), _lora(**options))
        session = lt.apply(model, _sampled())
        TINY.train(model)
        if end in ("unload", "merge_and_unload"):
            getattr(model, end)()
            session.remove()
        else:
            getattr(session, end)()
        assert not session.conversions and not any(hasattr(m, "runtime") for m in model.modules())

    return run


for _end in ("merge", "remove", "unload", "merge_and_unload"):
    CASES.add(f"peft_first_{_end}", "works", f"PEFT, WTACRS, a step, {_end}", _peft_first(_end))
for _variant in ("use_dora", "use_rslora"):
    CASES.add(
        f"peft_first_{_variant}",
        "works",
        f"PEFT with {_variant}, WTACRS, a step, merge",
        _peft_first("merge", **{_variant: True}),
    )
