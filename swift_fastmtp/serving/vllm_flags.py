"""The command that starts vLLM with an MTP layer, full checkpoint or draft-only folder.

vLLM builds the layer by the target's configuration, not by the draft's (0.32.0 `llm_base_proposer.py`,
`_create_draft_vllm_config`). So what the target does not say of the layer stands in `--hf-overrides`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.quantization import Quantization, leaving_out, parts_of, read_quantization
from ..families.family import config_value
from ..files.known_files import read_object
from .flags import REMOTE_CODE, Flag

RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Of LoRA adapters, that vLLM knows (0.32.0 `config/lora.py`, `MaxLoRARanks`)."""


def vllm_flags(remote_code: bool, target: Path, draft: Checkpoint | None, steps: int) -> list[Flag]:
    speculative: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": steps}
    overrides: dict[str, Any] = {}
    if draft:
        speculative["model"] = str(draft)
        overrides = _missing_keys(draft, read_object(target / "config.json")) | _left_out(draft, target)
    why = "the model the head was trained for" if draft else "the exported checkpoint"
    missing = "vLLM builds the MTP layer by the target's config.json, which lacks this"
    if "quantization_config" in overrides:
        missing += "; its quantization, with this layer left out: vLLM would build it quantized"
    return [
        Flag(("vllm", "serve", str(target)), why),
        *([Flag(("--trust-remote-code",), REMOTE_CODE)] if remote_code else []),
        *([Flag(("--hf-overrides", json.dumps(overrides)), missing)] if overrides else []),
        Flag(("--speculative-config", json.dumps(speculative)), "K drafts, the one layer applied K times"),
    ]


def _missing_keys(draft: Checkpoint, target: dict[str, Any]) -> dict[str, Any]:
    """What a target's config.json must say for vLLM to draft for it, and does not: it lost its MTP layer, or never had
    one (0.32.0 `mimo_mtp.py`: the layer is built by the target's configuration, not by the draft's)."""
    key = draft.family.engines.num_layers_key
    if config_value(target, key) is not None:
        return {}
    in_text = isinstance(target.get("text_config"), dict) and key in (draft.config.get("text_config") or {})
    return {"text_config": {key: 1}} if in_text else {key: 1}


def _left_out(draft: Checkpoint, target: Path) -> dict[str, Any]:
    """What the target's quantization must say for vLLM to build a plain layer plain: that it is left out."""
    config = read_object(target / "config.json")
    quantization = read_quantization(config, target)
    if quantization is None or read_quantization(draft.config, draft.folder):
        return {}
    family = draft.family
    numbered = f"model.layers.{config_value(config, 'num_hidden_layers')}"  # vLLM's name where it has no `mtp`
    roots = dict.fromkeys((*family.roots, numbered))
    shapes = {name: draft.shape(name) for name in draft.names if family.owns(name)}
    modules: set[str] = set()
    for part in parts_of(family, shapes):
        for name in (part.name, *part.modules):
            modules |= {name, name.replace(family.names.prefix, numbered)}
    if quantization.method == "awq":
        quantization = _with_plain(quantization, target)
    settings = leaving_out(quantization, roots, modules)
    return {"quantization_config": settings} if settings else {}


def _with_plain(quantization: Quantization, target: Path) -> Quantization:
    """With the plain matrices of the target's layers listed: vLLM looks at its files only where nothing is listed
    (0.32.0 `auto_awq.py` `maybe_update_config`)."""
    if quantization.settings.get(quantization.key):
        return quantization
    entries = Checkpoint(target).entries
    plain = [n for n, e in entries.items() if n.endswith(".weight") and len(e.shape) == 2 and ".layers." in n]
    listed = [name.removesuffix(".weight") for name in plain]
    return replace(quantization, settings={**quantization.settings, quantization.key: listed})


def lora_rank(rank: int) -> str:
    """The smallest that vLLM knows (0.32.0 `config/lora.py`, `MaxLoRARanks`)."""
    return str(next((known for known in RANKS if known >= rank), rank))
