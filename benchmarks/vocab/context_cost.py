"""What a draft step costs on one thread of a CPU when every request has ids of its own, beside one static map.

A draft step is the products of the MTP layer's matrices, then of the output matrix's rows, then the largest logit. All
forms take turns, in an order that is drawn anew in every round, so that a slow minute slows all of them.
"""

import random
import time

import numpy as np
import torch

from swift_fastmtp.serving.routed_head import RoutedHead

SHAPES = {
    "SmolLM2-135M": {"vocabulary": 49_152, "hidden": 576, "keys": 192, "wide": 1536},
    "MiMo-7B": {"vocabulary": 151_680, "hidden": 4096, "keys": 1024, "wide": 11_008},
}


def cost(name, requests, ids, own_ids, rounds):
    """CPU seconds of each form, by round; a set is a base of `ids - own_ids` ids and `own_ids` of the request.

    `kept`: the rows of a request's own ids are copied when an id is new, `gathered`: in every step.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = SHAPES[name]
    V, D = shape["vocabulary"], shape["hidden"]
    weight_VD = torch.randn(V, D) / D**0.5
    layer = _layer(shape)
    hidden_RD = torch.randn(requests, D)
    order = torch.randperm(V)
    base = order[: ids - own_ids].sort().values
    own = [order[ids + r * own_ids :][:own_ids].sort().values for r in range(requests)]
    static_ND, base_ND = weight_VD[order[:ids].sort().values], weight_VD[base]
    own_RC = torch.stack(own)
    kept_RCD = weight_VD[own_RC]
    routed = RoutedHead({"all": order[:ids]}, V)
    by_request = RoutedHead({str(r): torch.cat([base, each]) for r, each in enumerate(own)}, V)
    zeros_R, numbers_R = torch.zeros(requests, dtype=torch.int64), torch.arange(requests)
    out_RV = torch.empty(requests, V)

    def static():
        return (hidden_RD @ static_ND.T).argmax(1)

    def context(own_RCD):
        of_base, at_base = (hidden_RD @ base_ND.T).max(1)
        of_own, at_own = torch.bmm(own_RCD, hidden_RD[:, :, None])[:, :, 0].max(1)
        mine = own_RC.gather(1, at_own[:, None])[:, 0]
        return torch.where(of_own > of_base, mine, base[at_base])

    heads = {
        "static": static,
        "context, rows kept": lambda: context(kept_RCD),
        "context, rows gathered": lambda: context(weight_VD[own_RC]),
        "routed, one map": lambda: routed(hidden_RD, weight_VD, zeros_R, out=out_RV).argmax(1),
        "routed, a map for each request": lambda: by_request(hidden_RD, weight_VD, numbers_R, out=out_RV).argmax(1),
        "whole": lambda: (hidden_RD @ weight_VD.T).argmax(1),
    }
    assert torch.equal(heads["context, rows kept"](), heads["routed, a map for each request"]())
    seconds = {form: [] for form in [*heads, "layer"]}
    for number in range(rounds + 1):
        forms = list(seconds)
        random.Random(number).shuffle(forms)
        for form in forms:
            taken = _seconds(lambda: _through(layer, hidden_RD) if form == "layer" else heads[form]())  # noqa: B023
            if number:  # the first round warms up
                seconds[form].append(taken)
    return seconds


def _layer(shape):
    """The matrices of an MTP layer: fusion, attention, MLP."""
    D, keys, wide = shape["hidden"], shape["keys"], shape["wide"]
    sizes = [(D, 2 * D), (D, D), (keys, D), (keys, D), (D, D), (wide, D), (wide, D), (D, wide)]
    return [torch.randn(size) for size in sizes]


def _through(layer, hidden_RD):
    for matrix in layer:
        hidden_RD.new_ones(len(hidden_RD), matrix.shape[1]) @ matrix.T


def _seconds(function, least=0.02):
    """CPU seconds of one call, the mean of as many as take 20 ms."""
    calls, started = 0, time.process_time()
    while True:
        function()
        calls += 1
        taken = time.process_time() - started
        if taken >= least:
            return taken / calls


def ratios(seconds, form, with_layer):
    """Median, least and largest ratio to the static map's time, over rounds."""
    layer = np.array(seconds["layer"]) if with_layer else 0.0
    of_form, of_static = (np.array(seconds[name]) + layer for name in (form, "static"))
    ratio = of_form / of_static
    return [round(float(x), 3) for x in (np.median(ratio), ratio.min(), ratio.max())]


def bytes_read(name, requests, ids, own_ids):
    """What a draft step of a batch reads with ids of requests over what it reads with one static map of as many ids,
    the layer's matrices with both: predicted time where reading weights is what takes it. Ids of two requests count
    twice, as if they never shared one."""
    shape = SHAPES[name]
    D, keys, wide = shape["hidden"], shape["keys"], shape["wide"]
    layer = 2 * D * D + 2 * D * D + 2 * D * keys + 3 * D * wide
    static = layer + ids * D
    return (layer + (ids - own_ids + requests * own_ids) * D) / static


def upkeep(own_ids, repeats=20_000):
    """Microseconds to add the tokens of one verification step to a request's ids, as a server's scheduler would."""
    rng = np.random.default_rng(0)
    known, kept = set(rng.integers(0, 150_000, own_ids).tolist()), []
    steps = rng.integers(0, 150_000, (repeats, 2)).tolist()
    started = time.process_time()
    for step in steps:
        for token in step:
            if token not in known:
                known.add(token)
                kept.append(token)
    return 1e6 * (time.process_time() - started) / repeats
