"""Nothing takes the CPU for granted: what runs on a GPU runs on a device that refuses the CPU's tensors.

The machines that these tests run on have no GPU. `helpers/other_device.py` stands for one, as far as devices go.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT, TINY

pytestmark = pytest.mark.matrix

BEGIN = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers.other_device import NAME, Other, OtherDevice, move
from swift_fastmtp.model import loading

load = loading.load_model
TINY, ROWS, OUT = sys.argv[1:]

def on_the_device(folder, dtype, device="cpu", **options):
    return move(load(folder, dtype, **options))

loading.load_model = on_the_device
"""
JOBS = {
    "distill": """
from swift_fastmtp.data import distill
distill.load_model = on_the_device
with OtherDevice():
    distill.distill(TINY, ROWS, OUT, max_new_tokens=12, batch_size=3, torch_dtype="float32")
""",
    "simulate": """
from swift_fastmtp.simulate import simulate
simulate.load_model = on_the_device
torch.save(list(range(500)), "map.pt")
with OtherDevice():
    for temperature in (0.0, 1.0):
        output = OUT if temperature else None
        options = {"max_new_tokens": 8, "temperature": temperature, "token_maps": ["map.pt"]}
        simulate.simulate(TINY, [], ROWS, output_dir=output, **options)
""",
    "fit": """
from swift_fastmtp.export import fit_head
fit_head.load_model = on_the_device
with OtherDevice():
    fit = fit_head.fit_projection(TINY, ROWS)
open(OUT, "w").write(str(fit.error))
""",
    "train": """
from swift_fastmtp.method.config import LOSSES, FastMTPConfig
with OtherDevice():
    model = on_the_device(TINY, torch.float32)
    model.freeze_backbone()
    ids = torch.randint(0, 6000, (2, 24), device=NAME)
    mask = (torch.arange(24, device=NAME) < torch.tensor([[24], [20]], device=NAME)).long()
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.head_parameters().values(), lr=1e-3)
    for loss in LOSSES:
        for rollout in ("exact", "paper"):
            model.fastmtp = FastMTPConfig(loss=loss, rollout=rollout)
            model.train()
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
    model.eval()
    result = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert isinstance(result.loss, Other)
open(OUT, "w").write("trained")
""",
}
MIXED = """
with OtherDevice():
    Other(torch.ones(2)) + torch.ones(2)
"""


def run(code, tmp_path):
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w") as file:
        for number in range(9):
            asked = {"role": "user", "content": f"What is {number} times {number}?"}
            file.write(
                json.dumps({"messages": [asked, {"role": "assistant", "content": f"It is {number**2}."}]}) + "\n"
            )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BEGIN + code, TINY, rows, tmp_path / "out"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)


@pytest.mark.parametrize("job", JOBS)
def test_on_another_device(job, tmp_path):
    done = run(JOBS[job], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out").exists()


def test_two_devices_do_not_mix(tmp_path):
    """Otherwise the tests above could not fail."""
    assert "add: tensors on two devices" in run(MIXED, tmp_path).stderr
