"""What MTP a checkpoint holds, from config.json and the headers of its files: `fastmtp inspect`.

No tensor is read, so this answers in seconds for any size, before a download is finished or a run is planned. What
only values can tell (NaN, zeros, a head of another backbone) is the doctor's to find.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fp8_config import SCALE
from ..checkpoint.headers import TOWER, Headers
from ..checkpoint.layer_shapes import stated_shapes
from ..checkpoint.quantization import left_out_in_words, packed_modules, read_quantization
from ..checkpoint.refusals import refusals
from ..checkpoint.weight_files import INDEX_FILE
from ..errors import FastMTPError
from ..families.family import ENGINE_NAMES, Family, config_value, is_embedding
from ..families.refused import CHAIN, FROZEN_KV, Layout, known_layout
from ..families.table import FAMILIES
from .dense import AS_QWEN2

MTP_WORD = re.compile(r"(^|[._])(mtp|nextn|eh_proj|enorm|hnorm|pre_fc_norm_\w+|mtp_\w+)([._]|$)", re.I)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OWN_HEAD = re.compile(r"\.(shared_head\.(head|output)|lm_head|embed_tokens|output)\.weight$")
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_LAYER_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")


@dataclass(frozen=True)
class Reason:
    """Why a checkpoint cannot be trained, in one line, and whom it concerns."""

    about: str
    """`draft`: engines draft wrongly with it, or do not start; `training`: only training stands against it."""
    text: str


@dataclass
class Inspection:
    """Everything `fastmtp inspect` prints; sizes in bytes."""

    model: str
    architectures: list[str]
    family: str | None
    """Row of `families/table.py`, or of `families/refused.py`; None is an unknown layout."""
    trainable: bool
    reasons: list[str]
    """Why it is not trainable, each one line."""
    mtp_layers_config: int | None
    mtp_layers: int
    """By tensors."""
    mtp_tensors: int
    mtp_params: int
    mtp_bytes: int
    mtp_dtypes: dict[str, int]
    mtp_files: list[str]
    own_matrices: list[str]
    """Copies of the embedding or output matrix inside the MTP layer."""
    quantization: str | None
    tied_head: bool
    backbone_tensors: int
    backbone_bytes: int
    files: int
    lost_on_save: str | None
    engines: dict[str, str]
    suspicious: list[str] = field(default_factory=list)
    """Tensor names of an unknown layout that look like MTP."""
    notes: list[str] = field(default_factory=list)
    """About the folder's files, each one line: what stands in nobody's way, but not as it should be."""
    trained_for: str | None = None
    """Engine for whose graph the layer was trained here; None: it was not."""
    engine_differences: list[str] = field(default_factory=list)
    """What vLLM computes otherwise than SGLang with the same layer."""
    mtp_left_out: str | None = None
    """Whether quantization_config leaves out the MTP layer: "left out", "partly left out", "not left out"."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_model(folder: str | Path) -> Inspection:
    """Look at a checkpoint folder.

    Args:
        folder: checkpoint folder; only config.json and headers are read

    Raises `FastMTPError` only where there is nothing to look at: no config.json, or no safetensors file.
    """
    checkpoint = Checkpoint(folder)
    config, headers = checkpoint.config, checkpoint.headers
    architectures = [str(a) for a in config.get("architectures") or []]
    known = any(set(architectures) & set(f.architectures) for f in FAMILIES)
    family = checkpoint.family if known else None
    layout = None if family else known_layout(architectures)
    suspicious = odd_names(headers.entries, config)
    names = mtp_names(headers, config, family, layout, suspicious)
    mtp = set(names)
    head = [headers.entries[n] for n in names]
    rest = [e for n, e in headers.entries.items() if n not in mtp]
    reasons = _reasons(checkpoint, family, layout, names)
    return Inspection(
        model=str(checkpoint),
        architectures=architectures,
        family=family.name if family else layout.name if layout else None,
        trainable=not reasons,
        reasons=[reason.text for reason in reasons],
        mtp_layers_config=_layers_by_config(config, family),
        mtp_layers=count_layers(names),
        mtp_tensors=len(names),
        mtp_params=sum(e.params for e in head),
        mtp_bytes=sum(e.size for e in head),
        mtp_dtypes=dict(Counter(_FLOATS.get(e.dtype, e.dtype) for e in head)),
        mtp_files=sorted({e.file.name for e in head}),
        own_matrices=[n for n in names if _OWN_HEAD.search(n)],
        quantization=_quantization(checkpoint),
        tied_head=bool(config_value(config, "tie_word_embeddings")),
        backbone_tensors=len(rest),
        backbone_bytes=sum(e.size for e in rest),
        files=len(headers.files),
        lost_on_save=_lost_on_save(family, layout) if names else None,
        engines=_engines(headers, family, layout, names, reasons),
        suspicious=[] if family or layout else suspicious,
        notes=_notes(headers),
        trained_for=checkpoint.trained_for,
        engine_differences=family.differences if family else [],
        mtp_left_out=left_out_in_words(checkpoint.folder, config, family, lambda: _head_shapes(checkpoint)),
    )


def odd_names(names: Iterable[str], config: dict[str, Any]) -> list[str]:
    """Names that look like MTP: a telling word, or a decoder layer beyond num_hidden_layers."""
    layers = config_value(config, "num_hidden_layers")

    def odd(name: str) -> bool:
        if MTP_WORD.search(name):
            return True
        numbers = [int(n) for n in _LAYER.findall(name)]
        return isinstance(layers, int) and bool(numbers) and numbers[0] >= layers and not TOWER.search(name)

    return sorted(n for n in names if odd(n))


def count_layers(names: list[str]) -> int:
    """MTP layers by tensor names: distinct first numbers, or one where names have none."""
    numbers = {m.group(1) for n in names if (m := re.search(r"\.(\d+)(?:\.|$)", n))}
    return len(numbers) or int(bool(names))


def mtp_names(
    headers: Headers, config: dict[str, Any], family: Family | None, layout: Layout | None, suspicious: list[str]
) -> list[str]:
    """The tensors of all MTP layers, sorted. `suspicious`: what to take where a refused layout's paths hold none."""
    if family:
        return sorted(n for n in headers.entries if family.owns(n))
    if layout is None:
        return []
    first = config_value(config, "num_hidden_layers") or 0
    lost: set[str] = set()
    for prefix in layout.prefixes:
        pattern = re.escape(prefix).replace(r"\{N\}", r"(\d+)") + r"\."
        for name in headers.entries:
            match = re.match(pattern, name)
            if match and (not match.groups() or int(match.group(1)) >= first):
                lost.add(name)
    return sorted(lost) or suspicious


def _reasons(checkpoint: Checkpoint, family: Family | None, layout: Layout | None, names: list[str]) -> list[Reason]:
    """Everything that stops `swift sft` from training this checkpoint's MTP layer."""
    config, headers = checkpoint.config, checkpoint.headers
    broken = [Reason("draft", problem) for problem in headers.problems]
    if family is None:
        broken += [Reason("draft", line) for line in _lost(headers, [*headers.absent])]
        return [Reason("training", layout.reason if layout else _unknown(checkpoint)), *broken]
    reasons = broken + [Reason(r.about, r.text) for r in refusals(config, family, checkpoint.config_file)]
    if fault := checkpoint.vocab_size_fault:
        reasons.append(Reason("draft", f"{checkpoint.config_file}: {fault}"))
    try:
        expected = _head_shapes(checkpoint)
    except FastMTPError as error:
        reasons += [Reason("draft", line) for line in _lost(headers, [*headers.absent])]
        return [*reasons, Reason("draft", str(error))]

    # The layer: all of it, and nothing else under its names.
    missing = [n for n in expected if n not in headers.entries and n not in headers.absent]
    elsewhere = checkpoint.elsewhere(family) if missing else None
    if elsewhere:
        reasons.append(Reason("draft", elsewhere.text))
        missing = [n for n in missing if n not in elsewhere.names]
    elif not names and not any(family.owns(n) for n in headers.absent):
        how = "put the base model's back with `fastmtp graft`"
        if _quantization(checkpoint):
            how = "it is quantized, so put the base model's beside it: `fastmtp graft --donor BASE --draft_only`"
        return [
            *reasons,
            Reason("draft", f"no tensor under '{family.names.prefix}.': the checkpoint lost its MTP layer; {how}"),
        ]
    reasons += _of_layer(checkpoint, family, names, missing, expected)

    # The backbone.
    every = (*headers.entries, *headers.absent, *headers.stale)
    matrices = {n for n in every if n.endswith("lm_head.weight") or is_embedding(n)}
    if not matrices - set(names):
        reasons.append(Reason("training", "holds the MTP layer without a backbone; train from the full checkpoint"))
    listed = {*headers.stale, *headers.absent} - set(missing)
    if listed:
        from ..model.loading import needed_tensors  # builds the model: only where the index names what is not there

        needed = needed_tensors(checkpoint, listed, headers.entries)
        reasons += [Reason("draft", line) for line in _lost(headers, needed)]
    return reasons


def _of_layer(
    checkpoint: Checkpoint,
    family: Family,
    names: list[str],
    missing: list[str],
    expected: dict[str, tuple[int, ...]],
) -> Iterator[Reason]:
    """What is wrong with the tensors of the MTP layer; `missing`: of the expected ones, those that no file holds."""
    config, headers = checkpoint.config, checkpoint.headers
    if packed := packed_modules(names):
        # One line for all of it: their tensors have other names, types and shapes.
        yield Reason("training", _quantized_layer(checkpoint, packed))
        missing = [n for n in missing if n.removesuffix(".weight") not in packed]
        names = [n for n in names if not any(n.startswith(f"{module}.") for module in packed)]
    for name in missing:
        yield Reason("draft", f"{name} is missing")
    known = {n for n in names if n.removesuffix(SCALE) in expected or family.is_copy(n)}
    for name in names:
        if name not in known:
            yield Reason("draft", f"{name} is no tensor of the one MTP layer")
    for name in (n for n in names if n in expected):
        entry = headers.entries[name]
        if entry.shape != expected[name]:
            text = f"{name} has shape {list(entry.shape)}, config.json says {list(expected[name])}"
            yield Reason("draft", text)
        in_blocks = entry.dtype == "F8_E4M3" and f"{name}_scale_inv" in headers.entries
        if entry.dtype not in _FLOATS and not in_blocks:
            about = "training" if config_value(config, "quantization_config") else "draft"
            yield Reason(about, f"{name} is stored as {entry.dtype}; a quantized MTP layer cannot be trained")


def _quantized_layer(checkpoint: Checkpoint, packed: set[str]) -> str:
    """Of a layer that a tool quantized with the model, as AutoRound does."""
    how = "start from the unquantized model"
    if _quantization(checkpoint):
        how = "`fastmtp graft --donor BASE --draft_only` puts the base model's beside it"
    return (
        f"the MTP layer is quantized ({len(packed)} matrices are stored packed, as {min(packed)}), and cannot be "
        f"trained; {how}"
    )


def _lost(headers: Headers, needed: list[str]) -> list[str]:
    """A line for each file in which the index has tensors that the model needs, and that no file holds."""
    lines = []
    for file, why in headers.chosen.missing.items():
        if any(headers.absent.get(name) == file for name in needed):
            number = len(headers.chosen.listed_in(file))
            lines.append(f"{file}: listed in the index, but {why}; it holds {number} tensors")
    gone = [name for name in needed if name in headers.stale]
    if gone:
        lines.append(
            f"{INDEX_FILE}: lists {gone[0]}, which no file holds ({len(gone)} such tensors that the model needs)"
        )
    return lines


def _notes(headers: Headers) -> list[str]:
    chosen = headers.chosen
    notes = []
    if headers.stale:
        name = min(headers.stale)
        notes.append(
            f"{INDEX_FILE} lists {name}, which no file holds ({len(headers.stale)} such tensors); engines only choose "
            "files by the index"
        )
    if chosen.unlisted:
        names = ", ".join(path.name for path in chosen.unlisted)
        notes.append(f"{INDEX_FILE} does not list {names}, so no engine loads it")
    notes += [f"{engine}: {why}" for engine, why in chosen.refusals.items()]
    return notes


def _unknown(checkpoint: Checkpoint) -> str:
    """A save through transformers often renames the architecture to that of the class that ran the backbone."""
    config = checkpoint.config
    architectures = config.get("architectures") or []
    rows = [f for f in FAMILIES if f.backbone.split(":")[1] in architectures]
    if not rows and set(architectures) & set(AS_QWEN2) and _quantization(checkpoint):
        return (
            "holds no MTP layer, and is quantized; a layer that was trained for it is served beside it: "
            "`fastmtp graft --donor HEAD --draft_only`"
        )
    if not rows and set(architectures) & set(AS_QWEN2):
        return (
            "holds no MTP layer; `fastmtp graft --init_from_last_layer --fit_on ANSWERS` gives it one of MiMo's "
            "layout, which engines serve and which can then be trained"
        )
    if not rows:
        return "unknown layout: no row in families/table.py names its architectures"
    lost = any(isinstance(config_value(config, f.engines.num_layers_key), int) for f in rows)
    what = "the checkpoint lost its MTP layer, which config.json still counts" if lost else "holds no MTP layer"
    names = " or ".join(f.name for f in rows)
    how = "`fastmtp graft` puts a layer in"
    if _quantization(checkpoint):
        how = "it is quantized, so `fastmtp graft --donor BASE --draft_only` puts a layer beside it"
    return f"{what}; this is the backbone of {names}: {how}"


def _head_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    if (stated := stated_shapes(checkpoint)) is not None:
        return stated
    from ..model.loading import head_shapes  # transformers takes seconds: only where config.json is not as usual

    return head_shapes(checkpoint)


def _layers_by_config(config: dict[str, Any], family: Family | None) -> int | None:
    keys = (family.engines.num_layers_key,) if family else _LAYER_KEYS
    return next((v for k in keys if isinstance(v := config_value(config, k), int)), None)


def _quantization(checkpoint: Checkpoint) -> str | None:
    """The method's own name for itself, as far as it has one."""
    try:
        quantization = read_quantization(checkpoint.config, checkpoint.folder)
    except FastMTPError:
        return None  # which is the doctor's to say
    if quantization is None:
        return None
    return str(quantization.settings.get("quant_method") or quantization.method)


def _lost_on_save(family: Family | None, layout: Layout | None) -> str:
    pattern = layout.ignored if layout else None
    if family:
        pattern = next((p for p in family.ignored if re.match(p, f"{family.names.prefix}.")), None)
    how = f"silently (its class ignores {pattern})" if pattern else "after one warning about unused weights"
    return f"transformers drops the MTP layer, {how}; a save_pretrained of that model has none"


_NO_METHOD = "it has no method for this architecture"


def _engines(
    headers: Headers, family: Family | None, layout: Layout | None, names: list[str], reasons: list[Reason]
) -> dict[str, str]:
    if family is None and layout is None:
        return dict.fromkeys(("sglang", "vllm"), "unknown")
    against = [r.text for r in reasons if r.about == "draft"]
    if not names:
        why = f" ({against[-1]})" if family and against else ""
        return dict.fromkeys(("sglang", "vllm"), f"no: there is nothing to draft with{why}")
    chain = "the one layer, applied to its own output"
    if family:
        files = headers.chosen.refusals
        gaps = {"sglang": family.engines.sglang_gap, "vllm": None if family.engines.vllm else _NO_METHOD}
        verdicts = {}
        for engine, gap in gaps.items():
            why_not = next((w for w in (*against[:1], files.get(engine), gap) if w), None)
            verdicts[engine] = f"no: {why_not}" if why_not else f"yes: {chain}"
        return verdicts
    assert layout is not None
    sglang = {
        None: "no",
        CHAIN: f"yes: {chain}",
        FROZEN_KV: "another scheme: an assistant that reads the target's keys and values",
    }.get(layout.sglang, "another scheme: multi-layer, a layer and a KV cache for each depth")
    return {"sglang": sglang, "vllm": f"yes: method mtp ({layout.vllm})" if layout.vllm else f"no: {_NO_METHOD}"}


def text(inspection: Inspection) -> str:
    """The inspection for people."""
    known = inspection.family if inspection.family else f"unknown layout, architectures {inspection.architectures}"
    rows = [("family", known), ("trainable here", "yes" if inspection.trainable else "no")]
    rows += [("", f"- {reason}") for reason in inspection.reasons[:12]]
    if len(inspection.reasons) > 12:
        rows.append(("", f"- and {len(inspection.reasons) - 12} more"))
    rows += [("note", note) for note in inspection.notes]
    config = "does not say" if inspection.mtp_layers_config is None else str(inspection.mtp_layers_config)
    rows.append(("MTP layers", f"{inspection.mtp_layers} by tensors, config.json: {config}"))
    if inspection.mtp_tensors:
        kinds = ", ".join(f"{kind} x {n}" for kind, n in inspection.mtp_dtypes.items())
        rows.append(("MTP layer", f"{inspection.mtp_tensors} tensors, {_count(inspection.mtp_params)} parameters, "
                     f"{size(inspection.mtp_bytes)} ({kinds})"))  # fmt: skip
        rows.append(
            ("in files", ", ".join(inspection.mtp_files[:4]) + (", ..." if len(inspection.mtp_files) > 4 else ""))
        )
        rows.append(
            ("own matrices", ", ".join(inspection.own_matrices) or "none: embedding and head are the backbone's")
        )
    rows.append(("tied head", "yes" if inspection.tied_head else "no"))
    left_out = f", the MTP layer {inspection.mtp_left_out}" if inspection.mtp_left_out else ""
    rows.append(("quantized", (inspection.quantization or "no") + left_out))
    backbone = (
        f"{inspection.backbone_tensors} tensors, {size(inspection.backbone_bytes)}, {inspection.files} files in all"
    )
    rows.append(("backbone", backbone))
    if inspection.lost_on_save:
        rows.append(("on a save", inspection.lost_on_save))
    rows += [(engine, verdict) for engine, verdict in inspection.engines.items()]
    rows += [("engines differ", difference) for difference in inspection.engine_differences]
    if inspection.trained_for:
        rows.append(("trained for", ENGINE_NAMES[inspection.trained_for]))
    if inspection.suspicious:
        rows.append(("look like MTP", f"{len(inspection.suspicious)} tensors"))
        rows += [("", name) for name in inspection.suspicious[:8]]
    return "\n".join([inspection.model, *(f"  {left:14} {right}".rstrip() for left, right in rows)])


def _count(number: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number} B"
