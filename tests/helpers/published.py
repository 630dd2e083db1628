"""The numbers of published models that recipes and plans are about, by the model's name on the hub.

MiMo's are written out, from its config.json. The others are the defaults of transformers' configuration classes, which
were written for these models. Folders made of them hold config.json alone.
"""

import json

from transformers import CONFIG_MAPPING

from swift_fastmtp.families.table import FAMILIES

MIMO_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151680,
    "attention_bias": True,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 640000,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# Name on the hub → row of the table, and what is other than in its configuration class.
PUBLISHED = {
    "XiaomiMiMo/MiMo-7B-RL": ("mimo", MIMO_7B),
    "Qwen/Qwen3.5-9B": ("qwen3_5", {}),
    "Qwen/Qwen3.5-35B-A3B": ("qwen3_5_moe", {}),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("qwen3_next", {}),
    "zai-org/GLM-4.5-Air": ("glm4_moe", {}),
    "zai-org/GLM-4.7-Flash": ("glm4_moe_lite", {}),
    "deepseek-ai/DeepSeek-V3": ("deepseek_v3", {"quantization_config": FP8}),
    "zai-org/GLM-5-FP8": ("glm_moe_dsa", {"quantization_config": FP8}),
}


def published(name, folder):
    """A folder with the config.json of a published model and nothing else."""
    row, changes = PUBLISHED[name]
    family = next(each for each in FAMILIES if each.name == row)
    config = {} if row == "mimo" else CONFIG_MAPPING[family.model_type]().to_dict()
    config |= {"architectures": [family.architectures[0]], "model_type": family.model_type, "torch_dtype": "bfloat16"}
    config |= {family.engines.num_layers_key: 1, **changes}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
