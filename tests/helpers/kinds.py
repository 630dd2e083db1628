"""Every layout of the table as a tiny random model, beside its plain reference."""

from functools import partial

from helpers.models import (
    random_deepseek_v3,
    random_deepseek_v32,
    random_ernie,
    random_glm4_moe,
    random_glm4_moe_lite,
    random_glm_5_2,
    random_glm_moe_dsa,
    random_ling,
    random_longcat_flash,
    random_qwen3_5,
    random_qwen3_5_moe,
    random_qwen3_moe,
    random_qwen3_next,
)
from helpers.reference import (
    DenseQwenHead,
    ErnieHead,
    GlmHead,
    GlmSparseHead,
    LatentHead,
    LingHead,
    LongcatHead,
    Qwen3MoeHead,
    QwenHead,
    SharingHead,
    SparseHead,
)

# Name → a tiny random model and its plain reference.
KINDS = {
    "qwen3_next": (random_qwen3_next, QwenHead),
    "qwen3_5": (random_qwen3_5, DenseQwenHead),
    "qwen3_5_moe": (random_qwen3_5_moe, QwenHead),
    "qwen3_moe": (random_qwen3_moe, Qwen3MoeHead),
    "ernie4_5_moe": (partial(random_ernie, bias=True), ErnieHead),
    "glm4_moe": (random_glm4_moe, GlmHead),
    "deepseek_v3": (random_deepseek_v3, LatentHead),
    "glm4_moe_lite": (random_glm4_moe_lite, LatentHead),
    "deepseek_v32": (random_deepseek_v32, SparseHead),
    "glm_moe_dsa": (random_glm_moe_dsa, GlmSparseHead),
    "glm_5_2": (random_glm_5_2, SharingHead),  # glm_moe_dsa with another setting
    "longcat_flash": (random_longcat_flash, LongcatHead),
    "bailing_moe_v2": (random_ling, LingHead),
}
