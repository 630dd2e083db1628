"""A random language of few tokens, speculative decoding of it, and a verifier that takes its random numbers as given.

The verifier is what engines' kernels are held to: given the same numbers they must accept the same drafts and write the
same token.
"""

import torch

STEPS = 3


def language(vocab, seed, spread=1.0):
    """Probabilities [V, V] of the token that follows each token."""
    return (spread * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def verify(drafts_NK, q_NKV, p_NKV, coins_NK, last_N, block=False):
    """Leviathan et al. 2023, Algorithm 1, or with `block` Sun et al. 2024, Algorithm 2: (accepted drafts [N], the token
    after them [N]).

    Args:
        drafts_NK: drawn from q.
        p_NKV: of the target, [N, K + 1, V].
        coins_NK, last_N: uniform numbers in [0, 1): one for each draft, one for the token after the accepted ones.
    """
    N, K = drafts_NK.shape
    rows = torch.arange(N)
    p_of = p_NKV[:, :K].gather(2, drafts_NK[:, :, None])[..., 0]
    q_of = q_NKV.gather(2, drafts_NK[:, :, None])[..., 0]
    scale_N1 = torch.ones(N, 1, dtype=p_NKV.dtype)
    if block:
        prefix = [scale_N1[:, 0]]
        for k in range(K):
            prefix.append((prefix[-1] * p_of[:, k] / q_of[:, k]).clamp(max=1))
        accepted = torch.zeros(N, dtype=torch.long)
        for i in range(1, K + 1):  # the longest that is accepted counts
            chance = prefix[i]
            if i < K:
                left = (prefix[i][:, None] * p_NKV[:, i] - q_NKV[:, i]).clamp(min=0).sum(-1)
                chance = torch.where(chance < 1, left / (left + 1 - chance), chance)
            accepted[coins_NK[:, i - 1] < chance] = i
        scale_N1 = torch.stack(prefix, 1)[rows, accepted][:, None]
    else:
        accepted = (coins_NK * q_of < p_of).long().cumprod(1).sum(1)
    rest_NV = (scale_N1 * p_NKV[rows, accepted] - q_NKV[rows, accepted.clamp(max=K - 1)]).clamp(min=0)
    weights_NV = torch.where((accepted < K)[:, None], rest_NV, p_NKV[rows, accepted])
    total_NV = weights_NV.cumsum(-1)
    return accepted, (total_NV <= (last_N * weights_NV.sum(-1))[:, None]).sum(-1).clamp(max=p_NKV.shape[-1] - 1)


def drafted(target_VV, draft_VV, last_N, generator, steps=STEPS):
    """Drafts [N, K] behind each token, drawn from the draft, what they were drawn from [N, K, V], and what the target
    says [N, K + 1, V]."""
    tokens = [last_N]
    for _ in range(steps):
        tokens.append(torch.multinomial(draft_VV[tokens[-1]], 1, generator=generator)[:, 0])
    before = torch.stack(tokens, 1)
    return before[:, 1:], draft_VV[before[:, :-1]], target_VV[before]


def decode(target_VV, draft_VV, block, chains, length, seed):
    """Texts [N, length + K] that begin with token 0, and per text the drafts accepted in each round that began before
    its token `length`."""
    generator = torch.Generator().manual_seed(seed)
    texts, at = torch.zeros(chains, length + 2 * STEPS + 2, dtype=torch.long), torch.zeros(chains, dtype=torch.long)
    rounds = [[] for _ in range(chains)]
    while len(alive := (at < length - 1 + STEPS).nonzero()[:, 0]):
        drafts, q, p = drafted(target_VV, draft_VV, texts[alive, at[alive]], generator)
        coins, last = torch.rand(drafts.shape, generator=generator), torch.rand(len(alive), generator=generator)
        accepted, after = verify(drafts, q, p, coins, last, block)
        for row, chain, count, token in zip(
            range(len(alive)), alive.tolist(), accepted.tolist(), after.tolist(), strict=True
        ):
            start = int(at[chain])
            if start < length - 1:
                rounds[chain].append(count)
            texts[chain, start + 1 : start + 2 + count] = torch.tensor([*drafts[row, :count].tolist(), token])
            at[chain] += count + 1
    return texts[:, : length + STEPS], rounds


def ratios(target_VV, draft_VV, text, length):
    """q / p [K, A] of a text's tokens, as `simulate.acceptance.likelihood_ratios` has them."""
    before, after = text[:-1], text[1:]
    each = (draft_VV[before, after] / target_VV[before, after]).double()
    return torch.stack([each[k : k + length] for k in range(STEPS)])
