"""transformers' own `generate(use_mtp=True)` on what we export: one draft per round, of SGLang's graph.

It makes as many MTP layers as config.json says there are and runs each once, so the one layer drafts one token
(`MTPCandidateGenerator`, `MtpModel`). It knows that layer by its number in the published models.
"""

from dataclasses import replace

import pytest
import torch
from helpers.learning import learned
from helpers.models import RANDOM, random_glm4_moe, save_checkpoint
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from swift_fastmtp.simulate.acceptance import draft_rounds

TOKENS = 16
PROMPTS = ["a", "x = 1", "Hello", "好", "one two", "if"]  # short: the embedding at position 0 makes a difference


class Rounds(BaseStreamer):
    """Drafts accepted in each round: all of its tokens but the one that the model adds."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.numel())

    def end(self):
        """Nothing: `generate` calls it."""

    @property
    def accepted(self):
        _prompt, _first, *rounds = self.tokens
        return [number - 1 for number in rounds]


@pytest.mark.matrix  # so many layers take their time
def test_drafts_one_token_by_sglangs_graph(tmp_path):
    # As many layers as GLM-4.5-Air has: transformers takes no other number for the MTP layer's.
    base = save_checkpoint(random_glm4_moe, tmp_path / "base", num_hidden_layers=46, first_k_dense_replace=46)
    model, texts = learned(base, tmp_path, PROMPTS, TOKENS, 6, num_speculative_steps=1)

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    counted = []
    for text in texts:
        rounds, prompt = Rounds(), torch.tensor([text.ids[: text.start]])
        (ids,) = stock.generate(prompt, max_new_tokens=TOKENS, do_sample=False, use_mtp=True, streamer=rounds)
        assert ids.tolist() == text.ids[: text.end]
        counted.append(rounds.accepted)
    assert counted == simulated(model, texts)
    assert {0, 1} == {accepted for rounds in counted for accepted in rounds}
    for field in ("hidden_before_norm", "mask_position_zero"):
        graph = model.head.graph
        model.head.graph = replace(graph, **{field: True})
        assert counted != simulated(model, texts), field
        model.head.graph = graph


def simulated(model, texts):
    """The simulator's rounds, without drafts past the end of an answer: transformers cuts them off."""
    rounds = []
    for text, accepted in zip(texts, draft_rounds(model, texts, 0, 8)[0], strict=True):
        past = 1 + sum(accepted) + len(accepted) - (text.end - text.start)
        rounds.append([*accepted[:-1], accepted[-1] - past])
    return rounds


def test_of_these_families_only():
    """Whose configuration in transformers has a number of MTP layers; it says how many there are to draft with."""
    with_layers = set()
    for name, make in RANDOM.items():
        config = make().config
        if type(config).__module__.startswith("transformers.") and hasattr(config, "num_mtp_layers"):
            with_layers.add(name)
    assert with_layers == {"deepseek_v3", "glm4_moe"}
