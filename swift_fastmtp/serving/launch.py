"""The command that serves an exported folder, with the reason for each flag.

The flags are what the engines were read and tested to do (SGLang 0.5.19 to 0.5.23: `arg_groups/speculative_hook.py`,
`eagle_worker_v2.py`); docs and serving tests take them from here.
"""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config_file import TOKEN_MAPS_KEY, TOKEN_MAPS_VARIABLE
from ..checkpoint.quantization import Quantization, leaving_out, parts_of, read_quantization
from ..errors import FastMTPError
from ..families.family import Family, config_value
from ..files.known_files import read_object
from ..files.show import show
from ..method.verification import BLOCK, GREEDY, REGIMES, Regime, default_regime

ENVIRONMENT = "env"
"""The first word of a command that sets a variable; the engine's own follows it."""
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
_REMOTE = "config.json names a configuration class of its own (auto_map)"


@dataclass(frozen=True)
class Flag:
    """Words of a command line and why they are there."""

    words: tuple[str, ...]
    why: str


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
        flags = _vllm(bool(config.get("auto_map")), target, None if full else checkpoint, steps)
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
        flags.append(Flag(("--trust-remote-code",), _REMOTE))
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
    """`serve_flags` with K by load: SGLang reads the file, vLLM gets its ranges.

    SGLang sizes its buffers for the largest K of the file, and starts with the one that it is told, which must be in it
    (0.5.23 `speculative_hook.py:_init_adaptive_speculative_params`).
    """
    steps_from = read_schedule(file)
    most = max(steps_from.values())
    if most == 0:
        raise FastMTPError(f"{file}: makes drafts at no load; serve the model without --speculative flags")
    flags = flags_for(checkpoint, engine, most, token_map, model)
    if engine == "sglang":
        if any(flag.words[0] == "--enable-lora" for flag in flags):
            raise FastMTPError(
                f"{checkpoint}: SGLang has no drafts by load beside LoRA adapters (0.5.23 `lora_hook.py`); leave out "
                "--schedule"
            )
        return [
            *flags,
            Flag(("--speculative-adaptive",), "K by load"),
            Flag(("--speculative-adaptive-config", str(file)), "from how many requests at once on which K"),
        ]
    sizes = sorted(steps_from)
    ends = [size - 1 for size in sizes[1:]] + [sizes[-1]]  # vLLM goes on with the last range (dynamic/utils.py)
    ranges = [[start, end, steps_from[start]] for start, end in zip(sizes, ends, strict=True)]
    speculative = json.loads(flags[-1].words[1])
    speculative["num_speculative_tokens_per_batch_size"] = ranges
    words = (flags[-1].words[0], json.dumps(speculative))
    return [*flags[:-1], replace(flags[-1], words=words, why=f"K by load; {flags[-1].why}")]


def sampled_flags(checkpoint: Checkpoint, flags: list[Flag], engine: str, regime: Regime) -> list[Flag]:
    """A command with what selects a regime above temperature 0.

    SGLang verifies sampled drafts against the whole vocabulary and refuses its own token map with them (0.5.23
    `eagle_worker_v2.py`, `alloc_memory_pool`); this package's plugin keeps the vocabulary and takes the same file.

    Raises `FastMTPError` for what the engine would do otherwise than asked.
    """
    why = f"{regime.title}{_trained_otherwise(checkpoint, regime)}"
    if engine == "sglang":
        if regime.sglang and static_map(flags):
            if any(flag.words[0] == "--enable-lora" for flag in flags):
                raise FastMTPError(
                    f"{checkpoint.folder}: with adapters SGLang has no token map for sampled drafts; use --regime "
                    "greedy"
                )
            flags = _with_plugin_map(flags)
        return [*flags, Flag(regime.sglang, why)] if regime.sglang else flags
    mapped = TOKEN_MAPS_KEY in checkpoint.config or static_map(flags)
    if regime == BLOCK and mapped:
        raise FastMTPError(
            f"{checkpoint.folder}: in vLLM token maps need its older model runner, which has no block verification and "
            "would make greedy drafts; use --regime rejection"
        )
    speculative = json.loads(flags[-1].words[1]) | regime.vllm
    words = (flags[-1].words[0], json.dumps(speculative))
    return [*flags[:-1], replace(flags[-1], words=words, why=f"{flags[-1].why}; {why}")]


def _with_plugin_map(flags: list[Flag]) -> list[Flag]:
    """SGLang's command with its token map handed to this package's plugin."""
    (place,) = [i for i, flag in enumerate(flags) if flag.words[0] == "--speculative-token-map"]
    named = f"{TOKEN_MAPS_VARIABLE}={flags[place].words[1]}"
    why = (
        "the draft's smaller vocabulary, with this package beside SGLang, which refuses its own map with sampled drafts"
    )
    return [Flag((ENVIRONMENT, named), why), *flags[:place], *flags[place + 2 :]]  # --tp-size 1 goes with the map


def _trained_otherwise(checkpoint: Checkpoint, regime: Regime) -> str:
    """What to add to the reason for a regime's flags where the head's loss was measured to be the wrong one for it."""
    if regime == GREEDY or checkpoint.settings.get("loss") != "ce":
        return ""
    return (
        "; trained with `ce`, which with sampled drafts reached 2.16 tokens a step at temperature 1 where `kl` reached "
        "2.50, on the tiny model, and as many with greedy ones (docs/results/losses.md)"
    )


def read_schedule(file: Path) -> dict[int, int]:
    """From which batch size on how many drafts are made: a file for SGLang's --speculative-adaptive-config, with one K
    for each batch size.

    Raises `FastMTPError` for a file that is none, lets the engine choose, or has no entry for one request.
    """
    steps_from = {}
    for size, entry in read_object(file).items():
        candidates = entry.get("candidate_steps") if isinstance(entry, dict) else None
        steps = candidates[0] if isinstance(candidates, list) and len(candidates) == 1 else None
        if not size.isdecimal() or type(steps) is not int or steps < 0:
            raise FastMTPError(
                f'{file}: {show(size)}: must be a batch size with one K, as "8": {{"candidate_steps": [2]}}'
            )
        steps_from[int(size)] = steps
    if 1 not in steps_from:
        raise FastMTPError(f"{file}: has no entry for a batch size of 1")
    return steps_from


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
        *([Flag(("--max-lora-rank", _vllm_rank(rank)), "vLLM's default is 16")] if rank > VLLM_RANKS[0] else []),
    ]


def _vllm_rank(rank: int) -> str:
    """The smallest that vLLM knows (0.32.0 `config/lora.py`, `MaxLoRARanks`)."""
    return str(next((known for known in VLLM_RANKS if known >= rank), rank))


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


def _vllm(remote_code: bool, target: Path, draft: Checkpoint | None, steps: int) -> list[Flag]:
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
        *([Flag(("--trust-remote-code",), _REMOTE)] if remote_code else []),
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


def _with_plugin(flags: list[Flag], config: dict[str, Any], token_map: str | None) -> list[Flag]:
    """vLLM's command, with what this package's plugin makes of it where both are installed side by side."""
    if TOKEN_MAPS_KEY in config:
        why = f"{flags[0].why}; with this package beside it, {TOKEN_MAPS_KEY} of config.json"
        flags = [replace(flags[0], why=why), *flags[1:]]
    if token_map:
        why = "the draft's smaller vocabulary, with this package beside vLLM; the output does not change"
        flags = [Flag((ENVIRONMENT, f"{TOKEN_MAPS_VARIABLE}={token_map}"), why), *flags]
    return flags


def static_map(flags: list[Flag]) -> str | None:
    """The one token map for all requests that a command names."""
    for flag in flags:
        if flag.words[0] == "--speculative-token-map":
            return flag.words[1]
        if flag.words[0] == ENVIRONMENT:
            return flag.words[1].removeprefix(f"{TOKEN_MAPS_VARIABLE}=")
    return None


def command(flags: list[Flag]) -> list[str]:
    """The words of a command line."""
    return [word for flag in flags for word in flag.words]


def explain(flags: list[Flag]) -> str:
    """The command as a shell would take it, then a line per flag that says why."""
    shell = " \\\n  ".join(shlex.join(flag.words) for flag in flags)
    width = max(len(shlex.join(f.words)) for f in flags)
    reasons = "\n".join(f"# {shlex.join(f.words):{width}}  {f.why}" for f in flags)
    return f"{shell}\n\n{reasons}"
