"""The command that serves an exported folder, with the reason for each flag.

The flags are what the engines were read and tested to do (SGLang 0.5.19 to 0.5.23: `arg_groups/speculative_hook.py`,
`eagle_worker_v2.py`); docs and serving tests take them from here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config_file import TOKEN_MAPS_KEY, TOKEN_MAPS_VARIABLE
from ..checkpoint.quantization import read_quantization
from ..errors import FastMTPError
from ..families.family import Family, config_value
from ..files.known_files import read_object
from ..method.verification import REGIMES, default_regime
from .flags import ENVIRONMENT, REMOTE_CODE, Flag
from .regime_flags import sampled_flags
from .schedule_flags import most_drafts, with_schedule
from .vllm_flags import RANKS, lora_rank, vllm_flags


def serve_flags(
    folder: str | Path,
    engine: Literal["sglang", "vllm"] = "sglang",
    num_steps: int | None = None,
    token_map: str | None = None,
    model: str | None = None,
    schedule: str | None = None,
    temperature: float = 0.0,
    regime: Literal["greedy", "rejection", "block"] | None = None,
) -> list[Flag]:
    """Command line that serves `folder`, in order.

    Args:
        folder: full checkpoint or draft-only folder
        engine: that the command starts
        num_steps: drafts per step, K; default: what the head was trained for
        token_map: file of one map for all requests: SGLang's --speculative-token-map, or for vLLM an environment
            variable that this package's plugin reads; default: the one the head was trained inside
        model: target of a draft-only folder; default: the base model it was trained for
        schedule: adaptive.json of `fastmtp simulate --costs`: K by load, instead of one K
        temperature: of the requests; above 0 it matters how drafts are made and verified
        regime: how, above temperature 0: greedy drafts, or sampled ones with rejection sampling or block verification;
            default: rejection

    Raises `FastMTPError` for an unknown folder, or something the engine cannot do.
    """
    if temperature < 0:
        raise FastMTPError(f"--temperature {temperature:g}: must not be negative")
    if regime and temperature == 0:
        raise FastMTPError(f"--regime {regime}: at temperature 0 all regimes are one; give --temperature")
    if schedule and num_steps is not None:
        raise FastMTPError("--schedule and --num_steps: the schedule says how many drafts to make; leave one out")
    checkpoint = Checkpoint(folder)
    if schedule:
        flags = scheduled_flags(checkpoint, engine, Path(schedule), token_map, model)
    else:
        flags = flags_for(checkpoint, engine, num_steps, token_map, model)
    if temperature == 0:
        return flags
    chosen = REGIMES[regime] if regime else default_regime(temperature)
    return sampled_flags(checkpoint, flags, engine, chosen)


def flags_for(
    checkpoint: Checkpoint, engine: str, num_steps: int | None, token_map: str | None, model: str | None
) -> list[Flag]:
    """`serve_flags` of a folder that is open already."""
    folder = checkpoint.folder
    config, family, settings = checkpoint.config, checkpoint.family, checkpoint.settings
    _check_servable(checkpoint, engine)
    full = checkpoint.has_backbone()
    steps = num_steps or settings.get("num_speculative_steps") or 3
    target = folder if full else Path(model or settings.get("base_model") or "")
    if not full and not model and not settings.get("base_model"):
        raise FastMTPError(f"{folder}: holds only the draft; name the model it drafts for with --model")
    target_config = read_object(target / "config.json")
    by_language = TOKEN_MAPS_KEY in config and not token_map
    token_map = None if by_language else token_map or settings.get("token_map")
    adapter = _adapter(Path(settings["backbone_lora"]), engine) if settings.get("backbone_lora") else []
    if engine == "vllm":
        flags = vllm_flags(bool(config.get("auto_map")), target, None if full else checkpoint, steps)
        flags[-1:-1] = adapter
        flags[-1] = replace(flags[-1], why=flags[-1].why + _lost(checkpoint, engine, target_config))
        return _with_plugin(flags, config, token_map)
    if token_map and config_value(config, "tie_word_embeddings"):
        raise FastMTPError(
            f"{folder}: SGLang has no static token map for tied embeddings (its draft keeps the whole output matrix, "
            "and ids go through the short table); serve without the map"
        )
    why = "stock SGLang"
    if by_language:
        why += f"; with this package beside it, {TOKEN_MAPS_KEY} of config.json"
    flags = [
        Flag(("python", "-m", "sglang.launch_server"), why),
        Flag(
            ("--model-path", str(target)), "the exported checkpoint" if full else "the model the head was trained for"
        ),
    ]
    if not full:
        flags.append(Flag(("--speculative-draft-model-path", str(folder)), "only the MTP layer; the rest is shared"))
        if read_quantization(target_config, target) and not read_quantization(config, folder):
            why = "the target is quantized, these tensors are not"
            flags.append(Flag(("--speculative-draft-model-quantization", "unquant"), why))
    elif read_quantization(config, folder) and not _is_quantized(checkpoint, family):
        why = "SGLang names some MTP layers otherwise than the checkpoint, and may not see that this one is left out"
        flags.append(Flag(("--speculative-draft-model-quantization", "unquant"), why))
    if config.get("auto_map"):
        flags.append(Flag(("--trust-remote-code",), REMOTE_CODE))
    flags += [
        Flag(
            ("--speculative-algorithm", "NEXTN"),
            family.engines.sglang_gap
            or "the MTP layer drafts; the same code path as EAGLE" + _lost(checkpoint, engine, target_config),
        ),
        Flag(("--speculative-num-steps", str(steps)), "K, the layer is applied to its own output K times"),
        Flag(("--speculative-eagle-topk", "1"), "a chain: what the head was trained for"),
        Flag(("--speculative-num-draft-tokens", str(steps + 1)), "K drafts and the bonus token"),
        *adapter,
    ]
    if token_map:
        flags += [
            Flag(("--speculative-token-map", token_map), "the draft's smaller vocabulary; the output does not change"),
            Flag(("--tp-size", "1"), "a static map holds global ids, which a sharded head cannot take"),
        ]
    return flags


def scheduled_flags(
    checkpoint: Checkpoint, engine: str, file: Path, token_map: str | None, model: str | None
) -> list[Flag]:
    """`flags_for` with K by load."""
    flags = flags_for(checkpoint, engine, most_drafts(file), token_map, model)
    return with_schedule(checkpoint, flags, engine, file)


def _adapter(folder: Path, engine: str) -> list[Flag]:
    """The LoRA adapter that the target has and the draft was trained for. Both engines apply adapters to the target
    alone, and draft with one layer for all requests (docs/adapters.md)."""
    named = f"{folder.name}={folder}"
    why = "the adapter that the layer was trained for; requests name it"
    if engine == "sglang":
        return [Flag(("--enable-lora",), "adapters apply to the target"), Flag(("--lora-paths", named), why)]
    rank = read_object(folder / "adapter_config.json").get("r", 0)
    return [
        Flag(("--enable-lora",), "adapters apply to the target"),
        Flag(("--lora-modules", named), why),
        *([Flag(("--max-lora-rank", lora_rank(rank)), "vLLM's default is 16")] if rank > RANKS[0] else []),
    ]


def _check_servable(checkpoint: Checkpoint, engine: str) -> None:
    """Raises `FastMTPError` for a folder that the engine would not start with, or would draft nonsense with."""
    folder, family = checkpoint.folder, checkpoint.family
    _ = checkpoint.entries  # raises where a file is damaged
    if elsewhere := checkpoint.elsewhere(family):
        raise FastMTPError(f"{folder}: {elsewhere.text}")
    if fault := checkpoint.vocab_size_fault:
        raise FastMTPError(f"{checkpoint.config_file}: {fault}")
    if not checkpoint.under(*family.roots):
        raise FastMTPError(f"{folder}: holds no tensor under {family.root}; nothing to draft with")
    if refusal := checkpoint.chosen.refusals.get(engine):
        raise FastMTPError(f"{folder}: {engine}: {refusal}")
    if engine == "vllm" and not family.engines.vllm:
        raise FastMTPError(f"{folder}: vLLM has no MTP for {family.architectures[0]}; serve with SGLang")


def _lost(checkpoint: Checkpoint, engine: str, target: dict[str, Any]) -> str:
    """What to add to the reason for a flag where the head was trained for another engine's graph.

    `target` is the config.json of the model that it drafts for.
    """
    trained_for = checkpoint.trained_for
    mismatch = checkpoint.family.mismatch(trained_for, engine, target) if trained_for else None
    if not mismatch:
        return ""
    corrected = "; with this package beside vLLM, it computes what docs/engines.md says" if engine == "vllm" else ""
    return f"; {mismatch}{corrected}"


def _is_quantized(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether any tensor of the MTP layer is stored as other than plain numbers."""
    plain = {"bfloat16", "float16", "float32"}
    return any(dtype not in plain for name, dtype in checkpoint.dtypes().items() if family.owns(name))


def _with_plugin(flags: list[Flag], config: dict[str, Any], token_map: str | None) -> list[Flag]:
    """vLLM's command, with what this package's plugin makes of it where both are installed side by side."""
    if TOKEN_MAPS_KEY in config:
        why = f"{flags[0].why}; with this package beside it, {TOKEN_MAPS_KEY} of config.json"
        flags = [replace(flags[0], why=why), *flags[1:]]
    if token_map:
        why = "the draft's smaller vocabulary, with this package beside vLLM; the output does not change"
        flags = [Flag((ENVIRONMENT, f"{TOKEN_MAPS_VARIABLE}={token_map}"), why), *flags]
    return flags
