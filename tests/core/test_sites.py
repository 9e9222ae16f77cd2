"""Sites of every tiny model, exactly; and the ways of naming them."""

import pytest
from models import MODELS
from torch import Tensor, nn

from leantune.core.sites import ROLES, Site, find_sites, match_sites
from leantune.errors import SiteError


def block_names(tiny, model: nn.Module) -> list[str]:
    names = []
    for pattern in tiny.blocks:
        names += [pattern.replace("*", str(i)) for i in range(tiny.num_blocks)]
    modules = dict(model.named_modules())
    assert all(name in modules for name in names)
    return names


def expected_parts(block: str, layout: dict, modules: dict) -> dict[str, dict[str, str]]:
    """Resolve the layout in one block: entries that it lacks are left out."""
    return {
        f"{block}.{entry}": {part: f"{block}.{path}" for part, path in parts.items()}
        for entry, parts in layout.items()
        if f"{block}.{entry}" in modules
    }


@pytest.mark.parametrize("name", MODELS)
def test_blocks_attention_and_mlps_are_found_exactly(name: str) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    modules = dict(model.named_modules())
    sites = find_sites(model)
    blocks = block_names(tiny, model)
    assert [s.name for s in sites if s.role == "block"] == blocks
    attention: dict[str, dict[str, str]] = {}
    mlp: dict[str, dict[str, str]] = {}
    for block in blocks:
        attention.update(expected_parts(block, tiny.attention, modules))
        mlp.update(expected_parts(block, tiny.mlp, modules))
    assert {s.name: dict(s.parts) for s in sites if s.role == "attention"} == attention
    assert {s.name: dict(s.parts) for s in sites if s.role == "mlp"} == mlp
    assert all(part in modules for s in sites for part in s.parts.values())
    # Nothing more than blocks with their parts, and every plain linear.
    assert {s.role for s in sites} == set(ROLES)
    assert all(modules[s.name] is s.module for s in sites)
    order = list(modules)
    assert [order.index(s.name) for s in sites] == sorted(order.index(s.name) for s in sites)


@pytest.mark.parametrize("name", MODELS)
def test_linears_are_found_exactly(name: str) -> None:
    model = MODELS[name].build()
    wanted = [
        n for n, m in model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"
    ]
    sites = [s for s in find_sites(model) if s.role == "linear"]
    assert [s.name for s in sites] == wanted
    inside = [
        s
        for s in sites
        if any(s.name.startswith(b + ".") for b in block_names(MODELS[name], model))
    ]
    assert [s for s in sites if s.block is not None] == inside
    # Everything outside the blocks of these models is a head, and none of the blocks' linears is.
    assert all(s.is_head_or_embedding == (s.block is None) for s in sites)


@pytest.mark.parametrize("name", MODELS)
def test_linears_that_read_one_input_share_a_key(name: str) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    modules = dict(model.named_modules())
    groups: dict[str, set[str]] = {}
    for site in find_sites(model):
        if site.role == "linear" and site.reads is not None:
            groups.setdefault(site.reads, set()).add(site.name)
    expected = [
        {f"{block}.{path}" for path in shared}
        for block in block_names(tiny, model)
        for shared in tiny.shared
        if f"{block}.{shared[0]}" in modules
    ]
    several = [names for names in groups.values() if len(names) > 1]
    assert sorted(map(sorted, several)) == sorted(map(sorted, expected))


@pytest.mark.parametrize("name", MODELS)
def test_claimed_sharing_is_true(name: str) -> None:
    """Linears with one key are really called with one tensor object."""
    tiny = MODELS[name]
    model = tiny.build()
    inputs: dict[str, list[Tensor]] = {}
    for site in find_sites(model):
        if site.role == "linear" and site.reads is not None:

            def see(module, args, key=site.reads):
                inputs.setdefault(key, []).append(args[0])

            site.module.register_forward_pre_hook(see)
    model(**tiny.batch())
    assert all(x is seen[0] for seen in inputs.values() for x in seen)
    assert any(len(seen) > 1 for seen in inputs.values()) == bool(tiny.shared)


@pytest.mark.parametrize("name", MODELS)
def test_masks(name: str) -> None:
    for site in find_sites(MODELS[name].build()):
        if site.block is None:
            wanted = None
        elif site.name.startswith("decoder.") and "EncDecAttention.q" not in site.name:
            reads_encoder = site.name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            wanted = "attention_mask" if reads_encoder else "decoder_attention_mask"
        elif site.name.startswith("decoder."):
            wanted = "decoder_attention_mask"
        else:
            wanted = "attention_mask"
        assert site.mask == wanted, site.name


def test_bypass_names_what_a_whole_mlp_replaces() -> None:
    def bypass(name: str) -> tuple[str, ...]:
        return next(s.bypass for s in find_sites(MODELS[name].build()) if s.role == "mlp")

    assert bypass("bert") == ("bert.encoder.layer.0.output.dense",)
    assert bypass("opt") == ("model.decoder.layers.0.activation_fn", "model.decoder.layers.0.fc2")
    assert bypass("llama") == ()


# peft asks transformers for a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_factors_of_a_peft_model_are_linears() -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(MODELS["llama"].build(), LoraConfig(r=2, target_modules=targets))
    sites = {s.name: s for s in find_sites(model)}
    layer = "base_model.model.model.layers.0"
    first = [sites[f"{layer}.self_attn.{x}_proj.lora_A.default"] for x in "qkv"]
    assert len({s.reads for s in first}) == 1 and first[0].reads is not None
    base = [sites[f"{layer}.self_attn.{x}_proj.base_layer"] for x in "qkv"]
    assert len({s.reads for s in base}) == 1 and base[0].reads != first[0].reads
    assert not base[0].is_trainable and first[0].is_trainable
    gated = [sites[f"{layer}.mlp.{x}_proj.lora_A.default"] for x in ("gate", "up")]
    assert len({s.reads for s in gated}) == 1 and gated[0].reads != first[0].reads
    assert sites[f"{layer}.mlp.down_proj.lora_A.default"].reads is None
    second = [s for s in sites.values() if ".lora_B." in s.name]
    assert len(second) == 12 and all(s.reads is None for s in second)
    assert all(s.mask == "attention_mask" for s in [*first, *second])
    assert sum(s.role == "attention" for s in sites.values()) == 2


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.mlp = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Bilinear(4, 4, 4))
        self.classifier = nn.Linear(4, 2)
        self.lm_head = nn.Linear(4, 2)
        self.score = nn.Sequential(nn.Linear(2, 2))
        self.forehead_of_it = nn.Linear(4, 4)


def test_any_module_has_its_linears() -> None:
    sites = find_sites(Anything())
    assert [s.name for s in sites] == [
        "layers.0",
        "layers.1",
        "mlp.0",
        "classifier",
        "lm_head",
        "score.0",
        "forehead_of_it",
    ]
    assert all(s.role == "linear" and s.mask is None and s.reads is None for s in sites)
    heads = [s.name for s in sites if s.is_head_or_embedding]
    assert heads[:3] == ["classifier", "lm_head", "score.0"]


def test_subclasses_of_linear_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    assert find_sites(nn.Sequential(Special(2, 2))) == []


def test_decoder_beside_an_encoder_has_its_own_mask() -> None:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    options = {
        **MODELS["bert"].options,
        "num_hidden_layers": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**options), BertConfig(**options)
    )
    masks = {s.name: s.mask for s in find_sites(EncoderDecoderModel(config))}
    assert masks["encoder.encoder.layer.0.output.dense"] == "attention_mask"
    assert masks["decoder.bert.encoder.layer.0.output.dense"] == "decoder_attention_mask"
    cross = "decoder.bert.encoder.layer.0.crossattention.self"
    assert masks[f"{cross}.query"] == "decoder_attention_mask"
    assert masks[f"{cross}.key"] == "attention_mask"


@pytest.fixture(scope="module")
def bert_sites() -> list[Site]:
    return find_sites(MODELS["bert"].build())


def names(sites: list[Site], *wanted: str) -> list[str]:
    return [s.name for s in match_sites(sites, wanted, lambda s: False, "Test")]


LAYER = "bert.encoder.layer"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("block", [f"{LAYER}.0", f"{LAYER}.1"]),
        ("attention", [f"{LAYER}.0.attention.self", f"{LAYER}.1.attention.self"]),
        ("query", [f"{LAYER}.0.attention.self.query", f"{LAYER}.1.attention.self.query"]),
        ("self.query", [f"{LAYER}.0.attention.self.query", f"{LAYER}.1.attention.self.query"]),
        ("bert.*.1.*.query", [f"{LAYER}.1.attention.self.query"]),
        ("1.attention.*.[kq]*y", [f"{LAYER}.1.attention.self.{x}" for x in ("query", "key")]),
        (
            "re:layer\\.0.*(query|value)$",
            [f"{LAYER}.0.attention.self.{x}" for x in ("query", "value")],
        ),
        ("classifier", ["classifier"]),
        (f"{LAYER}.0.output.dense", [f"{LAYER}.0.output.dense"]),
    ],
)
def test_patterns(bert_sites, pattern, found) -> None:
    assert names(bert_sites, pattern) == found


def test_role_matches_every_site_of_it(bert_sites) -> None:
    assert names(bert_sites, "linear") == [s.name for s in bert_sites if s.role == "linear"]


def test_patterns_add_up_in_model_order(bert_sites) -> None:
    assert names(bert_sites, "classifier", "1.*.key", "0.*.key") == [
        f"{LAYER}.0.attention.self.key",
        f"{LAYER}.1.attention.self.key",
        "classifier",
    ]


@pytest.mark.parametrize("pattern", ["uery", "nothing", "re:^nothing$", "QUERY"])
def test_pattern_without_a_match_is_an_error(bert_sites, pattern) -> None:
    with pytest.raises(
        SiteError, match="Test: sites must match at least one module, got "
    ) as error:
        names(bert_sites, "query", pattern)
    assert repr(pattern) in str(error.value) and "linear, mlp, attention, block" in str(error.value)


def test_broken_regular_expression(bert_sites) -> None:
    with pytest.raises(SiteError, match=r"valid regular expressions, got 're:\('"):
        names(bert_sites, "re:(")


def test_predicate_and_default(bert_sites) -> None:
    chosen = match_sites(bert_sites, lambda s: s.name.endswith("key"), lambda s: False, "Test")
    assert [s.name.rpartition(".")[2] for s in chosen] == ["key", "key"]
    assert match_sites(bert_sites, None, lambda s: s.role == "block", "Test") == [
        s for s in bert_sites if s.role == "block"
    ]


def test_trainable_is_about_own_parameters() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    assert Site("x", "linear", layer).is_trainable
    layer.bias.requires_grad_(False)
    assert not Site("x", "linear", layer).is_trainable
