"""Families behind stock vLLM on a CPU: the text is the model's own, the rounds are those of vLLM's graph.

What vLLM computes otherwise than SGLang is a few fields of each family's `Graph`. With any of those that are set left
out, the simulator's rounds are others than vLLM's. So each field is seen in the engine, not only read in its source.
"""

import shutil
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from helpers.learning import learned, log_probabilities
from helpers.models import (
    WIDE_HEADS,
    random_deepseek_v3,
    random_ernie,
    random_glm4_moe,
    random_qwen3_next,
    save_checkpoint,
)
from helpers.paths import TINY
from helpers.vllm_jobs import VLLMJobs
from safetensors.torch import load_file, save_file

from swift_fastmtp.families.family import Graph
from swift_fastmtp.simulate.acceptance import draft_rounds

pytestmark = pytest.mark.matrix

TOKENS, STEPS = 24, 5
# So short that the first token is a large part of what the others attend to, and what it is shows.
PROMPTS = ["a", "b", "x = 1", "Hello", "好", "The", "one two", "if"]

# The others of the table that vLLM has a draft class for are not here: docs/dev-families.md says what stops each.
# vLLM's kernels for a CPU take latents of 512 beside 64 with a position.
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32}


def random_ernie_without_bias(*args, **sizes):
    """Without a bias of the routers: vLLM's router for CPUs leaves it out where experts have no groups
    (`fused_moe/router/cpu_router.py`), so the backbone would be another one."""
    model = random_ernie(*args, **sizes)
    for name, tensor in model.state_dict().items():
        if "e_score_correction_bias" in name:
            tensor.zero_()
    return model


def save_spread_mimo(folder):
    """The tiny MiMo, whose trained norms are all alike, with norms that make a difference of before and after."""
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" in name:
            torch.nn.init.uniform_(tensor, 0.3, 2.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FLOAT32 = {
    "mimo": save_spread_mimo,
    "glm4_moe": partial(save_checkpoint, random_glm4_moe, **WIDE_HEADS, head_dim=32),
    "deepseek_v3": partial(save_checkpoint, random_deepseek_v3, **WIDE_HEADS, **LATENT),
    "ernie4_5_moe": partial(save_checkpoint, random_ernie_without_bias, **WIDE_HEADS),
}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    with VLLMJobs(tmp_path_factory.mktemp("vllm") / "log") as jobs:
        yield jobs


def simulated(model, texts):
    return draft_rounds(model, texts, 0, 8)[STEPS - 1]


@pytest.mark.parametrize("name", FLOAT32)
def test_lossless_and_by_its_own_graph(name, vllm, tmp_path, shown):
    base = FLOAT32[name](tmp_path / "base")
    model, texts = learned(base, tmp_path, PROMPTS, TOKENS, 4, num_speculative_steps=STEPS, engine="vllm")
    prompts = [text.ids[: text.start] for text in texts]
    options = {"sampling": {"logprobs": 0}, "trust_remote_code": model.family.engines.remote_code}
    (answers,) = vllm.run(tmp_path / "full", [prompts], TOKENS, STEPS, **options)
    for answer, text in zip(answers, texts, strict=True):
        assert answer.ids == text.ids[text.start : text.end]
        served = torch.tensor(answer.log_probabilities)
        torch.testing.assert_close(log_probabilities(model, text), served, atol=2e-5, rtol=0)
    rounds = [answer.accepted for answer in answers]
    assert rounds == simulated(model, texts)
    assert {0, STEPS} <= {accepted for answer in rounds for accepted in answer}
    # Each field of the graph is needed for that.
    graph = model.head.graph
    for field in fields(Graph):
        if getattr(graph, field.name) is True:
            model.head.graph = replace(graph, **{field.name: False})
            assert simulated(model, texts) != rounds, field.name
    shown("vLLM", model.family.architectures)


def test_linear_attention_in_bfloat16(vllm, tmp_path):
    """Qwen3-Next, whose linear attention has a kernel for CPUs in bfloat16 only.

    That is too coarse for an exact comparison: a random model's tokens are near ties, so most texts part from those in
    float32 somewhere, and drafts do. This shows less than the test above: vLLM loads the export and drafts, the first
    token's log-probabilities are near, and where a text is the same, which is so for some, it takes about as many
    rounds as the simulator says.
    """
    linear = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    base = save_checkpoint(random_qwen3_next, tmp_path / "base", **WIDE_HEADS, **linear, head_dim=32)
    model, texts = learned(base, tmp_path, PROMPTS, TOKENS, 4, num_speculative_steps=STEPS, engine="vllm")
    prompts = [text.ids[: text.start] for text in texts]
    options = {"sampling": {"logprobs": 0}, "dtype": "bfloat16"}
    (answers,) = vllm.run(tmp_path / "full", [prompts], TOKENS, STEPS, **options)
    rounds, served_rounds, expected_rounds = simulated(model, texts), 0, 0
    for answer, text, accepted in zip(answers, texts, rounds, strict=True):
        served, expected = answer.log_probabilities[0], log_probabilities(model, text)[0]
        assert served == pytest.approx(float(expected), abs=0.2)
        if answer.ids == text.ids[text.start : text.end]:
            served_rounds += len(answer.accepted)
            expected_rounds += len(accepted)
    assert served_rounds == pytest.approx(expected_rounds, rel=0.1)
    assert served_rounds
