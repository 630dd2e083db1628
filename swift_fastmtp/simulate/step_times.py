"""What a server's step takes, by drafts per step and by how many answers it decodes at once: measured, or predicted.

Measured ones are those of `fastmtp bench --costs` (`bench/costs.py`). The prediction is a roofline: a step takes as
long as reading what it reads, or as long as its arithmetic, whichever is longer. With B answers and K drafts per step

    verification   the backbone over B (K + 1) tokens, and the keys and values of B contexts
    first draft    the MTP layer over the same tokens (SGLang extends its cache by all of them), `lm_head` over B
    other drafts   K - 1 times the MTP layer and `lm_head` over B

A server that makes no drafts because its schedule says so still fills the draft's cache, for when the load falls: the
first draft's step, over one token of each answer (SGLang 0.5.23 `eagle_worker_v2.py`; vLLM's has no `lm_head`).

Left out: kernel launches, sampling, communication between GPUs, and that no kernel reaches the data sheet's numbers. So
times are too short, by much the same factor for all K.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..checkpoint.checkpoint import Checkpoint
from ..errors import FastMTPError
from ..families.family import config_value
from .cost import StepParts, Weights, read_parts
from .gpus import GPU, find_gpu

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""At which a prediction is made."""


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a step.

    Attributes:
        milliseconds: by (K, answers at once); K = 0 is a decoding step without drafts.
        source: for people.
        token_map: file name without its ending of the map that drafts were chosen from; None: the whole vocabulary.
        paused: by answers at once, of a server that makes no drafts because its schedule says so.
        prompt: that the server works on a prompt, whatever its length, and on nothing else.
        prompt_token: added for each of its tokens.
        on_the_way: of a request, in which the server works on others.
    """

    milliseconds: Mapping[tuple[int, int], float]
    source: str
    token_map: str | None = None
    paused: Mapping[int, float] = field(default_factory=dict)
    prompt: float = 0.0
    prompt_token: float = 0.0
    on_the_way: float = 0.0

    @property
    def batch_sizes(self) -> list[int]:
        """Those with a step without drafts, which others are compared with."""
        return sorted(size for K, size in self.milliseconds if K == 0)

    def seconds(self, num_steps: int, size: int, paused: bool) -> float:
        """Of a step with K drafts for `size` answers at once, between known sizes in proportion; beyond them as the
        last two, but never less than at the largest.

        Args:
            num_steps: K.
            size: answers that are decoded at once.
            paused: the server could draft, which matters where K is 0.
        """
        known = {at: ms for (K, at), ms in self.milliseconds.items() if num_steps == K}
        if num_steps == 0 and paused and self.paused:
            known = dict(self.paused)
        sizes = sorted(known)
        if size <= sizes[0] or len(sizes) == 1:
            return known[sizes[0]] / 1000
        above = next((i for i, at in enumerate(sizes) if at >= size), len(sizes) - 1)
        low, high = sizes[above - 1], sizes[above]
        slope = (known[high] - known[low]) / (high - low)
        if size > high:
            slope = max(0.0, slope)
        return (known[high] + slope * (size - high)) / 1000

    def prompt_seconds(self, tokens: int) -> float:
        """That a prompt holds up the other answers."""
        return (self.prompt + self.prompt_token * tokens) / 1000


def check_gpu(name: str) -> GPU:
    """The GPU that `--costs` names. Raises `FastMTPError` for one that is not in the table."""
    return find_gpu(name, f"--costs {name}: neither a results.json nor a GPU that is known")


def predicted_step_times(model_dir: str, gpu: str, num_steps: int, num_ids: int, context: int) -> StepTimes:
    """A roofline of one GPU for the model of a checkpoint with an MTP layer; the others as `roofline`.

    Raises `FastMTPError` for an unknown GPU, and for a quantized checkpoint, whose arithmetic is not known.
    """
    sheet = check_gpu(gpu)
    checkpoint = Checkpoint(model_dir)
    parts = read_parts(checkpoint)
    if not parts.bytes_per_weight:
        raise FastMTPError(
            f"{model_dir}: is quantized, and how fast its products are depends on the kernels; measure its steps with "
            "`fastmtp bench --costs`"
        )
    cache = _cache_bytes(checkpoint, parts.bytes_per_weight)
    milliseconds, paused = roofline(parts, cache, sheet, num_steps, num_ids, context)
    source = f"predicted from the data sheet of one {gpu.upper()}, {context} tokens of context"
    read = 1000 * parts.backbone.read(BATCH_SIZES[-1]) / sheet.bandwidth
    computed = 1000 * 2 * parts.backbone.used / parts.bytes_per_weight / sheet.operations
    return StepTimes(milliseconds, source, paused=paused, prompt=read, prompt_token=computed)


def roofline(
    parts: StepParts, cache_bytes: float, gpu: GPU, num_steps: int, num_ids: int, context: int
) -> tuple[dict[tuple[int, int], float], dict[int, float]]:
    """Milliseconds by (K, answers at once), K from 0 to `num_steps`; and by answers at once with drafts paused.

    Args:
        parts: of the model
        cache_bytes: of keys and values, of one token of context
        gpu: that runs it
        num_steps: the largest K
        num_ids: rows of the output matrix that the draft reads
        context: tokens of each request that attention reads, on average
    """

    def seconds(weights: Weights, tokens: int, lm_head: float, sampled: int) -> float:
        """Of weights that `tokens` are multiplied with, and of an output matrix for `sampled` of them."""
        read = weights.read(tokens) + lm_head
        operations = 2 * (weights.used * tokens + lm_head * sampled) / parts.bytes_per_weight
        return max(read / gpu.bandwidth, operations / gpu.operations)

    whole = parts.row * parts.vocab_size
    drafted_from = parts.row * num_ids
    milliseconds, paused = {}, {}
    for batch in BATCH_SIZES:
        for K in range(num_steps + 1):
            tokens = batch * (K + 1)
            time = cache_bytes * context * batch / gpu.bandwidth
            time += seconds(parts.backbone, tokens, whole, tokens)
            if K:
                time += seconds(parts.mtp, tokens, drafted_from, batch)
                time += (K - 1) * seconds(parts.mtp, batch, drafted_from, batch)
            milliseconds[K, batch] = 1000 * time
        paused[batch] = milliseconds[0, batch] + 1000 * seconds(parts.mtp, batch, drafted_from, batch)
    return milliseconds, paused


def _cache_bytes(checkpoint: Checkpoint, bytes_per_number: float) -> float:
    """Bytes of keys and values that a token of context costs the backbone's attention, of all layers that have any."""

    def value(key: str) -> int:
        return int(config_value(checkpoint.config, key) or 0)

    layers = value("num_hidden_layers")
    kinds = config_value(checkpoint.config, "layer_types")
    if kinds:
        layers = sum("full" in kind for kind in kinds)
    elif interval := value("full_attention_interval"):
        layers //= interval
    if latent := value("kv_lora_rank"):  # MLA: one compressed vector for all attention heads
        return layers * (latent + value("qk_rope_head_dim")) * bytes_per_number
    attention_heads = value("num_attention_heads")
    head_dim = value("head_dim") or value("hidden_size") // max(1, attention_heads)
    return layers * 2 * (value("num_key_value_heads") or attention_heads) * head_dim * bytes_per_number
