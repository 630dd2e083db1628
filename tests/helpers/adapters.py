"""LoRA adapters of a small model's backbone, as peft saves them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.model.config import load_config

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base, folder, seed=0, targets=TARGETS, strength=0.3, **options):
    """A random one, strong enough to change what a MiMo folder answers."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM.from_pretrained(base, config=load_config(Checkpoint(base)), dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False, **options)
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(strength)
    wrapped.save_pretrained(folder)
    return folder
