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


def write_result(record, page, output):
    """`output`.json and `output`.md."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, output.with_suffix(".json"))
    output.with_suffix(".md").write_text(page)
