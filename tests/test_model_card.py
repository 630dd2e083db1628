"""The model card: read from the folder and the results, telling no paths, and never written over somebody's text."""

import json
import os
import re
import shutil

import pytest
import yaml
from helpers.bench_results import table_2
from helpers.paths import TINY

from swift_fastmtp.checkpoint.checkpoint import WEIGHTS_FILE
from swift_fastmtp.errors import FastMTPError
from swift_fastmtp.files.known_files import read_object
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.report.model_card import front_matter, hub_name_of, make_card, write_card


@pytest.fixture
def base(tmp_path):
    """A base model in a hub's cache."""
    folder = tmp_path / "secret place" / "models--XiaomiMiMo--MiMo-7B-RL" / "snapshots" / "abc"
    shutil.copytree(TINY, folder)
    return folder


def exported(base, folder, full=True):
    """What an export leaves, without training: the card reads only names and shapes of tensors."""
    folder.mkdir()
    for name in ("config.json", "configuration_mimo.py", *(["README.md"] if full else [])):
        os.link(base / name, folder / name)
    if full:
        os.link(base / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(base / WEIGHTS_FILE)
        save_file({n: t for n, t in tensors.items() if "mtp_layers" in n}, folder / WEIGHTS_FILE)
    write_json(
        {"swift_fastmtp": "0.1.0", "num_speculative_steps": 3, "beta": 0.6, "loss": "kl", "token_map": "/secret/zh.pt",
         "loss_chunk_size": 1024, "base_model": str(base), "base_fingerprint": "ab" * 32},
        folder / "fastmtp.json",
    )  # fmt: skip
    return folder


@pytest.fixture
def full(base, tmp_path):
    return exported(base, tmp_path / "MiMo-7B-FastMTP")


@pytest.fixture
def results(tmp_path):
    value = table_2()
    value["servers"]["tuned-k3"] |= {"model": "/secret/MiMo-7B-FastMTP", "command": ["python", "/secret/serve.py"]}
    value["provenance"]["command"] = ["fastmtp", "bench", "/secret/plan.yaml"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_card_of_a_full_export(full, base, results):
    before = (base / "README.md").read_bytes()
    assert (full / "README.md").samefile(base / "README.md")
    path = write_card(full, results)
    assert path == full / "README.md"
    assert (base / "README.md").read_bytes() == before, "written through the hard link"
    text = re.sub(" +", " ", path.read_text(encoding="utf-8"))  # cells are padded
    assert front_matter(path) == {
        "license": "apache-2.0",
        "language": ["en", "zh"],
        "base_model": "XiaomiMiMo/MiMo-7B-RL",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fastmtp", "mtp", "multi-token-prediction", "speculative-decoding", "sglang"],
    }
    assert "secret" not in text
    assert "[XiaomiMiMo/MiMo-7B-RL](https://huggingface.co/XiaomiMiMo/MiMo-7B-RL)" in text
    assert "| parameters of the MTP layer | 468,224 |" in text
    assert "| `beta` | `0.6` |" in text and "| `token_map` | `zh.pt` |" in text and "loss_chunk_size" not in text
    assert "| ZH. | 3 | zh-16384 (16,384 ids) | 2.525 | 62.928 | 1.990× |" in text
    assert "marginal" in text and "conditional" in text and "80 of 80" in text and "made by hand" in text
    assert "--model-path MiMo-7B-FastMTP" in text and "--speculative-token-map zh.pt" in text
    assert "--speculative-num-steps 3" in text and "vllm serve MiMo-7B-FastMTP" in text
    answer = "[Measured](#measured):\n\n* Fastest: FastMTP with K = 3, 1.76× the baseline's speed"
    assert text.index(answer) < text.index("| base model |") < text.index("## Measured\n")
    assert "grammatical fragments" not in text, "the base's card is linked to, not copied"


def test_card_of_a_draft_only_folder(base, tmp_path):
    folder = exported(base, tmp_path / "draft", full=False)
    text = write_card(folder, base_model="Other/Base").read_text(encoding="utf-8")
    matter = front_matter(folder / "README.md")
    assert matter["base_model"] == "Other/Base" and matter["library_name"] == "sglang"
    assert matter["license"] == "apache-2.0"  # of the base's card, though the folder has none
    assert "--model-path Other/Base" in text and "--speculative-draft-model-path draft" in text
    assert "vllm serve Other/Base" in text and '"model": "draft"' in text and str(tmp_path) not in text
    assert "Nothing yet" in text and "secret" not in text


def test_an_unknown_base_is_said_to_be_unknown(base, full, tmp_path):
    settings = read_object(full / "fastmtp.json")
    plain = tmp_path / "my model"
    shutil.copytree(base, plain)
    (plain / "README.md").unlink()
    write_json({**settings, "base_model": str(plain)}, full / "fastmtp.json")
    (full / "README.md").unlink()
    text = make_card(full)
    matter = yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.S)[1])
    assert "base_model" not in matter and "license" not in matter
    assert "# license: not found" in text and "# base_model: OWNER/NAME" in text
    assert "`my model`" in text and str(tmp_path) not in text
    write_json({"swift_fastmtp": "0.1.0"}, full / "fastmtp.json")
    assert "its base model" in make_card(full)


def test_a_card_is_made_again_but_nobodys_text_is_lost(full, results):
    write_card(full)
    write_card(full, results)  # ours, as we left it
    path = full / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("## Limits", "## My own limits"), encoding="utf-8")
    with pytest.raises(FastMTPError, match="move it away"):
        write_card(full)
    assert "My own limits" in path.read_text(encoding="utf-8")
    write_card(full, overwrite=True)
    path.write_text("# mine\n")
    with pytest.raises(FastMTPError, match="move it away"):
        write_card(full, results)
    assert path.read_text() == "# mine\n" and sorted(p.name for p in full.iterdir() if p.name.startswith(".")) == []
    path.unlink()
    path.symlink_to("/nowhere")
    with pytest.raises(FastMTPError, match="move it away"):
        write_card(full)


def test_a_copy_of_the_bases_card_is_not_somebodys_text(full, base):
    (full / "README.md").unlink()
    shutil.copyfile(base / "README.md", full / "README.md")
    write_card(full)
    assert front_matter(full / "README.md")["license"] == "apache-2.0"


def test_bad_input_is_one_line_and_writes_nothing(full, base, tmp_path):
    before = (full / "README.md").read_bytes()
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(FastMTPError, match=r"results\.json"):
        write_card(full, tmp_path / "results.json")
    with pytest.raises(FastMTPError, match="--base_model"):
        write_card(full, base_model="https://huggingface.co/a/b")
    with pytest.raises(FastMTPError, match=r"fastmtp\.json"):
        write_card(base)
    assert (full / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/hub/models--XiaomiMiMo--MiMo-7B-RL/snapshots/0a1b", "XiaomiMiMo/MiMo-7B-RL"),
        ("/x/.cache/modelscope/hub/models/XiaomiMiMo/MiMo-7B-RL-0530", "XiaomiMiMo/MiMo-7B-RL-0530"),
        ("/x/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B", "Qwen/Qwen2.5-7B"),
        ("XiaomiMiMo/MiMo-7B-RL", "XiaomiMiMo/MiMo-7B-RL"),
        ("/data/models/MiMo-7B-RL", None),
        ("./MiMo", None),
        ("../MiMo", None),
        ("", None),
    ],
)
def test_hub_name_of_a_path(path, name):
    assert hub_name_of(path) == name


@pytest.mark.parametrize("text", ["", "no block", "---\n[1, 2\n---\n", "---\n- a\n---\n", "---\nopen: end\n"])
def test_a_broken_card_of_the_base_is_none(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path / "README.md") == {}
    assert front_matter(tmp_path / "none.md") == {}
