"""Small random models for tests of shapes and graphs; `examples/tiny-mimo` is the trained one."""

import shutil

import torch
from conftest import TINY
from transformers import DeepseekV3Config, Glm4MoeConfig, Glm4MoeLiteConfig, Qwen3_5TextConfig, Qwen3NextConfig

from swift_fastmtp.checkpoints import Weights
from swift_fastmtp.families import FAMILIES
from swift_fastmtp.modeling import MiMoConfig, build_class


def random_mimo(seed=0, *, vocab=97, width=32, layers=2, heads=4, kv=2, dim=8, dtype=torch.float32):
    """A MiMo with random weights, norms far from 1 so that a swapped or missing norm shows."""
    torch.manual_seed(seed)
    config = MiMoConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=dim,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        architectures=["MiMoForCausalLM"],
    )
    model = build_class(FAMILIES[0])(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.3, 2.0)
        else:
            torch.nn.init.normal_(parameter, std=0.25)
    model.freeze_backbone()
    return model.to(dtype).eval()


def random_qwen3_next(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32):
    """A Qwen3-Next with one linear and one full-attention layer, four experts of which a token reads two."""
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3NextConfig(
        **_hybrid(vocab, heads, kv),
        **mixture,
        shared_expert_intermediate_size=24,
        tie_word_embeddings=False,
        architectures=["Qwen3NextForCausalLM"],
    )
    return _random(seed, config, std, dtype, norms=(-0.7, 1.0))


def random_qwen3_5(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32):
    """A text-only Qwen3.5 with a dense MLP; its output matrix is the embedding, as in the small published ones."""
    config = Qwen3_5TextConfig(
        **_hybrid(vocab, heads, kv), tie_word_embeddings=True, architectures=["Qwen3_5ForCausalLM"]
    )
    return _random(seed, config, std, dtype, norms=(-0.7, 1.0))


def random_glm4_moe(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32):
    """A GLM-4.5: one dense layer, one with six experts in two groups; QK-norm and biases, as the large one has."""
    config = Glm4MoeConfig(
        **_sizes(vocab, heads),
        **_EXPERTS,
        num_key_value_heads=kv,
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        architectures=["Glm4MoeForCausalLM"],
    )
    return _random(seed, config, std, dtype)


def random_deepseek_v3(seed=0, *, vocab=97, heads=4, kv=None, std=0.25, dtype=torch.float32):
    """A DeepSeek-V3: latent attention whose value heads are narrower than its query heads; YaRN."""
    published = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}  # SGLang reads them
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7}
    config = DeepseekV3Config(
        **_sizes(vocab, heads),
        **_EXPERTS,
        **_latent(8, heads),
        max_position_embeddings=64,
        rope_parameters=rope,
        **published,
        architectures=["DeepseekV3ForCausalLM"],
    )
    return _random(seed, config, std, dtype)


def random_glm4_moe_lite(seed=0, *, vocab=97, heads=4, kv=None, std=0.25, dtype=torch.float32):
    """A GLM-4.7-Flash: latent attention with heads of one width."""
    mtp = {"num_nextn_predict_layers": 1}
    config = Glm4MoeLiteConfig(
        **_sizes(vocab, heads), **_EXPERTS, **_latent(16, heads), **mtp, architectures=["Glm4MoeLiteForCausalLM"]
    )
    return _random(seed, config, std, dtype)


_EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
}


def _sizes(vocab, heads):
    sizes = {"vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": heads, "tie_word_embeddings": False}


def _latent(v_head_dim, heads):
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 10, "num_key_value_heads": heads}
    return {**ranks, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": v_head_dim}


def _hybrid(vocab, heads, kv):
    return {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }


def _random(seed, config, std, dtype, norms=(0.3, 2.0)):
    torch.manual_seed(seed)
    model = build_class(next(f for f in FAMILIES if config.architectures[0] in f.architectures))(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            torch.nn.init.uniform_(tensor, *norms)
        elif "A_log" not in name and "inv_freq" not in name:
            torch.nn.init.normal_(tensor, std=std)
    model.freeze_backbone()
    return model.to(dtype).eval()


def save_checkpoint(make, folder):
    """A checkpoint folder as published ones are: an expert per tensor, bfloat16, shards; with the tiny tokenizer.

    Beside a numbered MTP layer, copies of the embedding and the output matrix; the routers' biases are float32.
    """
    model = make(3, vocab=6144, std=0.1)
    model.config.eos_token_id = 6082
    kept = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    state = {**model.bfloat16().state_dict(), **kept}
    matrices = {"embed_tokens": model.model.embed_tokens, "shared_head.head": model.lm_head}
    copies = {f"{n}.weight": module.weight.detach().clone() for n, module in matrices.items()}
    state |= {f"{model.family.prefix}.{n}": t for n, t in copies.items() if n in model.family.copies}
    model.save_pretrained(folder, state_dict=state, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    assert len(Weights(folder).files) > 1
    return folder


def packed_positions(lengths):
    """Position ids of documents packed into one row, [1, T]."""
    return torch.cat([torch.arange(n) for n in lengths])[None]
