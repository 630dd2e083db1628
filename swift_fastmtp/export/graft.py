"""Give a backbone its MTP layer back: `fastmtp graft`.

Fine-tuning, merging and RL tools save what transformers loaded, and transformers loads no MTP layer. The base model
still has it. Here its tensors are put beside the tuned weights: the tuned files stay byte for byte, the head becomes a
shard of its own, and config.json says again what the engines and our trainer look for. The head was trained for other
hidden states than those it now gets, so a graft is a start, and `swift sft` heals it.

Tensors are read, cast, checked and written one at a time: memory is the largest of them, whatever the model's size.
"""

from pathlib import Path

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.headers import Headers
from ..checkpoint.mtp_tensors import head_reader
from ..checkpoint.quantization import read_quantization
from ..checkpoint.refusals import find_family
from ..checkpoint.shards import DTYPES, TORCH, copy_without, overwrite_tensors, tensor_hashes, write_tensors
from ..checkpoint.weight_files import INDEX_FILE
from ..errors import FastMTPError
from ..families.family import Family, config_value, is_embedding
from ..files.copies import link_or_copy
from ..files.paths import files_of
from ..files.staging import new_folder, try_output, write_json
from .dense import as_qwen2, is_qwen2s
from .folders import RUN_FILES, write_index
from .graft_config import Graft, changes, compare, dtype_name, family_of, remote_code, with_head
from .graft_draft import graft_draft
from .inspection import size

HEAD_FILE = "model-mtp.safetensors"
ADDED_FILE = "model-added.safetensors"
"""What `dense.as_qwen2` adds to the backbone."""
SINGLE = "model.safetensors"
"""What transformers loads without a look at an index."""
RENAMED = "model-00001-of-00002.safetensors"


def graft(
    model: str | Path,
    output_dir: str | Path,
    donor: str | Path | None = None,
    init_from_last_layer: bool = False,
    fit_on: str | None = None,
    max_rows: int | None = None,
    overwrite: bool = False,
    draft_only: bool = False,
) -> Graft:
    """Write `model` with an MTP layer to `output_dir`, or the layer alone.

    Args:
        model: folder of the fine-tuned, merged or RL-trained model, full weights in safetensors files
        output_dir: folder to write; must not exist
        donor: folder of a model of the same sizes that has the layer: the base model, or a head that was trained
        init_from_last_layer: where there is no donor, make a layer from the backbone's last one (`init_head.py`)
        fit_on: conversations with answers, the model's own at best: with --init_from_last_layer, on which the layer's
            projection is fitted (`fit_head.py`; the model is loaded in float32)
        max_rows: of those, from the top; default: all
        overwrite: replace an MTP layer that the model has
        draft_only: write the layer alone, beside the model, which may be quantized: engines serve it as a draft

    Raises `FastMTPError` naming the file, key or tensor that does not fit.
    """
    try_output(output_dir)
    if (donor is None) != init_from_last_layer:
        raise FastMTPError("graft: pass either --donor BASE or --init_from_last_layer")
    if fit_on and donor:
        raise FastMTPError("--fit_on fits a new layer; the donor's is taken as it is, drop one of the two")
    tuned = Checkpoint(model)
    giver = Checkpoint(donor) if donor else None
    if (tuned.folder / "adapter_config.json").exists():
        raise FastMTPError(
            f"{model}: holds a LoRA adapter, not a model; merge it first (swift export --merge_lora true)"
        )
    headers = _sound(tuned)
    if draft_only:
        if fit_on:
            raise FastMTPError("--fit_on needs the whole model; fit without --draft_only, and take that as --donor")
        return graft_draft(tuned, giver, output_dir)
    if quantization := read_quantization(tuned.config, tuned.folder):
        raise FastMTPError(f"{model}: is quantized ({quantization.method}); --draft_only writes the layer beside it")
    theirs = giver.config if giver else None
    # A dense model of a layout that no engine drafts with becomes one of a layout that they do.
    dense = as_qwen2(tuned) if not giver or is_qwen2s(giver.trainable_family) else None
    config = dense.config if dense else tuned.config
    family = giver.trainable_family if giver else family_of(config, tuned.config_file)
    new_config = with_head(config, theirs, family, tuned.folder)
    notes = changes(tuned.config, new_config) + (dense.notes if dense else [])
    if family.names.prefix != find_family(new_config, tuned.config_file).names.prefix:
        raise FastMTPError(
            f"{tuned.config_file}: num_hidden_layers is {config.get('num_hidden_layers')}, in {donor} it is "
            f"{(theirs or {}).get('num_hidden_layers')}; the MTP layer is numbered after it"
        )
    stale, dropped = _stale(tuned, family, overwrite)
    if giver:
        notes += compare(tuned, giver)
    dtype = _dtype(tuned)
    with new_folder(output_dir) as out:
        write_json(new_config, out / "config.json")
        notes += remote_code(new_config, tuned.folder, giver.folder if giver else None, out)
        from ..model.config import load_config  # transformers, and the head on the meta device
        from ..model.loading import head_shapes, keeps_float32
        from .init_head import initial_head

        result = Checkpoint(out)  # of its files, only config.json is there yet
        notes += _index_notes(tuned, result)
        expected = head_shapes(result, giver or tuned)
        dtypes = {n: torch.float32 if keeps_float32(family, n) else dtype for n in expected}
        weight_map = _copy_files(tuned.folder, out, headers, stale, dropped)
        if giver:
            read = head_reader(giver, family, expected)
        else:
            read = initial_head(dense or tuned, load_config(result), family, expected)
        hashes = write_tensors(out / HEAD_FILE, {n: (dtypes[n], s) for n, s in expected.items()}, read)
        weight_map.update(dict.fromkeys(expected, HEAD_FILE))
        added = dense.added if dense else {}
        if dense:
            dtypes |= dict.fromkeys(added, dtype)
            write_tensors(out / ADDED_FILE, {n: (dtype, s) for n, s in added.items()}, dense.read)
            weight_map.update(dict.fromkeys(added, ADDED_FILE))
        write_index(out, weight_map)
        if fit_on:
            from .fit_head import fit_line, fit_projection

            fit = fit_projection(out, fit_on, max_rows)
            name = f"{family.names.prefix}.{family.names.proj}.weight"
            weight = fit.weight.to(dtypes[name])
            hashes |= overwrite_tensors(out / HEAD_FILE, [name], {name: weight}.__getitem__)
            notes.append(fit_line(fit))
        _verify(out, headers, stale, expected, hashes, dtypes, added)
    nbytes = sum(torch.Size(s).numel() * dtypes[n].itemsize for n, s in expected.items())
    come_from = f"from {donor}" if donor else "made from the last decoder layer"
    first = f"{len(expected)} MTP tensors, {size(nbytes)} of {dtype_name(dtype)}, {come_from}"
    return Graft(family.name, len(expected), nbytes, [first, *notes])


def _sound(model: Checkpoint) -> Headers:
    _ = model.entries  # raises where a file is damaged
    headers = model.headers
    if SINGLE not in {f.name for f in headers.files} and (model.folder / SINGLE).exists():
        raise FastMTPError(
            f"{model.folder / SINGLE}: is not in the index, but transformers loads it instead; remove one"
        )
    return headers


def _index_notes(model: Checkpoint, result: Checkpoint) -> list[str]:
    """What the model's index lists and nobody holds. Raises `FastMTPError` if the backbone needs any of it.

    `result` has the config.json by which the backbone is built.
    """
    from ..model.loading import needed_tensors

    lost = [name for name in model.lost if not result.family.owns(name)]
    if needed := needed_tensors(result, lost, model.entries):
        file = model.lost[needed[0]]
        raise FastMTPError(
            f"{model}: {needed[0]} is in no file, the index has it in {file} ({len(needed)} such tensors); download "
            "the checkpoint again"
        )
    if not lost:
        return []
    return [f"{INDEX_FILE}: {len(lost)} tensors that no file holds, as {min(lost)}, are not listed any more"]


def _stale(model: Checkpoint, family: Family, overwrite: bool) -> tuple[set[str], set[Path]]:
    """Tensors of an MTP layer that the model has, wherever they are, and the unlisted files that hold some."""
    elsewhere = model.elsewhere(family)
    if elsewhere and not overwrite:
        raise FastMTPError(f"{model}: {elsewhere.text}; or --overwrite replaces them")
    places = elsewhere.places if elsewhere else ()
    stale = sorted(n for n in model.entries if family.owns(n))
    if stale and not overwrite:
        raise FastMTPError(
            f"{model}: holds {len(stale)} MTP tensors already, as {stale[0]}; --overwrite replaces them, "
            "`fastmtp inspect` tells what they are"
        )
    loaded = set(model.files)
    misnamed = {name for path, name in places if path in loaded}
    return {*stale, *misnamed}, {path for path, _ in places if path not in loaded}


def _dtype(model: Checkpoint) -> torch.dtype:
    """The backbone's dtype, by its embedding. Raises `FastMTPError` if that does not have config.json's rows."""
    name = next(filter(is_embedding, model.entries), None)
    if name is None:
        raise FastMTPError(f"{model}: no embedding matrix; graft into a full checkpoint")
    entry = model.entries[name]
    want = (config_value(model.config, "vocab_size"), config_value(model.config, "hidden_size"))
    if entry.shape != want:
        raise FastMTPError(f"{model}: {name} has shape {list(entry.shape)}, config.json says {list(want)}")
    if entry.dtype not in TORCH or TORCH[entry.dtype].itemsize < 2:
        raise FastMTPError(f"{model}: {name} is stored as {entry.dtype}: --draft_only writes the layer beside it")
    return TORCH[entry.dtype]


def _copy_files(model: Path, out: Path, headers: Headers, stale: set[str], dropped: set[Path]) -> dict[str, str]:
    """Everything but config and index: weights linked, or copied without the stale tensors, other files copied; not
    the `dropped` files. Returns name → file of the tensors.

    A lone `model.safetensors` gets the name of a shard: transformers would load it and never look at the index.
    """
    names = {path: path.name for path in headers.files}
    if set(names.values()) == {SINGLE}:
        names[headers.files[0]] = RENAMED
    if HEAD_FILE in {names[e.file] for n, e in headers.entries.items() if n not in stale}:
        raise FastMTPError(f"{model / HEAD_FILE}: holds other tensors than MTP ones; give that file another name")
    touched = {headers.entries[n].file for n in stale}
    emptied = touched - {e.file for n, e in headers.entries.items() if n not in stale}
    for source in files_of(model):
        skipped = source.name in (*RUN_FILES, "config.json", INDEX_FILE)
        if skipped or source in emptied | dropped:
            continue
        target = out / names.get(source, source.name)
        if source in touched:
            copy_without(source, target, stale)
        else:
            link_or_copy(source, target)
    return {n: names[e.file] for n, e in headers.entries.items() if n not in stale}


def _verify(
    out: Path,
    before: Headers,
    stale: set[str],
    expected: dict[str, tuple[int, ...]],
    hashes: dict[str, str],
    dtypes: dict[str, torch.dtype],
    added: dict[str, tuple[int, ...]],
) -> None:
    """Read the result back: the backbone's tensors as they were, what was added to it, and exactly these MTP tensors
    with these bytes."""
    after = Checkpoint(out)
    kept = {n: (e.dtype, e.shape) for n, e in before.entries.items() if n not in stale}
    want = {**kept, **{n: (DTYPES[dtypes[n]], s) for n, s in {**added, **expected}.items()}}
    got = {n: (e.dtype, e.shape) for n, e in after.entries.items()}
    if got != want:
        odd = sorted(n for n in {**got, **want} if got.get(n) != want.get(n))
        raise FastMTPError(f"{out}: {odd[0]} reads back as {got.get(odd[0])}, it should be {want.get(odd[0])}")
    if tensor_hashes(out / HEAD_FILE) != hashes:
        raise FastMTPError(f"{out / HEAD_FILE}: reads back with other values; the disk may be faulty")
