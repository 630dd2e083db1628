"""A trained head → a folder that an engine serves, by two routes.

* full: the base checkpoint with its MTP tensors replaced. Shards without MTP tensors are hard-linked; a shard that
  holds some is copied and the new values are written into the same bytes of the copy, so header, names, order and
  every other tensor stay as they were. What is not safetensors is copied: people edit it. (Adding a file and leaving
  the old tensors in place would not do: SGLang loads every tensor of every listed shard, and the stale ones may come
  last.)
* draft-only: config, tokenizer and the MTP tensors alone, for `--speculative-draft-model-path`.

Both write MTP tensors in the form in which the base stores them, so a head is served alike by both, and config.json is
right for them: plain ones in the base's dtype, FP8 in blocks quantized again. Neither loads a model: tensors are read,
cast, checked and written one at a time, and memory is a few times the largest (the head, where a LoRA adapter is
merged into it).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.checkpoint import SETTINGS_FILE, WEIGHTS_FILE, Checkpoint
from ..checkpoint.config_file import TOKEN_MAPS_KEY
from ..checkpoint.fp8 import requantize
from ..checkpoint.fp8_config import SCALE, without_quantization
from ..checkpoint.headers import Headers, entries_of
from ..checkpoint.mtp_tensors import head_reader, save_tensors
from ..checkpoint.shards import TORCH, overwrite_tensors, tensor_hashes, write_tensors
from ..checkpoint.weight_files import INDEX_FILE
from ..errors import FastMTPError
from ..families.family import Family
from ..files.copies import link_or_copy
from ..files.known_files import read_object
from ..files.paths import files_of
from ..files.staging import new_folder, try_output, write_json
from ..method.comparison import why_withheld
from ..method.config import FastMTPConfig
from ..method.map_files import check_tokenizer, copy_maps, read_map_list
from ..method.token_map import read_token_map
from ..vocab.languages import check_names

# Written by trainers next to a model; they describe a run, not a model.
RUN_FILES = ("args.json", "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", SETTINGS_FILE)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def settings(config: FastMTPConfig, base_model: str, base_fingerprint: str) -> dict[str, Any]:
    """Content of `fastmtp.json`: how a head was trained and which backbone it belongs to."""
    # Of the run and its machine, not of the head.
    here = ("hidden_cache", "hidden_cache_gb", "loss_chunk_size", "other_val_dataset", "on_worse")
    return {
        "swift_fastmtp": __version__,
        **{name: value for name, value in config.to_dict().items() if name not in here},
        "base_model": base_model,
        "base_fingerprint": base_fingerprint,
    }


def save_trained(model: Any, folder: str | Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write what is trained of a model, the head, as a checkpoint of `swift sft`.

    Args:
        model: the model; its `model_dir` is the base that it was loaded from
        folder: to write into
        state_dict: the head's tensors, if the model's own are partitioned
    """
    from ..model.head import as_stored  # torch models only from here on
    from ..model.loading import head_shapes

    folder, base = Path(folder), Checkpoint(model.model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    named = model.head_tensors()
    tensors = as_stored({n: (state_dict or named)[n] for n in named}, head_shapes(base))
    for source in (base.config_file, *base.folder.glob("*.py")):
        shutil.copyfile(source, folder / source.name)
    if base.blocks:
        # The trained values, unrounded: resuming needs them, and engines then draft with an unquantized layer.
        write_json(without_quantization(base.config), folder / "config.json")
    target = base.target  # where the model was a layer beside another one
    if not hasattr(model, "base_fingerprint"):
        model.base_fingerprint = target.fingerprint
    write_json(settings(model.fastmtp, str(target), model.base_fingerprint), folder / SETTINGS_FILE)
    save_tensors(tensors, folder / WEIGHTS_FILE)


def export_full(
    checkpoint: str | Path,
    output_dir: str | Path,
    base_model: str | Path | None = None,
    remote_code: bool = True,
    token_maps: str | Path | None = None,
    even_if_worse: bool = False,
) -> Path:
    """Write the base checkpoint with the trained head in it. Returns the base folder that was used.

    Args:
        checkpoint: checkpoint of swift sft (tuner type fastmtp, full or lora)
        output_dir: folder to write; must not exist
        base_model: base model folder; default: the one the checkpoint was trained for
        remote_code: keep config.json as it is; if false, rewrite it so that engines need no `--trust-remote-code`
        token_maps: JSON list of languages and maps that the server drafts with, as `fastmtp simulate --by language`
            writes it; the maps come along
        even_if_worse: also a head that its run measured to be worse than the one it began with

    Raises `FastMTPError` naming the file or tensor.
    """
    try_output(output_dir)
    base, family, trained, expected, info = _collect(checkpoint, base_model, even_if_worse)
    if info.get("backbone_lora"):
        raise FastMTPError(
            f"{checkpoint}: this head was trained for {base} with the adapter {info['backbone_lora']}, which a full "
            "checkpoint would not have; write the layer beside it: fastmtp export --draft_only"
        )
    with new_folder(output_dir) as out:
        changed = set(trained.file_of.values())
        hashes: dict[str, str] = {}
        for source in files_of(base.folder):
            target = out / source.name
            if source.name in RUN_FILES:
                continue
            if source not in changed:
                link_or_copy(source, target)
                continue
            shutil.copyfile(source, target)
            names = [n for n in trained.specs if trained.file_of[n] == source]
            hashes |= overwrite_tensors(target, names, trained)
        _finish_index(base.headers, out)
        _finish_config(out, family, remote_code)
        if token_maps:
            add_maps(out, token_maps)
        write_json(info, out / SETTINGS_FILE)
        _verify(out, family, expected, hashes)
    return base.folder


def export_draft(
    checkpoint: str | Path,
    output_dir: str | Path,
    base_model: str | Path | None = None,
    remote_code: bool = True,
    token_maps: str | Path | None = None,
    even_if_worse: bool = False,
) -> Path:
    """Write a draft-only folder: config, tokenizer and the head. It is the form for a head that was trained for an
    adapter of the backbone too. Arguments and errors as `export_full`."""
    try_output(output_dir)
    base, family, trained, expected, info = _collect(checkpoint, base_model, even_if_worse)
    with new_folder(output_dir) as out:
        for source in files_of(base.folder):
            if source.name == "config.json" or source.name in TOKENIZER_FILES or source.suffix == ".py":
                shutil.copyfile(source, out / source.name)
        _finish_config(out, family, remote_code)
        if token_maps:
            add_maps(out, token_maps)
        write_json(info, out / SETTINGS_FILE)
        hashes = write_tensors(out / WEIGHTS_FILE, trained.specs, trained)
        _verify(out, family, expected, hashes)
    return base.folder


def _finish_config(folder: Path, family: Family, remote_code: bool) -> None:
    """Make config.json one that engines load; it stays byte for byte the base's where that already is.

    Where transformers has no class for its model_type (`Engines.remote_code`), either config.json names one
    (`auto_map`), which asks for `--trust-remote-code`, or it calls itself by the plain type that class derives from.
    """
    config = Checkpoint(folder).config
    known = family.plain_model_type == family.model_type
    if known or config.get("model_type") != family.model_type or (remote_code and config.get("auto_map")):
        return
    if family.plain_model_type is None:
        raise FastMTPError(f"{folder}: {family.name} has no configuration without remote code; keep it")
    config.pop("auto_map", None)
    write_json({**config, "model_type": family.plain_model_type}, folder / "config.json")


def _finish_index(headers: Headers, out: Path) -> None:
    """An index that lists what is there, so that every engine starts; it stays the base's where that already is."""
    chosen = headers.chosen
    if chosen.index is None or not (headers.stale or chosen.missing or chosen.added):
        return
    write_index(out, {name: entry.file.name for name, entry in headers.entries.items()})


def write_index(folder: Path, weight_map: dict[str, str], total: int | None = None) -> None:
    """Write an index of the tensors of a folder, name → file. Raises as `write_json`.

    Args:
        folder: to write into.
        weight_map: name → file.
        total: bytes of all tensors, where the files are not in the folder yet.
    """
    if total is None:
        total = sum(e.size for name in set(weight_map.values()) for e in entries_of(folder / name).values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(index, folder / INDEX_FILE)


def add_maps(folder: Path, token_maps: str | Path) -> None:
    """Copy the maps of a list, with what is known of them, and name them in config.json."""
    checkpoint = Checkpoint(folder)
    maps = read_map_list(token_maps)
    check_names(maps)
    for path in maps.values():
        check_tokenizer(path, folder)
        read_token_map(path, checkpoint.value("vocab_size"))
    write_json({**checkpoint.config, TOKEN_MAPS_KEY: copy_maps(maps, folder)}, checkpoint.config_file)


class _Trained:
    """A trained head in the form in which its base stores one, a tensor at a time: plain tensors in the base's dtype,
    FP8 in blocks as weight and scales.

    Call it with a name of `specs`.
    """

    def __init__(
        self, base: Checkpoint, expected: dict[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]
    ) -> None:
        self._base = base
        self._read = read
        self._scales: dict[str, torch.Tensor] = {}
        entries = base.entries
        self.specs = {}
        """Name → dtype and shape in the base."""
        self.file_of = {}
        """Name → the base's file that holds it."""
        for name in expected:
            for part in (name, name + SCALE):
                if part in entries:
                    self.specs[part] = (TORCH[entries[part].dtype], entries[part].shape)
                    self.file_of[part] = entries[part].file

    def __call__(self, name: str) -> torch.Tensor:
        if name.endswith(SCALE):
            if name not in self._scales:  # it lies in an earlier file than its weight
                self(name.removesuffix(SCALE))
            return self._scales.pop(name)
        if name + SCALE not in self.specs or self._base.blocks is None:
            return self._read(name).to(self.specs[name][0])
        old = self._base.read(name), self._base.read(name + SCALE)
        weight, self._scales[name + SCALE] = requantize(self._read(name), *old, self._base.blocks)
        return weight

    def equals_base(self) -> bool:
        """Whether nothing was trained; the first tensor that was ends the search."""

        def same(name: str) -> bool:
            new, old = self(name), self._base.read(name)
            return torch.equal(new.view(torch.uint8), old.view(torch.uint8))

        same_files = all(same(name) for name in self.specs)
        self._scales.clear()
        return same_files


def _collect(
    checkpoint: str | Path, base_model: str | Path | None, even_if_worse: bool
) -> tuple[Checkpoint, Family, _Trained, dict[str, tuple[int, ...]], dict[str, Any]]:
    """Base, its family, the trained head, its names and shapes, and the content of `fastmtp.json`."""
    trained_in = Checkpoint(checkpoint)
    if not trained_in.folder.is_dir():
        raise FastMTPError(f"{checkpoint}: no such checkpoint folder")
    known = trained_in.settings
    if not even_if_worse:
        refuse_worse(trained_in)
    run = read_object(trained_in.folder / "args.json")
    base = Checkpoint(base_model or known.get("base_model") or run.get("model") or "")
    if not base.config_file.exists():
        raise FastMTPError(f"{checkpoint}: base model {str(base)!r} is not a local folder; name it with --model")
    family = base.trainable_family
    _ = base.vocab_size  # raises where it is not that of the matrices
    from ..model.loading import head_shapes, needed_tensors  # torch models only from here on

    if needed := needed_tensors(base, base.lost, base.file_of):
        name = needed[0]
        raise FastMTPError(
            f"{base}: {name} is in no file, the index has it in {base.lost[name]} ({len(needed)} such tensors); "
            "download the checkpoint again"
        )
    trained_in.check_backbone(base)
    expected = head_shapes(base)
    if (trained_in.folder / "adapter_config.json").exists():
        from .lora import merge_head

        read = merge_head(base, trained_in.folder).__getitem__
    else:
        read = head_reader(trained_in, family, expected)
    head_reader(base, family, expected)  # has every tensor, and no other
    trained = _Trained(base, expected, read)
    if trained.equals_base():
        if "instead_of" in (known.get("compared") or {}):
            raise FastMTPError(
                f"{checkpoint}: is the head that its run began with, which training made worse; serve {base} as it is"
            )
        raise FastMTPError(f"{checkpoint}: its MTP layer equals the base model's; nothing was trained")
    if not known.get("base_model"):  # tuner types `full` and `lora` keep nothing but what they were compared with
        knobs = {k.lower().removeprefix("fastmtp_"): v for k, v in (run.get("model_kwargs") or {}).items()}
        config = FastMTPConfig.from_mapping(knobs, str(trained_in.folder / "args.json"))
        known = {**known, **settings(config, str(base), base.fingerprint)}
    if run.get("dataset"):
        known = {**known, "dataset": run["dataset"]}
    return base, family, trained, expected, known


def refuse_worse(checkpoint: Checkpoint) -> None:
    """Raise `FastMTPError` for a checkpoint that its run measured to be worse than the head it began with, unless that
    run was told to keep it (`fastmtp_on_worse`)."""
    compared = checkpoint.settings.get("compared") or {}
    worse = why_withheld(compared)
    if worse and compared.get("on_worse") != "keep":
        raise FastMTPError(
            f"{checkpoint}: {worse}; serve the model as it was, or export it all the same: fastmtp export "
            """--even_if_worse, or swift export --model_kwargs '{"fastmtp_on_worse": "keep"}'"""
        )


def _verify(folder: Path, family: Family, expected: dict[str, tuple[int, ...]], hashes: dict[str, str]) -> None:
    """Read the result back, from the files that an engine will load: exactly these MTP tensors with these bytes.

    Args:
        hashes: name → SHA-256 of the bytes that were written.
    """
    written_out = Checkpoint(folder)
    head_reader(written_out, family, expected)
    for name, written in hashes.items():
        path = written_out.file_of[name]
        if path.resolve().parent != folder.resolve():
            raise FastMTPError(f"{path}: {name} would be read from {path.resolve()}, outside of what was written")
        if tensor_hashes(path, [name])[name] != written:
            raise FastMTPError(f"{path}: {name} reads back with other values; the disk may be faulty")
