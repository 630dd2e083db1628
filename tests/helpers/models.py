"""Small random models for tests of shapes and graphs; `examples/tiny-mimo` is the trained one.

`sizes` of a maker are keys of its config.json that are to be other than here.
"""

import json
import re
import shutil
from functools import partial

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    DeepseekV3Config,
    DeepseekV32Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmMoeDsaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LongcatFlashConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.ernie4_5_moe.configuration_ernie4_5_moe import Ernie4_5_MoeConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig

from helpers.paths import TINY
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.fp8 import quantize
from swift_fastmtp.checkpoint.fp8_config import SCALE, Blocks
from swift_fastmtp.families.bailing import BailingMoeV2Config
from swift_fastmtp.families.mimo import MiMoConfig
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.model.modeling import build_class

# vLLM's kernels for a CPU take attention heads of 32 and more.
WIDE_HEADS = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 32}


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


def random_qwen3_next(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32, **sizes):
    """A Qwen3-Next with one linear and one full-attention layer, four experts of which a token reads two."""
    more = {"tie_word_embeddings": False, "architectures": ["Qwen3NextForCausalLM"]}
    config = _config(Qwen3NextConfig, _hybrid(vocab, heads, kv), _MIXTURE, more, sizes)
    return _random(seed, config, "qwen3_next", std, dtype)


def random_qwen3_5(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32, **sizes):
    """A text-only Qwen3.5 with a dense MLP; its output matrix is the embedding, as in the small published ones."""
    more = {"tie_word_embeddings": True, "architectures": ["Qwen3_5ForCausalLM"]}
    config = _config(Qwen3_5TextConfig, _hybrid(vocab, heads, kv), more, sizes)
    return _random(seed, config, "qwen3_5", std, dtype)


def random_qwen3_5_moe(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32, **sizes):
    """A text-only Qwen3.5 with experts."""
    more = {"architectures": ["Qwen3_5MoeForCausalLM"]}
    config = _config(Qwen3_5MoeTextConfig, _hybrid(vocab, heads, kv), _MIXTURE, more, sizes)
    return _random(seed, config, "qwen3_5_moe", std, dtype)


def random_qwen3_moe(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32, **sizes):
    more = {
        "num_key_value_heads": kv,
        "head_dim": 16,
        "rope_theta": 10000.0,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "architectures": ["Qwen3MoeForCausalLM"],
    }
    config = _config(Qwen3MoeConfig, _sizes(vocab, heads), more, sizes)
    return _random(seed, config, "qwen3_moe", std, dtype, norms=(0.3, 2.0))


def random_ernie(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32, bias=False, **sizes):
    """An ERNIE-4.5 whose backbone has experts from its first layer on, and a dense MTP layer."""
    more = {
        "tie_word_embeddings": True,
        "num_key_value_heads": kv,
        "rope_theta": 10000.0,
        "use_bias": bias,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "num_nextn_predict_layers": 1,
        "architectures": ["Ernie4_5_MoeForCausalLM"],
    }
    config = _config(Ernie4_5_MoeConfig, _sizes(vocab, heads), more, sizes)
    return _random(seed, config, "ernie4_5_moe", std, dtype, norms=(0.3, 2.0))


_MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}


def random_glm4_moe(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32, **sizes):
    """A GLM-4.5: one dense layer, one with six experts in two groups; QK-norm and biases, as the large one has."""
    more = {
        "num_key_value_heads": kv,
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "architectures": ["Glm4MoeForCausalLM"],
    }
    config = _config(Glm4MoeConfig, _sizes(vocab, heads), _EXPERTS, more, sizes)
    return _random(seed, config, "glm4_moe", std, dtype, norms=(0.3, 2.0))


def random_deepseek_v3(seed=0, *, vocab=97, heads=4, kv=None, std=0.25, dtype=torch.float32, **sizes):
    """A DeepSeek-V3: latent attention whose value heads are narrower than its query heads; YaRN."""
    more = {"architectures": ["DeepseekV3ForCausalLM"]}
    config = _config(DeepseekV3Config, _sizes(vocab, heads), _EXPERTS, _latent(8, heads), _yarn(), more, sizes)
    return _random(seed, config, "deepseek_v3", std, dtype, norms=(0.3, 2.0))


def random_glm4_moe_lite(seed=0, *, vocab=97, heads=4, kv=None, std=0.25, dtype=torch.float32, **sizes):
    """A GLM-4.7-Flash: latent attention with heads of one width."""
    mtp = {"num_nextn_predict_layers": 1, "architectures": ["Glm4MoeLiteForCausalLM"]}
    config = _config(Glm4MoeLiteConfig, _sizes(vocab, heads), _EXPERTS, _latent(16, heads), mtp, sizes)
    return _random(seed, config, "glm4_moe_lite", std, dtype, norms=(0.3, 2.0))


def random_deepseek_v32(seed=0, *, vocab=97, heads=4, kv=None, std=0.25, dtype=torch.float32, top=4, **sizes):
    """A DeepSeek-V3.2: the same, attending to the four best keys."""
    mtp = {"num_nextn_predict_layers": 1, "architectures": ["DeepseekV32ForCausalLM"]}
    parts = [_sizes(vocab, heads), _EXPERTS, _latent(8, heads), _yarn(), _index(top), mtp]
    config = _config(DeepseekV32Config, *parts, sizes)
    return _random(seed, config, "deepseek_v32", std, dtype, norms=(0.3, 2.0))


def random_glm_moe_dsa(seed=0, *, vocab=97, heads=4, kv=None, std=0.25, dtype=torch.float32, top=4, **sizes):
    """A GLM-5 whose second layer attends to what the first has picked, as in GLM-5.2."""
    types = {"indexer_types": ["full", "shared"], "indexer_rope_interleave": True}
    mtp = {"num_nextn_predict_layers": 1, "architectures": ["GlmMoeDsaForCausalLM"], **_PUBLISHED}
    parts = [_sizes(vocab, heads), _EXPERTS, _latent(16, heads), _index(top), types, mtp]
    config = _config(GlmMoeDsaConfig, *parts, sizes)
    return _random(seed, config, "glm_moe_dsa", std, dtype, norms=(0.3, 2.0))


# Every step of a chain attends to what its first one has picked.
random_glm_5_2 = partial(random_glm_moe_dsa, index_share_for_mtp_iteration=True)


def random_longcat_flash(seed=0, *, vocab=97, heads=4, kv=None, std=0.25, dtype=torch.float32, **sizes):
    """A LongCat-Flash: latents scaled to the model's width, experts of which some do nothing, a dense MTP layer."""
    more = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_layers": 1,
        "num_attention_heads": heads,
        "head_dim": 8,
        "rope_theta": 10000.0,
        "moe_topk": 2,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 16,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "architectures": ["LongcatFlashForCausalLM"],
    }
    config = _config(LongcatFlashConfig, _latent(8, heads), more, sizes)
    return _random(seed, config, "longcat_flash", std, dtype, norms=(0.3, 2.0))


def random_ling(seed=0, *, vocab=97, heads=4, kv=2, std=0.25, dtype=torch.float32):
    """A Ling 2.0 with the layers of `random_glm4_moe`."""
    return _random(seed, BailingMoeV2Config(**_ling(vocab, heads, kv)), "bailing_moe_v2", std, dtype, norms=(0.3, 2.0))


def _ling(vocab, heads, kv):
    """config.json as published, but for the sizes and the bias of the queries, keys and values."""
    experts = {**_EXPERTS, "num_experts": _EXPERTS["n_routed_experts"], "num_shared_experts": 1}
    del experts["n_routed_experts"]
    return {
        **_sizes(vocab, heads),
        **experts,
        "architectures": ["BailingMoeV2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
        "embedding_dropout": 0.0,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "model_type": "bailing_moe",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 16,
        "norm_topk_prob": True,
        "num_key_value_heads": kv,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 600000,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": True,
    }


# What its publishers' configuration class does; for SGLang, and nothing of ours runs it.
_CONFIGURATION = """import sglang
from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    model_type = "bailing_moe"

    def __init__(self, rope_theta=10000.0, rope_scaling=None, **kwargs):
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        super().__init__(**kwargs)
"""


def save_ling(folder):
    """As inclusionAI publishes them, with the YaRN that they recommend for long texts.

    Without a `routed_scaling_factor`: SGLang's class leaves it to the experts' kernel, and that for a CPU has none.
    """
    save_checkpoint(random_ling, folder)
    config = {**_ling(6144, 4, 2), "routed_scaling_factor": 1.0, "eos_token_id": 6082, "dtype": "bfloat16"}
    config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "configuration_bailing_moe_v2.py").write_text(_CONFIGURATION)
    return folder


_PUBLISHED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}  # SGLang reads them
_EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
}


def _config(cls, *parts):
    """A configuration of settings of which later ones take the place of earlier ones."""
    settings = {}
    for part in parts:
        settings.update(part)
    return cls(**settings)


def _sizes(vocab, heads):
    sizes = {"vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": heads, "tie_word_embeddings": False}


def _latent(v_head_dim, heads):
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 10, "num_key_value_heads": heads}
    return {**ranks, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": v_head_dim}


def _yarn():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7}
    return {"max_position_embeddings": 2048, "rope_parameters": rope, **_PUBLISHED}


def _index(top):
    """So many heads that no two scores of a query are 0, of which either could be picked."""
    return {"index_topk": top, "index_n_heads": 16, "index_head_dim": 16}


def _hybrid(vocab, heads, kv):
    return {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "full_attention_interval": 2,  # the same to SGLang, which does not read layer_types
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


def _random(seed, config, family, std, dtype, norms=(-0.7, 1.0)):
    torch.manual_seed(seed)
    model = build_class(next(f for f in FAMILIES if f.name == family))(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            torch.nn.init.uniform_(tensor, *norms)
        elif "A_log" not in name and "inv_freq" not in name:
            torch.nn.init.normal_(tensor, std=std)
    model.freeze_backbone()
    return model.to(dtype).eval()


# What no gradient trains: the bias by which routers choose experts, and an indexer; of those, what is float32.
CARRIED = re.compile(r"(e_score_correction_bias|expert_bias)$|\.indexer\.")
WIDE = re.compile(r"(e_score_correction_bias|expert_bias|indexer\.k_norm\.(weight|bias))$")


def save_checkpoint(make, folder, **sizes):
    """A checkpoint folder as published ones are: an expert per tensor, bfloat16, shards; with the tiny tokenizer.

    Beside a numbered MTP layer, copies of the embedding and the output matrix; the routers' biases are float32, and so
    is the norm of the layer's indexer.
    """
    model = make(3, vocab=6144, std=0.1, **sizes)
    model.config.eos_token_id = 6082
    kept = {n: b.clone() for n, b in model.named_buffers() if WIDE.search(n)}
    state = {**model.bfloat16().state_dict(), **kept}
    matrices = {"embed_tokens": model.model.embed_tokens, "shared_head.head": model.lm_head}
    copies = {f"{n}.weight": module.weight.detach().clone() for n, module in matrices.items()}
    state |= {f"{model.family.names.prefix}.{n}": t for n, t in copies.items() if n in model.family.names.copies}
    model.save_pretrained(folder, state_dict=state, max_shard_size="100KB")
    config = json.loads((folder / "config.json").read_text())
    if "full_attention_interval" in config:  # transformers makes the layers' types of it, and does not save it then
        del config["layer_types"]
        (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    assert len(Checkpoint(folder).files) > 1
    return folder


def quantized(folder, target, size=(128, 128), plain=("norm", "embed_tokens", "lm_head"), power_of_two=False, **config):
    """A copy of a checkpoint with its matrices in FP8 blocks, as published ones are: scales beside their weights.

    `plain` are parts of the names that stay as they are; config.json lists those modules by their whole names.
    """
    shutil.copytree(folder, target)
    left_out = []
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        matrices = [n for n, t in tensors.items() if t.ndim > 1 and not any(p in n for p in plain)]
        left_out += [n.removesuffix(".weight") for n in tensors if n not in matrices]
        for name in matrices:
            tensors[name], tensors[name + SCALE] = quantize(tensors[name], Blocks(size, power_of_two))
        save_file(tensors, path, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.exists():
        index.unlink()  # without one every file counts
        weight_map = {n: p.name for n, p in Checkpoint(target).file_of.items()}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(size)}
    settings |= {"fmt": "e4m3", "modules_to_not_convert": sorted(left_out)} | (
        {"scale_fmt": "ue8m0"} if power_of_two else {}
    )
    old = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**old, "quantization_config": settings, **config}, indent=2))
    return target


DENSE = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
DENSE_SIZES = {
    "vocab_size": 6144,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def save_dense(folder, kind, **changes):
    """A random model with the tiny model's tokenizer, as transformers saves it."""
    config_class, model_class = DENSE[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**DENSE_SIZES, **changes})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def save_tied(folder, kind):
    """One with a tied output matrix, and without the window that Mistral's configuration has by default."""
    window = {"sliding_window": None} if kind == "mistral" else {}
    return save_dense(folder, kind, tie_word_embeddings=True, **window)


def gptq(folder, target, group=32, g_idx=True):
    """A copy of a checkpoint as GPTQModel stores it, 4 bits, symmetric, rounded to the nearest; without its MTP layer.

    `g_idx`: which group each column is of, which AutoRound leaves out of the same packing. Returns the tensors as the
    numbers that they stand for.
    """
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    checkpoint = Checkpoint(folder)
    stored, numbers = {}, {}
    for name in checkpoint.names:
        tensor = checkpoint.read(name)
        if checkpoint.family.owns(name):
            continue
        if tensor.ndim != 2 or ".layers." not in name:
            stored[name] = numbers[name] = tensor
            continue
        rows, columns = tensor.shape
        grouped = tensor.float().view(rows, columns // group, group)
        scales = (grouped.abs().amax(-1) / 7).clamp(min=1e-6).half()
        codes = (grouped / scales[..., None].float()).round().clamp(-8, 7)
        numbers[name] = (codes * scales[..., None].float()).view(rows, columns).to(tensor.dtype)
        # Eight codes of a column in an int32, the first in its lowest bits; zero is 8, and stored as one less.
        codes = (codes + 8).view(rows, columns).long().T.reshape(columns // 8, 8, rows)
        packed = (codes << torch.arange(0, 32, 4)[None, :, None]).sum(1)
        module = name.removesuffix(".weight")
        stored[f"{module}.qweight"] = torch.where(packed < 2**31, packed, packed - 2**32).int()
        stored[f"{module}.qzeros"] = torch.full((columns // group, rows // 8), 0x77777777, dtype=torch.int32)
        stored[f"{module}.scales"] = scales.T.contiguous()
        if g_idx:
            stored[f"{module}.g_idx"] = (torch.arange(columns) // group).int()
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True}
    settings |= {"lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32"}
    settings["meta"] = {"quantizer": ["gptqmodel:5.6.0"], "uri": "https://github.com/modelcloud/gptqmodel"}
    settings["meta"] |= {"damp_percent": 0.05, "mse": 0.0, "static_groups": False, "true_sequential": True}
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return numbers


# As Qwen3.5's renders a plain conversation.
_THINKING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}"
    "{%- if enable_thinking is false %}{{- '\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def save_vision_checkpoint(make, folder):
    """The same text model and head as Qwen publishes them: beside a vision tower, experts joined, a little in fp32."""
    model = make(3, vocab=6144, std=0.1).bfloat16()
    text = {**model.config.to_dict(), "mtp_num_hidden_layers": 1}
    text["rope_parameters"] |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_position_embeddings": 16}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    cls = Qwen3_5MoeConfig if "moe" in text["model_type"] else Qwen3_5Config
    config = cls(
        text_config=text,
        vision_config={**vision, "patch_size": 4, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
        eos_token_id=6082,
        dtype="bfloat16",
        **tokens,
    )
    whole = AutoModelForImageTextToText.from_config(config).bfloat16()
    config.architectures = [type(whole).__name__]
    tensors = {n: t for n, t in whole.state_dict().items() if n.startswith("model.visual.")}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not text["tie_word_embeddings"]:
            wide = name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))
            tensors[name.replace("model.", "model.language_model.", 1)] = tensor.float() + 1e-5 if wide else tensor
    folder.mkdir()
    save_torch_state_dict(tensors, folder, max_shard_size="100KB")
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    tokenizer = json.loads((TINY / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": _THINKING}))
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessorFast"}')
    assert len(Checkpoint(folder).files) > 1 and "vision_config" in json.loads((folder / "config.json").read_text())
    return folder


def save_longcat_flash(folder):
    """RoPE under the keys that published ones have: SGLang's configuration class reads no others. It does not take
    plain RoPE either, but YaRN by a factor of one, which is the same."""
    path = save_checkpoint(random_longcat_flash, folder) / "config.json"
    config = json.loads(path.read_text())
    scaling = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 131072}
    theta = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": scaling}))
    return folder


def for_each_row(what, values, but=()):
    """`values`, by names of families; an error that names the rows of the table that have none there."""
    missing = {row.name for row in FAMILIES} - values.keys() - set(but)
    assert not missing, f"{what}: none for {sorted(missing)}; swift_fastmtp/families/README.md says what a row needs"
    return values


def row_of(name):
    """The row of a name in `CHECKPOINTS`."""
    return next(row for row in FAMILIES if row.name == name.removesuffix(VISION))


# Family → a small random model of it.
RANDOM = for_each_row(
    "RANDOM of tests/helpers/models.py",
    {
        "mimo": random_mimo,
        "qwen3_next": random_qwen3_next,
        "qwen3_5": random_qwen3_5,
        "qwen3_5_moe": random_qwen3_5_moe,
        "qwen3_moe": random_qwen3_moe,
        "ernie4_5_moe": random_ernie,
        "glm4_moe": random_glm4_moe,
        "deepseek_v3": random_deepseek_v3,
        "glm4_moe_lite": random_glm4_moe_lite,
        "deepseek_v32": random_deepseek_v32,
        "glm_moe_dsa": random_glm_moe_dsa,
        "longcat_flash": random_longcat_flash,
        "bailing_moe_v2": random_ling,
    },
)
# Family → what saves a checkpoint, where `save_checkpoint` does not do.
_SAVE = {"longcat_flash": save_longcat_flash, "bailing_moe_v2": save_ling}
VISION = "_vision"


def _checkpoints():
    """Name → what makes a checkpoint folder, of every row but MiMo's, which has a trained one; with a second
    architecture, two: the text model alone, and the same beside a vision tower."""
    checkpoints = {}
    for row in FAMILIES:
        if row.name != "mimo":
            checkpoints[row.name] = _SAVE.get(row.name) or partial(save_checkpoint, RANDOM[row.name])
        if len(row.architectures) > 1:
            checkpoints[row.name + VISION] = partial(save_vision_checkpoint, RANDOM[row.name])
    return checkpoints


def _is_served(name):
    """Behind whole SGLang servers. On a CPU those have no sparse attention, some draft class may not draft at all, and
    a text-only model would be another one for what the published checkpoints hold beside a vision tower."""
    row = row_of(name)
    return not row.block.indexer_rope and not row.engines.sglang_gap and name + VISION not in CHECKPOINTS


CHECKPOINTS = _checkpoints()
SERVED = [name for name in CHECKPOINTS if _is_served(name)]


def tensors_of(folder):
    """Every tensor of a checkpoint, by name."""
    found = Checkpoint(folder)
    return {name: found.read(name) for name in found.file_of}


def packed_positions(lengths):
    """Position ids of documents packed into one row, [1, T]."""
    return torch.cat([torch.arange(n) for n in lengths])[None]


# Where most of the checkpoints above have their MTP layer.
HEAD, LAYER = "mtp.", "model.layers.2."


def broken(base, tmp_path, change=None, **config):
    """The checkpoint in one file, changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = tensors_of(base)
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), **config}))
    return folder


def lose_mtp(tensors):
    for name in [n for n in tensors if n.startswith((HEAD, LAYER))]:
        del tensors[name]
