"""Sparse attention in real architectures: causal to the bit, exact for its choice, reversible."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import MODELS
from oracles import spt as oracle
from torch import Tensor, nn

import leantune as lt
from leantune.errors import ConfigError, SiteError, UnsupportedError
from leantune.integrations.attention import CHILD, NAME
from leantune.methods.spt_attention import attention
from leantune.ops.sparse_attention import attention as ops_attention
from leantune.ops.sparse_attention.tiles import unpack_bits

DECODERS = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3")
SMALL: dict[str, Any] = {"subspace_width": 2, "num_codewords": 4}
SCORERS = ("adc", "match")


def keys(num_keys: int = 3, **options: Any) -> lt.SPTAttention:
    """A config that keeps so many keys, whatever a query sees, unless there is a keep_ratio."""
    return lt.SPTAttention(**{"keep_ratio": 1e-6, "min_keys": num_keys, **SMALL, **options})


def ids(num_tokens: int = 20, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (batch, num_tokens), generator=generator)


def sparse_model(name: str, seed: int = 0, **options: Any) -> nn.Module:
    model = MODELS[name].build(seed).eval()
    # Random weights of a fresh model hardly attend; larger ones make scores of both signs matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    session = lt.apply(model, keys(**options))
    session.calibrate([batch_for(name, seed) for seed in (7, 8)])
    return model


def batch_for(name: str, seed: int = 0) -> dict[str, Tensor]:
    batch = {"input_ids": ids(seed=seed)}
    return {**batch, "labels": ids(9, seed=seed + 1)} if name.startswith("t5") else batch


def scrambled(*args: Any, **how: Any) -> Tensor:
    """The prototype's first defect, in place of the right layout."""
    out = ops_attention.sparse_attention(*args, **how)
    return torch.from_numpy(oracle.scramble(out.detach().numpy()))


def counting_key_0(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, view: Any, **how: Any) -> Tensor:
    """The prototype's third defect: empty slots of short rows mean key 0, whatever is visible."""
    keep = unpack_bits(bits, k.shape[2]).numpy()
    g = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1])
    for b, h in np.ndindex(*q.shape[:2]):
        args = [t.detach().double().numpy() for t in (q[b, h], k[b, h // g], v[b, h // g])]
        out[b, h] = torch.from_numpy(oracle.counted_attention(*args, keep[b, h], how["scale"]))
    return out.to(q.dtype)


def dense_under_choice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    view: Any,
    *,
    scale: float,
    bias: Any = None,
) -> Tensor:
    """The same attention by torch's own operations and autograd."""
    g = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(g, 1) for t in (k, v))
    keep = unpack_bits(bits, k.shape[2])
    scores = scale * q @ k.mT + (0 if bias is None else bias)
    return scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", DECODERS)
def test_later_tokens_change_no_earlier_bit(name: str, scorer: str, granularity: str) -> None:
    more = {"block_size": 8, "min_keys": 8} if granularity == "block" else {}
    model = sparse_model(name, scorer=scorer, granularity=granularity, **more)
    x, t = ids(30), 17
    changed = x.clone()
    changed[:, t:] = ids(30, seed=5)[:, t:]
    with torch.no_grad():
        a, b = (model(input_ids=y).logits for y in (x, changed))
    assert torch.equal(a[:, :t], b[:, :t])
    assert not torch.equal(a[:, t:], b[:, t:])


def test_the_scrambled_layout_is_noticed(monkeypatch: Any) -> None:
    """Control of the test above: defect 1."""
    model = sparse_model("llama")
    monkeypatch.setattr(attention, "sparse_attention", scrambled)
    x = ids(30)
    changed = x.clone()
    changed[:, 17:] = ids(30, seed=5)[:, 17:]
    with torch.no_grad():
        a, b = (model(input_ids=y).logits for y in (x, changed))
    assert not torch.equal(a[:, :17], b[:, :17])


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_outputs_and_gradients_are_dense_attentions_under_the_choice(
    name: str, monkeypatch: Any
) -> None:
    model = sparse_model(name, min_keys=9).double().train()
    batch = MODELS[name].batch() | {"input_ids": ids(24, 4)}
    batch["attention_mask"] = (torch.arange(24) < torch.tensor([24, 13, 5, 20])[:, None]).long()
    if name in ("gpt2", "llama"):
        batch["labels"] = batch["input_ids"]

    def run() -> list[Tensor]:
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [out.logits.detach(), *grads]

    ours = run()
    monkeypatch.setattr(attention, "sparse_attention", dense_under_choice)
    wanted = run()
    monkeypatch.undo()

    def error(got: list[Tensor]) -> float:
        pairs = zip(got, wanted, strict=True)
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)

    assert error(ours) < 1e-9
    # Control: defect 2, the row term clamped at zero, leaves outputs right and gradients wrong.
    right = ops_attention._grad_scores

    def clamped(w: Any, grad_out: Tensor, values: Tensor) -> Tensor:
        grad_weights = torch.bmm(grad_out, values.mT)
        row_dot = (w.weights * grad_weights).sum(-1, keepdim=True).clamp(min=1e-9)
        return (grad_weights - row_dot) * w.weights

    monkeypatch.setattr(ops_attention, "_grad_scores", clamped)
    broken = run()
    assert torch.equal(broken[0], ours[0]) and error(broken) > 1e-3
    monkeypatch.setattr(ops_attention, "_grad_scores", right)
    # Control: defect 3, key 0 counted again in short rows.
    monkeypatch.setattr(attention, "sparse_attention", counting_key_0)
    if name in ("gpt2", "llama"):
        with torch.no_grad():
            out = model(**batch).logits
        assert float((out - wanted[0]).abs().max()) > 1e-3


RATIO = {"keep_ratio": 0.3, "min_keys": 2}


@pytest.mark.parametrize(
    ("name", "scorer", "options"),
    [
        ("llama", "adc", RATIO),
        ("llama", "match", {}),
        ("gpt2", "match", RATIO),
        ("opt", "adc", {}),
        ("mistral", "adc", RATIO),
        ("qwen3", "match", RATIO),
    ],
)
def test_generation_with_a_cache_is_the_full_forward(
    name: str, scorer: str, options: dict[str, Any]
) -> None:
    model = sparse_model(name, scorer=scorer, **options)
    x = ids(9)
    mask = torch.ones_like(x)
    mask[0, :3] = 0  # left padding
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    cached = model.generate(x, use_cache=True, **how)
    full = model.generate(x, use_cache=False, **how)
    assert torch.equal(cached.sequences, full.sequences)
    for a, b in zip(cached.logits, full.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    again = MODELS[name].build().eval()
    again.load_state_dict(model.state_dict())
    plain = again.generate(x, **how)
    assert any(not torch.allclose(a, b) for a, b in zip(plain.logits, full.logits, strict=True))


def test_translation_with_a_cache_is_the_full_forward() -> None:
    model = sparse_model("t5")
    x = ids(19)
    mask = torch.ones_like(x)
    mask[0, 12:] = 0
    how = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "num_beams": 1}
    tokens = [model.generate(x, use_cache=c, eos_token_id=None, **how) for c in (True, False)]
    assert torch.equal(*tokens)


def test_a_static_cache_chooses_the_same() -> None:
    model = sparse_model("llama")
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = [
        model.generate(ids(9), cache_implementation=c, disable_compile=True, **how)
        for c in ("static", "dynamic")
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "t5"])
def test_padding_changes_no_real_output(name: str, side: str, scorer: str) -> None:
    model = sparse_model(name, scorer=scorer, keep_ratio=0.25, min_keys=2)
    if side == "left" and name != "llama":
        pytest.skip("absolute positions move with padding on the left")
    x, pad = ids(18), ids(5, seed=9)
    left = side == "left"
    padded = torch.cat([pad, x] if left else [x, pad], 1)
    mask = torch.ones_like(padded)
    mask[:, slice(0, 5) if left else slice(18, 23)] = 0
    real = slice(5, 23) if left else slice(0, 18)
    core = model.get_encoder() if name == "t5" else model.base_model
    # Codes are those of rotated vectors: the real tokens keep their positions, as in generation.
    where = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if left else {}
    with torch.no_grad():
        plain = core(input_ids=x).last_hidden_state
        out = core(input_ids=padded, attention_mask=mask, **where).last_hidden_state[:, real]
        unmasked = core(input_ids=padded, **where).last_hidden_state[:, real]
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    if left or name != "llama":
        assert not torch.allclose(unmasked, plain, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other() -> None:
    model = sparse_model("llama", keep_ratio=0.3, min_keys=2)
    first, second = ids(11, 1), ids(13, 1, seed=3)
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(11), torch.arange(13)])[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=x).logits for x in (first, second)], 1)
        out = model(input_ids=packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-4)


def test_a_sliding_window_is_respected() -> None:
    model = sparse_model("mistral", keep_ratio=0.5, min_keys=2)
    model.config.sliding_window = 6
    x = ids(24)
    changed = x.clone()
    changed[:, 0] = 63 - changed[:, 0]
    with torch.no_grad():
        a, b = (model(input_ids=y).logits for y in (x, changed))
    # Two layers reach 2 * (6 - 1) tokens ahead.
    assert torch.equal(a[:, 11:], b[:, 11:]) and not torch.equal(a[:, :11], b[:, :11])


def test_masks_of_four_dimensions_boolean_and_additive() -> None:
    model = sparse_model("llama")
    x, n = ids(16), 16
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    keep = (causal & (torch.rand(2, 1, n, n) > 0.3)) | torch.eye(n, dtype=torch.bool)
    low = torch.finfo(torch.float32).min
    with torch.no_grad():
        plain = model(input_ids=x, attention_mask=causal.expand(2, 1, n, n)).logits
        assert torch.equal(plain, model(input_ids=x).logits)
        boolean = model(input_ids=x, attention_mask=keep).logits
        for hidden in (low, -torch.inf):
            added = torch.zeros(2, 1, n, n).masked_fill(~keep, hidden)
            additive = model(input_ids=x, attention_mask=added).logits
            torch.testing.assert_close(additive, boolean, rtol=1e-5, atol=1e-5)
        bias = 3 * torch.randn(2, 1, n, n)
        moved = model(input_ids=x, attention_mask=bias.masked_fill(~keep, low)).logits
    assert not torch.allclose(boolean, plain) and not torch.allclose(moved, boolean)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    model = sparse_model("llama").train()
    n = 12
    keep = torch.ones(n, n, dtype=torch.bool).tril().expand(2, 1, n, n).clone()
    keep[0, 0, 5] = False
    outputs: list[Tensor] = []
    block = model.model.layers[0].self_attn.o_proj
    block.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    out = model(input_ids=ids(n), attention_mask=keep, labels=ids(n))
    out.loss.backward()
    assert not outputs[0][0, 5].any() and outputs[0][0, 4].any()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(t).all() for t in [out.logits, *grads])


@pytest.mark.parametrize("shape", [(2, 16), (2, 1, 16, 15), (2, 1, 1, 16)])
def test_a_mask_of_unknown_shape_or_kind_is_an_error(shape: tuple[int, ...]) -> None:
    model = sparse_model("llama")
    choice = model.model.layers[0].self_attn._modules[CHILD]
    q, k = torch.randn(2, 2, 16, 8), torch.randn(2, 1, 16, 8)
    mask = torch.ones(shape, dtype=torch.int64 if shape == (2, 1, 1, 16) else torch.bool)
    how = {"is_causal": True, "scale": 1.0, "dropout": 0.0}
    with pytest.raises(
        UnsupportedError, match=r"attention_mask must be boolean or additive .* got"
    ):
        choice(q, k, k, mask, None, **how)


def attention_bytes(how: str, n: int, **options: Any) -> int:
    """Bytes that the attention call of one causal layer of width 64 keeps, q, k and v included."""
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=n,
        attn_implementation=how,
        use_cache=False,
    )
    model = transformers.LlamaModel(config)
    if options:
        session = lt.apply(model, lt.SPTAttention(**options))
        session.calibrate([{"input_ids": torch.randint(0, 8, (1, n))}])
    book = lt.ledger(model, {"input_ids": torch.randint(0, 8, (1, n))})
    kinds = book.by_kind(ledger="activations")
    return sum(v for k, v in kinds.items() if k in ("SparseAttention", "softmax", "matmul"))


@pytest.mark.parametrize("options", [{"keep_ratio": 0.125}, {"keep_ratio": 1e-6, "min_keys": 100}])
def test_saved_bytes_are_q_k_v_and_a_bit_for_each_pair(options: dict[str, Any]) -> None:
    n = 256
    saved = attention_bytes("sdpa", n, **options)
    assert saved == 3 * n * 64 * 4 + n * n // 8
    # The formula of the specification: a value and an int32 index for each of n / 8 keys.
    assert n * n // 8 <= n * (n // 8) * (4 + 4)


def test_eight_times_fewer_saved_bytes_than_eager_attention_at_2048_tokens() -> None:
    n = 2048
    eager, ours = attention_bytes("eager", n), attention_bytes("sdpa", n, keep_ratio=0.125)
    assert eager == 4 * n * n + 3 * n * 64 * 4
    assert ours == n * n // 8 + 3 * n * 64 * 4
    assert 8 * ours <= eager


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_recomputed_block_chooses_and_drops_the_same(name: str, use_reentrant: bool) -> None:
    grads = []
    for is_checkpointed in (False, True):
        model = sparse_model(name, min_keys=5).train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
            if type(module).__name__ == "BertSelfAttention":
                module.dropout.p = 0.3
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        labels = torch.tensor([0, 1]) if name == "bert" else ids()
        model(input_ids=ids(), labels=labels).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for pair in zip(*grads, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-7)


def test_dropout_draws_anew_each_forward_and_never_in_eval() -> None:
    model = sparse_model("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        a, b = (model(input_ids=ids()).logits for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before), "the global stream is left alone"
    assert not torch.equal(a, b)
    model.eval()
    assert torch.equal(*(model(input_ids=ids()).logits for _ in range(2)))


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_bfloat16_weights_are_near_float32(name: str) -> None:
    model = sparse_model(name, min_keys=15)
    wanted = model(**batch_for(name)).logits.detach()
    low = model.bfloat16()(**batch_for(name)).logits.detach()
    assert low.dtype == torch.bfloat16 and bool(torch.isfinite(low).all())
    assert float((low - wanted).abs().max() / wanted.abs().max()) < 0.2


def codebooks(model: nn.Module) -> list[Tensor]:
    return [m.codebooks.detach().clone() for m in model.modules() if hasattr(m, "codebooks")]


def test_codebooks_are_calibrated_and_stay() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    session = lt.apply(model, keys(3))
    assert not any(bool(b.any()) for b in codebooks(model))
    session.calibrate([tiny.batch(1), tiny.batch(2)])
    start = codebooks(model)
    assert all(bool(b.any()) for b in start) and model.training
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    for i in range(3):
        model(**tiny.batch(i)).loss.backward()
        optimizer.step()
        session.on_step()
    assert all(torch.equal(a, b) for a, b in zip(start, codebooks(model), strict=True))
    session.calibrate([tiny.batch(1), tiny.batch(2)])
    assert not any(torch.equal(a, b) for a, b in zip(start, codebooks(model), strict=True))


def test_an_uncalibrated_model_runs_only_where_every_key_is_kept() -> None:
    model = MODELS["llama"].build()
    session = lt.apply(model, keys(3))
    model(input_ids=ids(3))
    with session.exact():
        model(input_ids=ids())
    for mode in (True, False):
        with pytest.raises(ConfigError, match=r"codebooks must be calibrated before .*calibrate\("):
            model.train(mode)(input_ids=ids())


def test_padding_is_not_calibrated_on() -> None:
    tiny = MODELS["bert"]
    books = []
    for token in (0, 9):
        model = tiny.build()
        batch = tiny.batch(1)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, token)
        session = lt.apply(model, keys(3))
        session.calibrate([batch])
        books.append(codebooks(model))
    assert all(torch.equal(a, b) for a, b in zip(*books, strict=True))


def test_a_loaded_model_chooses_by_the_saved_codebooks(tmp_path: Any) -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    session = lt.apply(model, keys(3))
    session.calibrate([tiny.batch(7)])
    session.save(tmp_path)
    other = tiny.build()
    lt.load(other, tmp_path)
    assert codebooks(other)[0].shape == (2, 4, 4, 2)
    assert torch.equal(model(**tiny.batch(1)).logits, other(**tiny.batch(1)).logits)
    assert all(torch.equal(x, y) for x, y in zip(codebooks(model), codebooks(other), strict=True))


def test_codebooks_are_neither_trained_nor_part_of_the_weights() -> None:
    model = sparse_model("llama").train()
    model(input_ids=ids())
    assert not any("codebooks" in n for n, _ in model.named_parameters())
    assert not any("codebooks" in n for n in model.state_dict())


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_only_chosen_layers_are_sparse_and_remove_restores_the_rest(how: str) -> None:
    model = MODELS["t5"].build()
    model.set_attn_implementation(how)
    configs = [m.config for m in (model, model.encoder, model.decoder)]
    session = lt.apply(model, lt.SPTAttention(sites=["decoder.block.1.*SelfAttention"], **SMALL))
    now = [c._attn_implementation for c in configs]
    assert now == [NAME, how, NAME]
    assert [n for n, _ in model.named_modules() if n.endswith(CHILD)] == [
        "decoder.block.1.layer.0.SelfAttention." + CHILD
    ]
    batch = MODELS["t5"].batch()
    model(**batch).loss.backward()
    session.remove()
    assert [c._attn_implementation for c in configs] == [how] * 3
    assert not any(n.endswith(CHILD) for n, _ in model.named_modules())


def test_two_configs_calibrate_their_own_codebooks_once(monkeypatch: Any) -> None:
    made: list[int] = []
    right = attention.kmeans

    def counted(*args: Any, stream: int, **how: Any) -> Tensor:
        made.append(stream)
        return right(*args, stream=stream, **how)

    monkeypatch.setattr(attention, "kmeans", counted)
    model = MODELS["bert"].build()
    session = lt.apply(
        model, keys(3, sites=["layer.0.*"]), keys(5, sites=["layer.1.*"], num_codewords=8)
    )
    session.calibrate([MODELS["bert"].batch(1)])
    first, second = codebooks(model)
    assert len(made) == len(set(made)) == len(first) + len(second) == 4
    assert first.shape[2] == 4 and second.shape[2] == 8
    state = session.state_dict()
    assert sum("codebooks" in name for name in state) == 2
    model(**MODELS["bert"].batch(2)).loss.backward()
    session.remove()
    assert model.config._attn_implementation == "sdpa"


def test_a_state_of_other_sites_or_numbers_is_refused() -> None:
    model = MODELS["llama"].build()
    session = lt.apply(model, keys(3))
    session.calibrate([{"input_ids": ids()}])
    state = session.state_dict()
    name = next(n for n in state if n.endswith("codebooks"))
    lacking = {n: t for n, t in state.items() if n != name}
    with pytest.raises(ConfigError, match="state must hold the codebooks of 2 sites, got one that"):
        session.load_state_dict(lacking)
    for bad in (state[name] + torch.nan, state[name][:, :1]):
        with pytest.raises(ConfigError, match="codebooks must be finite and of shape"):
            session.load_state_dict({**state, name: bad})


def test_removing_leaves_what_others_chose_since() -> None:
    model = MODELS["llama"].build()
    session = lt.apply(model, keys(3))
    model.set_attn_implementation("eager")
    session.remove()
    assert model.config._attn_implementation == "eager"
    assert not any(n.endswith(CHILD) for n, _ in model.named_modules())


def test_nothing_is_chosen_inside_exact_or_where_every_key_is_kept() -> None:
    model = sparse_model("llama")
    plain = copy.deepcopy(model)
    plain._leantune_session.remove()
    wanted = plain(input_ids=ids()).logits
    assert not torch.equal(model(input_ids=ids()).logits, wanted)
    with model._leantune_session.exact():
        assert torch.equal(model(input_ids=ids()).logits, wanted)
    short = ids(3)
    assert torch.equal(model(input_ids=short).logits, plain(input_ids=short).logits)


def no_interface(model: nn.Module) -> None:
    kind = type(model.model.layers[0].self_attn)
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("OwnAttention", (kind,), {"__module__": __name__})


def flash(model: nn.Module) -> None:
    model.config._attn_implementation_internal = "flash_attention_2"


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (no_interface, {}, "must compute attention through transformers' attention interface"),
        (flash, {}, "attn_implementation must be 'sdpa' or 'eager', got 'flash_attention_2'; load"),
        (None, {"subspace_width": 3}, "subspace_width must divide the head width 8, got 3; give"),
    ],
)
def test_a_model_that_cannot_be_sparse_is_refused_untouched(
    spoil: Callable[[nn.Module], None] | None, options: dict[str, Any], message: str
) -> None:
    model = MODELS["llama"].build()
    if spoil is not None:
        spoil(model)
    before = list(model.named_modules())
    with pytest.raises(SiteError, match=message):
        lt.apply(model, lt.SPTAttention(**{**SMALL, **options}))
    assert list(model.named_modules()) == before


def test_too_few_calibration_vectors_name_the_way_out() -> None:
    model = MODELS["llama"].build()
    session = lt.apply(model, keys(1, num_codewords=16))
    with pytest.raises(ConfigError, match=r"at least num_codewords = 16 .* got 3 at .*; show"):
        session.calibrate([{"input_ids": ids(1, 1)}])
    with pytest.raises(ConfigError, match="got 0 at"):
        session.calibrate([])
    assert model.training and not any(bool(b.any()) for b in codebooks(model))


def test_merging_is_refused_unless_every_key_is_kept() -> None:
    model = MODELS["llama"].build()
    session = lt.apply(model, lt.SPTAttention(**SMALL))
    with pytest.raises(UnsupportedError, match=r"session.remove\(\)"):
        session.merge()
    assert model.config._attn_implementation == NAME
    session.remove()
    session = lt.apply(model, lt.SPTAttention(keep_ratio=1.0, **SMALL))
    session.merge()
    assert model.config._attn_implementation == "sdpa"


class Induction(nn.Module):
    """One attention layer that must look up what followed a token earlier on."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            use_cache=False,
        )
        self.own, self.previous = nn.Embedding(64, 64), nn.Embedding(64, 64)
        self.model, self.head = transformers.LlamaModel(config), nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (b, n, 64) of the token after each of (b, n)."""
        before = nn.functional.pad(tokens[:, :-1], (1, 0))
        x = self.own(tokens) + self.previous(before)
        return self.head(self.model(inputs_embeds=x).last_hidden_state)


def tune(model: nn.Module, num_steps: int, seed: int, rate: float) -> float:
    """Train on 16 tokens, then the same again from a random one on; return the mean loss of the
    last ten steps. Only where the repetition wraps round is the next token a guess."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(num_steps):
        half = torch.stack([torch.randperm(64, generator=generator)[:16] for _ in range(32)])
        shift = int(torch.randint(16, (), generator=generator))
        tokens = torch.cat([half, half.roll(shift, 1)], 1)
        logits = model(tokens)[:, 16:-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 17:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Hundreds of small steps: threads that wait for each other cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_fine_tuning_keeps_up_on_a_task_that_needs_distant_keys(one_thread: None) -> None:
    """Pre-trained densely, as in the paper's use; an eighth of 32 keys is 4."""
    base = Induction()
    tune(base, 200, seed=1, rate=1e-2)
    losses = {}
    for name in ("dense", "adc", "recent"):
        model = copy.deepcopy(base)
        if name != "dense":
            session = lt.apply(model, lt.SPTAttention(min_keys=4))
            session.calibrate([torch.randint(64, (32, 32))])
        if name == "recent":
            # The control: the same number of keys, but without scores the most recent ones.
            model.model.layers[0].self_attn._modules[CHILD].codebooks.zero_()
        losses[name] = tune(model, 40, seed=2, rate=2e-3)
    assert losses["adc"] < 1.25 * losses["dense"] + 0.1, losses
    assert losses["recent"] > 3, losses


def test_a_module_that_does_not_say_how_many_heads_is_refused_by_name() -> None:
    model = MODELS["gpt2"].build()
    options = {"subspace_width": 2, "sites": "h.0.attn"}
    (site,) = [s for s in lt.find_sites(model) if s.name == "transformer.h.0.attn"]
    assert lt.list_methods()["spt_attention"].check(site, lt.SPTAttention(**options)) is None
    site.module.num_heads, site.module.config = None, transformers.PretrainedConfig()
    with pytest.raises(lt.SiteError, match=r"h\.0\.attn: module must say how many key heads"):
        lt.apply(model, lt.SPTAttention(**options))
