"""A tiny random model of each architecture that we know how to build, for sweeps over all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 300
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FROM_PAD = {**SIZES, "max_position_embeddings": 66}
SMALL_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
FEW_HEADS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {**SIZES, "embedding_size": 8},
    "bert": SIZES,
    "big_bird": {**SIZES, "attention_type": "original_full"},
    "camembert": FROM_PAD,
    "convbert": {**SIZES, "embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3},
    "data2vec-text": FROM_PAD,
    "deberta": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "deberta-v2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    "electra": {**SIZES, "embedding_size": 8},
    "ernie": SIZES,
    "esm": {**FROM_PAD, "mask_token_id": 3},
    "flaubert": {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0, "max_position_embeddings": 64},
    "fnet": {key: size for key, size in SIZES.items() if key != "num_attention_heads"},
    "funnel": {"d_model": 16, "block_sizes": [1, 1], "n_head": 2, "d_head": 8, "d_inner": 32},
    "ibert": FROM_PAD,
    "layoutlm": SIZES,
    "longformer": {**SIZES, "max_position_embeddings": 70, "attention_window": 8},
    "luke": {**FROM_PAD, "entity_vocab_size": 10, "entity_emb_size": 8},
    "megatron-bert": SIZES,
    "mobilebert": {**SIZES, "embedding_size": 8, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": SIZES,
    "mpnet": FROM_PAD,
    "nystromformer": {**SIZES, "num_landmarks": 4, "segment_means_seq_len": 64},
    "rembert": {**SIZES, "input_embedding_size": 8, "output_embedding_size": 8},
    "roberta": FROM_PAD,
    "roberta-prelayernorm": FROM_PAD,
    "roc_bert": {**SIZES, "enable_pronunciation": False, "enable_shape": False},
    "roformer": {**SIZES, "embedding_size": 16},
    "squeezebert": {**SIZES, "embedding_size": 16},
    "xlm": {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0, "max_position_embeddings": 64},
    "xlm-roberta": FROM_PAD,
    "xlm-roberta-xl": FROM_PAD,
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "xmod": {**FROM_PAD, "languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": {**SIZES, "use_expectation": True},
}
"""By model_type: classifiers that no causal language model goes with."""
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": BART,
    "mbart": BART,
    "mt5": T5,
    "mvp": BART,
    "plbart": BART,
    "t5": T5,
    "umt5": T5,
}
DECODERS: dict[str, dict[str, Any]] = {
    "biogpt": SIZES,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "ctrl": {**SMALL_GPT, "dff": 32},
    "falcon": FEW_HEADS,
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "glm": {**GROUPED, "head_dim": 8},
    "gpt2": SMALL_GPT,
    "gpt_bigcode": SMALL_GPT,
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "gpt_neox": SIZES,
    "gptj": {**SMALL_GPT, "rotary_dim": 4},
    "helium": {**GROUPED, "head_dim": 8},
    "llama": GROUPED,
    "mistral": GROUPED,
    "nemotron": GROUPED,
    "openai-gpt": SMALL_GPT,
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    "persimmon": SIZES,
    "phi": SIZES,
    "phi3": SIZES,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
}
"""Of which there are both heads."""
EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **SIZES,
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {**GROUPED, "head_dim": 8, "num_local_experts": 4},
    "jamba": {**GROUPED, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen2_moe": {
        **GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
"""Of which there are both heads, with mixtures of experts."""
CAUSAL_ONLY: dict[str, dict[str, Any]] = {
    "cohere": GROUPED,
    "granite": GROUPED,
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 64},
}
CLASSIFIERS = {**ENCODERS, **ENCODER_DECODERS, **DECODERS, **EXPERTS}
LANGUAGE_MODELS = {**DECODERS, **EXPERTS, **CAUSAL_ONLY}


def write_architecture(directory: Path, model_type: str, *, head: str, **options: Any) -> Path:
    """Write a model of two blocks with random weights and the head, which has two labels if it is a classifier."""
    import transformers

    sizes = (CLASSIFIERS | LANGUAGE_MODELS)[model_type]
    config = transformers.AutoConfig.for_model(model_type, **{**TOKENS, **sizes, **options})
    family = {
        "sequence_classification": transformers.AutoModelForSequenceClassification,
        "causal_lm": transformers.AutoModelForCausalLM,
    }[head]
    torch.manual_seed(0)
    network = family.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and norms begin as zeros and ones, which would hide what becomes of them
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.save_pretrained(directory)
    return directory


def change_config(directory: Path, **values: Any) -> Path:
    """Write other values into the config.json of a model, None for those that are to go; return the directory."""
    path = directory / "config.json"
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return directory
