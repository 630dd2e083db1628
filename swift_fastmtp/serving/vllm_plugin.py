"""vLLM plugin: every request drafts with the token map of its language, and the draft computes the graph it was
trained for.

* **Token maps**, as in SGLang (`sglang_plugin.py`): the key `fastmtp_token_maps` of config.json, or the environment
  variable SWIFT_FASTMTP_MAPS, which names a JSON list of languages and files or, since vLLM has no option for it, the
  file of one map for all requests; `none` leaves out the model's own. Only the draft's logits are computed otherwise
  (`routed_head.py`): greedy and sampled drafts both come from them, and verification does not know about it.
* **SGLang's graph** for a head that was trained for it, as `fastmtp.json` of an exported folder says, or where the
  environment variable SWIFT_FASTMTP_ENGINE is `sglang`; `none` or `vllm` leaves vLLM as it is. What vLLM computes
  otherwise stands in the table of families (`Family.graph`).
* **Hidden states** for `fastmtp hidden`: MiMo's, which vLLM's own class does not give out.

Loaded by vLLM through the entry point `vllm.general_plugins`, in every process. It waits for the draft model and does
nothing until then, and nothing at all where none of this is asked for.
"""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..checkpoint.checkpoint import SETTINGS_FILE, engine_of
from ..errors import FastMTPError
from ..families.family import Family, Graph
from ..families.table import match_family
from ..files.known_files import read_object
from . import compat_vllm
from .compat_vllm import ServerParts, check_version, logger, warn_if_untried, when_loaded
from .maps import VARIABLE, file_of, maps_of, maps_of_variable, or_exit

ENGINE_VARIABLE = "SWIFT_FASTMTP_ENGINE"
_AS_IT_IS = ("none", "vllm")
_CORRECTED: dict[str, Callable[[Any, Any], None]] = {
    "hidden_before_norm": lambda target, _draft: compat_vllm.norm_target(target),
    "feedback_before_norm": lambda _target, draft: compat_vllm.norm_feedback(draft),
}
"""Fields of `Graph` -> what makes the loaded models compute SGLang's."""
_SMALL = ("mask_position_zero",)
"""Fields that vLLM keeps, with a line in the log: the key of one token of a context differs, and costs a little
acceptance. Any other field stops the server: another RoPE changes all that the layer attends to."""


def register() -> None:
    """Entry point. Stops the server with one line if it cannot do what the environment variables ask for."""
    maps = or_exit(maps_of_variable)
    engine = or_exit(_engine_of_variable)
    if maps:
        or_exit(check_version, f"{VARIABLE}={os.environ[VARIABLE]}")
    if engine == "sglang":
        or_exit(check_version, f"{ENGINE_VARIABLE}=sglang")
    compat_vllm.give_mimo_layer_states()
    nothing = os.environ.get(VARIABLE) and not maps and engine in _AS_IT_IS
    if not nothing:
        warn_if_untried()
        when_loaded(_after_load)


def _engine_of_variable() -> str:
    """The engine whose graph the environment asks for, "" for none. Raises `FastMTPError` for another word."""
    value = os.environ.get(ENGINE_VARIABLE, "").lower()
    if value not in ("", "sglang", *_AS_IT_IS):
        raise FastMTPError(f"{ENGINE_VARIABLE}: must be sglang, vllm or none, not {value[:100]!r}")
    return value


def _after_load(drafter: Any, target: Any, runner: str) -> None:
    """What is asked for, done with the models that have just been loaded."""
    or_exit(_correct_graph, drafter, target)
    or_exit(_route, drafter, runner)


def _correct_graph(drafter: Any, target: Any) -> None:
    server = compat_vllm.server_parts(drafter)
    family = family_to_correct(server)
    if family is None:
        return
    check_version(f"an MTP layer that was trained for SGLang ({ENGINE_VARIABLE}=none leaves vLLM as it is)")
    corrected, kept = split_differences(family, server.draft)
    if type(target).__name__ not in family.architectures and "hidden_before_norm" in corrected:
        corrected.remove("hidden_before_norm")  # which the target's own class does (`Family.graph_beside`)
    for name in corrected:
        _CORRECTED[name](target, drafter.model)
        logger.info("swift_fastmtp: %s as SGLang computes it, for which the MTP layer was trained", name)
    for name in kept:
        logger.warning("swift_fastmtp: %s stays as vLLM has it, the MTP layer was trained for SGLang", name)


def family_to_correct(server: ServerParts) -> Family | None:
    """The family of a head that was trained for SGLang's graph, or None for one that vLLM drafts with as it is.

    Raises `FastMTPError` for a config.json that cannot be read, or a family that is not in the table.
    """
    engine = _engine_of_variable()
    config_file = file_of(server.draft, "config.json") if server.method == "mtp" else None
    if engine in _AS_IT_IS or config_file is None:
        return None
    settings_file = file_of(server.draft, SETTINGS_FILE)
    trained_for = engine_of(settings_file) if settings_file else None
    if (engine or trained_for) != "sglang":
        return None
    return match_family(read_object(config_file), config_file)


def split_differences(family: Family, where: str) -> tuple[list[str], list[str]]:
    """Fields of `Graph` that vLLM has otherwise than SGLang: those that are corrected, and those that stay.

    Raises `FastMTPError` for one that can do neither.
    """
    sglang, vllm = family.graph("sglang"), family.graph("vllm")
    names = [f.name for f in fields(Graph) if f.compare and getattr(sglang, f.name) != getattr(vllm, f.name)]
    for name in names:
        if name not in _CORRECTED and name not in _SMALL:
            raise FastMTPError(
                f"{where}: its MTP layer was trained for SGLang, and vLLM computes another attention ({name}), which "
                f"costs acceptance; serve it with SGLang, or set {ENGINE_VARIABLE}=none"
            )
    return [n for n in names if n in _CORRECTED], [n for n in names if n in _SMALL]


def _route(drafter: Any, runner: str) -> None:
    server = compat_vllm.server_parts(drafter)
    files = maps_of(server.model, server.draft)
    if not files:
        return
    check_version(f"token maps ({VARIABLE}=none leaves them out)")
    refuse_unsupported(server, runner)
    compat_vllm.check_maps()
    from .vllm_router import VLLMRouter

    VLLMRouter(drafter, server, files)
    logger.info("swift_fastmtp: drafts by the token maps of %s", ", ".join(files))


def refuse_unsupported(server: ServerParts, runner: str) -> None:
    """Raises `FastMTPError` naming what cannot be combined with token maps."""
    if server.method != "mtp":
        raise FastMTPError(f"token maps: the speculative method `{server.method}` is not `mtp`; set {VARIABLE}=none")
    if runner != "V1":
        raise FastMTPError("token maps: vLLM's model runner V2 is not supported; set VLLM_USE_V2_MODEL_RUNNER=0")
    if server.lora:
        raise FastMTPError("token maps: --enable-lora is not supported")
