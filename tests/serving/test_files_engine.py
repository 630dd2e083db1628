"""SGLang's own loader picks the files that `weight_files.resolve` says it picks, for folders of every kind."""

import json
import os
import random
import subprocess

import pytest
from helpers.engine import SERVING, engine_python

from swift_fastmtp.checkpoint.weight_files import INDEX_FILE, resolve
from swift_fastmtp.errors import FastMTPError

pytestmark = pytest.mark.engine

NAMES = [
    "model.safetensors",
    "mtp.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "consolidated.safetensors",
]
# Run by SGLang's Python: folders from stdin; for each the files' names in order, or null where it stops.
CODE = """
import json, os, sys, types
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader import loader
from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors

loader.get_server_args = lambda: None
answers = []
for folder in json.load(sys.stdin):
    config = types.SimpleNamespace(**json.load(open(os.path.join(folder, "config.json"))))
    try:
        where, files, _ = loader.DefaultModelLoader(LoadConfig())._prepare_weights(folder, None, True)
        files = maybe_add_mtp_safetensors(files, where, "model.safetensors.index.json", config)
        answers.append([os.path.basename(file) for file in files])
    except RuntimeError:
        answers.append(None)
print("ANSWERS", json.dumps(answers))
"""


def make_folder(folder, rng):
    """Some of the files, an index that lists some of them or others, one architecture of which SGLang adds a file."""
    folder.mkdir()
    here = rng.sample(NAMES, rng.randint(0, 4))
    for name in here:
        (folder / name).write_bytes(b"")
    config = {
        "architectures": [rng.choice(["Glm4MoeForCausalLM", "MiMoForCausalLM"])],
        "num_nextn_predict_layers": rng.choice([0, 1, 1]),
    }
    (folder / "config.json").write_text(json.dumps(config))
    if rng.random() < 0.7:
        listed = rng.sample(here, rng.randint(1, len(here))) if here and rng.random() < 0.7 else rng.sample(NAMES, 2)
        weight_map = {f"tensor.{number}": name for number, name in enumerate(listed)}
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def answer(folder):
    try:
        chosen = resolve(folder)
    except FastMTPError:
        return None
    return None if "sglang" in chosen.refusals else sorted(path.name for path in chosen.files)


def test_sglang_loads_the_files_that_we_read(tmp_path):
    rng = random.Random(0)
    folders = [make_folder(tmp_path / str(number), rng) for number in range(400)]
    environment = {**os.environ, "PYTHONPATH": str(SERVING / "stand_in"), "SGLANG_USE_CPU_ENGINE": "1"}
    environment["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(
        [engine_python(), "-W", "ignore", "-c", CODE],
        input=json.dumps([str(folder) for folder in folders]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    theirs = [names and sorted(names) for names in json.loads(line.removeprefix("ANSWERS "))]
    ours = [answer(folder) for folder in folders]
    assert 50 < sum(names is None for names in theirs) < 350  # both kinds are among them
    for folder, want, got in zip(folders, theirs, ours, strict=True):
        assert got == want, sorted(os.listdir(folder))
