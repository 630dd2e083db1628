"""Inputs of the losses, at random."""

import torch


def case(K, N, R, D, V, seed, dtype=torch.float64):
    """Random outputs, weight, targets, validity, hidden states and rows; a row's teachers lie inside `hidden`."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(R, generator=g)[:N].sort().values
    valid = (torch.rand(K, N, generator=g) < 0.7) & (rows + torch.arange(1, K + 1)[:, None] < R)
    return (
        torch.randn(K, N, D, generator=g, dtype=dtype),
        torch.randn(V, D, generator=g, dtype=dtype) * 0.7,
        torch.randint(0, V, (K, N), generator=g),
        valid,
        torch.randn(R, D, generator=g, dtype=dtype),
        rows,
    )
