"""What a survey says: equal places once, each method's choice, and every matrix that is left."""

import pytest
import torch
import zoo
from torch import nn

import leantune as lt
from leantune.core.survey import Survey, survey


def found(result: Survey, name: str, role: str = "linear") -> tuple[object, ...]:
    (row,) = [row for row in result.found if (row.name, row.role) == (name, role)]
    return row.block, row.part, row.shape, row.count


def test_equal_places_are_shown_once() -> None:
    model, _ = zoo.build("t5")
    result = survey(model)
    block = "encoder.block.0-1"
    up = found(result, f"{block}.layer.1.DenseReluDense.wi")
    assert up == (block, "mlp.up", (96, 64), 2)
    norms = found(result, "decoder.block.0-1.layer.0-2.layer_norm", "norm")
    assert norms == ("decoder.block.0-1", None, (64,), 6)
    assert sum(row.count for row in result.found) == len(lt.find_sites(model))
    assert result.num_parameters == sum(p.numel() for p in model.parameters())


def test_numbers_of_unlike_places_stay_apart() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 4 + i // 3) for i in range(5))})
    names = {row.name: row.count for row in survey(model).found}
    assert names == {"layers.0-2": 3, "layers.3-4": 2}


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "gpt_oss"])
def test_a_survey_says_what_apply_does(name: str) -> None:
    model, _ = zoo.build(name)
    choices = {choice.method: choice for choice in survey(model).choices}
    assert list(choices) == list(lt.list_methods())
    for method, spec in lt.list_methods().items():
        if choices[method].why_not is None:
            lt.apply(model, spec.config()).remove()
        else:
            assert choices[method].num_sites == 0
            with pytest.raises((lt.SiteError, lt.UnsupportedError)):
                lt.apply(model, spec.config())
    rows = [row for row in survey(model).found if "wta_crs" in row.methods]
    assert sum(row.count for row in rows) == choices["wta_crs"].num_sites > 0


def test_every_weight_is_taken_or_named() -> None:
    model, _ = zoo.build("mixtral")
    result = survey(model)
    left = {item.name: item for item in result.left}
    experts = left["model.layers.0-1.mlp.experts.gate_up_proj"]
    assert experts.share == 2 * 4 * 192 * 64 / result.num_parameters and "no linear" in experts.why
    assert left["lm_head.weight"].why == "Linear, 128 x 64; sites= takes it"
    assert "model.embed_tokens.weight" in left
    taken = max(choice.share for choice in result.choices)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2) / result.num_parameters
    assert taken + vectors + sum(item.share for item in left.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["bert", "falcon"])
def test_no_weight_is_read(name: str) -> None:
    real, _ = zoo.build(name)
    with torch.device("meta"):
        model = type(real)(real.config)
    assert survey(model) == survey(real)


def test_parts_that_no_forward_could_show_are_no_silence() -> None:
    real, _ = zoo.build("phi3")
    with torch.device("meta"):
        model = type(real)(real.config)
    (choice,) = [c for c in survey(model).choices if c.method == "routed_ffn"]
    assert choice.why_not and choice.why_not.endswith("got a model on the meta device")


@pytest.mark.parametrize("name", ["mamba", "mixtral", "qwen3_next", "t5", "xlnet"])
def test_every_matrix_of_a_block_is_a_linears_or_named_as_none(name: str) -> None:
    model, _ = zoo.build(name)
    sites, result = lt.find_sites(model), survey(model)
    inside = tuple(f"{site.name}." for site in sites if site.role == "block")
    linears = {f"{site.name}.weight" for site in sites if site.role == "linear"}
    others = [
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim > 1 and n.startswith(inside) and n not in linears
    ]
    named = sum(item.share for item in result.left if "is no linear's weight" in item.why)
    assert named * result.num_parameters == pytest.approx(sum(others)) and others


def test_a_quantised_weight_is_named() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))})
    weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    model.get_submodule("layers.0").weight = weight
    reasons = {item.name: item.why for item in survey(model).left}
    assert "floating point, got int8" in reasons["layers.0.weight"]
