"""What several benchmarks do the same way."""

from pathlib import Path

import torch

from swift_fastmtp.files.staging import write_json


def collate(texts, pad):
    """Token ids, attention mask and labels [B, T] of texts (`simulate.acceptance.Text`): answers are supervised."""
    width = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        mask[row, : len(text.ids)] = 1
        labels[row, text.start : text.end] = ids[row, text.start : text.end]
    return ids, mask, labels


def take_step(loss, parameters, optimizer, schedule):
    """Down the gradient of a loss, clipped to a norm of 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


class Muon(torch.optim.Optimizer):
    """torch's Muon for matrices, at steps as large as AdamW's (`match_rms_adamw`), and AdamW for what is none."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
        ]

    def step(self, closure=None):
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]  # the schedule's
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, of_part in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(of_part)


def write_result(record, page, output):
    """`output`.json and `output`.md."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, output.with_suffix(".json"))
    output.with_suffix(".md").write_text(page)
