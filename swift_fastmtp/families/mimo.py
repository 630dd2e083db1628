"""MiMo, whose backbone and block are Qwen2's: transformers knows all of it but the name of its configuration."""

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config


class MiMoConfig(Qwen2Config):
    """transformers has no `mimo`; the checkpoint's own remote-code config is exactly this."""

    model_type = "mimo"
    num_nextn_predict_layers: int = 1
