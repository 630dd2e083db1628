"""What tests of whole engines do with a small random model: let its MTP layer learn the answers it will be asked for.

Random models say nothing that a draft could learn but by heart.
"""

import torch


def learn(model, texts, steps=20):
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
