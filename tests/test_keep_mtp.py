"""A model that was just saved without its MTP layers gets the base's, byte for byte; what cannot be is one line."""

import errno
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.broken_models import HEAD
from helpers.checkpoints import shard
from helpers.keep import assert_kept, hashes_of, save_through_transformers
from helpers.models import CHECKPOINTS, quantized
from helpers.paths import TINY
from helpers.tiers import some_now
from safetensors.torch import load_file, save_file

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export import keep
from swift_fastmtp.export.graft import HEAD_FILE
from swift_fastmtp.export.keep import find_layers, keep_layers
from swift_fastmtp.model.loading import load_model
from swift_fastmtp.swift_plugin.keep_asked import KEEP, keeps_mtp

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """The tiny model after a save through transformers, in one file."""
    return save_through_transformers(TINY, tmp_path_factory.mktemp("lost") / "model")


@pytest.fixture
def saved(lost, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(lost, tmp_path / "saved")


def changed_config(folder, **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def put(base, folder):
    return keep_layers(find_layers(base), folder)


def as_it_was(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- What is kept.


@pytest.mark.parametrize("name", some_now(["mimo", *CHECKPOINTS]))
def test_every_family_keeps_its_layer(name, bases, tmp_path):
    base = TINY if name == "mimo" else bases(name)
    folder = save_through_transformers(base, tmp_path / "saved")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        if (base / file).exists():
            shutil.copyfile(base / file, folder / file)
    before = hashes_of(folder)
    line = put(base, folder)
    assert f"are kept in {HEAD_FILE}, byte for byte" in line and str(base) in line
    assert_kept(folder, base, before)
    assert load_model(folder, torch.float32)
    # Again: nothing changes.
    after = as_it_was(folder)
    put(base, folder)
    assert as_it_was(folder) == after


def test_config_json_says_again_what_was_lost(saved):
    """Also the code that it names; and each change is in the line."""
    line = put(TINY, saved)
    config, base = Checkpoint(saved).config, Checkpoint(TINY).config
    for key in ("architectures", "model_type", "auto_map", "num_nextn_predict_layers"):
        assert config[key] == base[key]
    assert (saved / "configuration_mimo.py").exists()
    assert "architectures is ['MiMoForCausalLM'], was ['Qwen2ForCausalLM']" in line and "configuration_mimo.py" in line


def test_shards_stay_where_they_are(tmp_path):
    folder = save_through_transformers(TINY, tmp_path / "saved", max_shard_size="2MB")
    files = {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}
    assert len(files) > 2
    before = hashes_of(folder)
    put(TINY, folder)
    assert_kept(folder, TINY, before)
    now = {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}
    del now[HEAD_FILE]
    assert now == files


@pytest.mark.parametrize("first, second", [("5GB", "5GB"), ("2MB", "2MB"), ("2MB", "5GB"), ("5GB", "2MB")])
def test_a_folder_that_is_saved_into_again(first, second, tmp_path):
    """As a run that goes on from an earlier checkpoint does, in whatever form."""
    folder = save_through_transformers(TINY, tmp_path / "saved", max_shard_size=first)
    before = hashes_of(folder)
    put(TINY, folder)
    save_through_transformers(TINY, folder, max_shard_size=second)
    put(TINY, folder)
    assert_kept(folder, TINY, before)


def test_layers_that_were_saved_with_the_model_stay(tmp_path):
    """As remote code with a class for them does: they may have been trained."""
    folder = shutil.copytree(TINY, tmp_path / "saved")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD + "input_proj.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = as_it_was(folder)
    assert "16 MTP tensors were saved with the model and stay as they are" in put(TINY, folder)
    assert as_it_was(folder) == before


def test_a_base_whose_index_forgot_the_layer(saved, tmp_path):
    """No engine finds it there; in what is saved, the index has it."""
    base = shard(TINY, tmp_path / "base")
    tensors = {}
    for path in sorted(base.glob("*.safetensors")):
        part = load_file(path)
        tensors.update({n: t for n, t in part.items() if n.startswith(HEAD)})
        save_file({n: t for n, t in part.items() if not n.startswith(HEAD)}, path)
    save_file(tensors, base / "extra.safetensors")
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.startswith(HEAD)}
    (base / INDEX).write_text(json.dumps(index))
    put(base, saved)
    assert_kept(saved, TINY)


def with_second_layer(folder, **config):
    tensors = load_file(folder / "model.safetensors")
    second = {n.replace(HEAD, "model.mtp_layers.1."): t + 1 for n, t in tensors.items() if n.startswith(HEAD)}
    save_file({**tensors, **second}, folder / "model.safetensors", metadata={"format": "pt"})
    return changed_config(folder, num_nextn_predict_layers=2, **config)


def test_several_layers_are_kept_although_none_is_trained_here(saved, tmp_path):
    base = with_second_layer(shutil.copytree(TINY, tmp_path / "base"))
    put(base, saved)
    assert Checkpoint(saved).config["num_nextn_predict_layers"] == 2
    theirs, now = hashes_of(base), hashes_of(saved)
    assert now == theirs and len([n for n in now if "mtp_layers" in n]) == 32


def test_a_layout_that_is_not_trained_here_is_kept(saved, tmp_path):
    """MiMo-V2-Flash's: a layer for each depth."""
    base = shutil.copytree(saved, tmp_path / "base")
    architecture = {"architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash"}
    changed_config(base, **architecture, num_nextn_predict_layers=2)
    changed_config(saved, **architecture, num_nextn_predict_layers=None)
    tensors = {f"model.mtp.layers.{n}.eh_proj.weight": torch.full((4, 4), float(n)) for n in range(2)}
    save_file({**load_file(base / "model.safetensors"), **tensors}, base / "model.safetensors")
    assert "2 MTP tensors (128 B)" in put(base, saved)
    assert hashes_of(saved) == hashes_of(base)
    assert Checkpoint(saved).config == Checkpoint(base).config
    renamed = changed_config(shutil.copytree(saved, tmp_path / "other"), architectures=["Qwen2ForCausalLM"])
    (renamed / HEAD_FILE).unlink()
    (renamed / INDEX).unlink()
    with pytest.raises(FastMTPError, match=r"architectures is .*, the base's is"):
        put(base, renamed)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MiMoForCausalLM", "MiMoV2FlashForCausalLM"])
def test_a_base_without_the_layer_has_nothing_to_keep(architecture, saved):
    assert find_layers(changed_config(saved, architectures=[architecture])) is None


def test_a_plain_layer_of_a_quantized_base_is_kept(saved, tmp_path):
    """Its backbone alone is quantized, and was saved unquantized."""
    base = shutil.copytree(TINY, tmp_path / "base")
    changed_config(base, quantization_config={"quant_method": "awq"})
    put(base, saved)
    assert_kept(saved, TINY)


# --- What is not, and why.


def forgotten_shard(base):
    names = json.loads((base / INDEX).read_text())["weight_map"]
    file = next(file for name, file in names.items() if name.startswith(HEAD))
    (base / file).unlink()


def renamed_layer(base):
    tensors = load_file(base / "model.safetensors")
    tensors = {n.replace("model.mtp_layers", "model.language_model.mtp_layers"): t for n, t in tensors.items()}
    save_file(tensors, base / "model.safetensors")


def cut_off(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


BASES = {
    "a shard is missing": (True, forgotten_shard, "is in no file, the index has it in model-0000"),
    "other names": (False, renamed_layer, "named model.language_model.mtp_layers.0.*, where engines look for"),
    "cut off": (False, cut_off, "its header says"),
}


@pytest.mark.parametrize("case", BASES)
def test_bases_whose_layer_cannot_be_kept(case, tmp_path):
    sharded, change, message = BASES[case]
    base = shard(TINY, tmp_path / "base") if sharded else shutil.copytree(TINY, tmp_path / "base")
    change(base)
    with pytest.raises(FastMTPError) as error:
        find_layers(base)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_quantized_layer_is_for_graft(bases, tmp_path):
    base = quantized(bases("qwen3_next"), tmp_path / "fp8", size=(16, 16))
    with pytest.raises(
        FastMTPError, match=r"its MTP layer is quantized \(mtp\..* is F8_E4M3\).*`fastmtp graft --donor"
    ):
        find_layers(base)


def only_torch_files(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


SAVED = {
    "no safetensors": (only_torch_files, {}, r"no \*\.safetensors file was saved"),
    "cut off": (cut_off, {}, "its header says"),
    "quantized": (None, {"quantization_config": {"quant_method": "awq"}}, "was saved quantized"),
    "other depth": (None, {"num_hidden_layers": 3}, "num_hidden_layers is 3, the base's is 4"),
    "other width": (None, {"hidden_size": 96}, "hidden_size is 96, the base's is 192"),
    "other architecture": (None, {"architectures": ["LlamaForCausalLM"]}, "a mimo head fits Qwen2ForCausalLM"),
}


@pytest.mark.parametrize("case", SAVED)
def test_folders_that_do_not_fit_stay_as_they_were(case, saved):
    change, config, message = SAVED[case]
    if change:
        change(saved)
    before = as_it_was(changed_config(saved, **config))
    with pytest.raises(FastMTPError, match=message):
        put(TINY, saved)
    assert as_it_was(saved) == before


def test_a_full_disk_leaves_the_folder_as_it_was(saved, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = as_it_was(saved)
    for step in ("copy_tensors", "link_or_copy", "write_index"):
        with monkeypatch.context() as patch:
            patch.setattr(keep, step, full)
            with pytest.raises(FastMTPError, match=r"cannot be written.*free space"):
                put(TINY, saved)
        assert as_it_was(saved) == before
    put(TINY, saved)
    assert_kept(saved, TINY)


def test_a_disk_that_writes_other_bytes(saved, monkeypatch):
    monkeypatch.setattr(keep, "tensor_hashes", lambda path: {})
    before = as_it_was(saved)
    with pytest.raises(FastMTPError, match="reads back with other values"):
        put(TINY, saved)
    assert as_it_was(saved) == before


def test_killed_before_its_last_step(saved, monkeypatch):
    """transformers reads the file, engines the index: the same values. The next time it is finished."""

    def killed(self):
        raise KeyboardInterrupt

    before = hashes_of(saved)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        put(TINY, saved)
    assert load_file(saved / "model.safetensors").keys() == before.keys()
    assert hashes_of(saved).keys() > before.keys()
    put(TINY, saved)
    assert_kept(saved, TINY, before)


# --- Who asks for it.


def asked(**values):
    return keeps_mtp(SimpleNamespace(**values))


def test_what_asks_for_it(tmp_path):
    assert asked(callbacks=[KEEP]) and asked(callbacks=["early_stop", KEEP])
    assert not asked(callbacks=[]) and not asked() and not asked(callbacks=None, merge_lora=False)
    merge = {"merge_lora": True, "ckpt_dir": str(tmp_path)}
    assert not asked(**merge) and not asked(merge_lora=True, ckpt_dir=None)
    for value in (json.dumps({KEEP: True}), {KEEP: True}, {KEEP: "true"}, {KEEP: 1}):
        assert asked(**merge, model_kwargs=value) and not asked(merge_lora=False, model_kwargs=value)
    # The run that made the adapter asked; what is typed goes before it.
    (tmp_path / "args.json").write_text(json.dumps({"callbacks": [KEEP]}))
    assert asked(**merge) and asked(**merge, model_kwargs="{}")
    assert not asked(**merge, model_kwargs={KEEP: False}) and not asked(**merge, model_kwargs={KEEP: "false"})
    for broken in ("", "[]", '{"callbacks": null}', "{"):
        (tmp_path / "args.json").write_text(broken)
        assert not asked(**merge)
    assert not asked(**merge, model_kwargs="no json")


# --- The callback, without a run.


class FakeTrainer:
    """What the callback uses of ms-swift's trainer."""

    def __init__(self, base, save, should_save=True, model_type="mimo"):
        self.model_meta = SimpleNamespace(model_type=model_type)
        self.model_info = SimpleNamespace(model_dir=str(base))
        self.args = SimpleNamespace(should_save=should_save, output_dir="", use_flash_ckpt=False)
        self.save = save

    def save_model(self, output_dir=None, _internal_call=False):
        self.save(Path(output_dir))


@pytest.fixture
def callback(caplog):
    """A function from a trainer to its callback; `caplog` sees what is logged."""
    from swift.utils import get_logger

    from swift_fastmtp.swift_plugin.keep import KeepMTP

    logger = get_logger()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    yield lambda trainer: KeepMTP(trainer.args, trainer)
    logger.removeHandler(caplog.handler)


def lines(caplog, level="INFO"):
    return [r.getMessage() for r in caplog.records if r.levelname == level and KEEP in r.getMessage()]


def test_a_fault_does_not_stop_training_and_is_the_last_line(callback, caplog, lost, tmp_path):
    trainer = FakeTrainer(TINY, lambda folder: shutil.copytree(lost, folder))
    keeping = callback(trainer)
    trainer.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    assert_kept(tmp_path / "checkpoint-1", TINY)
    trainer.save = lambda folder: changed_config(shutil.copytree(lost, folder), hidden_size=96)
    trainer.save_model(str(tmp_path / "checkpoint-2"), _internal_call=True)
    (error,) = lines(caplog, "ERROR")
    assert "the MTP layer is not in this checkpoint" in error and "hidden_size is 96" in error
    assert (tmp_path / "checkpoint-2/model.safetensors").exists()
    with pytest.raises(
        FastMTPError, match=r"--callbacks fastmtp_keep_mtp: .*1 checkpoint is without.*hidden_size is 96"
    ):
        keeping.on_train_end(trainer.args, None, None)


def test_any_error_is_a_fault_of_keeping_only(callback, caplog, lost, tmp_path, monkeypatch):
    trainer = FakeTrainer(TINY, lambda folder: shutil.copytree(lost, folder))
    keeping = callback(trainer)
    monkeypatch.setattr("swift_fastmtp.swift_plugin.keep.keep_layers", lambda *_: {}["gone"])
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    assert "checkpoint-1: 'gone'" in lines(caplog, "ERROR")[0]
    with pytest.raises(FastMTPError, match="1 checkpoint is without"):
        keeping.on_train_end(trainer.args, None, None)


def test_only_the_process_that_saves_writes(callback, lost, tmp_path):
    trainer = FakeTrainer(TINY, lambda folder: shutil.copytree(lost, folder), should_save=False)
    keeping = callback(trainer)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    assert as_it_was(tmp_path / "checkpoint-1") == as_it_was(lost)
    assert keeping.on_train_end(trainer.args, None, None) is None


def test_an_adapter_stays_as_it_is(callback, caplog, tmp_path):
    def save(folder):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")

    trainer = FakeTrainer(TINY, save)
    keeping = callback(trainer)
    for step in (1, 2):
        trainer.save_model(str(tmp_path / f"checkpoint-{step}"))
        assert as_it_was(tmp_path / f"checkpoint-{step}") == {"adapter_config.json": b"{}"}
    first, note = lines(caplog)  # one line, however many checkpoints
    assert "16 MTP tensors" in first and "hold an adapter only and stay as they are" in note
    assert keeping.on_train_end(trainer.args, None, None) is None


def test_nothing_to_keep_is_one_line(callback, caplog, lost, tmp_path):
    trainer = FakeTrainer(lost, lambda folder: shutil.copytree(lost, folder))
    keeping = callback(trainer)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    assert as_it_was(tmp_path / "checkpoint-1") == as_it_was(lost)
    (line,) = lines(caplog)
    assert "has no MTP layer that this package knows; there is nothing to keep" in line
    assert keeping.on_train_end(trainer.args, None, None) is None
    callback(FakeTrainer(TINY, None, model_type="fastmtp"))
    assert "--model_type fastmtp trains the MTP layer" in lines(caplog)[-1]


def test_what_cannot_be_kept_stops_before_training(callback, tmp_path):
    base = shutil.copytree(TINY, tmp_path / "base")
    renamed_layer(base)
    with pytest.raises(FastMTPError, match="so they cannot be kept"):
        callback(FakeTrainer(base, None))
    trainer = FakeTrainer(TINY, None)
    trainer.args.use_flash_ckpt = True
    with pytest.raises(FastMTPError, match="does not work with --use_flash_ckpt"):
        callback(trainer)


def test_a_merge_whose_layer_cannot_be_written_ends_with_the_reason(lost, tmp_path):
    """The merged model is whole without it; and a merge that is not asked is ms-swift's own."""
    from swift_fastmtp.swift_plugin.keep import _merge_and_keep

    def merge(args):
        args.model_dir = shutil.copytree(lost, args.output_dir)
        if args.broken:
            changed_config(args.model_dir, hidden_size=96)

    def merged(name, **values):
        args = SimpleNamespace(model_type="mimo", merge_lora=True, ckpt_dir=None, model_kwargs={KEEP: True})
        args.__dict__.update({"model_dir": str(TINY), "output_dir": tmp_path / name, "broken": False, **values})
        _merge_and_keep(merge)(args)
        return args.model_dir

    assert_kept(merged("kept"), TINY)
    assert as_it_was(merged("plain", merge_lora=False)) == as_it_was(lost)
    with pytest.raises(FastMTPError, match=r"broken is merged, but without the MTP layer: .*hidden_size is 96"):
        merged("broken", broken=True)
    assert (tmp_path / "broken/model.safetensors").exists()


@pytest.mark.engine
def test_the_models_classes_stay_ms_swifts_own():
    """Our configuration of MiMo would take the place of the folder's own code; keeping does not load it."""
    code = (
        "import sys; from swift_fastmtp.swift_plugin.keep import register_keep; register_keep(); register_keep()\n"
        "from swift.callbacks import callbacks_map; from swift.model import MODEL_MAPPING\n"
        "assert 'fastmtp_keep_mtp' in callbacks_map and 'fastmtp' not in MODEL_MAPPING\n"
        "assert not [n for n in sys.modules if n.startswith('swift_fastmtp.model.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
