"""The projection of a head that is made from the last decoder layer, fitted in closed form.

The head's block is a copy of the last decoder layer (`init_head.py`). At position i + 1 that layer got some state
x_{i+1} from the layer below it; the head has h_i and the embedding of token i + 1 instead. So the projection is the
linear map that gives x_{i+1} best, over the tokens of some texts:

    proj = argmin_W  sum_i |W [norm_h(h_i), norm_e(e_{i+1})] - x_{i+1}|^2 + ridge |W|^2

Two matrices of sums are kept, so memory does not depend on the number of texts. The backbone runs over each text once,
without gradients, and nothing is trained.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..data.chat_template import load_tokenizer
from ..data.examples import turns
from ..errors import FastMTPError
from ..files.rows import read_rows
from ..method.rollout import segment_ids, shift_left
from ..model.loading import load_model

MAX_TOKENS = 1024
"""Of a text that are read."""
HELD_OUT = 8
"""Every 8th text chooses the ridge."""
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Multiples of the mean square of the inputs that are tried."""


class Sums(NamedTuple):
    """What a least-squares fit needs of its texts, float64."""

    inputs_II: torch.Tensor
    """Inputs times inputs."""
    products_IO: torch.Tensor
    """Inputs times outputs."""
    squares: float
    """Of the outputs."""
    positions: int

    def error(self, weight_OI: torch.Tensor) -> float:
        """Mean squared error of a map, as a share of the outputs' own mean square."""
        predicted = (weight_OI @ self.inputs_II * weight_OI).sum()
        return float((self.squares - 2 * (weight_OI.T * self.products_IO).sum() + predicted) / self.squares)

    def on_cpu(self) -> "Sums":
        return self._replace(inputs_II=self.inputs_II.cpu(), products_IO=self.products_IO.cpu())


class Fit(NamedTuple):
    """The projection and how well it fits."""

    weight: torch.Tensor
    """[D, 2 D]"""
    error: float
    """Of the texts that were held out, as a share of what is to be explained."""
    ridge: float
    positions: int


def texts_of(folder: str | Path, rows: str, max_rows: int | None) -> Iterator[list[int]]:
    """Token ids of the rows of a file: prompt and answer as the model's chat template renders them.

    Raises `FastMTPError` naming the row that cannot be rendered.
    """
    tokenizer = load_tokenizer(str(folder))
    for number, row in enumerate(read_rows(rows, max_rows)):
        try:
            answered = list(turns(tokenizer, row, trainable_only=False))
        except FastMTPError as error:
            raise FastMTPError(f"{rows}: row {number + 1}: {error}") from None
        if answered:
            yield (answered[-1].asked + answered[-1].answered)[:MAX_TOKENS]


def fit_projection(folder: str | Path, rows: str, max_rows: int | None = None) -> Fit:
    """Fit the projection of the MTP layer of the checkpoint in `folder`, which is loaded in float32.

    Args:
        folder: checkpoint whose MTP layer was made from its last decoder layer
        rows: JSONL or Parquet of conversations with answers, the model's own at best
        max_rows: of the file, from its top; default: all

    Raises `FastMTPError` for rows that cannot be read or are too few.
    """
    model = load_model(folder, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    fitted, held_out = None, None
    for number, ids in enumerate(tqdm(texts_of(folder, rows, max_rows), desc="fit", unit="text")):
        if len(ids) < 2:
            continue
        sums = _sums(model, torch.tensor([ids], device=model.device))
        if number % HELD_OUT == HELD_OUT - 1:
            held_out = _added(held_out, sums)
        else:
            fitted = _added(fitted, sums)
    if fitted is None or held_out is None:
        raise FastMTPError(f"{rows}: a fit needs at least {HELD_OUT} rows with answers")
    fitted, held_out = fitted.on_cpu(), held_out.on_cpu()
    fits = []
    for ridge in RIDGES:
        weight = solve(fitted, ridge)
        fits.append(Fit(weight.float(), held_out.error(weight), ridge, fitted.positions))
    return min(fits, key=lambda fit: fit.error)


def solve(sums: Sums, ridge: float) -> torch.Tensor:
    """W [O, I] of the ridge regression, `ridge` in multiples of the mean square of the inputs."""
    width = len(sums.inputs_II)
    added = ridge * sums.inputs_II.diagonal().mean()
    factor = torch.linalg.cholesky(sums.inputs_II + added * torch.eye(width, dtype=torch.float64))
    return torch.cholesky_solve(sums.products_IO, factor).T


@torch.no_grad()
def _sums(model: Any, ids_BT: torch.Tensor) -> Sums:
    """Of one text."""
    head, names = model.head, model.family.names
    positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    states: list[torch.Tensor] = []

    def keep(_module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    hook = model.model.layers[model.config.num_hidden_layers - 1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        hidden = model.backbone_states(ids_BT, None, positions, segment_ids(positions))
    finally:
        hook.remove()
    hidden = head.get_submodule(names.hidden_norm)(hidden)
    embeds = head.get_submodule(names.token_norm)(shift_left(model.model.embed_tokens(ids_BT), 1))
    pair = (hidden, embeds) if model.family.fusion.hidden_first else (embeds, hidden)
    # The last position has no next token.
    inputs = torch.cat(pair, -1)[0, :-1].double()
    outputs = states[0][0, 1:].double()
    return Sums(inputs.T @ inputs, inputs.T @ outputs, float(outputs.square().sum()), len(inputs))


def _added(a: Sums | None, b: Sums) -> Sums:
    if a is None:
        return b
    inputs, products = a.inputs_II + b.inputs_II, a.products_IO + b.products_IO
    return Sums(inputs, products, a.squares + b.squares, a.positions + b.positions)


def fit_line(fit: Fit) -> str:
    """For people."""
    return (
        f"projection fitted on {fit.positions} tokens: {1 - fit.error:.1%} of what the last layer reads is explained, "
        f"of texts that were held out (ridge {fit.ridge:g})"
    )
