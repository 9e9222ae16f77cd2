"""The plan is the fastest way that fits, and what nothing fits says what would."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import leantune as lt
from leantune.planner.plan import Plan, _gradient
from leantune.planner.request import PlanRequest
from leantune.training.recipe import MeasureRecipe

EXACT = {"batch_size": 4, "max_length": 32, "min_keep_ratio": 1}


def config(**options: Any) -> transformers.GPT2Config:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
    return transformers.GPT2Config(**{**sizes, "bos_token_id": 1, **options})


def gpt2(**options: Any) -> nn.Module:
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(config(**options))


@pytest.fixture(scope="module")
def roomy() -> Plan:
    return lt.plan(gpt2(), batch_size=4, max_length=32, budget="1GiB")


def ways(plan: Plan) -> dict[str, Plan]:
    return {str(way.methods): way for way in (plan, *plan.alternatives)}


def test_with_room_the_fastest_way_takes_the_whole_batch(roomy: Plan) -> None:
    every = [roomy, *roomy.alternatives]
    assert len(every) == 6 and all(way.fits and way.accumulation_steps == 1 for way in every)
    assert [way.relative_time for way in every] == sorted(way.relative_time for way in every)
    plain = ways(roomy)["()"]
    assert (plain.relative_time, plain.gradient) == (1.0, "exact")


def test_bytes_are_those_of_the_ledger_on_the_same_batch(roomy: Plan) -> None:
    model = transformers.GPT2LMHeadModel(config())
    request = PlanRequest(batch_size=4, max_length=32, budget="1GiB")
    batch = request.batch(model, torch.device("cpu"))
    if roomy.methods:
        lt.apply(model, *roomy.methods)
    measured = lt.ledger(model, batch)
    for name in ("weights", "gradients", "optimizer", "activations"):
        assert roomy.num_bytes[name] == getattr(measured, name), name


def test_what_costs_more_saves_more(roomy: Plan) -> None:
    def saved(*methods: Any) -> int:
        return ways(roomy)[str(methods)].num_bytes["activations"]

    some, mlp, block = lt.WTACRS(keep_ratio=0.3), lt.Checkpoint(parts=("mlp",)), lt.Checkpoint()
    assert saved() > saved(some) > saved(mlp, some) > saved(block)
    assert saved() > saved(mlp) > saved(block) == saved(block, lt.WTACRS(keep_ratio=0.1))


@pytest.mark.parametrize(
    ("bound", "sampled"),
    [
        (0.1, {"()": [0.3, 0.1], "mlp": [0.3, 0.1], "block": [0.1]}),
        (0.3, {"()": [0.3], "mlp": [0.3], "block": [0.1]}),
        (0.31, {"()": [], "mlp": [], "block": []}),
    ],
)
def test_the_bound_is_a_third_where_rows_are_drawn_by_exact_norms(
    bound: float, sampled: dict[str, list[float]]
) -> None:
    parts = {"()": (), "mlp": (lt.Checkpoint(parts=("mlp",)),), "block": (lt.Checkpoint(),)}
    plan = lt.plan(gpt2(), batch_size=1, max_length=8, budget="1GiB", min_keep_ratio=bound)
    found = {way.methods for way in (plan, *plan.alternatives)}
    assert found == {
        (*part, *rows)
        for name, part in parts.items()
        for rows in [(), *((lt.WTACRS(keep_ratio=ratio),) for ratio in sampled[name])]
    }


def test_a_small_budget_is_met_by_what_a_step_then_holds() -> None:
    two = {**EXACT, "batch_size": 2}
    room = lt.plan(gpt2(), **two, budget="1GiB").num_bytes["peak"] - 1
    plan = lt.plan(gpt2(), **two, budget=room)
    assert plan.fits and (plan.methods, plan.accumulation_steps) != ((), 1)
    for way in (plan, *plan.alternatives):
        assert way.fits is (way.num_bytes["peak"] <= room)
        assert way.batch_size * way.accumulation_steps == 2


def test_a_large_batch_is_cut_into_micro_batches() -> None:
    exact = {"batch_size": 12, "max_length": 64, "min_keep_ratio": 1}
    whole = lt.plan(gpt2(), lt.Checkpoint(), **exact, budget="1GiB")
    plan = lt.plan(gpt2(), lt.Checkpoint(), **exact, budget=whole.num_bytes["peak"] * 3 // 4)
    assert plan.methods == (lt.Checkpoint(),)
    assert plan.accumulation_steps in (2, 4, 12) and plan.fits
    assert plan.batch_size * plan.accumulation_steps == 12


def test_methods_that_are_given_are_kept_and_not_added_again() -> None:
    given = (lt.LoRA(rank=2), lt.WTACRS(keep_ratio=0.5, min_rows=2))
    plan = lt.plan(gpt2(), *given, batch_size=2, max_length=32, budget="1GiB")
    every = [way.methods for way in (plan, *plan.alternatives)]
    assert sorted(map(len, every)) == [2, 3, 3]
    assert all(methods[:2] == given for methods in every)
    assert plan.num_bytes["gradients"] < plan.num_bytes["weights"] / 4


def test_the_recipe_is_read_by_a_run_and_the_rest_is_json(roomy: Plan) -> None:
    recipe = roomy.recipe()
    del recipe["gradient_accumulation_steps"]
    assert MeasureRecipe.from_dict(recipe).methods == roomy.methods
    document = json.loads(json.dumps(roomy.to_dict()))
    assert document["num_bytes"] == roomy.num_bytes and len(document["alternatives"]) == 5
    assert str(roomy).count("\n") == 7


def test_a_configuration_names_its_class() -> None:
    options = {"architectures": ["GPT2ForSequenceClassification"], "pad_token_id": 0}
    small = lt.plan(config(**options), **EXACT, budget="1GiB")
    large = lt.plan(config(), **EXACT, budget="1GiB")
    tied = large.num_bytes["weights"] - small.num_bytes["weights"]
    assert tied == -2 * 32 * 4  # a head of two classes; the language model's is its embedding


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("22GiB", 22 * 2**30), ("8 GB", 8 * 10**9), ("1.5MiB", 3 * 2**19), ("7B", 7), (512, 512)],
)
def test_budgets_are_read(text: Any, num_bytes: int) -> None:
    assert PlanRequest(batch_size=1, max_length=2, budget=text).budget == num_bytes


@pytest.mark.parametrize("budget", ["22", "0GiB", "-1GiB", "GiB", "1 XB", 0, -5, 2.5, True, None])
def test_what_is_no_budget_is_named(budget: Any) -> None:
    with pytest.raises(lt.ConfigError, match=r"budget must be a size with its unit.*'22GiB'"):
        lt.plan(gpt2(), batch_size=1, max_length=8, budget=budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be .*1.*, got 0"),
        ({"max_length": 65}, "max_length must be at most 64 for GPT2LMHeadModel, got 65"),
        ({"min_keep_ratio": 0}, "min_keep_ratio must be .*, got 0"),
        ({"precision": "int8"}, "precision must be .*'float32'.*, got 'int8'"),
    ],
)
def test_what_is_no_request_is_named(options: Any, message: str) -> None:
    with pytest.raises(lt.ConfigError, match=message):
        lt.plan(gpt2(), **{**EXACT, "budget": "1GiB", **options})


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(lt.ConfigError, match=r"model must be a torch.nn.Module or .*'gpt2'"):
        lt.plan("gpt2", **EXACT, budget="1GiB")
    with pytest.raises(lt.ConfigError, match="model must read input_ids, got Linear"):
        lt.plan(nn.Linear(2, 2), **EXACT, budget="1GiB")
    with pytest.raises(lt.ConfigError, match="built on the meta device, got GPT2LMHeadModel"):
        lt.plan(
            config(architectures=["GPT2LMHeadModel"], activation_function="no"),
            **EXACT,
            budget="1GiB",
        )


def test_the_smallest_budget_that_an_error_names_is_enough_and_the_smallest() -> None:
    """Gradients that accumulate take more here than the smaller micro-batch saves."""
    wide, two = gpt2(n_embd=256), {"batch_size": 2, "max_length": 8, "min_keep_ratio": 1}
    given = lt.Checkpoint(), lt.LoRA(rank=256)
    with pytest.raises(lt.ConfigError, match="below its weights'") as refused:
        lt.plan(wide, *given, **two, budget="1KiB")
    least = int(str(refused.value).split("at least ")[1].split("MiB")[0])
    assert lt.plan(wide, *given, **two, budget=f"{least}MiB").accumulation_steps == 1
    with pytest.raises(lt.ConfigError, match=f"at least {least}MiB"):
        lt.plan(wide, *given, **two, budget=f"{least - 1}MiB")


def test_where_all_weights_do_not_fit_lora_may() -> None:
    wide = gpt2(n_embd=256)
    whole = lt.plan(wide, lt.Checkpoint(), **EXACT, budget="1GiB")
    assert not whole.alternatives
    smaller = lt.plan(wide, lt.Checkpoint(), **EXACT, budget=whole.num_bytes["weights"] * 3)
    assert smaller.methods == (lt.LoRA(), lt.Checkpoint()) and smaller.relative_time < 1
    assert [(way.methods, way.fits) for way in smaller.alternatives] == [
        ((lt.Checkpoint(),), False)
    ]
    with pytest.raises(lt.ConfigError, match=r"the smallest is LoRA\(\) \+ Checkpoint\(\) on "):
        lt.plan(wide, lt.Checkpoint(), **EXACT, budget="1KiB")


@pytest.mark.parametrize(
    ("method", "gradient"),
    [
        (lt.LoRA(), "exact"),
        (lt.WTACRS(keep_ratio=0.2), "unbiased, variance <= 4.0"),
        (lt.WTACRS(estimator="topk"), "as topk makes it"),
        (lt.MeProp(), "as MeProp makes it"),
    ],
)
def test_it_says_what_is_done_to_the_gradient(method: Any, gradient: str) -> None:
    assert _gradient((method,)) == gradient
    assert _gradient((method, lt.Checkpoint())) == gradient.replace("ed,", "ed by exact norms,")


def test_what_is_no_method_is_named() -> None:
    with pytest.raises(lt.ConfigError, match=r"method must be one of .*'lor'.*'lora'"):
        lt.plan(gpt2(), "lor", **EXACT, budget="1GiB")


def test_a_method_that_finds_no_site_is_said() -> None:
    with pytest.raises(lt.SiteError, match="LoRA"):
        lt.plan(gpt2(), lt.LoRA(sites=("nowhere",)), **EXACT, budget="1GiB")


def test_what_cannot_be_added_is_said_with_the_reason() -> None:
    """Bloom's MLP is seen in a forward with numbers alone."""
    bloom = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    plan = lt.plan(bloom, batch_size=2, max_length=8, budget="1GiB", min_keep_ratio=1)
    (why,) = plan.to_dict()["left_out"].values()
    assert "its mlp must be told from the rest, got BloomBlock" in why
    assert str(plan).endswith(f"left out: Checkpoint(parts=('mlp',)) ({why})")


@pytest.mark.slow
def test_the_page_shows_what_it_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "will-it-fit.md"
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    # In a process of its own: what other tests have left in torch's caches saves some operations.
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == printed.splitlines()


@pytest.mark.gpu
@pytest.mark.parametrize("given", [(), (lt.LoRA(rank=8),)])
def test_the_allocators_peak_is_as_planned(given: tuple[lt.LoRA, ...]) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    options: dict[str, Any] = {"batch_size": 8, "max_length": 512, "precision": "bf16"}
    plan = lt.plan(config, *given, **options, budget="100GiB")
    ids = torch.randint(0, 8192, (8, 512), device="cuda")
    (ids.float() @ ids.float().t()).sum()  # the library of products takes its own memory first
    differences: dict[str, float] = {}
    for way in (plan, *plan.alternatives):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = transformers.LlamaForCausalLM(config).cuda().train()
        session = lt.apply(model, *way.methods) if way.methods else None
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peak, planned = torch.cuda.max_memory_allocated() - before, way.num_bytes["peak"]
        differences[str(way.methods)] = planned / peak - 1
        del model, session, trained, optimizer, loss
    print(differences)
    assert all(abs(difference) <= 0.1 for difference in differences.values()), differences
