"""What every registered method owes to others' modules, to frozen weights and after its end; a new
method is tested here by being registered."""

import copy
import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt
from leantune.core import registry
from leantune.core.discovery import find_sites
from leantune.core.saving import writes_plain

SPECS = {name: spec for name, spec in registry.list_methods().items() if not spec.needs_gpu}
TINY = MODELS["llama"]
ENDS = ("merge", "remove")
# peft asks transformers for a name that transformers is about to drop, and says when a second
# adapter comes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter cannot be set:UserWarning"),
]


def example(method: str, **options: Any) -> Any:
    return SPECS[method].config(**{**SPECS[method].test_options, **options})


def convert(model: nn.Module, method: str) -> lt.Session:
    session = lt.apply(model, example(method))
    session.calibrate([TINY.batch(90), TINY.batch(91)])
    return session


def adapter(**options: Any) -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "up_proj", "down_proj"]
    return LoraConfig(**{"r": 2, "target_modules": targets, **options})


def with_adapter(model: nn.Module, **options: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, adapter(**options))  # type: ignore[arg-type]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def objects(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("method", SPECS)
def test_an_adapter_put_on_top_is_never_lost(method: str, end: str, tmp_path: Path) -> None:
    """It trains or is refused with the right order; the end leaves it whole, or changes nothing."""
    from peft import PeftModel

    base = TINY.build()
    session = convert(base, method)
    model = with_adapter(base)
    if SPECS[method].acts_on_weight:
        with pytest.raises(lt.SiteError, match=r"all frozen .* let the other library go first"):
            TINY.train(model)
    else:
        TINY.train(model, 2)
    # As others would have trained it: none of the factors is zero.
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_" in n:
                p += torch.linspace(-0.1, 0.1, p.numel()).view_as(p)
    kept, before, wanted = factors(model), objects(model), TINY.logits(model)
    has_dense = session.can_merge
    try:
        getattr(session, end)()
    except lt.UnsupportedError:
        assert method == "lora" or (end == "merge" and not has_dense)
        assert objects(model) == before and session.conversions
        assert torch.equal(TINY.logits(model), wanted)
        return
    assert equal(factors(model), kept)
    assert [type(m) for m in model.modules()] == [
        type(m) for m in with_adapter(TINY.build()).modules()
    ]
    if has_dense:
        torch.testing.assert_close(TINY.logits(model), wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    model.get_base_model().state_dict()
    back = PeftModel.from_pretrained(TINY.build(), str(tmp_path))
    assert equal(factors(back), kept)


@pytest.mark.parametrize("method", SPECS)
def test_nested_models_are_refused_both_ways(method: str) -> None:
    model = TINY.build()
    before = objects(model)
    for outer, inner in ((model, model.model), (model.model, model), (model, model)):
        session = lt.apply(outer, example(method))
        converted = objects(model)
        with pytest.raises(lt.ConfigError, match="not be converted already, nor a model inside"):
            lt.apply(inner, example(method))
        assert objects(model) == converted
        session.remove()
        assert objects(model) == before


def test_a_part_of_a_converted_model_is_converted_whoever_still_has_the_rest() -> None:
    model = TINY.build()
    lt.apply(model, lt.WTACRS())
    parts = [copy.deepcopy(model.model), model.model]
    del model
    gc.collect()
    for part in parts:
        with pytest.raises(lt.ConfigError, match="not be converted already"):
            lt.apply(part, lt.WTACRS())


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("method", SPECS)
def test_an_ended_session_says_so(method: str, end: str, tmp_path: Path) -> None:
    model = TINY.build()
    session = convert(model, method)
    if end == "merge" and not session.can_merge:
        end = "remove"
    state = session.state_dict()
    getattr(session, end)()
    calls: dict[str, Callable[[], Any]] = {
        "session.exact": session.exact,
        "session.on_step": session.on_step,
        "session.auxiliary_loss": session.auxiliary_loss,
        "session.calibrate": lambda: session.calibrate([TINY.batch()]),
        "session.optimizer": lambda: session.optimizer(lr=0.1),
        "session.merge": session.merge,
        "session.state_dict": session.state_dict,
        "session.load_state_dict": lambda: session.load_state_dict(state),
        "session.save": lambda: session.save(tmp_path / "saved"),
        "TrainerCallback": lambda: lt.TrainerCallback(session),
    }
    for who, call in calls.items():
        with pytest.raises(lt.ConfigError, match=f"^{who}: session must be open, got one after"):
            call()
    session.remove()
    assert not any(tmp_path.iterdir()) and "closed" in repr(session)


def frozen_parts(model: nn.Module) -> list[nn.Module]:
    return [model.model.layers[0], model.model.embed_tokens]


@pytest.mark.parametrize("method", [m for m in SPECS if SPECS[m].acts_on_weight])
def test_frozen_weights_are_refused_where_nothing_else_is_there_to_act_on(method: str) -> None:
    model = TINY.build()
    model.requires_grad_(False)
    before = objects(model)
    names = [s.name for s in find_sites(model) if s.role == "linear" and s.part == "mlp.up"]
    for sites in (None, names):
        with pytest.raises(lt.SiteError):
            lt.apply(model, example(method, sites=sites))
    with pytest.raises(lt.SiteError, match="frozen"):
        lt.apply(model, example(method, sites=names))
    assert objects(model) == before and not any(p.requires_grad for p in model.parameters())
    # Some of the layers frozen on purpose: the method acts on the others.
    model.requires_grad_(True)
    for part in frozen_parts(model):
        part.requires_grad_(False)
    kept = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    session = convert(model, method)
    TINY.train(model, 2)
    session.merge()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert equal({n: p for n, p in model.named_parameters() if n in kept}, kept)
    assert {n for n, flag in flags.items() if not flag} == set(kept)


@pytest.mark.parametrize("method", [m for m in SPECS if SPECS[m].trains_weight])
def test_weights_beside_an_adapter_are_not_trained(method: str) -> None:
    """What is trained there the adapter's file would lack."""
    model = with_adapter(TINY.build(), target_modules=["q_proj"])
    before = objects(model)
    with pytest.raises(lt.SiteError, match=r"1 of 1 sites .*as all are beside a PEFT adapter"):
        lt.apply(model, example(method, sites="layers.0.mlp.up_proj"))
    assert objects(model) == before


@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize(
    ("predicate", "rule"),
    [
        (lambda site: 1 / 0, "answers for every site, got ZeroDivisionError at model.layers.0"),
        (lambda site: site.name, "returns True or False, got 'model.layers.0"),
        (lambda site: None, "returns True or False, got None at model.layers.0"),
    ],
)
def test_a_predicate_that_does_not_answer_is_named(method, predicate, rule: str) -> None:
    model = TINY.build()
    before = objects(model)
    with pytest.raises(lt.SiteError, match=rf"^\w+: sites must be a predicate that {rule}"):
        lt.apply(model, example(method, sites=predicate))
    assert objects(model) == before


HUGE = (
    2**63,
    -(2**63) - 1,
    10**400,
    10**5000,
    float("nan"),
    -float("inf"),
    "1e999",
    True,
    "x" * 999,
)


class Unshown:
    """A value that fails where an error shows it."""

    def __repr__(self) -> str:
        raise RuntimeError("not shown")


@pytest.mark.parametrize("method", SPECS)
def test_absurd_values_of_every_option_are_named(method: str) -> None:
    config = SPECS[method].config
    for row in config.describe():
        for value in (*HUGE, Unshown(), object(), b"1"):
            if row["name"] == "sites" and isinstance(value, str):
                continue
            if "bool" in row["rule"] and isinstance(value, bool):
                continue
            with pytest.raises(lt.ConfigError) as error:
                config(**{row["name"]: value})
            said = str(error.value)
            assert said.startswith(f"{config.__name__}: {row['name']} must be "), said
            assert len(said) < 700


@pytest.mark.parametrize("method", SPECS)
def test_save_pretrained_never_writes_another_function(method: str, tmp_path: Path) -> None:
    model = TINY.build()
    names = sorted(vars(model))
    session = convert(model, method)
    TINY.train(model, 2)
    wanted = TINY.logits(model)
    if session.can_merge:
        model.save_pretrained(tmp_path)
        if method != "lora":  # whose files are the adapter's
            back, how = type(model).from_pretrained(tmp_path, output_loading_info=True)
            assert not any(how.values()), how
            torch.testing.assert_close(TINY.logits(back), wanted)
        assert torch.equal(TINY.logits(model), wanted) and session.conversions
        return
    with pytest.raises(
        lt.UnsupportedError, match=r"what its plain modules do, got .*session\.save.*\.remove\("
    ):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    session.remove()
    assert sorted(vars(model)) == names
    model.save_pretrained(tmp_path)
    assert torch.equal(TINY.logits(type(model).from_pretrained(tmp_path)), TINY.logits(model))


@pytest.mark.parametrize("method", [m for m in SPECS if m != "lora"])
def test_a_run_with_its_session_writes_checkpoints_that_only_a_resumed_run_reads(
    method: str, tmp_path: Path
) -> None:
    import transformers

    def run(resume: Path | None = None) -> dict[str, Tensor]:
        session = lt.apply(TINY.build(), example(method))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            save_steps=1,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = [{k: v[i] for k, v in TINY.batch().items()} for i in range(4)] * 3
        callbacks = [lt.TrainerCallback(session)]
        trainer = transformers.Trainer(
            session.model,  # type: ignore[arg-type]
            arguments,
            train_dataset=rows,  # type: ignore[arg-type]
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        final = tmp_path / "final"
        if session.can_merge:
            trainer.save_model(str(final))
            saved = transformers.LlamaForCausalLM.from_pretrained(final)
            torch.testing.assert_close(TINY.logits(saved), TINY.logits(session.model))
        else:
            with pytest.raises(lt.UnsupportedError, match="save_pretrained: model must compute"):
                trainer.save_model(str(final))
        return {n: p.detach().clone() for n, p in session.model.named_parameters()}

    expected = run()
    checkpoint = tmp_path / "checkpoint-1"
    if not writes_plain(lt.apply(TINY.build(), example(method)).conversions):
        for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
            with pytest.raises(ValueError, match="leantune_session"):
                kind.from_pretrained(checkpoint)
    assert equal(run(checkpoint), expected)


@pytest.mark.parametrize("method", SPECS)
def test_a_module_replaced_inside_a_site_is_not_overwritten(method: str) -> None:
    """A linear of another's in our place stays, or the end is refused and changes nothing."""
    model = TINY.build()
    session = convert(model, method)
    mlp = model.model.layers[0].mlp
    other = nn.Linear(*mlp.up_proj.weight.shape[::-1])
    mlp.up_proj = other
    before = objects(model)
    try:
        session.remove()
    except lt.UnsupportedError as error:
        assert "model.layers.0.mlp.up_proj" in str(error)
        assert objects(model) == before and session.conversions
    else:
        assert model.model.layers[0].mlp.up_proj is other
        plain = TINY.build()
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("method", SPECS)
def test_the_repr_says_what_was_done(method: str) -> None:
    session = convert(TINY.build(), method)
    text = repr(session)
    assert text.startswith("<Session of LlamaForCausalLM: open, step 0\n")
    num = len(session.conversions[0].sites)
    assert f"{session.methods[0]!r} at {num} site" in text
    assert len(inspect.cleandoc(text).splitlines()) == 2
