"""The draft's output matrix, restricted to another token map in every row of a batch.

A token map makes a draft step cheap, since most of that step is reading the output matrix. SGLang has one map per
server, copied out of the matrix. Here every row of a batch names its own map, the logits keep the whole vocabulary's
columns, and the matrix is the live one: nothing is copied, ids stay global, new weights are seen at once, and any
number of languages share a batch and a captured CUDA graph. On CUDA a Triton kernel reads the rows of the maps that
the batch names and no others (`routed_head_triton`); elsewhere a loop over the maps in PyTorch, its reference.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import FastMTPError

NOTHING = -1
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fill_value(dtype: torch.dtype) -> float:
    """The logit of a token outside the row's map: no probability, and finite, since SGLang looks for NaN and Inf."""
    return torch.finfo(dtype).min / 2


def route(
    hidden_ND: Tensor, weight_VD: Tensor, ids_M: Tensor, offsets: Tensor, language_N: Tensor, out_NV: Tensor
) -> None:
    """Write each row's logits at the columns of its map; other columns of `out_NV` stay as they are.

    Map l is `ids_M[offsets[l] : offsets[l + 1]]`; l = number of maps is the whole vocabulary, any other number no map.
    Products and sums are float32, rounded once to `out_NV`'s dtype. For the eager CPU: it looks at `language_N`.
    """
    bounds = offsets.tolist()
    for language in range(len(bounds)):
        rows = (language_N == language).nonzero()[:, 0]
        if not len(rows):
            continue
        hidden = hidden_ND[rows].float()
        if language == len(bounds) - 1:
            out_NV[rows] = (hidden @ weight_VD.float().T).to(out_NV.dtype)
        else:
            ids = ids_M[bounds[language] : bounds[language + 1]]
            out_NV[rows[:, None], ids] = (hidden @ weight_VD[ids].float().T).to(out_NV.dtype)


class RoutedHead:
    """Token maps, and the logits of rows that each use one of them.

    Args:
        maps: the name of each language → its token ids, in any order. Languages are numbered in this order.
        vocab_size: tokens of the whole vocabulary, which ids must be below.
        vocab_start, vocab_end: this rank's part of the vocabulary under tensor parallelism, [start, end); by default
            all of it. Ids outside it are left to the other ranks; row 0 of the matrix is token `vocab_start`.
        device: where the matrix is.

    Attributes:
        languages: the names, by number.
        full: the number that stands for the whole vocabulary, after the last map's. `NOTHING`, -1, stands for rows
            that need no logits, such as the padding of a captured CUDA graph.
        ids_M: local rows of all maps, one after the other, sorted within each; int32.
        offsets: where each map begins in `ids_M`, and the end of the last; int32 [maps + 1].

    Raises `FastMTPError` for a map that is empty, not a flat list of ids, or holds an id twice or out of range.
    """

    def __init__(
        self,
        maps: Mapping[str, Sequence[int] | Tensor],
        vocab_size: int,
        *,
        vocab_start: int = 0,
        vocab_end: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        vocab_end = vocab_size if vocab_end is None else vocab_end
        if not 0 <= vocab_start <= vocab_end:
            raise ValueError(f"vocab_start {vocab_start} and vocab_end {vocab_end} are no part of a vocabulary")
        self.languages = tuple(maps)
        self.full = len(maps)
        self.vocab_size, self.vocab_start, self.vocab_end = vocab_size, vocab_start, vocab_end
        local, offsets = [torch.empty(0, dtype=torch.int32)], [0]
        for name, given in maps.items():
            ids = _checked(name, given, vocab_size)
            local.append((ids[(ids >= vocab_start) & (ids < vocab_end)] - vocab_start).int())
            offsets.append(offsets[-1] + len(local[-1]))
        self.ids_M = torch.cat(local).to(device)
        self.offsets = torch.tensor(offsets, dtype=torch.int32, device=device)

    @torch.no_grad()
    def __call__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        language_N: Tensor,
        out: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits [N, V] of the rows: h W^T at the columns of the row's map, `fill_value(dtype)` everywhere else.

        Args:
            hidden_ND: the draft's last hidden states; cast to the matrix's dtype.
            weight_VD: this rank's rows of the output matrix, float32, bfloat16 or float16. Rows past the rank's part
                of the vocabulary are padding, which the whole vocabulary computes too.
            language_N: int32 or int64, the number of each row's map, `full` or `NOTHING`.
            out: [N, V], a buffer for the result.
            dtype: of the result; `out`'s or else `hidden_ND`'s by default.

        On CUDA nothing waits for the GPU, and no shape or launch depends on the values: it can be captured in a
        graph and replayed with other languages. No gradients.
        """
        N, V = len(hidden_ND), len(weight_VD)
        dtype = dtype or (hidden_ND if out is None else out).dtype
        self._check(hidden_ND, weight_VD, language_N, out, dtype)
        if out is None:
            out = torch.empty(N, V, dtype=dtype, device=weight_VD.device)
        out.fill_(fill_value(dtype))
        if N:
            hidden_ND, language_N = hidden_ND.to(weight_VD.dtype).contiguous(), language_N.contiguous()
            _kernel(weight_VD)(hidden_ND, weight_VD, self.ids_M, self.offsets, language_N, out)
        return out

    def _check(self, hidden: Tensor, weight: Tensor, language: Tensor, out: Tensor | None, dtype: torch.dtype) -> None:
        if weight.dtype not in _WEIGHT_DTYPES:
            raise FastMTPError(
                f"the output matrix is {weight.dtype}; routed maps need float32, bfloat16 or float16, not quantized"
            )
        if len(weight) < self.vocab_end - self.vocab_start:
            raise FastMTPError(
                f"the output matrix has {len(weight)} rows for tokens {self.vocab_start}..{self.vocab_end - 1}; "
                "make the token maps for this model"
            )
        if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.stride(1) != 1:
            raise ValueError(f"rows {tuple(hidden.shape)} do not fit an output matrix {tuple(weight.shape)} by rows")
        if language.shape != hidden.shape[:1] or language.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{len(hidden)} rows need as many int32 or int64 languages, not {tuple(language.shape)}")
        shape = (len(hidden), len(weight))
        if out is not None and (out.shape != shape or out.dtype != dtype or out.stride(1) != 1):
            raise ValueError(f"the buffer is {out.dtype} {tuple(out.shape)}; the logits are {dtype} {shape}, by rows")


def _checked(name: str, given: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """The map's ids as a sorted int64 copy."""
    try:
        ids = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise FastMTPError(f"token map {name!r}: not a list of token ids ({error})") from None
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise FastMTPError(f"token map {name!r}: must be a flat list of one or more token ids")
    ids = ids.long().sort().values
    for id in (int(ids[0]), int(ids[-1])):
        if not 0 <= id < vocab_size:
            raise FastMTPError(
                f"token map {name!r}: holds id {id}, the model has tokens 0..{vocab_size - 1}; "
                "make the map with this model's tokenizer"
            )
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise FastMTPError(f"token map {name!r}: holds id {int(twice[0])} twice; make the ids unique")
    return ids


def _kernel(weight: Tensor) -> Callable[..., None]:
    """Triton's kernel for a matrix on a GPU; plain PyTorch elsewhere."""
    if weight.is_cuda:
        from . import routed_head_triton

        return routed_head_triton.route
    return route
