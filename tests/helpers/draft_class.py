# ruff: noqa: E402
"""SGLang's own draft class on a CPU: loads a draft-only folder as a server does, and drafts one chain.

Run by SGLang's Python with `stand_in/` on PYTHONPATH:

    draft_class.py JOB...

A job is a folder with `draft`, a draft-only checkpoint; `full`, the whole one with the same head, of which the class
must take the same parameters; and `in.safetensors`: `ids` [base + K + 1], the text; `hidden` [base + 1, D], the
target's hidden states of slots 0..base; `embed` and `lm_head`, which a draft takes from its target. There
`out.safetensors` appears, with `logits` [K, V] and `hidden` [K, D] of the chain that starts at the last of these slots
and reads the text; and, where the job holds a file `backbone`, `backbone` [base + 1, D]: the target's hidden states as
SGLang's own class computes them. Printed are the parameters that no tensor of the folder filled.

    draft_class.py FOLDER OUT.safetensors

only loads a draft-only folder, in FP8 for one, and writes the class's parameters.

One class is fixed: LongCat's layer does not hand the projection to latents to its attention, which then stops (SGLang
0.5.23 `longcat_flash_nextn.py`; the layers of `longcat_flash.py` do). `hand_latents` does it instead.

SGLang's are `load_weights`, the order of everything, projections, RoPE, experts and norms; not the attention kernel
with its cache, which needs a whole server and is a few lines over a list here, the scores of sparse attention's
indexer, and three fused GPU kernels.
"""

import os
import sys
from collections import defaultdict

os.environ.update(SGLANG_USE_CPU_ENGINE="1", TORCHDYNAMO_DISABLE="1")

import torch

# SGLang's layers in plain PyTorch, on every CPU, as far as it has them: not the stand-in's kernels.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_OnSglang"]
torch.cpu._is_amx_tile_supported = lambda: False

from safetensors.torch import load_file, save_file
from sglang.srt import runtime_context
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.attention.dsa import dsa_indexer
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.layer_boundary.adapters.attention import AttentionInputs, get_attn_tp_context
from sglang.srt.layers.rotary_embedding import factory
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, get_attn_backend, set_forward_context
from sglang.srt.model_loader import loader
from sglang.srt.server_args import ServerArgs

SENTINEL = 12345.0


built = loader._initialize_model


def initialize(*a, **k):
    model = built(*a, **k)
    for parameter in model.parameters():
        parameter.data.fill_(SENTINEL if parameter.element_size() > 1 else float("nan"))
    if type(model).__name__ == "LongcatFlashForCausalLMNextN":
        model.model.decoder.self_attn.register_forward_pre_hook(hand_latents, with_kwargs=True)
    return model


def hand_latents(attention, _, given):
    inputs = AttentionInputs(given["hidden_states"], given["forward_batch"], attention.prepare_qkv_latent)
    get_attn_tp_context().set_attn_inputs(inputs)


loader._initialize_model = initialize


class Cache:
    """An attention backend: causal over what was written, which is one request.

    Latent attention asks for the backend's name to choose how it computes: with this one, after a verification, it
    writes and reads latents.
    """

    prefill_attention_backend_str = decode_attention_backend_str = "triton"

    token_to_kv_pool = None

    def __init__(self):
        self.layers, self.index_keys = defaultdict(lambda: ([], [])), []

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, topk_indices=None, **_):
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        written = self.layers[layer.layer_id]
        before = sum(map(len, written[0]))
        written[0].append(k.reshape(-1, layer.tp_k_head_num, layer.head_dim))
        written[1].append(v.reshape(-1, layer.tp_k_head_num, layer.v_head_dim))
        groups = layer.tp_q_head_num // layer.tp_k_head_num
        keys, values = (torch.cat(x).repeat_interleave(groups, 1) for x in written)
        scores = torch.einsum("qhd,khd->hqk", q, keys) * layer.scaling
        visible = torch.ones(len(q), len(keys)).tril(before).bool()
        if topk_indices is not None:
            picked = torch.zeros(len(q), len(keys) + 1).scatter(1, topk_indices % (len(keys) + 1), 1)  # -1 is no key
            visible &= picked[:, :-1].bool()
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def pick(self, x, q_lora, positions, forward_batch, layer_id):
    """In place of the indexer's kernels, with its own projections, norm and RoPE: scores in float32, and no rotation
    (Hadamard) of queries and keys alike, which is there for FP8."""
    query = self.wq_b(q_lora)[0].view(1, len(x), -1, self.head_dim)
    key = self.k_norm(self.wk(x)[0])[None, :, None]
    turned = self.rotary_emb(positions[None], query[..., : self.rope_head_dim], key[..., : self.rope_head_dim])
    query, key = (
        torch.cat([a, b[..., self.rope_head_dim :]], -1)[0] for a, b in zip(turned, (query, key), strict=True)
    )
    cache = get_attn_backend()
    before = sum(map(len, cache.index_keys))
    cache.index_keys.append(key[:, 0])
    products = torch.einsum("qhd,kd->qkh", query, torch.cat(cache.index_keys)).relu()
    scores = torch.einsum("qkh,qh->qk", products, x @ self.weights_proj.weight.float().T)
    scores = scores.masked_fill(~torch.ones_like(scores).tril(before).bool(), float("-inf"))
    best = scores.topk(min(self.index_topk, scores.shape[1]))
    indices = best.indices.masked_fill(best.values == float("-inf"), -1)
    return torch.nn.functional.pad(indices, (0, self.index_topk - indices.shape[1]), value=-1)


dsa_indexer.Indexer.forward_native = pick
rope_of_cpus = factory.get_rope_cpu  # knows YaRN only
factory.get_rope_cpu = lambda *a: rope_of_cpus(*a) if a[5] else factory.get_rope(*a[:-1])


class Batch:
    """A forward batch of one request; what it does not say is not set."""

    def __init__(self, mode, hidden, seed=None):
        self.forward_mode, self.residual_stream = mode, None
        decodes = mode == ForwardMode.DECODE
        self.reuse_dsa_topk_indices = decodes and seed is not None
        picks = {"dsa_topk_indices" if decodes else "dsa_seed_topk_capture": seed, "dsa_seed_topk_select": None}
        self.spec_info = type("Spec", (), {"hidden_states": hidden, "dsa_seed_topk_capture": None, **picks})()

    def contains_mm_inputs(self):
        return False

    def __getattr__(self, name):
        return None


class Logits(torch.nn.Module):
    """What the class hands to its logits processor, which feeds the first back."""

    def forward(self, ids, hidden, head, batch, aux_hidden_states=None):
        return hidden, hidden @ head.weight.T


def start(folder, dtype="float32"):
    args = ServerArgs(model_path=folder, device="cpu", dtype=dtype, disable_radix_cache=True, trust_remote_code=True)
    runtime_context.publish(args, role="test", ranks=runtime_context.SpawnRanks(world_rank=0))
    init_distributed_environment(1, 0, "tcp://127.0.0.1:" + os.environ["PORT"], 0, "gloo")
    initialize_model_parallel()
    initialize_dp_attention(args)
    return args


def load(args, folder, draft=True):
    config = ModelConfig.from_server_args(args, model_path=folder, is_draft_model=draft)
    return loader.get_model_loader(LoadConfig(), config).load_model(
        model_config=config, device_config=DeviceConfig("cpu")
    )


def parameters(folder, target):
    """Only what the class has loaded, for layers whose kernels no CPU has: FP8."""
    from sglang.srt.layers.quantization import fp8

    for method in (fp8.Fp8LinearMethod, fp8.Fp8MoEMethod):
        method.process_weights_after_loading = lambda *_: None  # lays them out for a kernel
    model = load(start(folder, "bfloat16"), folder)
    print(type(model).__name__)
    save_file({n: p.detach().contiguous() for n, p in own_parameters(model).items()}, target)


def own_parameters(model):
    """Without the matrices that a draft takes from its target."""
    shared = ("embed_tokens", "word_embeddings", "lm_head")
    return {n: p for n, p in model.named_parameters() if not any(name in n for name in shared)}


def backbone(args, folder, ids):
    """Hidden states [n, D] of a text's tokens [n], by the target's class."""
    model = load(args, folder, draft=False).eval()
    model.logits_processor = Logits()
    set_forward_context(ForwardContext(attn_backend=Cache()))
    with torch.no_grad():
        return model(ids, torch.arange(len(ids)), Batch(ForwardMode.DRAFT_EXTEND_V2, None))[0]


def run(args, job):
    given = load_file(f"{job}/in.safetensors")
    model = load(args, f"{job}/draft").eval()
    own = own_parameters(model)
    unfilled = [n for n, p in own.items() if bool((p == SENTINEL).any())]
    whole = dict(load(args, f"{job}/full").named_parameters())
    others = [n for n, p in own.items() if not torch.equal(p, whole[n])]
    print(f"{os.path.basename(job)}: {type(model).__name__}, unfilled {unfilled}, other in full {others}")
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None  # which this SGLang calls on every device
    model.set_embed_and_head(torch.nn.Parameter(given["embed"]), torch.nn.Parameter(given["lm_head"]))
    model.logits_processor = Logits()
    ids, hidden = given["ids"], given["hidden"]
    base = len(hidden) - 1
    set_forward_context(ForwardContext(attn_backend=Cache()))
    found, seed = [], None
    if getattr(model.config, "index_share_for_mtp_iteration", False):
        seed = torch.full((base + 1, model.config.index_topk), -1)
    with torch.no_grad():
        g, logits = model(ids[1 : base + 2], torch.arange(base + 1), Batch(ForwardMode.DRAFT_EXTEND_V2, hidden, seed))
        found.append((logits[-1], g[-1]))
        for k in range(2, len(ids) - base):
            batch = Batch(ForwardMode.DECODE, found[-1][1][None], None if seed is None else seed[-1:])
            g, logits = model(ids[base + k : base + k + 1], torch.tensor([base + k - 1]), batch)
            found.append((logits[0], g[0]))
    out = {"logits": torch.stack([x for x, _ in found]), "hidden": torch.stack([x for _, x in found])}
    if os.path.exists(f"{job}/backbone"):
        out["backbone"] = backbone(args, f"{job}/full", ids[: base + 1])
    save_file(out, f"{job}/out.safetensors")


if __name__ == "__main__":
    if sys.argv[-1].endswith(".safetensors"):
        parameters(*sys.argv[1:])
    else:
        arguments = start(f"{sys.argv[1]}/draft")
        for folder in sys.argv[1:]:
            run(arguments, folder)
