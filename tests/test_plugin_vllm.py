"""What the vLLM plugin decides before it touches vLLM: which maps, whose graph, and what it refuses."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import write_trained
from helpers.paths import TINY
from transformers import AutoTokenizer

from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.export.folders import export_draft
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.serving import vllm_plugin
from swift_fastmtp.serving.compat_vllm import ServerParts, when_imported
from swift_fastmtp.serving.flags import command, explain
from swift_fastmtp.serving.launch import serve_flags
from swift_fastmtp.serving.maps import AGAIN_EVERY, EVERY, VARIABLE, maps_of
from swift_fastmtp.serving.routed_head import RoutedHead
from swift_fastmtp.serving.vllm_plugin import (
    ENGINE_VARIABLE,
    family_to_correct,
    refuse_unsupported,
    split_differences,
)
from swift_fastmtp.serving.vllm_router import VLLMRouter
from swift_fastmtp.vocab.languages import Languages

SERVER = ServerParts(
    model=str(TINY),
    draft=str(TINY),
    tokenizer=str(TINY),
    trust_remote_code=False,
    method="mtp",
    lora=False,
)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in (VARIABLE, ENGINE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def tiny(folder, trained_for=None):
    """A model, as exported where it says which engine it was trained for."""
    folder.mkdir()
    shutil.copyfile(TINY / "config.json", folder / "config.json")
    if trained_for:
        (folder / "fastmtp.json").write_text(json.dumps({"engine": trained_for}))
    return SERVER._replace(model=str(folder), draft=str(folder))


@pytest.mark.parametrize(
    ("key", "variable", "corrected"),
    [
        (None, None, False),
        ("sglang", None, True),
        ("vllm", None, False),
        ("both", None, False),
        (None, "sglang", True),
        (None, "SGLang", True),
        ("sglang", "none", False),
        ("sglang", "vllm", False),
        ("vllm", "sglang", True),
    ],
)
def test_whose_graph(key, variable, corrected, tmp_path, monkeypatch):
    server = tiny(tmp_path / "model", key)
    if variable:
        monkeypatch.setenv(ENGINE_VARIABLE, variable)
    family = family_to_correct(server)
    assert (family is not None) == corrected
    assert family is None or family.name == "mimo"
    assert family_to_correct(server._replace(method="eagle3")) is None


def test_a_draft_only_folder_says_whose_graph_it_was_trained_for(tmp_path):
    """What the target's own MTP layer was trained for says nothing of it."""
    trained, own = tiny(tmp_path / "trained", "sglang"), tiny(tmp_path / "own")
    assert family_to_correct(own._replace(draft=trained.draft))
    assert not family_to_correct(trained._replace(draft=own.draft))


@pytest.mark.parametrize("row", [row for row in FAMILIES if row.engines.vllm], ids=lambda row: row.name)
def test_every_difference_is_corrected_named_or_refused(row):
    """None is passed over in silence."""
    different = len(row.differences)
    if row.graph("vllm").rotary_halves:
        with pytest.raises(FastMTPError, match=rf"model: .*rotary_halves.*{ENGINE_VARIABLE}=none"):
            split_differences(row, "model")
        return
    corrected, kept = split_differences(row, "model")
    assert len(corrected) + len(kept) == different
    assert ("hidden_before_norm" in corrected) == (row.name == "mimo")
    assert ("feedback_before_norm" in corrected) == (row.name in ("glm4_moe", "glm4_moe_lite"))


def test_another_word_for_an_engine(monkeypatch):
    monkeypatch.setenv(ENGINE_VARIABLE, "tgi")
    with pytest.raises(FastMTPError, match=f"{ENGINE_VARIABLE}: must be sglang, vllm or none, not 'tgi'"):
        family_to_correct(SERVER)


REFUSED = {
    "EAGLE-3": ({"method": "eagle3"}, "V1", "`eagle3` is not `mtp`"),
    "V2": ({}, "V2", "VLLM_USE_V2_MODEL_RUNNER=0"),
    "LoRA": ({"lora": True}, "V1", "--enable-lora"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_with_maps_is_refused(case):
    changes, runner, message = REFUSED[case]
    with pytest.raises(FastMTPError, match=message):
        refuse_unsupported(SERVER._replace(**changes), runner)
    refuse_unsupported(SERVER, "V1")


def test_one_map_for_all_requests(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "map.pt"))
    with pytest.raises(FastMTPError, match=r"SWIFT_FASTMTP_MAPS: .*map.pt: no such file"):
        maps_of(str(TINY), None)
    torch.save([5, 6], tmp_path / "map.pt")
    assert maps_of(str(TINY), None) == {EVERY: tmp_path / "map.pt"}


def router(maps, identify):
    made = VLLMRouter.__new__(VLLMRouter)
    made.head = RoutedHead(maps, 6144)
    made.identify = identify
    made.numbers = {name: i for i, name in enumerate(maps)}
    made.device, made.language_N = torch.device("cpu"), None
    return made


EN = "The heart pumps blood through the body, and the lungs fill it with oxygen."
ZH = "心脏把血液输送到全身，肺让血液充满氧气，这样人才能活着。"


def request(prompt, answer=()):
    return SimpleNamespace(prompt_token_ids=prompt, output_token_ids=list(answer))


def test_rows_follow_their_requests_however_the_batch_changes():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    made = router({"en": [1], "zh": [2]}, Languages(tokenizer, ["en", "zh"]))
    en, zh = tokenizer.encode(EN), tokenizer.encode(ZH)
    # Tokens that are still being computed are -1.
    one, two, other, no_ids = request(en, zh), request(zh, [*zh, -1, -1]), request([1, 2]), request(None)
    made.begin([one, two, other, no_ids])
    assert made.language_N.tolist() == [0, 1, 2, 2]
    made.begin([two, one])
    assert made.language_N.tolist() == [1, 0]
    for _ in range(AGAIN_EVERY - 2):
        made.begin([one])
    assert made.language_N.tolist() == [0]
    made.begin([one, other])  # the first answers in Chinese; the other's prompt is still being read
    assert made.language_N.tolist() == [1, 2]
    assert not hasattr(no_ids, "fastmtp_language") and other.fastmtp_steps == 0


def test_one_map_is_that_of_every_request():
    made = router({EVERY: [7, 9]}, None)
    assert not made.has_begun
    made.begin([request(None), request([1])])
    logits = made.logits(torch.randn(2, 4), torch.randn(6144, 4), torch.float32)
    assert made.has_begun and set(logits.argmax(-1).tolist()) <= {7, 9}


def test_the_command_names_the_map_and_what_the_folder_asks_for(tmp_path):
    torch.save([5, 6], tmp_path / "map.pt")
    words = command(serve_flags(TINY, "vllm", token_map=str(tmp_path / "map.pt")))
    assert words[:4] == ["env", f"{VARIABLE}={tmp_path / 'map.pt'}", "vllm", "serve"]
    draft = tmp_path / "draft"
    export_draft(write_trained(tmp_path / "trained"), draft)
    config = json.loads((draft / "config.json").read_text())
    config |= {"fastmtp_token_maps": {"en": "en.pt"}}
    (draft / "config.json").write_text(json.dumps(config))
    text = explain(serve_flags(draft, "vllm"))
    assert text.startswith("vllm serve") and "with this package beside it, fastmtp_token_maps of config.json" in text
    assert "trained for SGLang's graph" in text


def test_it_waits_for_the_draft_and_imports_nothing_for_it(tmp_path):
    """A stand-in for vLLM of two modules: `register` imports neither, and continues where `load_model` ends."""
    package = tmp_path / "vllm/v1/spec_decode"
    package.mkdir(parents=True)
    source = "class SpecDecodeBaseProposer:\n    def load_model(self, target_model): self.model = 5\n"
    (package / "llm_base_proposer.py").write_text(source)
    code = (
        "import sys; from swift_fastmtp.serving import vllm_plugin as plugin\n"
        "plugin.register(); assert 'vllm' not in sys.modules\n"
        "plugin._correct_graph = lambda drafter, target: print('loaded', drafter.model, target)\n"
        "plugin._route = lambda drafter, runner: print(runner)\n"
        "from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer\n"
        "SpecDecodeBaseProposer().load_model('target')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.split() == ["loaded", "5", "target", "V1"], done.stderr


def test_when_imported(tmp_path, monkeypatch):
    (tmp_path / "waited_for.py").write_text("VALUE = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders, called = list(sys.meta_path), []
    when_imported("waited_for", lambda: called.append(sys.modules["waited_for"].VALUE))
    assert not called
    import waited_for  # noqa: F401

    assert called == [1] and sys.meta_path == finders
    when_imported("waited_for", lambda: called.append(2))
    assert called == [1, 2]
    del sys.modules["waited_for"]


def test_nothing_is_waited_for_where_both_are_switched_off(monkeypatch):
    waits = []
    monkeypatch.setattr(vllm_plugin, "when_loaded", waits.append)
    monkeypatch.setenv(VARIABLE, "none")
    monkeypatch.setenv(ENGINE_VARIABLE, "none")
    vllm_plugin.register()
    assert not waits
    monkeypatch.delenv(ENGINE_VARIABLE)
    vllm_plugin.register()
    assert len(waits) == 1
