"""Every private or undocumented name that is gone, or means something else, is one line that says what to install."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT, TINY
from helpers.swift_runs import ONE_CORE, logged, sft_args, swift
from helpers.tiers import some_now
from packaging.requirements import Requirement
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from swift_fastmtp.checkpoint import compat_deepspeed
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.libraries import TRIED, Name, check_names, find, owner_of
from swift_fastmtp.method import compat_torch
from swift_fastmtp.model import compat_transformers
from swift_fastmtp.serving import compat_sglang, compat_vllm
from swift_fastmtp.swift_plugin import compat_swift

ONE_LINE = r"^{library} [\w.+ ]+: [^\n]*{what}[^\n]*; this package was tried with [\w., ]+: install {library}==[\w.]+$"


def fails(library, what):
    """As `pytest.raises`: one line that names the library, its version, the name, and what to install."""
    return pytest.raises(FastMTPError, match=ONE_LINE.format(library=library, what=re.escape(what)))


# --- names


EVERY_NAME = [*compat_swift.WRAPPED, *compat_swift.OVERRIDDEN, *compat_swift.CALLED]


@pytest.mark.parametrize("name", EVERY_NAME, ids=lambda name: name.short)
def test_a_name_that_is_gone(name, monkeypatch):
    find(name)  # it is there
    module = name.path.partition(":")[0]
    owner, last = owner_of(name)
    for holder in getattr(owner, "__mro__", (owner,)):  # a base class may have a method of that name too
        if last in vars(holder):
            monkeypatch.delattr(holder, last)
    with fails(name.library, f"{name.short} of {module} is gone ({name.why})"):
        check_names((name,))


@pytest.mark.parametrize("name", [n for n in EVERY_NAME if n.first], ids=lambda name: name.short)
def test_a_name_that_takes_something_else(name, monkeypatch):
    module, _, attributes = name.path.partition(":")
    monkeypatch.setattr(f"{module}.{attributes}", lambda other, *more: None)
    with fails(name.library, f"{name.short} takes (other, more), it took ({', '.join(name.first)}"):
        check_names((name,))


GONE = """
import sys
from transformers import trainer
del trainer.Trainer._run_epoch
from swift.pipelines import sft_main
sft_main(sys.argv[1:])
"""


@pytest.mark.parametrize("how", some_now(["autoload", "external plugin"], ["autoload"]))
def test_the_command_stops_with_one_line(how, rows, tmp_path):
    """Before anything is loaded, whichever way the plugin came."""
    words = sft_args(TINY, rows, tmp_path / "run")[1:]
    environment = {**os.environ, **ONE_CORE}
    if how == "external plugin":
        words += ["--external_plugins", str(compat_swift.PLUGIN_FILE)]
        environment["SWIFT_FASTMTP_AUTOLOAD"] = "0"
    command = [sys.executable, "-c", GONE, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert re.match(
        r"fastmtp: error: transformers [\w.]+: Trainer._run_epoch of transformers.trainer is gone .*: install "
        r"transformers==[\w.]+$",
        line,
    )
    assert not (tmp_path / "run").exists()


def test_a_module_that_is_gone():
    with fails("ms-swift", "Nothing of swift.nowhere is gone (nothing)"):
        find(Name("ms-swift", "swift.nowhere:Nothing", "nothing"))


# --- torch


def test_torch_operators(monkeypatch):
    for name in compat_torch._ARGUMENTS:
        assert compat_torch.operator(name) is getattr(torch.ops.aten, name)
    look = compat_torch.operator.__wrapped__
    monkeypatch.setitem(compat_torch._ARGUMENTS, compat_torch.CPU_FORWARD, "query value key | scale")
    with fails("torch", f"torch.ops.aten.{compat_torch.CPU_FORWARD} takes (query, key, value"):
        look(compat_torch.CPU_FORWARD)
    monkeypatch.setattr(compat_torch.torch, "ops", SimpleNamespace(aten=SimpleNamespace()))
    with fails("torch", "torch.ops.aten._flash_attention_forward is gone"):
        look(compat_torch.CUDA_FORWARD)


def test_error_texts_of_torch(monkeypatch):
    compat_swift.check_error_texts()
    monkeypatch.setattr(compat_swift, "_NO_MEMORY", "no memory is left")
    with fails("torch", "a failed allocation says"):
        compat_swift.check_error_texts()
    monkeypatch.undo()
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(compat_swift, "_CANNOT_WRITE", re.compile("the disk is full"))
    with fails("torch", "torch.save to a full disk says"):
        compat_swift.check_error_texts()


# --- transformers


@pytest.mark.parametrize(
    "name",
    [
        "transformers.integrations.finegrained_fp8.Fp8Dequantize",
        "transformers.core_model_loading.WeightConverter",
        "transformers.conversion_mapping.get_model_conversion_mapping",
        "transformers.dynamic_module_utils.resolve_trust_remote_code",
    ],
)
def test_what_is_imported(name, monkeypatch):
    """Read anew, under another name, so that nothing else sees it."""
    module, _, last = name.rpartition(".")
    monkeypatch.delattr(sys.modules[module], last)
    spec = importlib.util.spec_from_file_location("swift_fastmtp.model.again", compat_transformers.__file__)
    with fails("transformers", f"cannot import name '{last}' from '{module}'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_fp8_arithmetic(monkeypatch):
    compat_transformers.check_fp8()
    theirs = Fp8Dequantize._dequantize_one
    with monkeypatch.context() as patch:  # another method does the work
        patch.setattr(Fp8Dequantize, "convert", lambda self, tensors, *_: {"weight": torch.zeros(3, 3)})
        with fails("transformers", "Fp8Dequantize.convert does not use _dequantize_one"):
            compat_transformers.check_fp8()
    with monkeypatch.context() as patch:  # renamed: transformers' own arithmetic runs, which stops at a ragged edge
        patch.delattr(Fp8Dequantize, "_dequantize_one")
        patch.setattr(Fp8Dequantize, "_dequantize_block", theirs, raising=False)
        with fails("transformers", "Fp8Dequantize._dequantize_one"):
            compat_transformers.check_fp8()


def test_fp8_conversions_without_the_operation(monkeypatch):
    stock = compat_transformers.FineGrainedFP8HfQuantizer
    config = compat_transformers.DequantizedFP8Config(dequantize=True)
    quantizer = compat_transformers.Quantizer(config, pre_quantized=True)
    conversions = quantizer.update_weight_conversions([])
    (ours,) = [c for c in conversions if isinstance(c, WeightConverter)]
    assert [type(operation) for operation in ours.operations] == [compat_transformers.Dequantize]
    monkeypatch.setattr(stock, "update_weight_conversions", lambda self, conversions: conversions)
    with fails("transformers", "no conversion of FP8 weights has the operation Fp8Dequantize"):
        quantizer.update_weight_conversions([])


def test_weight_conversions_of_a_loaded_model():
    with fails("transformers", "a loaded model has no _weight_conversions"):
        compat_transformers.save_as_loaded_plain(SimpleNamespace())


class OtherRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.variance_epsilon = 1e-6  # it is there, and nobody reads it

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.small)


def test_the_epsilon_of_norms():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norm = Qwen2RMSNorm(4, eps=1e-6)
    compat_transformers.set_epsilon([norm], 0.5)
    assert norm.variance_epsilon == 0.5
    with fails("transformers", "OtherRMSNorm computes with neither variance_epsilon nor eps"):
        compat_transformers.set_epsilon([OtherRMSNorm()], 0.5)


class OtherTopkRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.register_buffer("score_bias", torch.zeros(2))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 2))
        self.register_buffer("e_score_correction_bias", torch.zeros(2))

    def forward(self, hidden_states, fail=False):
        if fail:
            raise ValueError
        return hidden_states @ self.weight


def test_routers_compute_in_float32():
    router, x = Router(), torch.rand(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x).dtype == torch.bfloat16
    compat_transformers.route_in_float32([router])
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x).dtype == router(hidden_states=x).dtype == torch.float32
        with pytest.raises(ValueError):
            router(x, fail=True)
        assert torch.is_autocast_enabled("cpu") and (x @ x).dtype == torch.bfloat16
    with fails("transformers", "OtherTopkRouter has score_bias, where routers had e_score_correction_bias"):
        compat_transformers.route_in_float32([OtherTopkRouter()])


@pytest.mark.parametrize("name", compat_transformers._CLASS_LISTS)
def test_lists_of_model_classes(name, monkeypatch):
    compat_transformers.check_class_lists()
    monkeypatch.delattr(PreTrainedModel, name)
    with fails("transformers", f"PreTrainedModel has no {name}"):
        compat_transformers.check_class_lists()


def test_what_stays_float32_is_a_set_of_the_model():
    with fails("transformers", "_keep_in_fp32_modules_strict of a model is no set"):
        compat_transformers.keep_in_float32(SimpleNamespace(_keep_in_fp32_modules_strict=["a"]), "b")


def test_the_attention_of_a_config(monkeypatch):
    compat_transformers.check_attention()
    monkeypatch.setattr(PreTrainedConfig, "_attn_implementation", None)
    with fails("transformers", "PreTrainedConfig has no property _attn_implementation"):
        compat_transformers.use_attention(PreTrainedConfig(), "eager")


def test_making_a_model(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "get_init_context", classmethod(lambda cls, dtype: []))
    with fails("transformers", "PreTrainedModel.get_init_context takes (dtype), it took"):
        compat_transformers.making(PreTrainedModel, torch.float32)


def test_tied_names():
    with fails("transformers", "a model has no all_tied_weights_keys"):
        compat_transformers.tied_names(SimpleNamespace())


def test_a_dispatched_model_stays_where_it_is():
    """accelerate puts a function that raises over a model's `to`; ours is the class's."""
    from swift_fastmtp.model.loading import load_model

    model = load_model(TINY, torch.float32)
    model.hf_device_map, model.to = {"a": "cpu", "b": "disk"}, None
    compat_transformers.uncover_to(model)
    assert model.to("meta") is model and model.device.type == "cpu"
    del model.hf_device_map
    assert model.to(torch.float64).dtype == torch.float64


def test_text_of_a_folder_that_needs_code(monkeypatch):
    compat_transformers.check_needs_folder_code()
    monkeypatch.setattr(compat_transformers, "_NEEDS_CODE", "allow_code")
    with fails("transformers", "is not refused by a text with allow_code"):
        compat_transformers.check_needs_folder_code()


# --- DeepSpeed


def partitioned(**attributes):
    tensor = torch.empty(0)
    for name, value in {"ds_id": 0, "ds_shape": torch.Size([2, 3]), "ds_tensor": torch.zeros(6), **attributes}.items():
        if value is not None:
            setattr(tensor, name, value)
    return tensor


def test_partitioned_parameters(monkeypatch):
    monkeypatch.setattr(compat_deepspeed, "get_world_size", lambda: 1)
    compat_deepspeed.check_partitioned([partitioned(), torch.zeros(3)])
    with fails("deepspeed", "ZeRO-3 gives parameters none of ds_id, ds_shape, ds_tensor"):
        compat_deepspeed.check_partitioned([torch.zeros(3)])
    for name in ("ds_id", "ds_shape", "ds_tensor"):
        with fails("deepspeed", f"ZeRO-3 gives a parameter no {name}"):
            compat_deepspeed.check_partitioned([partitioned(**{name: None})])
    with fails("deepspeed", "ds_tensor is no rank's part of ds_shape (2 of 6 numbers)"):
        compat_deepspeed.check_partitioned([partitioned(ds_tensor=torch.zeros(2))])


def test_deepspeed_checkpoints(monkeypatch):
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "save_checkpoint", lambda self, save_dir: None)
    with fails("deepspeed", "DeepSpeedEngine.save_checkpoint takes (self, save_dir), it took"):
        compat_swift.head_only_deepspeed_checkpoints()


# --- ms-swift, its trainer and datasets


def test_export_actions(monkeypatch):
    compat_swift.check_export_actions()
    for actions in (compat_swift.EXPORT_ACTIONS[:-1], (*compat_swift.EXPORT_ACTIONS, "to_gguf")):
        monkeypatch.setattr(compat_swift, "EXPORT_ACTIONS", actions)
        different = "to_gguf" if "to_gguf" in actions else "push_to_hub"
        with fails("ms-swift", f"SwiftExport.run decides by other arguments ({different})"):
            compat_swift.check_export_actions()


def test_metrics():
    with fails("ms-swift", "trainers have no custom_metrics['train']"):
        compat_swift.add_metric(SimpleNamespace(), "train", "mtp", None)


def test_the_name_of_a_dataset():
    with fails("datasets", "a Dataset has no _fingerprint"):
        compat_swift.fingerprint_of(SimpleNamespace())


class Arguments:
    """As ms-swift's argument class, without the method that loads plugins."""

    def __init__(self, model_type):
        self.model_type = model_type
        self.__post_init__()

    def __post_init__(self):
        self.made = True


def test_without_the_method_that_loads_plugins():
    """A run that asks for the plugin stops; others go on."""
    compat_swift.load_among_plugins(Arguments, lambda args: args.model_type == "fastmtp")
    assert Arguments("qwen2").made
    with fails("ms-swift", "BaseArguments._import_external_plugins is gone"):
        Arguments("fastmtp")


PLUGINS = """
import json, sys
from swift import SftArguments
from swift.utils.utils import get_external_files
args = SftArguments(**json.loads(sys.argv[1]))
print("LEFT", json.dumps([get_external_files(), args.external_plugins]))
"""


@pytest.mark.parametrize("named", some_now([False, True], [True]))
def test_the_plugin_is_one_of_the_external_ones(named, rows, tmp_path):
    """So data workers replay it; args.json names it only if the user did, as its path is of this environment."""
    theirs = tmp_path / "theirs.py"
    theirs.write_text("")
    plugins = [str(theirs), *([str(compat_swift.PLUGIN_FILE)] if named else [])]
    asked = {"model_type": "fastmtp", "model": str(TINY), "dataset": [str(rows)], "output_dir": str(tmp_path / "out")}
    asked |= {"external_plugins": plugins, "torch_dtype": "float32", "fp16": False, "report_to": ["none"]}
    done = subprocess.run(
        [sys.executable, "-c", PLUGINS, json.dumps(asked)],
        env={**os.environ, **ONE_CORE}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LEFT ")]
    assert json.loads(line[5:]) == [[str(theirs), str(compat_swift.PLUGIN_FILE)], plugins]


@pytest.mark.matrix
def test_a_spawned_data_worker_has_the_plugin(rows, tmp_path):
    """It begins with nothing of this process; the plugin is replayed in it."""
    workers = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    swift(*sft_args(TINY, rows, tmp_path / "run", max_steps=1, **workers))
    assert logged(tmp_path / "run")


def test_the_error_hook_is_set_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("theirs"))
    compat_swift.print_errors_as_lines()
    ours = sys.excepthook
    compat_swift.print_errors_as_lines()
    assert sys.excepthook is ours
    ours(FastMTPError, FastMTPError("bad"), None)
    ours(ValueError, ValueError("other"), None)
    shown = capsys.readouterr()
    assert shown.err == "fastmtp: error: bad\n" and shown.out == "theirs\n"


# --- SGLang, a stand-in of which has the names that are used


@pytest.fixture
def sglang(monkeypatch):
    """Its modules, with just what `compat_sglang.check` looks at; what it is in SGLang 0.5.23."""

    class EagleDraftWorker:
        def init_lm_head(self): ...
        def _draft_extend_for_prefill(self, batch, target_hidden_states): ...
        def _draft_extend_for_decode(self, batch, batch_result): ...

    modules = {
        "spec_info": types.ModuleType("sglang.srt.speculative.spec_info"),
        "eagle_worker_v2": types.ModuleType("sglang.srt.speculative.eagle_worker_v2"),
        "logits_processor": types.ModuleType("sglang.srt.layers.logits_processor"),
        "schedule_batch": types.ModuleType("sglang.srt.managers.schedule_batch"),
        "batch_result_processor": types.ModuleType("sglang.srt.managers.scheduler_components.batch_result_processor"),
    }
    for module in modules.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    packages = ("speculative", "layers", "managers", "managers.scheduler_components")
    for package in ("sglang", "sglang.srt", *(f"sglang.srt.{name}" for name in packages)):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    source = {
        "spec_info": "class SpeculativeAlgorithm:\n    def create_worker(self, server_args): ...\n",
        "eagle_worker_v2": (
            "class EAGLEWorkerV2:\n    def __init__(self): self.draft = EagleDraftWorker()\n"
            "    def forward(self, batch):\n"
            "        self.draft._draft_extend_for_prefill(batch); self.draft._draft_extend_for_decode(batch)\n"
        ),
        "logits_processor": (
            "class LogitsProcessor:\n"
            "    def forward(self, input_ids, hidden_states, lm_head, logits_metadata):\n"
            "        return self._compute_lm_head(hidden_states, lm_head)\n"
            "    def _compute_lm_head(self, hidden_states, lm_head, embedding_bias=None, *, out=None): ...\n"
        ),
        "schedule_batch": (
            "class Req:\n    def __init__(self): self.customized_info = None\n"
            "    def update_spec_correct_drafts_histogram(self, num_correct_drafts): ...\n"
        ),
        "batch_result_processor": (
            "class SchedulerBatchResultProcessor:\n"
            "    def _append_prefill_hidden_states(self, *, req, logits_output, hidden_state_offset,\n"
            "        capture_hidden_mode, extend_input_len, store=True): ...\n"
        ),
    }
    for name, module in modules.items():
        exec(source[name], vars(module))
    modules["eagle_worker_v2"].EagleDraftWorker = EagleDraftWorker
    return SimpleNamespace(**modules)


def test_sglang_names(sglang, monkeypatch):
    compat_sglang.check()
    for name in compat_sglang.NAMES:
        module = name.path.partition(":")[0]
        with monkeypatch.context() as patch:
            patch.delattr(*owner_of(name))
            with fails("sglang", f"{name.short} of {module} is gone ({name.why})"):
                compat_sglang.check()


def test_sglang_names_that_nothing_calls(sglang, monkeypatch):
    """They are there, and replacing them would change nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(sglang.eagle_worker_v2.EAGLEWorkerV2, "forward", lambda self, batch: None)
        with fails("sglang", "nothing calls EagleDraftWorker._draft_extend_for_prefill"):
            compat_sglang.check()
    with monkeypatch.context() as patch:
        patch.setattr(sglang.eagle_worker_v2.EAGLEWorkerV2, "__init__", lambda self: None)
        with fails("sglang", "nothing calls EagleDraftWorker"):
            compat_sglang.check()


def test_sglang_names_for_hidden_states(sglang, monkeypatch):
    compat_sglang.check_states()
    processor = sglang.batch_result_processor.SchedulerBatchResultProcessor
    with monkeypatch.context() as patch:
        patch.setattr(processor, "_append_prefill_hidden_states", lambda self, req, *, where: None)
        with fails("sglang", "SchedulerBatchResultProcessor._append_prefill_hidden_states takes (self, req, where)"):
            compat_sglang.check_states()
    with monkeypatch.context() as patch:
        patch.setattr(sglang.schedule_batch.Req, "__init__", lambda self: None)
        with fails("sglang", "Req has no customized_info (what is sent beside the answer of a request)"):
            compat_sglang.check_states()


def test_sglang_versions_arguments_and_parts(monkeypatch):
    monkeypatch.setattr(compat_sglang, "installed", lambda library: "0.5.24")
    with fails("sglang", "token maps per language: it is not among the versions tried"):
        compat_sglang.check_version("token maps per language")
    monkeypatch.setattr(compat_sglang, "installed", lambda library: "0.5.23")
    compat_sglang.check_version("token maps per language")
    arguments = dict.fromkeys(compat_sglang.SERVER_ARGUMENTS)
    compat_sglang.check_arguments(SimpleNamespace(**arguments))
    del arguments["enable_lora"]
    with fails("sglang", "servers have no argument enable_lora"):
        compat_sglang.check_arguments(SimpleNamespace(**arguments))
    with fails("sglang", "the draft worker has other parts"):
        compat_sglang.draft_parts(SimpleNamespace(draft_runner=SimpleNamespace(model=SimpleNamespace())))


# --- vLLM, likewise


@pytest.fixture
def vllm(monkeypatch):
    """Its modules, with just what `compat_vllm.check_maps` looks at; what it is in vLLM 0.32.0."""
    source = {
        "vllm.v1.spec_decode.llm_base_proposer": (
            "class SpecDecodeBaseProposer:\n"
            "    def load_model(self, target_model): ...\n"
            "    def prepare_next_token_ids_padded(self, sampled_token_ids, requests, gpu_input_batch, mask): ...\n"
            "    def prepare_next_token_ids_cpu(self, sampled_token_ids, requests, gpu_input_batch, numbers): ...\n"
        ),
        "vllm.v1.worker.gpu_model_runner": (
            "class GPUModelRunner:\n"
            "    def propose_draft_token_ids(self, scheduler_output, sampled_token_ids):\n"
            "        self.drafter.prepare_next_token_ids_padded; self.drafter.prepare_next_token_ids_cpu\n"
        ),
        "vllm.model_executor.layers.logits_processor": (
            "class LogitsProcessor:\n"
            "    def _get_logits(self, hidden_states, lm_head, embedding_bias):\n"
            "        return self._apply_head(lm_head, hidden_states, embedding_bias)\n"
            "    def _apply_head(self, lm_head, hidden_states, embedding_bias): ...\n"
        ),
        "vllm.v1.worker.gpu_input_batch": (
            "class CachedRequestState:\n    def __init__(self, req_id, prompt_token_ids, output_token_ids): ...\n"
        ),
    }
    modules = {}
    for name, code in source.items():
        parents = name.split(".")[:-1]
        for length in range(1, len(parents) + 1):
            package = ".".join(parents[:length])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
        exec(code, vars(modules[name]))
    return {name.rpartition(".")[2]: module for name, module in modules.items()}


def test_vllm_names(vllm, monkeypatch):
    compat_vllm.check_maps()
    for name in compat_vllm.MAP_NAMES:
        module = name.path.partition(":")[0]
        with monkeypatch.context() as patch:
            patch.delattr(*owner_of(name))
            with fails("vllm", f"{name.short} of {module} is gone ({name.why})"):
                compat_vllm.check_maps()


def test_states_of_vllms_mimo(monkeypatch):
    """Given where they are asked for, of the last layer alone; a class that gives its own is left as it is."""
    module = types.ModuleType("vllm.model_executor.models.mimo")
    exec(
        "class MiMoModel:\n    layers = [0] * 4\n    aux_hidden_state_layers = ()\n"
        "    def forward(self, input_ids, positions): return input_ids\n",
        vars(module),
    )
    for package in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    compat_vllm.give_mimo_layer_states()
    model, states = module.MiMoModel(), torch.ones(2)
    assert model.forward(states, None) is states
    model.aux_hidden_state_layers = (4,)
    output, layers = model.forward(states, None)
    assert output is states and layers == [states]
    assert model.forward((states, [states]), None) == (states, [states])
    model.aux_hidden_state_layers = (3,)
    with fails("vllm", "MiMo's hidden states are asked of layers (3,), not of the last alone"):
        model.forward(states, None)


def test_vllms_connector(monkeypatch):
    """Its names, and which layers it is started for."""
    path = "vllm.distributed.kv_transfer.kv_connector.v1"
    module = types.ModuleType(f"{path}.example_hidden_states_connector")
    exec(
        "def extract_from_kv_cache(kv_cache, slot_mapping, num_tokens): ...\n"
        "class ExampleHiddenStatesConnector:\n    def _submit_async_write(self, pending): ...\n"
        "    @staticmethod\n    def _write_tensors(tensors, event, filename, lock_fd): ...\n",
        vars(module),
    )
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    sys.modules[path].example_hidden_states_connector = module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "swift_fastmtp.serving.compat_vllm_states", raising=False)
    states = importlib.import_module("swift_fastmtp.serving.compat_vllm_states")
    monkeypatch.delitem(sys.modules, "swift_fastmtp.serving.compat_vllm_states")
    states.check()

    def server(layers):
        asked = SimpleNamespace(hf_config=SimpleNamespace(eagle_aux_hidden_state_layer_ids=layers))
        model = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=4))
        return SimpleNamespace(model_config=model, speculative_config=SimpleNamespace(draft_model_config=asked))

    states.check_layers(server([4]))
    for layers in ([3], [2, 4], None):
        with pytest.raises(FastMTPError, match=r"eagle_aux_hidden_state_layer_ids must be \[4\]$"):
            states.check_layers(server(layers))
    monkeypatch.delattr(module.ExampleHiddenStatesConnector, "_write_tensors")
    with fails("vllm", "ExampleHiddenStatesConnector._write_tensors of vllm"):
        states.check()


def test_vllm_names_that_nothing_uses(vllm, monkeypatch):
    runner, processor = vllm["gpu_model_runner"].GPUModelRunner, vllm["logits_processor"].LogitsProcessor
    with monkeypatch.context() as patch:
        patch.setattr(runner, "propose_draft_token_ids", lambda self, scheduler_output, sampled_token_ids: None)
        with fails("vllm", "nothing calls SpecDecodeBaseProposer.prepare_next_token_ids_padded"):
            compat_vllm.check_maps()
    with monkeypatch.context() as patch:
        patch.setattr(processor, "_get_logits", lambda self: None)
        with fails("vllm", "nothing calls LogitsProcessor._apply_head"):
            compat_vllm.check_maps()
    monkeypatch.setattr(vllm["gpu_input_batch"], "CachedRequestState", lambda prompt_token_ids: None)
    with fails("vllm", "CachedRequestState has no output_token_ids any more"):
        compat_vllm.check_maps()


class Target(torch.nn.Module):
    """MiMo's: it ends before the final norm, which `compute_logits` applies."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 8)

    def logits_processor(self, lm_head, hidden_states):
        return lm_head(hidden_states)

    def forward(self, hidden_states):
        return 2 * hidden_states

    def compute_logits(self, hidden_states):
        return self.logits_processor(self.lm_head, self.model.norm(hidden_states))


def test_a_target_that_ends_with_its_norm():
    target, hidden = Target(), torch.randn(3, 4)
    logits = target.compute_logits(target(hidden))
    compat_vllm.norm_target(target)
    torch.testing.assert_close(target(hidden), target.model.norm(2 * hidden))
    torch.testing.assert_close(target.compute_logits(target(hidden)), logits)
    assert type(target).__name__ == "Target" and "model.norm.weight" in target.state_dict()
    with fails("vllm", "Target.compute_logits applies no final norm any more"):
        compat_vllm.norm_target(target)  # it has one already, as a later vLLM might


class SharedHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, hidden_states):
        return self.norm(hidden_states)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shared_head = SharedHead()

    def forward(self, hidden_states):
        return 2 * hidden_states


class Predictor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleDict({"2": Layer()})

    def compute_logits(self, hidden_states):
        return self.layers["2"].shared_head(hidden_states)


def test_a_draft_whose_layer_ends_with_its_norm():
    draft, hidden = torch.nn.Module(), torch.randn(3, 4)
    draft.model = Predictor()
    layer = draft.model.layers["2"]
    logits = draft.model.compute_logits(layer(hidden))
    compat_vllm.norm_feedback(draft)
    torch.testing.assert_close(layer(hidden), layer.shared_head.norm(2 * hidden))
    torch.testing.assert_close(draft.model.compute_logits(layer(hidden)), logits)
    with fails("vllm", "Layer does not end before its norm any more"):
        compat_vllm.norm_feedback(draft)
    with fails("vllm", "Target.compute_logits applies no norm of its layers any more"):
        compat_vllm.norm_feedback(Target())


def test_vllm_versions_and_parts(monkeypatch):
    monkeypatch.setattr(compat_vllm, "installed", lambda library: "0.33.0")
    with fails("vllm", "token maps: it is not among the versions tried"):
        compat_vllm.check_version("token maps")
    for version in ("0.32.0", "0.32.0+cpu"):
        monkeypatch.setattr(compat_vllm, "installed", lambda library, version=version: version)
        compat_vllm.check_version("token maps")
    with fails("vllm", "servers are configured otherwise"):
        compat_vllm.server_parts(SimpleNamespace(vllm_config=SimpleNamespace()))


def test_a_vllm_in_which_the_draft_is_loaded_otherwise(vllm, monkeypatch, caplog):
    """Nobody may have asked for anything: it serves, and the log says what is not done."""
    proposer = vllm["llm_base_proposer"].SpecDecodeBaseProposer
    with monkeypatch.context() as patch:
        patch.delattr(proposer, "load_model")
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        compat_vllm.when_loaded(lambda *_: None)
    assert "SpecDecodeBaseProposer.load_model of vllm.v1.spec_decode.llm_base_proposer is gone" in caplog.text
    monkeypatch.setattr(compat_vllm, "installed", lambda library: "0.33.0")
    caplog.clear()
    compat_vllm.warn_if_untried()
    assert "vllm 0.33.0: what config.json asks for may not be done" in caplog.text.replace(
        "of unknown version", "0.33.0"
    )


def test_vllm_draft_parts(vllm):
    kind = type("Processor", (torch.nn.Module, vllm["logits_processor"].LogitsProcessor), {})
    draft = torch.nn.Module()
    with fails("vllm", "Module has 0 logits processors"):
        compat_vllm.draft_parts(draft)
    draft.processor = kind()
    with fails("vllm", "Module has other parts"):
        compat_vllm.draft_parts(draft)
    shard = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=8)
    draft.lm_head = torch.nn.Linear(4, 8)
    draft.lm_head.shard_indices, draft.lm_head.org_vocab_size = shard, 8
    processor, matrix = compat_vllm.draft_parts(draft)
    assert processor is draft.processor and matrix.weight is draft.lm_head.weight
    assert (matrix.start, matrix.end, matrix.vocab_size) == (0, 8, 8)


# --- versions: setup.py, constraints.txt and the table in the docs say the same


def requirements():
    """Library → what setup.py asks for."""
    listed = re.findall(r'"([a-z][\w-]*[<>=]=?[\w.,<>= ]+)"', (ROOT / "setup.py").read_text())
    return {made.name: made.specifier for made in map(Requirement, listed)}


def cells(line):
    """Of a row of a table in Markdown."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_versions():
    asked = requirements()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    installed = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    lines_of_table = [line for line in page.splitlines() if line.startswith("|")][2:]
    rows = [cells(line) for line in lines_of_table]
    seen = {}
    for library, tried, specifier, _, checks in rows:
        if library:
            seen[library] = tuple(tried.split(", "))
            assert Requirement(library + specifier.strip("`")).specifier == asked[library], library
            assert "<" in specifier
            for version in seen[library]:
                assert asked[library].contains(version), library
            if library in installed:
                assert installed[library] in seen[library]
        if checks:
            functions, file = checks.rsplit(" in ", 1)
            code = (ROOT / "swift_fastmtp" / file.strip("`")).read_text(encoding="utf-8")
            for function in functions.split(", "):
                name = function.strip("`")
                assert f"def {name}(" in code, checks
    for library, tried in TRIED.items():
        assert seen.get(library, tried) == tried
    known = {"torch", "transformers", "accelerate", "deepspeed", "datasets", "ms-swift", "peft", "sglang", "vllm"}
    assert known == set(seen)
