"""Hidden states that an engine computes: rows, the server's flags, ours to compare with."""

import json

import torch

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.method.rollout import segment_ids
from swift_fastmtp.model.hidden_cache import EngineStates, HiddenCache

STATES = ["--enable-return-hidden-states", "--disable-radix-cache", "--chunked-prefill-size", "-1"]


def states_of(model, ids):
    """[T, D] of a prompt, as the model's own backbone computes them for the engine that it is trained for."""
    positions = torch.arange(len(ids))[None]
    return model.backbone_states(torch.tensor([ids]), None, positions, segment_ids(positions))[0]


def cache_of(folder, target, width, dtype="float32"):
    """A cache of a model, as `fastmtp hidden` fills it from SGLang."""
    states = EngineStates("SGLang", "0.5.23", dtype, None, width)
    return HiddenCache.from_engine(folder, Checkpoint(target).fingerprint, states, 2**30)


def write_rows(path, count=24):
    """Chat rows of different lengths, no two alike."""
    with open(path, "w") as file:
        for number in range(count):
            asked = {"role": "user", "content": f"What is {number} times {number + 1}?"}
            answer = {"role": "assistant", "content": f"It is {number * (number + 1)}. " * (1 + number % 7)}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    return path
