"""MTP layouts that exist and that this package does not train, each with the reason.

`fastmtp inspect` names them instead of calling them unknown, and the trainer refuses them with the same words, so that
nobody trains a chain for an engine that runs something else. What is trained has a row in `table.FAMILIES` instead.

Which engine serves what was read in SGLang 0.5.23 (`configs/model_config.py` `_config_draft_model`,
`arg_groups/overrides.py`, `model_overrides/`) and in vLLM's `config/speculative.py` (`MTPModelTypes`); what
transformers ignores, in the `_keys_to_ignore_on_load_unexpected` of transformers 5.19. Nothing here was run.
"""

from dataclasses import dataclass

CHAIN = "chain"
"""One layer, applied to its own output (SGLang `eagle_worker_v2.py`): what FastMTP trains."""
MULTI_LAYER = "multi-layer"
"""One layer and one KV cache for each depth (SGLang `multi_layer_eagle_worker_v2.py`)."""
FROZEN_KV = "frozen-kv"
"""A separate assistant that reads the target's own keys and values (SGLang `frozen_kv_mtp_worker_v2.py`)."""


@dataclass(frozen=True)
class Layout:
    """One MTP layout by the architectures of its checkpoints."""

    name: str
    architectures: tuple[str, ...]
    prefixes: tuple[str, ...]
    """Module paths of the MTP tensors; `{N}` stands for every layer index from num_hidden_layers on."""
    sglang: str | None
    """`CHAIN`, `MULTI_LAYER`, `FROZEN_KV`, or None where it serves no MTP of it."""
    vllm: str | None
    """vLLM's name of the speculative method, which `"method": "mtp"` resolves to."""
    reason: str
    """Why it is not trained here."""
    ignored: str | None = None
    """Pattern of names that transformers drops while loading, without a word."""


_NO_ROW = "its layout is known, but it has no row in families/table.py yet"
_BY_DEPTH = "the engine gives every depth its own layer and KV cache, so a layer trained on its own output is not"
_NUMBERED = ("model.layers.{N}",)
_NUMBERED_IGNORED = r"model\.layers\.N.*"

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "glm-ocr",
        ("GlmOcrForConditionalGeneration",),
        ("model.language_model.layers.{N}", "model.layers.{N}"),
        CHAIN,
        "glm_ocr_mtp",
        f"{_NO_ROW}: a vision model",
        r"model\.language_model\.layers\.16.*",
    ),
    Layout(
        "glm5-next",
        ("Glm5NextForConditionalGeneration",),
        ("model.language_model.layers.{N}", "model.layers.{N}"),
        CHAIN,
        "glm5_next_mtp",
        f"{_NO_ROW}: a vision model with linear attention and experts",
        _NUMBERED_IGNORED,
    ),
    Layout(
        "bailing",
        ("BailingMoeForCausalLM",),
        _NUMBERED,
        CHAIN,
        None,
        f"{_NO_ROW}: Ling 1.0 and 1.5, whose routers choose by softmax and which are published without an MTP layer",
    ),
    Layout(
        "bailing-v2.5",
        ("BailingMoeV2_5ForCausalLM",),
        _NUMBERED,
        CHAIN,
        "bailing_hybrid_mtp",
        f"{_NO_ROW}: latent attention (MLA), after a backbone with linear attention that transformers runs with remote "
        "code only",
    ),
    Layout(
        "bailing-v3",
        ("BailingMoeV3ForCausalLM",),
        _NUMBERED,
        CHAIN,
        "bailing_hybrid_v3_mtp",
        f"{_NO_ROW}: gated latent attention (MLA), after a backbone with linear attention (KDA) that transformers runs "
        "with remote code only",
    ),
    Layout(
        "hunyuan-v3",
        ("HYV3ForCausalLM",),
        _NUMBERED,
        CHAIN,
        "hy_v3_mtp",
        f"{_NO_ROW}: checkpoints name router and shared expert otherwise than transformers' modules do",
        _NUMBERED_IGNORED,
    ),
    Layout(
        "hunyuan-v4",
        ("HYV4ForCausalLM",),
        ("model.mtp_layers",),
        CHAIN,
        "hy_v4_mtp",
        f"{_NO_ROW}: MLA and experts",
        r"model\.mtp_layers\..*",
    ),
    Layout(
        "intern-s2",
        ("InternS2PreviewForConditionalGeneration", "InternS2MobiusForConditionalGeneration"),
        ("mtp",),
        CHAIN,
        "qwen3_5_mtp",
        f"{_NO_ROW}: Qwen3.5's layer beside a backbone that transformers runs with remote code only",
        r"^mtp.*",
    ),
    Layout(
        "qwen4-exp",
        ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"),
        ("mtp",),
        CHAIN,
        "qwen4_exp_mtp",
        "hyper-connections: the chain carries several hidden states beside each other, not one",
        r"^mtp.*",
    ),
    Layout(
        "exaone-moe",
        ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"),
        ("mtp",),
        CHAIN,
        "exaone_moe_mtp",
        f"{_NO_ROW}: its MTP layer attends within the first layer's sliding window, which the exact rollout has not",
        r"mtp.*",
    ),
    Layout(
        "nemotron-h",
        ("NemotronHForCausalLM", "NemotronHPuzzleForCausalLM"),
        ("mtp",),
        CHAIN,
        "nemotron_h_mtp",
        f"{_NO_ROW}: its MTP layer is a pattern of attention and expert blocks",
        r"mtp.*",
    ),
    Layout(
        "mimo-v2",
        ("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"),
        ("model.mtp",),
        MULTI_LAYER,
        "mimo_v2_mtp",
        f"{_BY_DEPTH} what SGLang runs, and every depth there reads the target's hidden state again",
        r"^model\.mtp\.",
    ),
    Layout(
        "step3",
        ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),
        _NUMBERED,
        MULTI_LAYER,
        "step3p5_mtp",
        f"{_BY_DEPTH} what SGLang runs; its chain carries the state before the norm, and each layer has its own head",
        r"(^|\.)layers\.N\.",
    ),
    Layout(
        "gigachat3.5",
        ("GigaChat35ForCausalLM",),
        _NUMBERED,
        MULTI_LAYER,
        None,
        f"{_BY_DEPTH} what SGLang runs; its chain carries the state before the norm",
    ),
    Layout(
        "inkling",
        ("InklingForCausalLM", "InklingForConditionalGeneration"),
        ("model.mtp",),
        MULTI_LAYER,
        "inkling_mtp",
        f"{_BY_DEPTH} what SGLang runs; its chain carries the state before the norm",
        r"model\.mtp\..*",
    ),
    Layout(
        "deepseek-v4",
        ("DeepseekV4ForCausalLM",),
        ("mtp",),
        CHAIN,
        None,
        "hyper-connections: the chain carries a stream before the norm, and the two inputs are projected apart",
        r"(^|\.)mtp\..*",
    ),
    Layout(
        "gemma4-assistant",
        ("Gemma4AssistantForCausalLM",),
        ("pre_projection", "post_projection"),
        FROZEN_KV,
        "gemma4_mtp",
        "a separate model that reads the target's own keys and values at one constant position; no chain of its own",
    ),
    Layout(
        "dots3",
        ("Dots3NoteForCausalLM",),
        _NUMBERED,
        CHAIN,
        "dots3_note_mtp",
        "it has an embedding and head of its own",
    ),
    Layout("iquest-q1", ("IQuestQ1ForCausalLM",), ("mtp",), CHAIN, None, "it has an embedding and head of its own"),
)


def known_layout(architectures: list[str]) -> Layout | None:
    """The row that names one of a config.json's `architectures`, or None."""
    return next((row for row in LAYOUTS if any(a in row.architectures for a in architectures)), None)
