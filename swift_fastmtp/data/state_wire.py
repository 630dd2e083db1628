"""Hidden states in an answer of SGLang as bytes, where its server has our plugin.

SGLang writes them as lists of numbers, about 20 characters each; text is most of the work on both sides. A request that
has `PARAMETER` among its sampling parameters' `custom_params` gets them in base64, in the engine's dtype, under `KEY`
of its `meta_info` (`serving/sglang_plugin.py`). A server without the plugin passes over the parameter and answers in
lists, so nobody has to say which kind a server is.
"""

import base64
from typing import Any

import numpy as np
import torch

PARAMETER = "fastmtp_states"
KEY = "fastmtp_states"


def encode(states_TD: torch.Tensor) -> dict[str, Any]:
    """States [T, D] on the CPU as JSON can hold them."""
    data = states_TD.contiguous().view(torch.uint8).numpy()
    return {
        "dtype": str(states_TD.dtype).removeprefix("torch."),
        "shape": list(states_TD.shape),
        "base64": base64.b64encode(data.data).decode("ascii"),
    }


def decode(value: Any) -> torch.Tensor:
    """What `encode` was given. Raises `ValueError` for anything else."""
    try:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[value["dtype"]]
        data = np.frombuffer(base64.b64decode(value["base64"], validate=True), np.uint8)
        rows, width = (int(size) for size in value["shape"])
        return torch.from_numpy(data.copy()).view(dtype).view(rows, width)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"hidden states that cannot be read ({error!r})") from None
