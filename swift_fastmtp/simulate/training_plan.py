"""`fastmtp inspect --gpus`: whether training fits some GPUs, its hours and its disk, and which way to take.

Predictions from data sheets (`gpus.py`) and arithmetic (`training_cost.py`). No GPU was there to check them: hours are
those at `peak_share` of the arithmetic peak, and in inverse proportion to it.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..families.family import Family
from ..families.table import match_family
from .gpus import GPU, GPUS, read_gpus
from .training_cost import (
    DISK,
    NODE,
    ROOM,
    WIDTH,
    ModelNumbers,
    Stage,
    Workload,
    backbone_seconds,
    gather_seconds,
    head_seconds,
    memory,
    operations,
)

_HEAD_STATE = 16
"""Bytes of a checkpoint for each parameter of the head: weights, copy in float32 and two moments."""
_CHECKPOINTS = 4
"""On disk at once: `save_total_limit` 3 in the recipes, and the one that is being written."""


@dataclass
class Way:
    """One way to train, on the GPUs that were named; bytes and hours."""

    name: str
    stage: str
    fits: bool
    memory: dict[str, float]
    """Of a GPU at its peak, by what it is for."""
    tokens_per_second: float
    """Of all GPUs, that are trained on."""
    hours: float
    """For all epochs; with states from a server, those of computing them on the same GPUs too."""
    disk: float
    """For checkpoints and hidden states; the model and the rows are not counted."""
    how: str
    note: str = ""

    @property
    def peak(self) -> float:
        """Bytes of a GPU."""
        return sum(self.memory.values())


@dataclass
class Plan:
    """What `fastmtp inspect --gpus` tells."""

    gpus: str
    gpu_memory: float
    parameters: int
    parameters_used: float
    """By a token, in the backbone's layers."""
    mtp_parameters: int
    operations: dict[str, float]
    """Of a token that is trained on."""
    tokens: int
    """Of all epochs."""
    work: dict[str, Any]
    stages: dict[str, float]
    """Bytes of a GPU at its peak, by how processes share."""
    ways: list[Way]
    take: str | None
    """The first way that fits; None: none does."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ways": [{**asdict(way), "peak": way.peak} for way in self.ways]}


@dataclass(frozen=True)
class Recipe:
    """A file of `recipes/` and what it is for."""

    file: str
    families: tuple[str, ...]
    way: str


WHOLE, DIVIDED, SERVER, PASSING = "whole", "ZeRO-3", "from a server", "layers on disk"
RECIPES = (
    Recipe("mimo_7b_rl_1gpu.yaml", ("mimo",), "one process"),
    Recipe("mimo_7b_rl_8xh20.yaml", ("mimo",), "ZeRO-2"),
    Recipe("qwen3_5_9b_1gpu.yaml", ("qwen3_5", "qwen3_5_moe", "qwen3_next"), "one process"),
    Recipe("qwen3_5_35b_a3b_8gpu.yaml", ("qwen3_5", "qwen3_5_moe", "qwen3_next"), "ZeRO-2"),
    Recipe("qwen3_next_80b_8gpu.yaml", ("qwen3_next", "qwen3_5", "qwen3_5_moe"), "ZeRO-3"),
    Recipe("glm_4_7_flash_8gpu.yaml", ("glm4_moe_lite", "glm4_moe"), "ZeRO-2"),
    Recipe("glm_4_5_air_8gpu.yaml", ("glm4_moe",), "ZeRO-3"),
    Recipe("deepseek_v3_from_server_8gpu.yaml", ("deepseek_v3", "deepseek_v32", "glm_moe_dsa"), SERVER),
)


def recipe(family: Family, way: str) -> str:
    """The file to begin with: the family's own, else another family's of that way; "" where no recipe has it."""
    rows = [row for row in RECIPES if row.way == way]
    own = [row for row in rows if family.name in row.families]
    # A family whose layers carry a state from row to row cannot take the flags of one whose layers do not.
    alike = [row for row in rows if ("qwen3_next" in row.families) == family.recurrent_backbone]
    return next((row.file for row in [*own, *alike, *rows]), "")


@dataclass(frozen=True)
class Case:
    """A model, some GPUs and what is to be trained on them."""

    model: ModelNumbers
    family: Family
    model_dir: str
    number: int
    gpu: GPU
    work: Workload


def plan(model_dir: str, gpus: str, work: Workload) -> Plan:
    """What training a folder's MTP layer takes. config.json is enough.

    Args:
        model_dir: the folder.
        gpus: how many of which, such as `8xH20`.
        work: what is trained on, and how.

    Raises `FastMTPError` for an unknown GPU, and as `model_numbers.read_numbers`.
    """
    number, name = read_gpus(gpus)
    checkpoint = Checkpoint(model_dir)
    family = match_family(checkpoint.config, checkpoint.config_file)
    from .model_numbers import read_numbers  # torch and transformers: after what can be refused without them

    return plan_for(read_numbers(checkpoint), family, model_dir, number, name, work)


def plan_for(model: ModelNumbers, family: Family, model_dir: str, number: int, name: str, work: Workload) -> Plan:
    """`plan` for a model's numbers, on `number` GPUs of a name in `GPUS`."""
    gpu = GPUS[name]
    case = Case(model, family, model_dir, number, gpu, work)
    stages: list[Stage] = ["one process"] if number == 1 else ["DDP", "ZeRO-0", "ZeRO-2", "ZeRO-3"]
    peaks: dict[str, float] = {stage: sum(memory(model, work, stage, number).values(), 0.0) for stage in stages}
    ways = [_whole(case)]
    if number > 1:
        ways.append(_divided(case))
    ways.append(_from_server(case))
    ways.append(_passing(case))
    counted = operations(model, work)
    return Plan(
        gpus=f"{number}x{name.upper()}",
        gpu_memory=gpu.memory,
        parameters=model.frozen + model.mtp,
        parameters_used=model.layers_used,
        mtp_parameters=model.mtp,
        operations={**asdict(counted)},
        tokens=work.epochs * work.tokens,
        work=asdict(work),
        stages=peaks,
        ways=ways,
        take=next((way.name for way in ways if way.fits), None),
        notes=_notes(ways, model, gpu, number, work),
    )


def _checkpoint_bytes(model: ModelNumbers) -> float:
    return float(_CHECKPOINTS * _HEAD_STATE * model.mtp)


def _hours(work: Workload, tokens_per_second: float) -> float:
    return work.epochs * work.tokens / tokens_per_second / 3600


def _command(case: Case, way: str, more: str = "") -> str:
    file = recipe(case.family, way)
    begin = f"swift sft recipes/{file}" if file else "swift sft --model_type fastmtp --dataset DATA"
    return f"{begin} --model {case.model_dir}{more}"


def _whole(case: Case) -> Way:
    """Every GPU holds the backbone; the head's states are divided where there are several."""
    model, gpu, work, number = case.model, case.gpu, case.work, case.number
    stage: Stage = "one process" if number == 1 else "ZeRO-2"
    parts = memory(model, work, stage, number)
    seconds = backbone_seconds(model, work, gpu) + head_seconds(model, work, gpu)
    speed = number * work.step_tokens / seconds
    note = ""
    if work.epochs > 1:
        once = backbone_seconds(model, work, gpu) + work.epochs * head_seconds(model, work, gpu)
        hours = once * work.tokens / (number * work.step_tokens) / 3600
        note = f"with fastmtp_hidden_cache {_short(hours)} hours, and {_states(model, work) / 1e12:.2f} TB of disk more"
    return Way(
        WHOLE, stage, _fits(parts, gpu), parts, speed, _hours(work, speed), _checkpoint_bytes(model),
        _command(case, stage), note,
    )  # fmt: skip


def _divided(case: Case) -> Way:
    """ZeRO-3: every GPU holds a part of the backbone."""
    model, gpu, work, number = case.model, case.gpu, case.work, case.number
    parts = memory(model, work, "ZeRO-3", number)
    gathering = gather_seconds(model, gpu, number)
    seconds = backbone_seconds(model, work, gpu) + head_seconds(model, work, gpu) + gathering
    speed = number * work.step_tokens / seconds
    note = f"of a step, {100 * gathering / seconds:.0f}% is gathering weights: more rows_per_step make that less"
    return Way(
        DIVIDED, "ZeRO-3", _fits(parts, gpu), parts, speed, _hours(work, speed), _checkpoint_bytes(model),
        _command(case, "ZeRO-3"), note,
    )  # fmt: skip


def _from_server(case: Case) -> Way:
    """`fastmtp hidden`: the states come from a server, and no layer of the backbone is loaded."""
    model, gpu, work, number = case.model, case.gpu, case.work, case.number
    stage: Stage = "one process" if number == 1 else "ZeRO-2"
    bare = replace(model, layers=0)
    parts = memory(bare, work, stage, number)
    served = model.stored / number
    once = backbone_seconds(model, work, gpu) * work.tokens / (number * work.step_tokens) / 3600
    speed = number * work.step_tokens / head_seconds(model, work, gpu)
    fits = _fits(parts, gpu) and served < 0.9 * ROOM * gpu.memory
    note = f"the server holds {served / 1e9:.0f} GB a GPU; {_short(once)} of the hours are its prompts"
    if not fits and _fits(parts, gpu):
        note += ", which need more GPUs than these: train here, serve elsewhere"
    way, more = SERVER, ""
    if number == 1:  # of which there is no recipe of its own
        way, more = "one process", """ --model_kwargs '{"fastmtp_hidden_cache": "states"}'"""
    ask = f"fastmtp hidden --model {case.model_dir} --dataset DATA --base_url URL --hidden_cache states"
    return Way(
        SERVER, stage, fits, parts, speed, once + _hours(work, speed),
        _checkpoint_bytes(model) + _states(model, work), f"{ask}; {_command(case, way, more)}", note,
    )  # fmt: skip


def _passing(case: Case) -> Way:
    """One process; layers that no GPU has room for pass through the first one, from disk."""
    model, gpu, work, number = case.model, case.gpu, case.work, case.number
    held = memory(replace(model, layers=0), work, "one process", 1)
    layers = WIDTH * model.layers
    room = max(0.0, 0.8 * gpu.memory - sum(held.values()))
    others = (number - 1) * 0.8 * gpu.memory
    passing = max(0.0, layers - room - others)
    # Where some pass, the first GPU keeps room for one of them.
    one = 1.5 * WIDTH * model.largest if passing else 0.0
    parts = {**held, "layers": max(one, min(layers, room))}
    seconds = backbone_seconds(model, work, gpu) + head_seconds(model, work, gpu) + passing / DISK
    speed = work.step_tokens / seconds
    note = f"{passing / 1e9:.0f} GB of layers are read at every step, at {DISK / 1e9:.0f} GB/s" if passing else ""
    if passing and work.epochs > 1:
        note += "; with fastmtp_hidden_cache in the first epoch only"
    return Way(
        PASSING, "one process", _fits(parts, gpu), parts, speed, _hours(work, speed), _checkpoint_bytes(model),
        _command(case, "one process", " --device_map auto"), note,
    )  # fmt: skip


def _states(model: ModelNumbers, work: Workload) -> float:
    """Bytes of the hidden states of all rows, once."""
    return float(WIDTH * model.hidden_size * work.tokens)


def _fits(parts: dict[str, float], gpu: GPU) -> bool:
    return sum(parts.values()) <= ROOM * gpu.memory


def _notes(ways: list[Way], model: ModelNumbers, gpu: GPU, number: int, work: Workload) -> list[str]:
    if any(way.fits for way in ways[:-1]):
        return []
    for several in (2, 4, 8, 16, 32, 64, 128):
        if several > number and sum(memory(model, work, "ZeRO-3", several).values()) <= ROOM * gpu.memory:
            nodes = f", {several // NODE} nodes" if several > NODE else ""
            return [f"ZeRO-3 fits {several} of these GPUs{nodes}"]
    return ["no number of these GPUs has room for ZeRO-3; a quantized model needs less to be served"]


def text(found: Plan) -> str:
    """The plan for people."""
    work, counted = found.work, found.operations
    rows = [
        ("GPUs", f"{found.gpus}, {found.gpu_memory / 1e9:.0f} GB each, of which {100 * ROOM:.0f}% is planned for"),
        ("parameters", f"{_count(found.parameters)}, of the backbone's layers {_count(found.parameters_used)} for a "
                       f"token; MTP layer {_count(found.mtp_parameters)}"),
        ("to train on", f"{work['rows']} rows x {work['tokens_per_row']} tokens x {work['epochs']} epochs = "
                        f"{found.tokens / 1e9:.2f}B tokens, {100 * work['answer_share']:.0f}% answers"),
        ("a token takes", f"{sum(counted.values()) / 1e9:.1f} GFLOPs: backbone {counted['backbone'] / 1e9:.1f}, "
                          f"MTP layer {counted['mtp'] / 1e9:.1f}, lm_head {counted['lm_head'] / 1e9:.1f}"),
        ("assumed", f"{100 * work['peak_share']:.0f}% of the arithmetic peak; hours are in inverse proportion"),
        ("GB of a GPU", ", ".join(f"{stage} {size / 1e9:.1f}" for stage, size in found.stages.items())),
    ]  # fmt: skip
    for way in found.ways:
        verdict = "take this" if way.name == found.take else "fits" if way.fits else "does not fit"
        rows.append((way.name, f"{verdict}: {numbers(way)}"))
        largest = sorted(way.memory.items(), key=lambda item: -item[1])[:4]
        rows.append(("", "GB: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)))
        rows += [("", line) for line in (way.note, way.how if way.fits else "") if line]
    rows += [("", note) for note in found.notes]
    return "\n".join(f"  {left:14} {right}".rstrip() for left, right in rows)


def numbers(way: Way) -> str:
    """Memory, speed, hours and disk on one line, as the recipes have it."""
    return (
        f"{way.stage}, {way.peak / 1e9:.0f} GB a GPU, {_short(way.tokens_per_second)} tokens/s, "
        f"{_short(way.hours)} hours, {way.disk / 1e9:.0f} GB of disk"
    )


def _count(number: float) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"


def _short(number: float) -> str:
    """Two digits that count: more would claim what a prediction does not know."""
    if number < 10:
        return f"{number:.2g}"
    digits = len(str(int(number))) - 2
    return f"{round(number / 10**digits) * 10**digits:,}"
