"""Every layout of the table as a tiny random model, beside its plain reference."""

from functools import partial

from helpers.models import RANDOM, for_each_row, random_ernie, random_glm_5_2
from helpers.reference import (
    DenseQwenHead,
    ErnieHead,
    GlmHead,
    GlmSparseHead,
    Head,
    LatentHead,
    LingHead,
    LongcatHead,
    Qwen3MoeHead,
    QwenHead,
    SharingHead,
    SparseHead,
)

# Family → its head written out plainly.
REFERENCES = for_each_row(
    "REFERENCES of tests/helpers/kinds.py",
    {
        "mimo": Head,
        "qwen3_next": QwenHead,
        "qwen3_5": DenseQwenHead,
        "qwen3_5_moe": QwenHead,
        "qwen3_moe": Qwen3MoeHead,
        "ernie4_5_moe": ErnieHead,
        "glm4_moe": GlmHead,
        "deepseek_v3": LatentHead,
        "glm4_moe_lite": LatentHead,
        "deepseek_v32": SparseHead,
        "glm_moe_dsa": GlmSparseHead,
        "longcat_flash": LongcatHead,
        "bailing_moe_v2": LingHead,
    },
)
# Name → a tiny random model and its plain reference; test_rollout.py has MiMo.
KINDS = {name: (RANDOM[name], head) for name, head in REFERENCES.items() if name != "mimo"}
KINDS["ernie4_5_moe"] = partial(random_ernie, bias=True), ErnieHead
KINDS["glm_5_2"] = random_glm_5_2, SharingHead  # glm_moe_dsa with another setting
