"""Small random models for tests of shapes and graphs; `examples/tiny-mimo` is the trained one."""

import json
import shutil

import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5TextConfig, Qwen3NextConfig

from swift_fastmtp.checkpoints import Weights
from swift_fastmtp.families import FAMILIES
from swift_fastmtp.fp8 import SCALE, Blocks, quantise
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
    return _random_qwen(seed, config, "qwen3_next", std, dtype)


def random_qwen3_5(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32):
    """A text-only Qwen3.5 with a dense MLP; its output matrix is the embedding, as in the small published ones."""
    config = Qwen3_5TextConfig(
        **_hybrid(vocab, heads, kv), tie_word_embeddings=True, architectures=["Qwen3_5ForCausalLM"]
    )
    return _random_qwen(seed, config, "qwen3_5", std, dtype)


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


def _random_qwen(seed, config, family, std, dtype):
    torch.manual_seed(seed)
    model = build_class(next(f for f in FAMILIES if f.name == family))(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, -0.7, 1.0)
        elif "A_log" not in name:
            torch.nn.init.normal_(parameter, std=std)
    model.freeze_backbone()
    return model.to(dtype).eval()


def save_checkpoint(make, folder):
    """A checkpoint folder as published ones are: an expert per tensor, bfloat16, shards; with the tiny tokenizer."""
    model = make(3, vocab=6144, std=0.1)
    model.config.eos_token_id = 6082
    model.bfloat16().save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    assert len(Weights(folder).files) > 1
    return folder


def quantised(folder, target, size=(128, 128), plain=("norm", "embed_tokens", "lm_head"), power_of_two=False, **config):
    """A copy of a checkpoint with its matrices in FP8 blocks, as published ones are: scales beside their weights.

    `plain` are parts of the names that stay as they are.
    """
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [n for n, t in tensors.items() if t.ndim > 1 and not any(p in n for p in plain)]:
            tensors[name], tensors[name + SCALE] = quantise(tensors[name], Blocks(size, power_of_two))
        save_file(tensors, path, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.exists():
        index.unlink()  # without one every file counts
        weight_map = {n: p.name for n, p in Weights(target).file_of.items()}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(size)}
    settings |= {"fmt": "e4m3", "modules_to_not_convert": list(plain)} | (
        {"scale_fmt": "ue8m0"} if power_of_two else {}
    )
    old = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**old, "quantization_config": settings, **config}, indent=2))
    return target


def packed_positions(lengths):
    """Position ids of documents packed into one row, [1, T]."""
    return torch.cat([torch.arange(n) for n in lengths])[None]
