"""What tests of whole engines do with a small random model: let its MTP layer learn the answers it will be asked for.

Random models say nothing that a draft could learn but by heart.
"""

import torch
from transformers import AutoTokenizer

from helpers.models import save_tied
from helpers.paths import TINY
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.mtp_tensors import read_head
from swift_fastmtp.export.folders import export_full
from swift_fastmtp.export.graft import graft
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import head_shapes, load_head, load_model
from swift_fastmtp.simulate.acceptance import draft_rounds, make_texts
from swift_fastmtp.swift_plugin.tuner import FastMTPTuner


def learned(base, folder, prompts, tokens, learn_steps, chat_template="{{ messages[0]['content'] }}", **knobs):
    """A model whose head has learned its greedy responses to the prompts, and those texts.

    The head is exported to `folder`/full and read back from there, so it is as served: in the base's dtype.
    """
    model, tokenizer = load_model(base, torch.float32), AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    # The default loss learns the model's own distribution, which is nearly flat here: no draft would be accepted.
    model.fastmtp, model.model_dir = FastMTPConfig(loss="ce", **knobs), base
    rows = [{"messages": [{"role": "user", "content": text}]} for text in prompts]
    texts = make_texts(model, tokenizer, rows, tokens, "generate", 8)
    learn(model, texts, learn_steps)
    FastMTPTuner.save_pretrained(model, str(folder / "checkpoint"))
    export_full(folder / "checkpoint", folder / "full")
    load_head(model, read_head(Checkpoint(folder / "full"), model.family, head_shapes(Checkpoint(base))))
    return model, texts


def learned_beside(kind, folder, prompts, tokens, steps):
    """A dense model of random weights, a draft-only folder with a layer that has learned its responses, these texts,
    and the drafts that the simulator accepts in each round of them, `steps` to a round.

    The layer learns in the model that it can be put into, and is served beside the one that it was made for.
    """
    target = save_tied(folder / "target", kind)
    graft(target, folder / "whole", init_from_last_layer=True)
    model, texts = learned(folder / "whole", folder, prompts, tokens, 6, num_speculative_steps=steps)
    graft(target, folder / "draft", folder / "checkpoint", draft_only=True)
    return target, folder / "draft", texts, draft_rounds(model, texts, 0, 8)[steps - 1]


def learn(model, texts, steps):
    """The head learns the answers by heart; in fewer steps, some of them."""
    model.freeze_backbone()
    model.train()
    optimizer = torch.optim.Adam(model.head_parameters().values(), lr=1e-2)
    for _ in range(steps):
        for text in texts:
            ids = torch.tensor([text.ids])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def log_probabilities(model, text):
    """Of the answer's tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text.ids[: text.end]])).logits[0, text.start - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(text.ids[text.start : text.end])[:, None])[:, 0]
