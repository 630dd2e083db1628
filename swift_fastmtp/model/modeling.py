"""Frozen backbone + MTP head as one Hugging Face model.

`build_class` makes, for a family, a subclass of the transformers class that runs its backbone, with the head at its
native checkpoint path. So `from_pretrained`, device maps, ZeRO-3 and `generate` are transformers' own; in training
(and whenever no KV cache is asked for) `forward` runs the backbone without gradients, then the K-step recursion,
and returns per-row losses and matches instead of logits.
"""

import copy
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.finite import Source, check_drafts, check_hidden_states, check_losses, first_bad_module
from ..checkpoint.headers import Headers
from ..errors import FastMTPError
from ..families import bailing  # noqa: F401 (it registers what transformers has no classes for)
from ..families.family import Family
from ..families.table import FAMILIES
from ..method.chunked_losses import greedy_tokens, step_losses
from ..method.config import FastMTPConfig
from ..method.losses import weighted_loss
from ..method.rollout import places, rollout, segment_ids, step_targets
from ..method.token_map import DraftVocabulary, read_token_map
from . import placement
from .compat_transformers import (
    class_attributes,
    ignored_in_files,
    is_dispatched,
    keep_in_float32,
    kept_in_float32,
    route_in_float32,
    set_epsilon,
)
from .config import load_config
from .fp8_loading import dequantized, saved_plain
from .head import MTPHead, import_class, place_module
from .hidden_cache import HiddenCache, documents_of
from .partitioned import load_partitioned, sources


@dataclass
class FastMTPOutput(ModelOutput):
    """What a training or evaluation step needs; the per-row fields are [K, B, T], see `losses.StepLosses`.

    `logits` stays None: the frozen model's own next-token logits are never computed for its own sake.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    """`loss`, under a name that ms-swift's trainer leaves alone: it drops `loss` where there is a loss function."""
    step_loss: torch.Tensor | None = None
    match: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    """The target exists and is supervised."""
    trained: torch.Tensor | None = None
    """... and the token map reaches it: neither it nor a token before it in the chain is outside the map."""
    accept_prob: torch.Tensor | None = None
    full_match: torch.Tensor | None = None
    """`match` of a draft without the token map; in evaluation with a map only."""
    place: torch.Tensor | None = None
    """[B, T]: rows before each in its document (`rollout.places`)."""


class FastMTPMixin:
    """The part of the model class that does not depend on the family."""

    family: Family
    config_class: Any
    model: Any
    lm_head: nn.Linear
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.hidden_cache: HiddenCache | None = None
        self.family = self.family.at(config.num_hidden_layers)
        head = MTPHead(config, self.family)
        # In a list, so not as a submodule of its own: every parameter has one name, its native one.
        self._heads = [head]
        self._mapped: DraftVocabulary | None = None
        self.fastmtp = FastMTPConfig()
        if self.family.scattered:
            for part, child in head.named_children():
                cast(nn.Module, self).get_submodule(self.family.names.prefix).add_module(part, child)
        else:
            # At `model.layers.N` it is never run as a decoder layer: transformers' models run the first N.
            place_module(cast(nn.Module, self), self.family.names.prefix, head)
        # Those of latents too: transformers gives them a constant, engines the configuration's.
        set_epsilon(cast(nn.Module, self).modules(), config.rms_norm_eps)
        route_in_float32(cast(nn.Module, self).modules())
        cast(PreTrainedModel, self).post_init()
        if self.family.block.indexer_rope:
            # What is carried along must come out as it went in, whatever the run's dtype.
            keep_in_float32(self, f"{self.family.names.prefix}.{self.family.names.attention}.indexer")

    @property
    def head(self) -> MTPHead:
        """The MTP layer, whose parts lie at its native path."""
        return self._heads[0]

    @property
    def fastmtp(self) -> FastMTPConfig:
        """The settings. Setting them raises `FastMTPError` where the family has no graph for their engine."""
        return self._fastmtp

    @fastmtp.setter
    def fastmtp(self, config: FastMTPConfig) -> None:
        self._fastmtp = config
        self._mapped = None  # of the token map that the last ones had
        self.head.graph = self.family.graph(config.engine)

    @classmethod
    def from_pretrained(cls, model_dir: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As transformers', except that FP8 gives plain weights of the dtype asked for (`fp8_loading.py`), ZeRO-3 reads
        one parameter at a time (`partitioned.py`), an automatic device map keeps the head (`placement.py`), and a
        tensor that no file holds is an error: it would be random, after a mere warning. With `without_layer` those of
        the MTP layer may be missing, and are for the caller to fill."""
        without_layer = kwargs.pop("without_layer", False)
        checkpoint = Checkpoint(model_dir)
        config = copy.deepcopy(config) or load_config(checkpoint)
        if isinstance(kwargs.get("dtype"), torch.dtype):
            config.dtype = kwargs["dtype"]
        if is_deepspeed_zero3_enabled() and (parts := sources(cls, checkpoint, config)):
            return load_partitioned(cls, checkpoint, config, parts)
        mapping = _device_map(cls, config, kwargs)
        quantized = getattr(config, "quantization_config", None) is not None
        if quantized:
            dequantized(config)
        # transformers writes layers that stay on disk again where they are not as in the files.
        offloaded = None
        on_disk = isinstance(mapping, dict) and "disk" in mapping.values()
        if on_disk and not kwargs.get("offload_folder"):
            offloaded = tempfile.TemporaryDirectory(prefix="fastmtp-offload-")
            kwargs["offload_folder"] = offloaded.name
        # It picks files by rules of its own; where they differ from the engines', it gets a folder of links.
        links = None
        headers = checkpoint.headers
        if not headers.chosen.read_by_transformers or getattr(config, "transformers_weights", None) is not None:
            links = headers.chosen.linked({name: entry.file for name, entry in headers.entries.items()})
            config.transformers_weights = None
        parent = super().from_pretrained  # type: ignore[misc]
        source = links.name if links else model_dir
        model, info = parent(source, *args, config=config, **{**kwargs, "output_loading_info": True})
        missing = sorted(info["missing_keys"])
        if without_layer:
            missing = [name for name in missing if not model.family.owns(name)]
        if missing:
            raise FastMTPError(_missing(model_dir, missing, headers))
        # The model is that of the folder, whatever it was read through.
        if links:
            model.name_or_path = model.config.name_or_path = str(model_dir)
            if on_disk:
                model.weight_links = links  # they are read through these
            else:
                links.cleanup()
        if quantized:
            saved_plain(model, model_dir)
        if is_dispatched(model):
            placement.keep(model, offloaded)
        return (model, info) if kwargs.get("output_loading_info") else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the backbone is transformers' own, so the renamings that it has for checkpoints hold here too."""
        return False

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a model whose layers lie on several devices stays there: trainers move models."""
        if is_dispatched(self):
            return self
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters under their checkpoint names, experts joined (`head.as_stored`)."""
        return {n: p for n, p in cast(nn.Module, self).named_parameters() if self.family.owns(n)}

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint stores of the head: `head_parameters`, and what no gradient trains (the bias by which
        routers of DeepSeek's kind choose experts, the indexer of sparse attention)."""
        return {f"{self.family.names.prefix}.{n}": t for n, t in self.head.state_dict(keep_vars=True).items()}

    def freeze_backbone(self) -> None:
        """Only the head gets gradients."""
        cast(nn.Module, self).requires_grad_(False)
        for parameter in self.head_parameters().values():
            parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> Any:
        """Training mode for the head only: a frozen backbone has no dropout and needs no checkpointing."""
        module = cast(nn.Module, super().train(mode))  # type: ignore[misc]
        for child in module.children():
            nn.Module.train(child, False)
        self.head.train(mode)
        return module

    def get_rope_index(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [3, B, T] of text, which the chat templates of vision models ask their model for."""
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        return positions.expand(3, -1, -1), positions.new_zeros(len(positions), 1)

    def generate(self, *args: Any, mm_token_type_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:  # noqa: ARG002 (the caller's interface)
        """As transformers', without what those templates add for images; positions follow from the attention mask."""
        if "position_ids" in kwargs and kwargs["position_ids"].ndim == 3:
            del kwargs["position_ids"]
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def enable_input_require_grads(self) -> None:
        """Nothing: trainers call this for gradient checkpointing, and it would drag autograd through the backbone."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """With `labels` [B, T] (unshifted, -100 where not supervised): a `FastMTPOutput`.

        Without them this is the plain language model: `generate`, evaluation and export tools see no difference.
        `num_items_in_batch`, if given, is the token count the loss is divided by (see `losses.weighted_loss`).

        Raises `NotFiniteError` at the first state, draft or loss that is NaN or infinite.
        """
        labels = kwargs.pop("mtp_labels", labels)  # ms-swift's trainer takes `labels` out of the inputs
        if labels is None:
            parent = super().forward  # type: ignore[misc]
            return parent(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        assert input_ids is not None
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
        elif position_ids.ndim == 3:
            position_ids = position_ids[0]  # time, height, width: alike for text
        # What each step must predict, and the rows for which some step must: only those are drafted.
        segments = segment_ids(position_ids, attention_mask)
        targets, valid = step_targets(input_ids, segments, labels, self.fastmtp.num_speculative_steps)
        rows = valid.any(0).flatten().nonzero().squeeze(1)
        if not len(rows):
            rows = rows.new_zeros(1)  # a batch without a target must still take part in a distributed backward
        # The backbone without gradients, then the recursion.
        hidden = self.backbone_states(input_ids, attention_mask, position_ids, segments, **kwargs)
        outputs = self.draft_states(hidden, input_ids, position_ids, segments, rows)
        valid_KN = valid.flatten(1)[:, rows]
        check_drafts(self, outputs, valid_KN, rows, input_ids.shape[1])
        results = self._step_results(outputs, hidden, targets.flatten(1)[:, rows], valid_KN, rows)
        # Back to [K, B, T], where metrics find a draft's place in its document.
        for name, value in results.items():
            dense = value.new_zeros(valid.flatten(1).shape)
            results[name] = dense.index_copy(1, rows, value).view_as(valid)
        check_losses(self, results["step_loss"])
        # Eq. 1.
        num_items = kwargs.get("num_items_in_batch")
        if num_items is None:
            num_items = (labels[:, 1:] != -100).sum()
        loss = weighted_loss(results["step_loss"], self.fastmtp.step_weights, num_items)
        return FastMTPOutput(loss=loss, mtp_loss=loss, valid=valid, place=places(segments), **results)

    @torch.no_grad()
    def backbone_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        segments: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """h [B, T, D]: the frozen backbone's hidden state that step 1 gets, or `hidden_cache`'s copy of it. It is the
        one after the final norm, in all engines but one (`families.family.Graph`); `normed` gives that in any case.

        `segments` [B, T] are the documents (`rollout.segment_ids`); rows outside any are 0 when
        they come from the cache.

        Raises `NotFiniteError` for states that hold a NaN or an infinity.
        """
        cache = self.hidden_cache
        spans = documents_of(segments) if cache else []
        documents = [input_ids[b, start:end] for b, start, end in spans]
        cached = cache.get(documents) if cache else None
        if cache and cached is not None:
            hidden = torch.zeros(*input_ids.shape, cache.width, dtype=cache.dtype)
            for (b, start, end), states in zip(spans, cached, strict=True):
                hidden[b, start:end] = states
            damaged = Source(f"it is from {cache.folder}; delete that folder")
            check_hidden_states(hidden, (segments >= 0).cpu(), lambda: damaged)
            # An engine's states are kept in its own dtype, which need not be this run's.
            hidden = hidden.to(self.lm_head.weight.dtype).to(input_ids.device, non_blocking=True)
            if cache.origin and cache.origin.before_norm and not self.head.graph.hidden_before_norm:
                hidden = self.model.norm(hidden)
            return hidden
        if cache and cache.origin:
            raise FastMTPError(
                f"{cache.folder}: lacks the hidden states of a row of {len(documents[0])} tokens or one beside it; run "
                "`fastmtp hidden` again with all rows of this run, and its --max_length"
            )
        packed = {k: v for k, v in kwargs.items() if k.startswith(("cu_seq_lens", "max_length_"))}
        several = (segments >= 0) & (segments != segments.amax(1, keepdim=True))
        if self.family.recurrent_backbone and bool(several.any()):
            raise FastMTPError(
                f"a row holds several documents, and {self.family.name} has layers that carry a state from one to the "
                "next; train without --packing and --padding_free"
            )
        run = partial(
            self.model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **packed,
        )
        if self.head.graph.hidden_before_norm:
            with _input_of(self.model.norm) as inputs:
                run()
            (hidden,) = inputs
        else:
            hidden = run().last_hidden_state
        real = segments >= 0
        check_hidden_states(hidden, real, lambda: self.source_of_bad_states(run, real))
        if cache:
            cache.put(documents, [hidden[b, start:end] for b, start, end in spans])
        return hidden

    @torch.no_grad()
    def normed(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What the output matrix takes, of what `backbone_states` gives: states after the final norm."""
        if self.head.graph.hidden_before_norm:
            return cast(torch.Tensor, self.model.norm(hidden_BTD))
        return hidden_BTD

    @torch.no_grad()
    def source_of_bad_states(self, run: Callable[[], Any], real_BT: torch.Tensor) -> Source:
        """Which module gave states that are not finite, for an error message. `run` calls the backbone again."""
        if is_deepspeed_zero3_enabled():
            return Source("run `fastmtp doctor` on the model")  # the other ranks would have to take part
        return first_bad_module(self, run, real_BT)

    def draft_states(
        self,
        hidden_BTD: torch.Tensor,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        segment_ids_BT: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """g^1..g^K [K, N, D] of the rows asked for, flat indices into [B * T]; None is all."""
        with torch.no_grad():
            embeds = self.model.embed_tokens(input_ids_BT)
        return rollout(
            self.head,
            hidden_BTD,
            embeds,
            position_ids_BT,
            segment_ids_BT,
            self.model.rotary_emb,
            self.fastmtp.num_speculative_steps,
            self.fastmtp.rollout,
            rows,
        )

    @property
    def draft_vocabulary(self) -> DraftVocabulary:
        """The frozen output matrix, or its part in the token map.

        Under ZeRO-3 the read of `lm_head.weight` gathers the partitioned matrix until the end of this forward; backward
        needs none. The map's part is copied once.
        """
        if not self.fastmtp.token_map:
            return DraftVocabulary(self.lm_head.weight)
        if self._mapped is None or self._mapped.weight.device != self.lm_head.weight.device:
            weight = self.lm_head.weight.detach()
            self._mapped = DraftVocabulary(weight, read_token_map(self.fastmtp.token_map, weight.shape[0]))
        return self._mapped

    def _step_results(
        self,
        outputs_KND: torch.Tensor,
        hidden_BTD: torch.Tensor,
        targets_KN: torch.Tensor,
        valid_KN: torch.Tensor,
        rows: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The per-row fields of `FastMTPOutput`, [K, N]."""
        vocabulary, config = self.draft_vocabulary, self.fastmtp
        labels = vocabulary.encode(targets_KN)
        # A token outside the map is a sure rejection: nothing to learn there, and a server never drafts further.
        trained = valid_KN & ((labels >= 0) | ~valid_KN).cumprod(0).bool()
        # The soft losses compare with the frozen model's own distribution.
        hidden = self.normed(hidden_BTD).flatten(0, 1)
        losses = step_losses(outputs_KND, vocabulary.weight, labels.clamp(min=0), trained, config, hidden, rows)
        results = {"step_loss": losses.loss, "match": losses.match, "trained": trained}
        if losses.accept_prob is not None:
            results["accept_prob"] = losses.accept_prob
        if vocabulary.ids is not None and not cast(nn.Module, self).training:
            best = greedy_tokens(outputs_KND.flatten(0, 1), self.lm_head.weight, config)
            results["full_match"] = (best.view_as(targets_KN) == targets_KN) & valid_KN
        return results


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a module is called with while it lasts."""
    inputs: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


def _device_map(cls: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """The device map of `from_pretrained`: an automatic one is made here, and replaced in `kwargs`; a given one keeps
    what must be together together, or raises `FastMTPError`."""
    mapping = kwargs.get("device_map")
    if isinstance(mapping, str) and mapping in placement.AUTOMATIC:
        mapping = placement.device_map(cls, config, config.dtype or torch.float32, kwargs.pop("max_memory", None))
        kwargs["device_map"] = mapping
    elif isinstance(mapping, dict):
        placement.check_map(mapping, cls.family.at(config.num_hidden_layers).roots)
    return mapping


def _missing(model_dir: Any, missing: list[str], headers: Headers) -> str:
    """Why a model cannot be loaded: tensors that no loaded file holds."""
    listed = next(((n, f) for n, f in headers.absent.items() if n in missing), None)
    where = f", the index has it in {listed[1]}, which is missing or damaged" if listed else ""
    name = listed[0] if listed else missing[0]
    return f"{model_dir}: {name} is in no file ({len(missing)} such tensors{where}); download the checkpoint again"


@cache
def build_class(family: Family) -> type:
    """The model class of a family, named like the checkpoint's architecture so that saved configs keep it."""
    backbone = import_class(family.backbone)
    # transformers' own classes know that checkpoints have MTP tensors, and pass over them in silence.
    patterns = ignored_in_files(backbone)
    ignored = [p for p in patterns if not any(re.search(p, f"{root}.") for root in family.roots)]
    ignored += [re.escape(f"{family.names.prefix}.{n}").replace(r"\{N\}", r"\d+") + "$" for n in family.names.copies]
    attributes = {
        "family": family,
        "config_class": CONFIG_MAPPING[family.model_type],
        **class_attributes([*kept_in_float32(backbone), *family.engines.kept_in_float32], ignored),
    }
    cls = type(family.architectures[0], (FastMTPMixin, backbone), attributes)
    # Found by this name in `__getattr__` below: multi-process dataset mapping pickles models' classes.
    cls.__module__, cls.__qualname__ = __name__, f"FastMTP_{family.name}"
    return cls


def __getattr__(name: str) -> type:
    """Unpickling in a fresh process asks for `FastMTP_<family>` before anything built it."""
    for family in FAMILIES:
        if name == f"FastMTP_{family.name}":
            return build_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
