"""Tiny random models of the popular model types of transformers, each with a padded batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from models import padded
from torch import Tensor, nn

VOCABULARY, D_MODEL, D_HIDDEN, NUM_HEADS = 128, 64, 96, 4
D_HEAD = D_MODEL // NUM_HEADS
NUM_TOKENS, LENGTHS = 24, (24, 20, 15, 11)
"""27 % of the batch is padding."""
PAD, FIRST_WORD, IMAGE_TOKEN = 0, 8, 7

Batch = dict[str, Any]
_Options = Mapping[str, Any]


class _Kind(NamedTuple):
    """One model type: the class to build, the batch that trains it, the options of its config."""

    model: str
    batch: str
    options: _Options


_BASE: _Options = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_HEADS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {**_BASE, "max_position_embeddings": 64}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": D_HEAD}
_EXPERTS = {
    **_LLAMA,
    "moe_intermediate_size": D_HIDDEN // 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_ALTERNATING = {
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_DELTA = {  # Gated delta rule in every second layer.
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": D_HEAD,
    "linear_value_head_dim": D_HEAD,
}
_GPT2 = {**_BERT, "n_inner": D_HIDDEN}
_T5 = {**_BASE, "num_layers": 2, "d_kv": D_HEAD, "d_ff": D_HIDDEN, "decoder_start_token_id": PAD}
_BART = {
    **_BERT,
    "decoder_layers": 2,
    "decoder_attention_heads": NUM_HEADS,
    "encoder_ffn_dim": D_HIDDEN,
    "decoder_ffn_dim": D_HIDDEN,
    "decoder_start_token_id": 2,
}
_VISION = {**_BASE, "image_size": 16, "patch_size": 4}


def _causal(model: str, base: _Options = _LLAMA, **options: Any) -> _Kind:
    return _Kind(f"{model}ForCausalLM", "generate", {**base, **options})


def _encoder(model: str, base: _Options = _BERT, **options: Any) -> _Kind:
    return _Kind(f"{model}ForSequenceClassification", "classify", {**base, **options})


def _pair(model: str, base: _Options = _BART, **options: Any) -> _Kind:
    return _Kind(f"{model}ForConditionalGeneration", "translate", {**base, **options})


_KINDS: dict[str, _Kind] = {
    # Decoders.
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "ministral": _causal("Ministral", **_ALTERNATING),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3"),
    "gemma": _causal("Gemma"),
    "gemma2": _causal("Gemma2", **_ALTERNATING),
    "gemma3": _causal("Gemma3", **_ALTERNATING),
    "gemma4": _causal(
        "Gemma4",
        **_ALTERNATING,
        global_head_dim=D_HEAD,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
    ),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3"),
    "olmo": _causal("Olmo"),
    "olmo2": _causal("Olmo2"),
    "olmo3": _causal("Olmo3", **_ALTERNATING),
    "smollm3": _causal("SmolLM3", no_rope_layers=[1, 0]),
    "granite": _causal("Granite"),
    "cohere": _causal("Cohere"),
    "cohere2": _causal("Cohere2", **_ALTERNATING),
    "falcon": _causal("Falcon", _BERT, ffn_hidden_size=D_HIDDEN),
    "gpt_neox": _causal("GPTNeoX"),
    "gptj": _causal("GPTJ", _GPT2, rotary_dim=8),
    "gpt_neo": _causal("GPTNeo", attention_types=[[["global", "local"], 1]], window_size=8),
    "gpt2": _Kind("GPT2LMHeadModel", "generate", _GPT2),
    "opt": _causal("OPT", ffn_dim=D_HIDDEN, word_embed_proj_dim=D_MODEL),
    "bloom": _causal("Bloom", _BASE),
    "mpt": _causal("Mpt", _BASE, expansion_ratio=2),
    "starcoder2": _causal("Starcoder2"),
    "stablelm": _causal("StableLm"),
    "glm": _causal("Glm"),
    "nemotron": _causal("Nemotron"),
    # Decoders with experts, other mixers or pictures.
    "mixtral": _causal("Mixtral", _EXPERTS),
    "qwen2_moe": _causal("Qwen2Moe", _EXPERTS, shared_expert_intermediate_size=D_HIDDEN),
    "qwen3_moe": _causal("Qwen3Moe", _EXPERTS),
    "deepseek_v3": _causal(
        "DeepseekV3",
        _EXPERTS,
        head_dim=8,
        num_key_value_heads=NUM_HEADS,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=D_HEAD,
    ),
    "gpt_oss": _causal("GptOss", _EXPERTS, **_ALTERNATING),
    "llama4": _causal(
        "Llama4",
        _EXPERTS,
        num_hidden_layers=4,
        intermediate_size_mlp=D_HIDDEN,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0, 1, 0],
        attention_chunk_size=8,
    ),
    "qwen3_next": _causal(
        "Qwen3Next", _EXPERTS, **_DELTA, shared_expert_intermediate_size=D_HIDDEN
    ),
    "qwen3_5": _causal("Qwen3_5", **_DELTA),
    "qwen2_vl": _Kind(
        "Qwen2VLForConditionalGeneration",
        "look",
        {
            "text_config": {
                **_LLAMA,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": D_MODEL,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "image_token_id": IMAGE_TOKEN,
            "tie_word_embeddings": False,
        },
    ),
    "mamba": _causal("Mamba", state_size=4, time_step_rank=4),
    # Encoders.
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "xlm_roberta": _encoder("XLMRoberta"),
    "camembert": _encoder("Camembert"),
    "electra": _encoder("Electra", embedding_size=32),
    "distilbert": _encoder("DistilBert", hidden_dim=D_HIDDEN),
    "albert": _encoder("Albert", embedding_size=32),
    "deberta": _encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": _encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": _encoder("ModernBert", **_ALTERNATING, local_attention=8),
    "mpnet": _encoder("MPNet"),
    "nomic_bert": _encoder("NomicBert", head_dim=D_HEAD),
    "longformer": _encoder("Longformer", attention_window=[8, 8]),
    "big_bird": _encoder("BigBird", attention_type="original_full"),
    "xlnet": _encoder("XLNet", _BASE, d_head=D_HEAD, d_inner=D_HIDDEN),
    # Encoders with a decoder.
    "t5": _pair("T5", _T5),
    "mt5": _pair("MT5", _T5, feed_forward_proj="gated-gelu"),
    "umt5": _pair("UMT5", _T5, feed_forward_proj="gated-gelu"),
    "longt5": _pair("LongT5", _T5, local_radius=7, feed_forward_proj="gated-gelu"),
    "bart": _pair("Bart"),
    "mbart": _pair("MBart"),
    "pegasus": _pair("Pegasus"),
    "marian": _Kind("MarianMTModel", "translate", _BART),
    "blenderbot": _pair("Blenderbot"),
    "m2m_100": _pair("M2M100"),
    "led": _pair(
        "LED",
        attention_window=[8, 8],
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    # Pictures and sound.
    "vit": _Kind("ViTForImageClassification", "image", _VISION),
    "dinov2": _Kind("Dinov2ForImageClassification", "image", {**_VISION, "mlp_ratio": 2}),
    "clip": _Kind(
        "CLIPModel",
        "caption",
        {"text_config": _BERT, "vision_config": _VISION, "projection_dim": 32},
    ),
    "whisper": _pair(
        "Whisper",
        num_mel_bins=16,
        max_source_positions=NUM_TOKENS,
        max_target_positions=64,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )._replace(batch="listen"),
}

NAMES = tuple(sorted(name for name, kind in _KINDS.items() if hasattr(transformers, kind.model)))
"""The model types that the installed transformers has."""


def build(name: str, *, dropout: float = 0.0, seed: int = 0) -> tuple[nn.Module, Batch]:
    """Make a model in training mode and a batch that it computes a loss of, ``model(**batch)``.

    Args:
        name: one of ``NAMES``.
        dropout: every rate of every dropout in the configuration.
        seed: equal seeds give equal weights and batches.
    """
    kind = _KINDS[name]
    model = getattr(transformers, kind.model)
    config = model.config_class(**kind.options)
    _set_dropout(config, dropout)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config).train(), _BATCHES[kind.batch](torch.Generator().manual_seed(seed))


def _set_dropout(config: Any, rate: float) -> None:
    for field, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            _set_dropout(value, rate)
        elif "drop" in field and isinstance(value, float):
            setattr(config, field, rate)


def _tokens(generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(FIRST_WORD, VOCABULARY, (len(LENGTHS), NUM_TOKENS), generator=generator)
    return padded(ids, torch.tensor(LENGTHS))


def _pixels(generator: torch.Generator) -> Tensor:
    return torch.randn(len(LENGTHS), 3, 16, 16, generator=generator)


def _generate(generator: torch.Generator) -> Batch:
    batch = _tokens(generator)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _classify(generator: torch.Generator) -> Batch:
    return {**_tokens(generator), "labels": torch.tensor([0, 1, 1, 0])}


def _translate(generator: torch.Generator) -> Batch:
    return {**_tokens(generator), "labels": _generate(generator)["labels"].roll(1, 0)}


def _image(generator: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(generator), "labels": torch.tensor([0, 1, 1, 0])}


def _caption(generator: torch.Generator) -> Batch:
    return {**_tokens(generator), "pixel_values": _pixels(generator), "return_loss": True}


def _listen(generator: torch.Generator) -> Batch:
    sound = torch.randn(len(LENGTHS), 16, 2 * NUM_TOKENS, generator=generator)
    return {"input_features": sound, "labels": _generate(generator)["labels"]}


def _look(generator: torch.Generator) -> Batch:
    """One picture of 4 x 4 patches a sample, which the model merges to 4 tokens."""
    batch = _generate(generator)
    batch["input_ids"][:, 2:6] = IMAGE_TOKEN
    batch["labels"][:, 2:6] = -100
    return {
        **batch,
        "mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(len(LENGTHS) * 16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(LENGTHS)),
    }


_BATCHES: dict[str, Callable[[torch.Generator], Batch]] = {
    "caption": _caption,
    "classify": _classify,
    "generate": _generate,
    "image": _image,
    "listen": _listen,
    "look": _look,
    "translate": _translate,
}
