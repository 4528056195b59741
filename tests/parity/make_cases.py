"""Makes reference cases of decoder families with Hugging Face transformers.

In a scratch environment with `torch`, `transformers` and `safetensors`:
    python tests/parity/make_cases.py tests/parity
Random weights, f32, one forward without cache. The numbers are made here; nothing is
downloaded.
"""
import json
import os
import sys

sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers import (
    GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, OPTConfig, Qwen2Config, Qwen3MoeConfig,
)

small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)


def rope(**kw):
    return dict(rope_parameters=dict(rope_theta=10000.0, **kw))


CASES = {
    "gpt2_inverse": (GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=40,
                                scale_attn_by_inverse_layer_idx=True), 20, "scores divided by the layer's number"),
    "opt": (OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                      max_position_embeddings=64, word_embed_proj_dim=32), 20, "learned positions with an offset of two"),
    "opt_post": (OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                           max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False), 20,
                 "norms after, projected embeddings"),
    "llama_bias_tied": (LlamaConfig(**small, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=12), 20,
                        "biases, tied head, head_dim other than hidden / heads"),
    "llama_linear": (LlamaConfig(**small, **rope(rope_type="linear", factor=2.0)), 30, "linear rope scaling"),
    "llama_dynamic": (LlamaConfig(**{**small, "max_position_embeddings": 16}, **rope(rope_type="dynamic", factor=2.0)), 16,
                      "dynamic rope scaling up to the trained length"),
    "llama_llama3": (LlamaConfig(**small, **rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                 original_max_position_embeddings=16)), 40, "llama3 rope scaling"),
    "llama_yarn": (LlamaConfig(**small, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)), 40,
                   "yarn rope scaling"),
    "llama_longrope": (LlamaConfig(**small, **rope(rope_type="longrope", factor=4.0, original_max_position_embeddings=16,
                                                   short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 4.0])), 40,
                       "longrope beyond the trained length"),
    "mistral": (MistralConfig(**small, sliding_window=5), 20, "sliding window"),
    "mixtral": (MixtralConfig(**small, num_local_experts=4, num_experts_per_tok=2), 20, "experts"),
    "qwen2_sliding": (Qwen2Config(**small, use_sliding_window=True, sliding_window=6, max_window_layers=1), 20,
                      "sliding window in the upper layers"),
    "qwen3_moe_mixed": (Qwen3MoeConfig(**small, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=3,
                                       decoder_sparse_step=2, norm_topk_prob=True, head_dim=8), 20, "dense and expert layers"),
}

for name, (config, time, note) in CASES.items():
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn_like(p)
            # Weights large enough that every part matters; norms around one.
            p.copy_(1.0 + 0.1 * noise if "norm" in key or "ln_" in key and key.endswith("weight") else 0.25 * noise)
        ids = torch.randint(0, 64, (2, time))
        logits = model(ids, use_cache=False).logits
    folder = os.path.join(sys.argv[1], name)
    model.save_pretrained(folder)
    for extra in ("generation_config.json",):
        if os.path.exists(os.path.join(folder, extra)):
            os.remove(os.path.join(folder, extra))
    save_file({"input_ids": ids}, os.path.join(folder, "inputs.safetensors"))
    save_file({"logits": logits.contiguous()}, os.path.join(folder, "expected.safetensors"))
    case = {"name": name, "class": type(model).__name__, "inputs": {"input_ids": list(ids.shape)},
            "outputs": {"logits": list(logits.shape)}, "atol": 0.0002, "rtol": 0.002, "note": note}
    with open(os.path.join(folder, "case.json"), "w") as f:
        json.dump(case, f, indent=1)
    print(name, float(logits.abs().mean()))
