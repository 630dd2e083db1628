"""Which drafts a server would accept, from one teacher-forced pass over texts that the model itself generated.

A text's token stands where the server's would, so for every position, depth and token map at once: a greedy draft is
accepted if it equals the text, whatever the temperature the text was sampled at; sampled drafts by the likelihood ratio
of the text's tokens (`method.verification`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import TopKLogitsWarper, TopPLogitsWarper

from ..checkpoint.finite import NotFiniteError, check_drafts, not_finite, output_matrix
from ..data.chat_template import RenderError, encode_prompt
from ..data.conversation import without_answer
from ..data.examples import turns
from ..data.generate import generate
from ..errors import FastMTPError
from ..method.frozen_head import chunk_size, project
from ..method.metrics import verify_rounds
from ..method.rollout import segment_ids, step_targets
from ..method.token_map import DraftVocabulary
from ..method.verification import rejection_acceptance
from .answers import KeptAnswer, KeptAnswers
from .request_map import RequestMap, RequestVocabulary, request_ids

TokenMap = torch.Tensor | RequestMap | None
"""Ids that drafts choose from, or those that every request has beside its own; None: the whole vocabulary."""
Vocabulary = DraftVocabulary | RequestVocabulary

TOKENS_PER_BATCH = 32_768
"""Padded tokens of one teacher-forced pass at most, so that long answers fit where short ones do."""


class Text(NamedTuple):
    """One conversation as token ids: prompt, answer, and tokens that would have followed, K if they are known."""

    ids: list[int]
    start: int
    """Length of the prompt."""
    end: int
    """Length of prompt + answer. A server drafts past the end of an answer too, and counts what it would accept."""
    row: int = 0
    """Which of the dataset's rows it is of."""


def make_texts(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    max_new_tokens: int,
    answers: str,
    batch_size: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    kept: KeptAnswers | None = None,
) -> list[Text]:
    """The texts to measure on, without answers so short that nothing is ever drafted.

    Prompts are those that an engine would be asked with: the row's own where it keeps them (`answers` "given"), else
    rendered by the folder's chat template with the row's tools and `chat_template_kwargs`. Answers that are `kept` are
    taken from there, the others are added. Raises `FastMTPError` for a row that cannot be rendered, has no answer where
    it should, or makes the model compute a NaN or an infinity.
    """
    if answers == "given":
        texts = [_given(tokenizer, number, row) for number, row in enumerate(rows)]
    else:
        prompts = [_prompt(tokenizer, number, row) for number, row in enumerate(rows)]
        sampling = (max_new_tokens, temperature, top_k, top_p)
        answered = _generated(model, tokenizer, prompts, batch_size, sampling, seed, kept)
        texts = []
        for i, each in enumerate(answered):
            start, end = len(each.prompt), len(each.prompt) + len(each.answer)
            texts.append(Text([*each.prompt, *each.answer, *each.after], start, end, i))
    long_enough = [text for text in texts if text.end - text.start > 1]
    if not long_enough:
        raise FastMTPError("no answer is longer than one token, so nothing is ever drafted; use other prompts")
    return long_enough


def _generated(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    batch_size: int,
    sampling: tuple[int, float, int, float],
    seed: int,
    kept: KeptAnswers | None,
) -> list[KeptAnswer]:
    """The model's answers to prompts, with at least K tokens that would have followed; `sampling` as `generate` has it.

    Batches are the same whatever is kept of them, and seeded by number: one that was cut off is generated again, the
    same.
    """
    K = model.fastmtp.num_speculative_steps
    seen: Counter[tuple[int, ...]] = Counter()
    samples = []
    for prompt in prompts:
        samples.append(seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
    answers = [kept.get(prompt, sample, K) if kept else None for prompt, sample in zip(prompts, samples, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), batch_size), desc="answers", unit="batch"):
        batch = order[start : start + batch_size]
        missing = [i for i in batch if answers[i] is None]
        if not missing:
            continue
        torch.manual_seed(seed * 2**32 + start)
        try:
            generated = generate(model, tokenizer, [prompts[i] for i in batch], *sampling)
            whole = [prompts[i] + answer.token_ids for i, answer in zip(batch, generated, strict=True)]
            beyond = generate(model, tokenizer, whole, K, *sampling[1:], stop=False)
        except NotFiniteError as error:
            raise error.of(f"row {batch[error.row] + 1}") from None
        new = {}
        for i, answer, after in zip(batch, generated, beyond, strict=True):
            if i in missing:
                new[i] = KeptAnswer(tuple(prompts[i]), samples[i], answer.token_ids, after.token_ids)
        for i, each in new.items():
            answers[i] = each
        if kept:
            kept.add(list(new.values()))
    return [each for each in answers if each is not None]


def _prompt(tokenizer: Any, number: int, row: dict[str, Any]) -> list[int]:
    messages = without_answer(row["messages"])
    try:
        return encode_prompt(tokenizer, messages, row.get("tools"), row.get("chat_template_kwargs"))
    except RenderError as error:
        raise FastMTPError(f"row {number + 1}: {error}") from None


def _given(tokenizer: Any, number: int, row: dict[str, Any]) -> Text:
    if row["messages"][-1]["role"] != "assistant":
        raise FastMTPError(f"row {number + 1}: has no assistant answer; drop --answers given, or distill first")
    try:
        answered = list(turns(tokenizer, row, trainable_only=False))
    except FastMTPError as error:
        raise FastMTPError(f"row {number + 1}: {error}") from None
    if not answered:
        raise FastMTPError(f"row {number + 1}: its answer is empty; remove the row")
    last = answered[-1]
    return Text(last.asked + last.answered, len(last.asked), len(last.asked) + len(last.answered), number)


def greedy_acceptance(
    model: Any,
    texts: list[Text],
    pad: int,
    batch_size: int,
    token_maps: Sequence[TokenMap] = (None,),
    label: str = "head",
) -> list[list[torch.Tensor]]:
    """Where the loaded head's greedy drafts equal the texts.

    Args:
        token_maps: ids that the draft may choose from (SGLang's `--speculative-token-map`), or a `RequestMap`; None is
            all. All of them share one pass, because a chain goes on only from drafts that equal the text.
        label: of the progress bar; empty is none.

    Returns, per map and text, bool [K, A]: `[k-1, t]`: with answer token t just committed, depth k's draft is the
    text's token t + k. After a draft that is rejected all are False: no server gets there. Drafts past the end of an
    answer count where the text says what would have followed.
    """

    def accepted(
        states: torch.Tensor, _: torch.Tensor, tokens: torch.Tensor, vocabularies: list[Vocabulary]
    ) -> torch.Tensor:
        logits = _logits(model, states)
        return torch.stack([v.decode(v.columns(logits).argmax(-1)) == tokens for v in vocabularies])

    return _acceptance(model, texts, pad, batch_size, token_maps, accepted, torch.bool, label)


def sampled_acceptance(*args: Any, **options: Any) -> list[list[torch.Tensor]]:
    """As `greedy_acceptance`, where drafts are sampled too and verified by rejection sampling: probabilities, float64.

    Takes what `likelihood_ratios` takes.
    """
    return [list(map(rejection_acceptance, of_map)) for of_map in likelihood_ratios(*args, **options)]


def likelihood_ratios(  # noqa: PLR0913
    model: Any,
    texts: list[Text],
    pad: int,
    batch_size: int,
    temperature: float,
    token_maps: Sequence[TokenMap] = (None,),
    label: str = "head",
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[list[torch.Tensor]]:
    """What the acceptance of sampled drafts follows from, in every regime (`method.verification`).

    Returns, per map and text, float64 [K, A]: `[k-1, t]`: with answer token t just committed, q / p of answer token
    t + k. p is what the texts were drawn from: the model's distribution at `temperature`, cut to `top_k` and `top_p`;
    q is the draft's at the same temperature: engines draw drafts from the whole of it. 0 for tokens outside a map, for
    those that p excludes, and behind one that is 0: no server gets there.
    """

    def ratios(
        states: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, vocabularies: list[Vocabulary]
    ) -> torch.Tensor:
        target = _cut(_logits(model, teacher).float() / temperature, top_k, top_p)
        log_p = target.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        logits = _logits(model, states).float() / temperature
        of_maps = []
        for vocabulary in vocabularies:
            rows = vocabulary.encode(tokens)
            log_q = vocabulary.columns(logits).log_softmax(-1).gather(1, rows.clamp(min=0)[:, None])[:, 0]
            possible = (rows >= 0) & log_p.isfinite()
            of_maps.append(torch.where(possible, (log_q - log_p).double().exp(), 0.0))
        return torch.stack(of_maps)

    return _acceptance(model, texts, pad, batch_size, token_maps, ratios, torch.float64, label)


def _logits(model: Any, states_ND: torch.Tensor) -> torch.Tensor:
    """[N, V]. Raises `FastMTPError` for one that is not finite, which `argmax` would take for the largest."""
    logits = project(states_ND, model.lm_head.weight)
    if bool(not_finite(logits).any()):
        raise FastMTPError(f"{model.name_or_path}: logits of drafts are not finite: {output_matrix(model)}")
    return logits


def _cut(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """[N, V] logits of which sampling excludes some, -inf there: first top-k, then top-p, as engines and transformers
    do."""
    for warper in sampling_warpers(top_k, top_p):
        logits = warper(None, logits)
    return logits


def sampling_warpers(top_k: int, top_p: float) -> list[Any]:
    """transformers' own, for the options that exclude anything."""
    warpers: list[Any] = []
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def draft_rounds(
    model: Any, texts: list[Text], pad: int, batch_size: int, token_map: TokenMap = None
) -> list[list[list[int]]]:
    """`rounds[K' - 1][text]`: the verification rounds of a greedy server with K' drafts per step, drafts accepted in
    each."""
    (accepted,) = greedy_acceptance(model, texts, pad, batch_size, (token_map,))
    K = model.fastmtp.num_speculative_steps
    return [[verify_rounds(accepted_KA, k) for accepted_KA in accepted] for k in range(1, K + 1)]


@torch.no_grad()
def _acceptance(
    model: Any,
    texts: list[Text],
    pad: int,
    batch_size: int,
    token_maps: Sequence[TokenMap],
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[Vocabulary]], torch.Tensor],
    dtype: torch.dtype,
    label: str,
) -> list[list[torch.Tensor]]:
    """`function(draft states, teacher's states, text tokens, vocabularies) -> [maps, rows]` over all positions and
    depths, by chunks of rows so that few logits exist at a time."""
    weight = model.lm_head.weight
    chunk, num_maps = chunk_size(weight, model.fastmtp), len(token_maps)
    fixed = [None if isinstance(ids, RequestMap) else DraftVocabulary(weight, ids) for ids in token_maps]

    def vocabularies(ids_BT: torch.Tensor, rows: torch.Tensor) -> list[Vocabulary]:
        """What base rows draft from, by map."""
        by_request = [ids for ids in token_maps if isinstance(ids, RequestMap)]
        present_NV = request_ids(ids_BT, rows, len(weight)) if by_request else None
        of_rows: list[Vocabulary] = []
        for ids, of_all in zip(token_maps, fixed, strict=True):
            if isinstance(ids, RequestMap) and present_NV is not None:
                of_rows.append(RequestVocabulary(ids.base_M, present_NV))
            elif of_all is not None:
                of_rows.append(of_all)
        return of_rows

    per_text: list[list[torch.Tensor]] = [[torch.empty(0)] * len(texts) for _ in range(num_maps)]
    for batch in _batches(model, texts, pad, batch_size, label):
        hidden = model.normed(batch.hidden).flatten(0, 1)
        flat = torch.zeros(num_maps, *batch.exists.flatten(1).shape, dtype=dtype, device=hidden.device)
        going_on = batch.wanted[:1].expand(num_maps, -1)
        for k, wanted in enumerate(batch.wanted):
            # A chain ends where a draft is rejected: what would come after is drafted by nobody.
            chosen = wanted & going_on.any(0)
            rows = batch.rows[chosen]
            states, teacher = batch.outputs[k][chosen], hidden[rows + k + 1]
            tokens = batch.targets[k].flatten()[rows]
            values = []
            for start in range(0, len(rows), chunk):
                here = slice(start, start + chunk)
                of_rows = vocabularies(batch.ids, rows[here])
                values.append(function(states[here], teacher[here], tokens[here], of_rows))
            if values:
                flat[:, k, rows] = torch.cat(values, 1) * going_on[:, chosen]
            going_on = flat[:, k, batch.rows] > 0
        accepted = flat.view(num_maps, *batch.exists.shape).cpu()
        for row, i in enumerate(batch.places):
            for number in range(num_maps):
                per_text[number][i] = accepted[number, :, row, texts[i].start - 1 : texts[i].end - 1].clone()
    return per_text


class _Batch(NamedTuple):
    """A teacher-forced pass over some texts."""

    places: list[int]
    """Which of the texts, per batch row."""
    ids: torch.Tensor
    """[B, T]: their tokens, padded on the right."""
    targets: torch.Tensor
    exists: torch.Tensor
    """[K, B, T]: base rows whose target of depth k exists, past the end of the answer too."""
    hidden: torch.Tensor
    rows: torch.Tensor
    """[N]: the base rows, flat."""
    outputs: torch.Tensor
    """[K, N, D]: g^1..g^K of them."""

    @property
    def wanted(self) -> torch.Tensor:
        """[K, N]: `exists` of the base rows."""
        return self.exists.flatten(1)[:, self.rows]


def _batches(model: Any, texts: list[Text], pad: int, batch_size: int, label: str) -> Iterator[_Batch]:
    K = model.fastmtp.num_speculative_steps
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    name = f"acceptance of {Path(label).name}"
    progress = tqdm(total=len(order), desc=name, unit="answer", disable=not label)
    while order:
        # The longest first: if they do not fit, it is known at once.
        places = order[: max(1, min(batch_size, TOKENS_PER_BATCH // len(texts[order[0]].ids)))]
        del order[: len(places)]
        width = max(len(texts[i].ids) for i in places)
        ids = torch.full((len(places), width), pad)
        mask, base = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(places):
            text = texts[i]
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
            base[row, text.start - 1 : text.end - 1] = True
        ids, mask, base = (x.to(model.device) for x in (ids, mask, base))
        positions = torch.arange(width, device=ids.device)[None].expand_as(ids)
        segments = segment_ids(positions, mask)
        targets, exists = step_targets(ids, segments, None, K)
        exists &= base
        rows = exists.any(0).flatten().nonzero().squeeze(1)
        try:
            hidden = model.backbone_states(ids, mask, positions, segments)
            outputs = model.draft_states(hidden, ids, positions, segments, rows)
            batch = _Batch(places, ids, targets, exists, hidden, rows, outputs)
            check_drafts(model, outputs, batch.wanted, rows, width)
        except NotFiniteError as error:
            raise error.of(f"row {texts[places[error.row]].row + 1}") from None
        yield batch
        progress.update(len(places))
    progress.close()
