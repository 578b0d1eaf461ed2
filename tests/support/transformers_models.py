"""transformers models, tiny and of random weights, each with inputs for it. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.arange(1, 11).reshape(2, 5)
TOKENS: dict[str, Any] = {"input_ids": IDS}
BOTH: dict[str, Any] = {"input_ids": IDS, "decoder_input_ids": IDS}
SIZES: dict[str, Any] = {
    **{"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4},
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
T5_SIZES: dict[str, Any] = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
SPEECH: dict[str, Any] = {
    **SIZES,
    **{"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}
IMAGES: dict[str, Any] = {"image_size": 16, "patch_size": 8}
VISION = {name: value for name, value in SIZES.items() if name != "vocab_size"} | IMAGES

Made = tuple[nn.Module, dict[str, Any]]


def pixels(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size)


def made(kind: str, inputs: dict[str, Any], config: str | None = None, **settings: Any) -> Made:
    """The model of a class of transformers, with a configuration of these settings."""
    import transformers

    model_class = getattr(transformers, kind)
    config_class = getattr(transformers, config) if config else model_class.config_class
    return model_class(config_class(**settings)).eval(), inputs


# --- models that read the weights of their layers ---------------------------------------------------------------------


def mamba(kind: str) -> Made:
    return made(kind, TOKENS, vocab_size=100, hidden_size=64, state_size=8, num_hidden_layers=2)


def mamba2() -> Made:
    sizes = {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}
    return made("Mamba2ForCausalLM", TOKENS, vocab_size=100, hidden_size=64, num_hidden_layers=2, **sizes)


def jamba() -> Made:
    every_second = {f"{kind}_layer_period": 2 for kind in ("attn", "expert")}
    offsets = {f"{kind}_layer_offset": 1 for kind in ("attn", "expert")}
    sizes = {"mamba_d_state": 8, "mamba_dt_rank": 8, "num_experts": 2}
    return made("JambaForCausalLM", TOKENS, **GROUPED, **every_second, **offsets, **sizes)


def wavlm() -> Made:
    return made("WavLMModel", {"input_values": torch.randn(2, 800)}, **SPEECH)


def xvector() -> Made:
    sizes = {"tdnn_dim": (32, 32, 32), "tdnn_kernel": (5, 3, 1), "tdnn_dilation": (1, 2, 1), "xvector_output_dim": 32}
    return made("Wav2Vec2ForXVector", {"input_values": torch.randn(2, 800)}, **SPEECH, **sizes, num_labels=4)


def mobilebert() -> Made:
    sizes = {"embedding_size": 32, "intra_bottleneck_size": 32, "intermediate_size": 64}
    return made("MobileBertForMaskedLM", TOKENS, **{**SIZES, **sizes})


def detr() -> Made:
    from transformers import ResNetConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )
    sides = ("encoder", "decoder")
    sizes = {
        **{f"{side}_layers": 1 for side in sides},
        **{f"{side}_attention_heads": 8 for side in sides},
        **{f"{side}_ffn_dim": 64 for side in sides},
    }
    no_timm = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    inputs = {"pixel_values": pixels(64)}
    settings = {"backbone_config": backbone, "d_model": 32, "num_queries": 4}
    return made("DetrForSegmentation", inputs, **settings, **no_timm, **sizes)


def bloom(parts: int) -> Made:
    sizes = {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    return made("BloomForCausalLM", TOKENS, **sizes, pretraining_tp=parts, slow_but_exact=True)


def t5() -> Made:
    return made("T5ForConditionalGeneration", BOTH, **T5_SIZES, feed_forward_proj="gated-gelu")


def longt5() -> Made:
    return made("LongT5ForConditionalGeneration", BOTH, **T5_SIZES, local_radius=3)


def switch() -> Made:
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}
    return made("SwitchTransformersForConditionalGeneration", BOTH, **T5_SIZES, **sparse, num_experts=2)


def blip2() -> Made:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, **IMAGES, "intermediate_size": 64}
    asking = {"vocab_size": 100, "intermediate_size": 64, "encoder_hidden_size": 32, "use_qformer_text_input": True}
    text = {**small, "model_type": "opt", "vocab_size": 100, "ffn_dim": 64, "word_embed_proj_dim": 32}
    parts = {"vision_config": vision, "qformer_config": {**small, **asking}, "text_config": text}
    inputs = {**TOKENS, "pixel_values": pixels(), "attention_mask": torch.ones_like(IDS)}
    inputs["use_image_text_matching_head"] = False
    sizes = {"num_query_tokens": 4, "image_text_hidden_size": 16}
    return made("Blip2ForImageTextRetrieval", inputs, **parts, **sizes)


def colpali() -> Made:
    from transformers import PaliGemmaConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, **IMAGES, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {**small, "model_type": "gemma", "vocab_size": 100, "num_key_value_heads": 1, "head_dim": 16}
    both = PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=32, hidden_size=32, image_token_index=99
    )
    inputs = {**TOKENS, "attention_mask": torch.ones_like(IDS)}
    return made("ColPaliForRetrieval", inputs, vlm_config=both, embedding_dim=16)


def gemma3n() -> Made:
    altup = {"altup_num_inputs": 2, "altup_active_idx": 0, "altup_coef_clip": 120.0, "laurel_rank": 8}
    by_layer = {"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
    kinds = {
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 16,
    }
    return made("Gemma3nForCausalLM", TOKENS, "Gemma3nTextConfig", **GROUPED, **altup, **by_layer, **kinds)


def longcat() -> Made:
    heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 16}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "num_layers": 1, "num_attention_heads": 4}
    experts = {"moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32}
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "ffn_hidden_size": 128}
    return made("LongcatFlashForCausalLM", TOKENS, **sizes, **heads, **ranks, **experts)


# model: (how it is made, the last components of the names of the layers whose weight is read)
READERS: dict[str, tuple[Callable[[], Made], set[str]]] = {
    "Mamba": (lambda: mamba("MambaForCausalLM"), {"x_proj", "dt_proj", "out_proj", "lm_head"}),
    "Mamba2": (mamba2, {"out_proj", "lm_head"}),
    "FalconMamba": (lambda: mamba("FalconMambaForCausalLM"), {"x_proj", "dt_proj", "out_proj", "lm_head"}),
    "Jamba": (jamba, {"dt_proj"}),
    "WavLM": (wavlm, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "Wav2Vec2ForXVector": (xvector, {"kernel"}),
    "MobileBert": (mobilebert, {"dense", "decoder"}),
    "DetrForSegmentation": (detr, {"k_proj"}),
    "Bloom in parts": (lambda: bloom(2), {"dense", "dense_4h_to_h"}),
    "T5": (t5, {"wo"}),
    "LongT5": (longt5, {"wo"}),
    "SwitchTransformers": (switch, {"wo"}),
    "BLIP-2": (blip2, {"vision_projection", "text_projection", "itm_head"}),
    "ColPali": (colpali, {"embedding_proj_layer"}),
    "Gemma3n": (gemma3n, {"correction_coefs", "prediction_coefs"}),
    "LongcatFlash": (longcat, {"classifier"}),
}


# --- models that read none --------------------------------------------------------------------------------------------


def opt() -> Made:
    sizes = {"vocab_size": 100, "hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
    return made("OPTForCausalLM", TOKENS, **sizes, num_hidden_layers=2, num_attention_heads=4)


def clip() -> Made:
    parts = {"text_config": {**SIZES, "eos_token_id": 9}, "vision_config": VISION}
    return made("CLIPModel", {**TOKENS, "pixel_values": pixels()}, **parts, projection_dim=32)


def whisper() -> Made:
    sides = ("encoder", "decoder")
    sizes = {
        **{f"{side}_layers": 1 for side in sides},
        **{f"{side}_attention_heads": 4 for side in sides},
        **{f"{side}_ffn_dim": 128 for side in sides},
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sound = {"max_source_positions": 50, "num_mel_bins": 16, "d_model": 64, "vocab_size": 100}
    inputs = {"input_features": torch.randn(2, 16, 100), "decoder_input_ids": IDS}
    return made("WhisperForConditionalGeneration", inputs, **sizes, **ids, **sound)


def gpt2() -> Made:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return made("GPT2LMHeadModel", TOKENS, vocab_size=100, n_embd=64, n_layer=2, n_head=4, **ids)


def falcon() -> Made:
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return made("FalconForCausalLM", TOKENS, **sizes, bias=True)


# model: (how it is made, how many layers quantize_model takes)
OTHERS: dict[str, tuple[Callable[[], Made], int]] = {
    "Llama": (lambda: made("LlamaForCausalLM", TOKENS, **GROUPED), 14),
    "Qwen2": (lambda: made("Qwen2ForCausalLM", TOKENS, **GROUPED), 14),
    "Qwen3": (lambda: made("Qwen3ForCausalLM", TOKENS, **GROUPED, head_dim=16), 14),
    "Mistral": (lambda: made("MistralForCausalLM", TOKENS, **GROUPED), 14),
    "Gemma2": (lambda: made("Gemma2ForCausalLM", TOKENS, **GROUPED, head_dim=16), 14),
    "Gemma3": (lambda: made("Gemma3ForCausalLM", TOKENS, "Gemma3TextConfig", **GROUPED, head_dim=16), 14),
    "Phi": (lambda: made("PhiForCausalLM", TOKENS, **SIZES), 12),
    "OPT": (opt, 12),
    "GPT-NeoX": (lambda: made("GPTNeoXForCausalLM", TOKENS, **SIZES), 8),
    "BERT": (lambda: made("BertForMaskedLM", TOKENS, **SIZES), 12),
    "ViT": (lambda: made("ViTForImageClassification", {"pixel_values": pixels()}, **VISION), 12),
    "CLIP": (clip, 26),
    "Whisper": (whisper, 16),
    "Bloom in one part": (lambda: bloom(1), 8),
    "GPT-2": (gpt2, 8),
    "Falcon": (falcon, 8),
}
