"""The method written out plainly, sharing nothing with the package: what the fast paths must equal.

A MiMo head in a few functions over its raw weights (RMSNorm, rotate-half RoPE, grouped heads, SwiGLU), the heads of
other families where they differ, the paper's rollout as a loop over steps, and a token-by-token draft with a KV cache
as a server does it (SGLang `eagle_worker_v2.py`: one extend pass over the committed slots, then single-token decodes).
"""

import copy
import math
import re
from functools import partial

import torch


class Head:
    """Weights of one head, by names relative to it, and its sizes."""

    def __init__(self, head, config):
        self.w = {n: p.detach() for n, p in head.named_parameters()}
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.eps = getattr(config, "head_dim", config.hidden_size // self.heads), config.rms_norm_eps
        rope = config.rope_parameters
        self.rotary = int(self.dim * rope.get("partial_rotary_factor", 1))
        self.frequencies = rope["rope_theta"] ** -(torch.arange(0, self.rotary, 2).double() / self.rotary)
        self.scale, self.amplitude = self.dim**-0.5, 1.0

    def rms(self, x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.w[name + ".weight"]

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def rope(self, x, positions):
        """x [n, heads, dim], positions [n]; the first `rotary` of dim turn, in halves."""
        angle = (positions[:, None] * self.frequencies.to(x.dtype))[:, None, :].repeat(1, 1, 2)
        turned, rest = x[..., : self.rotary], x[..., self.rotary :]
        a, b = turned.chunk(2, -1)
        return torch.cat([turned * angle.cos() + torch.cat([-b, a], -1) * angle.sin(), rest], -1)

    def fuse(self, hidden, embed):
        return self.linear(
            torch.cat([self.rms(hidden, "hidden_layernorm"), self.rms(embed, "token_layernorm")], -1), "input_proj"
        )

    def qkv(self, u, positions):
        a = self.rms(u, "input_layernorm")
        q = self.linear(a, "self_attn.q_proj").view(len(u), self.heads, self.dim)
        k = self.linear(a, "self_attn.k_proj").view(len(u), self.kv, self.dim)
        v = self.linear(a, "self_attn.v_proj").view(len(u), self.kv, self.dim)
        return self.rope(q, positions), self.rope(k, positions), v

    def attend(self, q, k, v, visible):
        """One softmax per head; visible [n_queries, n_keys]."""
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for h in range(self.heads):
            g = h * self.kv // self.heads
            scores = (q[:, h] @ k[:, g].T * self.scale).masked_fill(~visible, float("-inf"))
            out[:, h] = scores.softmax(-1) @ v[:, g]
        return out

    def block_output(self, u, attended):
        u = u + self.linear(attended.flatten(1), "self_attn.o_proj")
        a = self.rms(u, "post_attention_layernorm")
        gate = torch.nn.functional.silu(self.linear(a, "mlp.gate_proj"))
        u = u + self.linear(gate * self.linear(a, "mlp.up_proj"), "mlp.down_proj")
        return u

    def final(self, u):
        return self.rms(u, "final_layernorm")

    def tail(self, u, attended):
        return self.final(self.block_output(u, attended))


def mlp(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


class QwenHead(Head):
    """Norms that multiply by 1 + w, [embed, hidden], an output gate beside the queries, QK-norm, RoPE on a part of each
    head, and a mixture of experts with one shared expert (SGLang `qwen3_next_mtp.py`, `qwen3_next.py`,
    `qwen2_moe.py`)."""

    def __init__(self, head, config):
        super().__init__(head, config)
        self.w = {n.removeprefix("layers.0."): w for n, w in self.w.items()}
        self.top = getattr(config, "num_experts_per_tok", None)

    def rms(self, x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.w[name + ".weight"])

    def fuse(self, hidden, embed):
        pair = self.rms(embed, "pre_fc_norm_embedding"), self.rms(hidden, "pre_fc_norm_hidden")
        return self.linear(torch.cat(pair, -1), "fc")

    def queries_and_gate(self, u):
        both = self.linear(self.rms(u, "input_layernorm"), "self_attn.q_proj").view(len(u), self.heads, 2 * self.dim)
        return both[..., : self.dim], both[..., self.dim :]

    def qkv(self, u, positions):
        a = self.rms(u, "input_layernorm")
        q, _ = self.queries_and_gate(u)
        k = self.linear(a, "self_attn.k_proj").view(len(u), self.kv, self.dim)
        v = self.linear(a, "self_attn.v_proj").view(len(u), self.kv, self.dim)
        q, k = self.rms(q, "self_attn.q_norm"), self.rms(k, "self_attn.k_norm")
        return self.rope(q, positions), self.rope(k, positions), v

    def shared_expert(self, x):
        out = mlp(x, *(self.w[f"mlp.shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down")))
        return out * torch.sigmoid(self.linear(x, "mlp.shared_expert_gate"))

    def feed_forward(self, x):
        """Row by row, expert by expert."""
        out = self.shared_expert(x)
        share = self.linear(x, "mlp.gate").softmax(-1)
        for i, row in enumerate(x):
            best = share[i].argsort(descending=True)[: self.top].tolist()
            for e in best:
                gate, up = self.w["mlp.experts.gate_up_proj"][e].chunk(2)
                y = mlp(row[None], gate, up, self.w["mlp.experts.down_proj"][e])[0]
                out[i] += y * share[i, e] / share[i, best].sum()
        return out

    def block_output(self, u, attended):
        _, gate = self.queries_and_gate(u)
        u = u + self.linear((attended * torch.sigmoid(gate)).flatten(1), "self_attn.o_proj")
        u = u + self.feed_forward(self.rms(u, "post_attention_layernorm"))
        return u

    def final(self, u):
        return self.rms(u, "norm")


class Qwen3MoeHead(QwenHead):
    """Plain norms, no output gate, RoPE on the whole head, no shared expert (SGLang `qwen3_moe_mtp.py`)."""

    rms = Head.rms

    def queries_and_gate(self, u):
        q = self.linear(self.rms(u, "input_layernorm"), "self_attn.q_proj").view(len(u), self.heads, self.dim)
        return q, torch.full_like(q, math.inf)

    def shared_expert(self, x):
        return torch.zeros_like(x)


class ErnieHead(Head):
    """[embed, hidden], RoPE on neighboring pairs, a bias where the config says so, and no final norm
    (SGLang `ernie4_eagle.py`, `ernie4.py`)."""

    def __init__(self, head, config):
        super().__init__(head, config)
        self.w = {n.removeprefix("mtp_block.0."): w for n, w in self.w.items()}

    def rope(self, x, positions):
        angle = (positions[:, None] * self.frequencies.to(x.dtype))[:, None, :]
        a, b = x[..., 0::2], x[..., 1::2]
        turned = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return torch.stack(turned, -1).flatten(-2)

    def fuse(self, hidden, embed):
        pair = self.rms(embed, "mtp_emb_norm.0"), self.rms(hidden, "mtp_hidden_norm.0")
        return self.linear(torch.cat(pair, -1), "mtp_linear_proj.0")

    def final(self, u):
        return u


class DenseQwenHead(QwenHead):
    """Qwen3.5: the same with a dense MLP."""

    def feed_forward(self, x):
        return mlp(x, *(self.w[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down")))


class GlmHead(Head):
    """[embed, hidden], QK-norm, RoPE on a part of each head, and experts in groups, chosen by a score with a bias that
    does not weigh them (SGLang `glm4_moe_nextn.py`, `glm4_moe.py`, `layers/moe/topk.py`)."""

    router_bias, output, last_norm = "e_score_correction_bias", "self_attn.o_proj", "shared_head.norm"

    def __init__(self, head, config):
        super().__init__(head, config)
        self.bias = head.state_dict()[f"mlp.gate.{self.router_bias}"]
        self.top, self.routed_scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups, self.open_groups = config.n_group, config.topk_group

    def fuse(self, hidden, embed):
        return self.linear(torch.cat([self.rms(embed, "enorm"), self.rms(hidden, "hnorm")], -1), "eh_proj")

    def qkv(self, u, positions):
        a = self.rms(u, "input_layernorm")
        q = self.linear(a, "self_attn.q_proj").view(len(u), self.heads, self.dim)
        k = self.linear(a, "self_attn.k_proj").view(len(u), self.kv, self.dim)
        v = self.linear(a, "self_attn.v_proj").view(len(u), self.kv, self.dim)
        q, k = self.rms(q, "self_attn.q_norm"), self.rms(k, "self_attn.k_norm")
        return self.rope(q, positions), self.rope(k, positions), v

    def feed_forward(self, x):
        """Row by row, expert by expert."""
        out = mlp(x, *(self.w[f"mlp.shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down")))
        for i, row in enumerate(x):
            score = torch.sigmoid(self.w["mlp.gate.weight"] @ row)
            rank = (score + self.bias.to(score.dtype)).view(self.groups, -1)
            best_groups = rank.topk(2, -1).values.sum(-1).topk(self.open_groups).indices.tolist()
            for g in set(range(self.groups)) - set(best_groups):
                rank[g] = float("-inf")
            best = rank.flatten().topk(self.top).indices.tolist()
            for e in best:
                gate, up = self.w["mlp.experts.gate_up_proj"][e].chunk(2)
                y = mlp(row[None], gate, up, self.w["mlp.experts.down_proj"][e])[0]
                out[i] += y * self.routed_scale * score[e] / score[best].sum()
        return out

    def heads_out(self, attended):
        return attended.flatten(1)

    def block_output(self, u, attended):
        u = u + self.linear(self.heads_out(attended), self.output)
        u = u + self.feed_forward(self.rms(u, "post_attention_layernorm"))
        return u

    def final(self, u):
        return self.rms(u, self.last_norm)


class LingHead(GlmHead):
    """GLM-4.5's under other names; one matrix for queries, keys and values, in this order (SGLang `bailing_moe.py`)."""

    router_bias, output, last_norm = "expert_bias", "attention.dense", "final_layernorm"

    def qkv(self, u, positions):
        both = self.linear(self.rms(u, "input_layernorm"), "attention.query_key_value").view(len(u), -1, self.dim)
        q, k, v = both.split([self.heads, self.kv, self.kv], 1)
        q, k = self.rms(q, "attention.query_layernorm"), self.rms(k, "attention.key_layernorm")
        return self.rope(q, positions), self.rope(k, positions), v


class LatentHead(GlmHead):
    """DeepSeek's attention as a server runs it: one key per token for all heads, which is the latent beside a rotary
    part; the matrices that would widen the latent are applied to query and output instead (DeepSeek-V2, section 2.1).
    """

    def __init__(self, head, config):
        super().__init__(head, config)
        self.latents(config)

    def latents(self, config):
        self.kv, self.rank, self.nope, self.rotary = 1, config.kv_lora_rank, config.qk_nope_head_dim, self.dim
        self.scale = (self.nope + self.rotary) ** -0.5
        rope = config.rope_parameters
        if rope["rope_type"] == "yarn":
            self.yarn(rope)

    def yarn(self, rope):
        """Peng et al. 2023, section 3.2: slow frequencies are divided by the factor. DeepSeek scales the logits by the
        square of a factor that their `mscale_all_dim` says, and what turns by the ratio of two."""

        def turns(n):
            return self.rotary * math.log(rope["original_max_position_embeddings"] / (n * 2 * math.pi)) / 2 / log_theta

        def factor(mscale):
            return 0.1 * mscale * math.log(rope["factor"]) + 1

        log_theta = math.log(rope["rope_theta"])
        low, high = math.floor(turns(rope["beta_fast"])), math.ceil(turns(rope["beta_slow"]))
        low, high = max(low, 0), min(high, self.rotary - 1)
        slow = ((torch.arange(self.rotary // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
        self.frequencies = self.frequencies * (1 - slow + slow / rope["factor"])
        self.amplitude = factor(rope["mscale"]) / factor(rope["mscale_all_dim"])
        self.scale *= factor(rope["mscale_all_dim"]) ** 2

    def rope(self, x, positions):
        """Neighbors turn together."""
        angle = (positions[:, None] * self.frequencies.to(x.dtype))[:, None, :]
        a, b = x[..., 0::2], x[..., 1::2]
        pairs = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return torch.stack(pairs, -1).flatten(-2) * self.amplitude

    def widening(self):
        """Of keys [heads, nope, rank] and of values [heads, v, rank]."""
        both = self.w["self_attn.kv_b_proj.weight"].view(self.heads, -1, self.rank)
        return both[:, : self.nope], both[:, self.nope :]

    def qkv(self, u, positions):
        a = self.rms(u, "input_layernorm")
        q = self.rms(self.linear(a, "self_attn.q_a_proj"), "self_attn.q_a_layernorm")
        q = self.linear(q, "self_attn.q_b_proj").view(len(u), self.heads, -1)
        latent, turning = self.linear(a, "self_attn.kv_a_proj_with_mqa").split([self.rank, self.rotary], -1)
        latent = self.rms(latent, "self_attn.kv_a_layernorm")[:, None]
        narrowed = torch.einsum("nhd,hdr->nhr", q[..., : self.nope], self.widening()[0])
        queries = torch.cat([narrowed, self.rope(q[..., self.nope :], positions)], -1)
        return queries, torch.cat([latent, self.rope(turning[:, None], positions)], -1), latent

    def heads_out(self, attended):
        return torch.einsum("nhr,hvr->nhv", attended, self.widening()[1]).flatten(1)


class SparseHead(LatentHead):
    """Attends to the keys that an indexer picks (DeepSeek-V3.2, section 2.1; SGLang `dsa_indexer.py`). Index keys lie
    beside the latent ones in the cache; index queries and their weights come with the others."""

    def __init__(self, head, config):
        super().__init__(head, config)
        self.w |= {n: t for n, t in head.state_dict().items() if ".indexer." in n}
        self.index_heads, self.keys = config.index_n_heads, config.index_topk

    def qkv(self, u, positions):
        q, key, latent = super().qkv(u, positions)
        a = self.rms(u, "input_layernorm")
        r = self.rms(self.linear(a, "self_attn.q_a_proj"), "self_attn.q_a_layernorm")
        index_q = self.linear(r, "self_attn.indexer.wq_b").view(len(u), self.index_heads, -1)
        k = self.linear(a, "self_attn.indexer.wk")
        k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        k = k * self.w["self_attn.indexer.k_norm.weight"] + self.w["self_attn.indexer.k_norm.bias"]
        index_q, k = self.turn(index_q, positions), self.turn(k[:, None], positions)
        return (q, index_q, self.linear(a, "self_attn.indexer.weights_proj")), torch.cat([key, k], -1), latent

    def turn(self, x, positions):
        return torch.cat([self.index_rope(x[..., : self.rotary], positions), x[..., self.rotary :]], -1)

    def index_rope(self, x, positions):
        return Head.rope(self, x, positions) * self.amplitude

    def attend(self, queries, keys, values, visible):
        q, index_q, weights = queries
        keys, index_keys = keys.split([q.shape[-1], index_q.shape[-1]], -1)
        return super().attend(q, keys, values, self.picked(index_q, index_keys[:, 0], weights, visible))

    def picked(self, q, keys, weights, visible):
        """Query by query."""
        found = torch.zeros_like(visible)
        for t, seen in enumerate(visible):
            score = (torch.relu(keys @ q[t].T) @ weights[t]).masked_fill(~seen, float("-inf"))
            found[t, score.argsort(descending=True)[: self.keys]] = True
        return found & visible


class GlmSparseHead(SparseHead):
    """Its indexer turns neighbors together."""

    index_rope = LatentHead.rope


class SharingHead(GlmSparseHead):
    """Picks in the first pass only; a later query of the chain attends to what the last row of it has picked (SGLang
    `eagle_worker_v2.py`, `index_share_for_mtp_iteration`)."""

    def picked(self, q, keys, weights, visible):
        if len(q) == len(keys):
            found = super().picked(q, keys, weights, visible)
            self.seed = found[-1]
            return found
        return torch.nn.functional.pad(self.seed, (0, len(keys) - len(self.seed)))[None]


class LongcatHead(LatentHead):
    """The latents are scaled to the model's width, the MLP is dense (SGLang `longcat_flash_nextn.py`)."""

    def __init__(self, head, config):
        Head.__init__(self, head, config)
        self.latents(config)
        self.w = {re.sub(r"^layers\.0\.|transformer_layer\.|\.m(?=\.)", "", n): w for n, w in self.w.items()}
        self.widths = {
            "self_attn.q_a_layernorm": (config.hidden_size / config.q_lora_rank) ** 0.5,
            "self_attn.kv_a_layernorm": (config.hidden_size / config.kv_lora_rank) ** 0.5,
        }

    def rms(self, x, name):
        return super().rms(x, name) * self.widths.get(name, 1.0)

    feed_forward = DenseQwenHead.feed_forward

    def final(self, u):
        return self.rms(u, "norm")


def merged_attention(query, keys, values, chain_keys, chain_values, visible, scale):
    """One softmax over [T + M] scores: the visible step-1 keys and the row's own M chain keys.

    query [B, H, T, d], keys and values [B, H_kv, T, d], chain [M, B, H_kv, T, d], visible [B, 1, T, T].
    """
    groups, T = query.shape[1] // keys.shape[1], query.shape[2]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    chain_keys, chain_values = (x.repeat_interleave(groups, 2) for x in (chain_keys, chain_values))
    context = (query @ keys.transpose(-1, -2)).masked_fill(~visible, float("-inf"))
    chain = (query * chain_keys).sum(-1).permute(1, 2, 3, 0)
    weights = (torch.cat([context, chain], -1) * scale).softmax(-1)
    out = weights[..., :T] @ values
    for m, v in enumerate(chain_values):
        out = out + weights[..., T + m, None] * v
    return out


def paper_rollout(head: Head, hidden, embeds, steps):
    """Paper 2.1 on one document: hidden [T, D], embeds [T, D]. Step k has rows 0..T-k-1 (row i reads token i + k)."""
    outputs = []
    for k in range(1, steps + 1):
        n = len(embeds) - k
        if n <= 0:
            break
        positions = torch.arange(n)
        u = head.fuse(hidden[:n], embeds[k : k + n])
        q, key, value = head.qkv(u, positions)
        hidden = head.tail(u, head.attend(q, key, value, torch.ones(n, n).tril().bool()))
        outputs.append(hidden)
    return outputs


def draft_with_cache(head: Head, hidden, embeds, base, steps, graph, *, shift_positions=True, own_chain=True):
    """The chain a server drafts from slot `base` of one document, fed the true tokens. Returns g^1..g^K at that slot.

    `graph` is what the server computes (`families.family.Graph`). The switches take one ingredient away each, to show
    that the test would notice.
    """

    def zero_at_start(e, positions):
        return e.masked_fill((positions == 0)[:, None], 0) if graph.mask_position_zero else e

    if graph.rotary_halves:
        head = copy.copy(head)
        head.rope = partial(Head.rope, head)
    slots = torch.arange(base + 1)
    u = head.fuse(hidden[: base + 1], zero_at_start(embeds[1 : base + 2], slots))
    q, keys, values = head.qkv(u, slots)
    everything = torch.ones(base + 1, base + 1).tril().bool()
    before_norm = head.block_output(u, head.attend(q, keys, values, everything))[-1:]
    outputs = [head.final(before_norm)]
    for step in range(2, steps + 1):
        position = torch.tensor([base + step - 1 if shift_positions else base])
        fed_back = before_norm if graph.feedback_before_norm else outputs[-1]
        u = head.fuse(fed_back, zero_at_start(embeds[base + step : base + step + 1], position))
        q, key, value = head.qkv(u, position)
        if own_chain:
            keys, values = torch.cat([keys, key]), torch.cat([values, value])
            k_seen, v_seen = keys, values
        else:
            k_seen, v_seen = torch.cat([keys, key]), torch.cat([values, value])
        before_norm = head.block_output(u, head.attend(q, k_seen, v_seen, torch.ones(1, len(k_seen)).bool()))
        outputs.append(head.final(before_norm))
    return torch.cat(outputs)


def speculative_greedy(model, prompt, steps, max_new_tokens, ends, token_map=None):
    """Greedy speculative decoding from scratch in every round: (tokens, accepted drafts per round).

    The draft runs on its own tokens here, not on the text's, as it does in a server. `token_map`: ids to draft from, or
    a function of prompt and answer so far that says which, in every round.
    """
    head, embed = Head(model.head, model.config), model.model.embed_tokens

    def target(ids):
        """What the draft gets of every position, and the model's own next tokens."""
        before = []
        hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0][0]))
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        hook.remove()
        best = model.lm_head(hidden).argmax(-1).tolist()
        return before[0] if model.head.graph.hidden_before_norm else hidden, best

    ids = list(prompt)
    _, best = target(ids)
    ids.append(best[-1])  # the prefill's token
    rounds = []
    while ids[-1] not in ends and len(ids) - len(prompt) < max_new_tokens:
        hidden, _ = target(ids[:-1])
        base, drafts = len(ids) - 2, []
        allowed = token_map(ids) if callable(token_map) else token_map
        for k in range(1, steps + 1):
            embeds = embed(torch.tensor(ids + drafts))
            g = draft_with_cache(head, hidden, embeds, base, k, model.head.graph)[-1]
            logits = model.lm_head(g)
            drafts.append(int(logits.argmax() if allowed is None else allowed[logits[allowed].argmax()]))
        _, best = target(ids + drafts)
        accepted = 0
        while accepted < steps and drafts[accepted] == best[base + 1 + accepted]:
            accepted += 1
        rounds.append(accepted)  # SGLang counts drafts past the end of the answer too
        for token in [*drafts[:accepted], best[base + 1 + accepted]]:
            ids.append(token)
            if token in ends or len(ids) - len(prompt) == max_new_tokens:
                break
    return ids[len(prompt) :], rounds


def verify_sampled(drafts, q, p, generator):
    """Speculative sampling (Leviathan et al. 2023, Algorithm 1) for a batch of chains.

    drafts [N, K] were drawn from q [N, K, V]; p [N, K + 1, V] is the target after each prefix. Returns (accepted [N],
    next token [N]): accept draft k with probability min(1, p/q), else draw from the normalized max(p - q, 0).
    """
    N, K = drafts.shape
    rows = torch.arange(N)
    alive, accepted = torch.ones(N, dtype=torch.bool), torch.zeros(N, dtype=torch.long)
    for k in range(K):
        token = drafts[:, k]
        ratio = p[rows, k, token] / q[rows, k, token]
        alive &= torch.rand(N, generator=generator) < ratio
        accepted += alive
    last = p[rows, accepted]
    rejected = accepted < K
    residual = (last - q[rows, accepted.clamp(max=K - 1)]).clamp(min=0)
    last = torch.where(rejected[:, None], residual, last)
    return accepted, torch.multinomial(last / last.sum(-1, keepdim=True), 1, generator=generator).squeeze(1)
