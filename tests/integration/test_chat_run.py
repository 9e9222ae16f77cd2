"""Chats are fine-tuned by an unmodified SFTTrainer: every method, resumption, measures, answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration.tiny import VOCABULARY, cut_off, llama, same, saved_weights
from training.chats import chat_tokenizer, chats, run_options, said, write_lines

import leantune as lt

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.filterwarnings(
    # TRL 1.0 and peft call a model by transformers' older names.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
LORA = lt.LoRA(rank=4)
SAMPLED = lt.WTACRS(keep_ratio=0.3, min_rows=2)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """Options of a run of eight steps, two batches in each."""
    return run_options(tmp_path, chats)


def test_a_compared_run_learns_the_answers(base: dict[str, Any]) -> None:
    options = {"methods": [LORA, SAMPLED], "compare": ["baseline"], "epochs": 8}
    options |= {"batch_size": 8, "gradient_accumulation_steps": 1, "save_steps": 100}
    result = lt.train(base, **options, score_answers=True, learning_rate=2e-2)
    assert [run.name for run in result.runs] == ["baseline", "lora+wta_crs"]
    for run in result.runs:
        assert run.metrics.keys() == {"loss", "perplexity", "accuracy"}
        assert run.metrics["perplexity"] == pytest.approx(math.exp(run.metrics["loss"]))
        assert len(run.evaluations) == 8
    # At first one answer is the likeliest of all rows; in the end the right one is.
    plain, sampled = result.runs
    assert plain.evaluations[0][1]["accuracy"] == 0.5 and plain.metrics["accuracy"] == 1.0
    assert plain.metrics["loss"] < 0.5 * plain.evaluations[0][1]["loss"]
    assert sampled.saved_bytes < plain.saved_bytes
    assert (result.main_metric, result.floor) == ("perplexity", None)
    output = Path(base["output"])
    assert {"model", "adapter", "session"} <= {path.name for path in output.iterdir()}


def test_the_loss_is_the_mean_over_all_answer_tokens_of_a_step(
    base: dict[str, Any], tmp_path: Path
) -> None:
    """As in one batch of eight rows, not the mean of two batches' means."""
    rows = [
        {"messages": said("w1", " ".join(f"w{i}" for i in range(i % 7 + 1)))} for i in range(16)
    ]
    write_lines(tmp_path / "data" / "train.jsonl", rows)
    found = []
    for size, steps in ((4, 2), (8, 1)):
        options = {"batch_size": size, "gradient_accumulation_steps": steps, "epochs": 1}
        lt.train(base, **options, output=tmp_path / f"{size}")
        found.append(saved_weights(tmp_path / f"{size}"))
    first = saved_weights_of(llama())
    moved = max(float((found[0][n] - first[n]).abs().max()) for n in first if n in found[0])
    apart = max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0])
    assert apart < 1e-4 and moved > 1e-2


def saved_weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


METHODS: dict[str, list[Any]] = {
    "wta_crs, each sample's norms": [lt.WTACRS(keep_ratio=0.3, min_rows=2, norms="cache")],
    "lora+wta_crs+checkpoint": [LORA, SAMPLED, lt.Checkpoint()],
    "spt": [LORA, lt.SPTAttention(min_keys=2, num_codewords=4, subspace_width=4)],
    "routed_ffn": [LORA, lt.RoutedFFN()],
    "sparse_grad": [lt.SparseGrad(density=0.1, num_calibration_batches=2)],
}


@pytest.mark.parametrize("name", METHODS)
def test_cut_off_and_resumed_ends_with_the_same_bits(
    base: dict[str, Any], tmp_path: Path, name: str
) -> None:
    base |= {"methods": METHODS[name], "save_steps": 3}
    whole = lt.train(base)
    cut_off(base["output"], tmp_path / "again", 6)
    resumed = lt.train(base, output=tmp_path / "again", resume=True)
    assert resumed.runs[0].evaluations == whole.runs[0].evaluations
    assert resumed.runs[0].num_steps == 8
    if (tmp_path / "run" / "model").is_dir():
        assert same(saved_weights(tmp_path / "again"), saved_weights(tmp_path / "run"))


def test_a_gpt2_in_bf16_checkpoints_and_its_model_answers_without_us(
    base: dict[str, Any], tmp_path: Path
) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    options = {"precision": "bf16", "gradient_checkpointing": True, "methods": [SAMPLED]}
    lt.train(base, **options, epochs=1)
    folder = tmp_path / "run" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = tokenizer.apply_chat_template(
        said("w1 good w2"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**question, max_new_tokens=3, do_sample=False)[0]
    assert len(answer) > question["input_ids"].shape[1]
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_a_model_that_is_too_short_is_named(base: dict[str, Any]) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = 1000
    tokenizer.save_pretrained(base["model"])
    with pytest.raises(lt.ConfigError, match="max_length must be at most 64 for"):
        lt.train(base, max_length=128)
    assert not Path(base["output"]).exists()


def packed(first: list[int], second: list[int]) -> dict[str, Any]:
    """Make a packed row of two segments, as SFTTrainer hands it to a model."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    lengths = [len(first), len(second)]
    return {**collate([{"input_ids": first + second, "seq_lengths": lengths}]), "use_cache": False}


SPT = {"min_keys": 2, "num_codewords": 4, "subspace_width": 4}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "methods",
    [
        [],
        [lt.SPTAttention(**SPT)],
        [lt.SPTAttention(granularity="block", block_size=8, min_keys=8)],
    ],
    ids=["plain", "token", "block"],
)
def test_a_segment_sees_no_other(attention: str, methods: list[Any]) -> None:
    for make in (llama, gpt2):
        model = make()
        model.set_attn_implementation(attention)
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(5, VOCABULARY, (32,), generator=draw).tolist()
        one, other = ids[:12], [*ids[:4], 7, 8, *ids[6:12]]
        if methods:
            lt.apply(model, *methods).calibrate([packed(one, ids[12:])])
        model.eval()
        with torch.no_grad():
            logits = [model(**packed(first, ids[12:])).logits[0] for first in (one, other)]
        assert torch.equal(logits[0][12:], logits[1][12:])
        # The control: within a segment later tokens do see it.
        assert not torch.equal(logits[0][6:12], logits[1][6:12])


@pytest.mark.parametrize("task", ["chat", "causal_lm"])
def test_packed_rows_train_and_resume(base: dict[str, Any], tmp_path: Path, task: str) -> None:
    if task == "causal_lm":
        for split, count in (("train", 32), ("validation", 10)):
            rows = [{"text": row["messages"][0]["content"]} for row in chats(count)]
            write_lines(tmp_path / "data" / f"{split}.jsonl", rows)
    options = {"task": task, "packing": True, "batch_size": 2, "max_length": 24}
    options |= {"methods": [LORA, lt.SPTAttention(**SPT)]}
    options |= {"save_steps": 1}
    whole = lt.train(base, **options)
    assert whole.num_train < 32 / 1.5 and whole.runs[0].metrics["loss"] > 0
    cut_off(base["output"], tmp_path / "again", whole.runs[0].num_steps - 1)
    resumed = lt.train(base, **options, output=tmp_path / "again", resume=True)
    assert resumed.runs[0].evaluations == whole.runs[0].evaluations


def test_packing_needs_segments_that_are_seen(base: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(lt.ConfigError, match="packing must be False for a model that cannot see"):
        lt.train(base, packing=True)
    assert lt.train(base, epochs=1).num_train == 32
    with pytest.raises(lt.ConfigError, match="packing must be False for task text"):
        lt.train(base, packing=True, task="text")
    llama().save_pretrained(tmp_path / "model")
    cache = lt.WTACRS(keep_ratio=0.3, min_rows=2, norms="cache")
    with pytest.raises(lt.ConfigError, match="packing must be False where a method needs to know"):
        lt.train(base, packing=True, methods=[cache], output=tmp_path / "other")
