"""All answers that a model can give to one prompt at top_k 2, with their exact probabilities, and what follows for a
server that samples them: how its answers are distributed, and how many drafts its first round accepts."""

import torch

from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.verification import block_acceptance, rejection_acceptance
from swift_fastmtp.simulate.acceptance import Text, greedy_acceptance, likelihood_ratios

# Of the tiny model with its first tokens only: every draft draws a random number for each of its tokens.
VOCAB = 128
# A prompt after which no outcome is rarer than 1 in 60, and every kind of drafts is accepted now and then.
PROMPT = [63, 63, 101, 29, 108, 18]
STEPS, TOKENS = 3, 5  # the first token, three drafts, and what follows them when all are accepted
# top_p excludes nothing here: with top_k alone vLLM 0.32.0 stops (docs/dev/upstream/vllm-top-k-without-drafts.md).
TOP_K, TOP_P = 2, 0.99999
CRITICAL = 61.1  # 0.999 quantile of chi-square with 2 ** TOKENS - 1 = 31 degrees of freedom


def outcomes(model, temperature):
    """Each answer that top_k allows, and its probability, by transformers: (tokens, probability)."""
    answers = [((), 1.0)]
    for _ in range(TOKENS):
        ids = torch.tensor([[*PROMPT, *tokens] for tokens, _ in answers])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1].double() / temperature
        best = logits.topk(TOP_K)
        longer = []
        for (tokens, probability), next_tokens, next_probabilities in zip(
            answers, best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True
        ):
            for token, p in zip(next_tokens, next_probabilities, strict=True):
                longer.append(((*tokens, token), probability * p))
        answers = longer
    return dict(answers)


def chi_square(counts, probabilities):
    total = sum(counts.values())
    return sum((counts.get(tokens, 0) - total * p) ** 2 / (total * p) for tokens, p in probabilities.items())


def first_round(model, temperature, regime, engine, token_map=None):
    """Probabilities that the first k drafts of the first round are accepted, k = 1..K: the mean over all answers, each
    with its own."""
    model.fastmtp = FastMTPConfig(num_speculative_steps=STEPS, engine=engine)
    probabilities = outcomes(model, temperature)
    texts = [Text([*PROMPT, *tokens], len(PROMPT), len(PROMPT) + TOKENS) for tokens in probabilities]
    given = (model, texts, 0, len(texts))
    if regime == "greedy":
        (accepted,) = greedy_acceptance(*given, [token_map])
    else:
        (ratios,) = likelihood_ratios(*given, temperature, [token_map], top_k=TOP_K, top_p=TOP_P)
        accepted = list(map({"rejection": rejection_acceptance, "block": block_acceptance}[regime], ratios))
    chains = torch.stack([of_text[:, 0] for of_text in accepted]).double().cumprod(1)
    return torch.tensor(list(probabilities.values())).double() @ chains


def deviations(accepted, total, rates):
    """Of how many of `total` first rounds accepted k drafts or more [K] from what `rates` say, in standard
    deviations."""
    return (torch.as_tensor(accepted) - total * rates) / (total * rates * (1 - rates)).sqrt()
