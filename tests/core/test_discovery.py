"""What is found in any model without running it: blocks, parts, heads, ties, and what is not."""

from functools import cache

import pytest
import torch
import zoo
from stats import mean_check
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import leantune as lt
from leantune.core.discovery import Layout, discover, find_sites
from leantune.core.sites import Site
from leantune.errors import SiteError

IN_LISTS = {
    "albert": ["albert.encoder.albert_layer_groups.0"],
    "mpnet": ["mpnet.encoder.layer.0", "mpnet.encoder.layer.1"],
    "xlnet": ["transformer.layer.0", "transformer.layer.1"],
}
"""Types none of whose layers transformers can checkpoint by itself."""

BETWEEN = {
    "clip": {"text_projection", "visual_projection"},
    "gemma4": {"model.per_layer_model_projection"},
    "qwen2_vl": {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"},
}
"""Linears outside blocks that are no heads: they lie between the parts of a model."""


@cache
def built(name: str) -> tuple[nn.Module, dict[str, Tensor], Layout, list[Site]]:
    model, batch = zoo.build(name)
    layout = discover(model)
    return model, batch, layout, find_sites(model, layout)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_blocks_are_the_layers_that_transformers_checkpoints_or_those_of_a_list(name: str) -> None:
    model, _, layout, _ = built(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    outermost = [n for n in layers if not any(n.startswith(f"{other}.") for other in layers)]
    assert list(layout.blocks) == (outermost or IN_LISTS[name])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_no_linear_of_a_block_is_a_head_and_every_head_is_found(name: str) -> None:
    model, _, _, sites = built(name)
    heads = {s.name for s in sites if s.is_head_or_embedding}
    inside = {s.name for s in sites if s.block is not None}
    assert not heads & inside
    output = model.get_output_embeddings()
    assert output is None or output in [model.get_submodule(n) for n in heads]
    free = {s.name for s in sites if s.role == "linear"} - heads - inside
    assert free == BETWEEN.get(name, set())


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_claim_of_the_table_is_true(name: str) -> None:
    """FFNs compute what their parts say, and query, key and value read what they are said to."""
    model, batch, layout, _ = built(name)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    wanted = {n for part in layout.parts for n in part.modules.values()}
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda module, args, output, n=n: seen.__setitem__(n, (args[0], output))
        )
        for n in wanted
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    for part in layout.parts:
        read = {key: seen[n] for key, n in part.modules.items()}
        if part.role == "mlp":
            assert ("gate" in read) == (len({"up", "gate", "down"} & set(read)) == 3)
            act = model.get_submodule(part.modules["activation"])
            up = read["up"][1]
            made = act(read["gate"][1]) * up if "gate" in read else act(up)
            assert torch.equal(made.flatten(), read["down"][0].flatten()), part.entry
        elif "query" in read and "key" in read:
            assert read["key"][0] is read["value"][0]
            assert (read["query"][0] is read["key"][0]) == (not part.is_cross)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """A user's own model: a list of layers, with what is no block around and inside it."""

    def __init__(self, layers: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = layers
        self.steps = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.experts = nn.ModuleList([Layer(), Layer()])
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))] * 2)


class Flagged(Layer):
    gradient_checkpointing = False


def twice(kind: type[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList([kind(), kind()])


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        (twice(Layer), ["layers.0", "layers.1"]),
        (nn.Sequential(Layer(), nn.ReLU(), Layer()), ["layers.0", "layers.2"]),
        (
            nn.ModuleList([twice(Layer), twice(Layer)]),
            [f"layers.{i}" for i in ("0.0", "0.1", "1.0", "1.1")],
        ),
        (nn.ModuleList([Layer()]), ["layers.0"]),
        (nn.ModuleList([Layer()] * 3), ["layers.0"]),
        (nn.ModuleList([nn.ModuleDict({"a": Layer()})] * 2), []),
        (nn.ModuleList([Flagged(), Layer()]), ["layers.0"]),
        (nn.ModuleList([nn.ReLU(), nn.LayerNorm(4)]), []),
    ],
    ids=["list", "sequential", "nested", "one", "one called often", "dicts", "flag", "none"],
)
def test_blocks_of_a_users_own_model(layers: nn.Module, blocks: list[str]) -> None:
    model = Stack(layers)
    assert list(discover(model).blocks) == blocks
    inside = {s.block for s in find_sites(model) if s.role == "linear"}
    assert inside == {*blocks, None}


class Speaker(nn.Module):
    def __init__(self, speaks: bool) -> None:
        super().__init__()
        self.body, self.say, self.speaks = nn.Linear(4, 4), nn.Linear(4, 8), speaks

    def get_output_embeddings(self) -> nn.Module:
        if not self.speaks:  # as a model of transformers without any does
            raise NotImplementedError("it has no output embeddings")
        return self.say


@pytest.mark.parametrize("speaks", [True, False])
def test_output_embeddings_are_a_head_whatever_they_are_called(speaks: bool) -> None:
    sites = find_sites(nn.Sequential(Speaker(speaks)))
    assert [s.name for s in sites if s.is_head_or_embedding] == ["0.say"] * speaks


def test_a_part_keeps_its_name_and_block_inside_an_adapter_and_a_routed_ffn() -> None:
    model, _ = zoo.build("llama")
    layout = discover(model)
    before = {s.name: s for s in find_sites(model, layout) if s.role == "linear"}
    lt.apply(model, lt.LoRA(rank=2), lt.RoutedFFN(num_groups=4, num_active=2, balance_weight=0.0))
    after = [s for s in find_sites(model, layout) if s.role == "linear"]
    assert len(after) == 3 * 14 + 1
    for site in after:
        plain = site.name.split(".lora_")[0].removesuffix(".base_layer")
        assert (site.block, site.part) == (before[plain].block, before[plain].part)
    # Without the layout of the plain model the heads would be found anew, and be the same here.
    assert [s.name for s in after if s.is_head_or_embedding] == ["lm_head"]


class Tied(nn.Module):
    """Two linears with one weight, one linear in two places, and a table used as a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.layers = twice(Layer)
        self.layers[1].up.weight = self.layers[0].up.weight
        self.layers[1].down = self.layers[0].down
        self.vocabulary = nn.Linear(4, 8, bias=False)
        self.vocabulary.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_ties_are_found() -> None:
    ties = {s.name: s.tied_to for s in find_sites(Tied()) if s.role == "linear"}
    assert ties == {
        "layers.0.up": "layers.1.up",
        "layers.0.down": "layers.1.down",
        "layers.1.up": "layers.0.up",
        "vocabulary": "words",
    }
    heads = [s.name for s in find_sites(Tied()) if s.is_head_or_embedding]
    assert heads == ["vocabulary"]
    # A layer called three times is in one place, and so are its linears.
    assert not discover(Stack(nn.ModuleList([Layer()] * 3))).ties.keys() & {"layers.0.up"}


@pytest.mark.parametrize(
    "config",
    [lt.LoRA(rank=2, sites="up"), lt.SparseGrad(density=0.5, sites="layers.0.up")],
    ids=["lora", "sg"],
)
def test_what_would_change_another_module_is_refused_by_name(config) -> None:
    model = Tied()
    modules = list(model.modules())
    with pytest.raises(
        SiteError, match=r"layers\.0\.up: weight must not be shared, got one that lay"
    ):
        lt.apply(model, config)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    with pytest.raises(SiteError, match="none by the method's own choice"):
        lt.apply(model, type(config)())


def test_lora_on_a_tied_head_is_refused() -> None:
    model, _ = zoo.build("gpt2")
    with pytest.raises(SiteError, match="lm_head: weight must not be shared, got one that transf"):
        lt.apply(model, lt.LoRA(sites="lm_head"))


def test_rows_of_tied_linears_are_sampled_and_their_gradients_add_up() -> None:
    plain, model = Tied(), Tied()
    model.load_state_dict(plain.state_dict())
    lt.apply(model, lt.WTACRS(keep_ratio=0.5, min_rows=1, draw_at="forward"), seed=3)
    x = torch.randn(16, 4)

    def gradient(model: Tied) -> Tensor:
        model.zero_grad()
        model(x).sum().backward()
        return model.layers[0].up.weight.grad.clone()

    draws, exact = torch.stack([gradient(model) for _ in range(100)]), gradient(plain)
    assert model.layers[0].up.weight is model.layers[1].up.weight
    assert mean_check(draws, exact, resolution=1e-6).ok
    plain.layers[1].up.weight = nn.Parameter(plain.layers[0].up.weight.detach().clone())
    assert not mean_check(draws, gradient(plain), resolution=1e-6).ok  # of one of the two alone
