"""Train `examples/tiny-mimo`: a MiMo with one MTP layer, small enough to carry in a git repository.

As MiMo itself, backbone and a depth-1 MTP layer learn together: first plain text (English, Chinese, code), then
chat-formatted prompts and dialogues. The MTP layer never sees its own output, so it drafts one token well and
collapses after that; which is what FastMTP is there to fix.

    python examples/train_tiny_mimo.py --data DATA --output_dir examples/tiny-mimo

DATA holds `text/*.jsonl.xz` (`{"text", "source", "license"}`) and `prompts.jsonl` (`{"messages", "response"}`);
the model card lists the sources. About an hour on two CPU cores; `--work_dir` keeps the state, and a killed run
started again goes on from there.
"""

import argparse
import json
import lzma
import math
import random
import re
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F

from swift_fastmtp.families.mimo import MiMoConfig
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.method.rollout import rollout, segment_ids, step_targets
from swift_fastmtp.model.modeling import build_class

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
BPE_SIZE, VOCAB_ROWS = 6080, 6144  # rows are padded, as MiMo's are (151,680 for 151,669 tokens)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CONFIG = {
    "architectures": ["MiMoForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "model_type": "mimo",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_ROWS,
}
CONFIGURATION_MIMO = """from transformers.models.qwen2.configuration_qwen2 import Qwen2Config


class MiMoConfig(Qwen2Config):
    model_type = "mimo"
    num_nextn_predict_layers: int = 1
"""


def documents(data: Path) -> list[tuple[str, str]]:
    """(file stem, text) of every plain-text document."""
    rows = []
    for path in sorted((data / "text").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as file:
            rows += [(path.name.split(".")[0], json.loads(line)["text"]) for line in file]
    return rows


def chat(turns: list[str]) -> str:
    """Alternating user / assistant turns in ChatML."""
    out = [SYSTEM]
    for i, turn in enumerate(turns):
        out.append(f"<|im_start|>{'assistant' if i % 2 else 'user'}\n{turn}<|im_end|>\n")
    return "".join(out)


def conversations(data: Path, docs: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """Chat texts: prompts with answers, two-speaker dialogues, and "continue this" made from plain text."""
    out = []
    with open(data / "prompts.jsonl", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.get("response"):
                out.append(chat([row["messages"][-1]["content"], row["response"]]))
    for name, text in docs:
        if name.endswith("dialogue"):
            turns = [re.sub(r"^[^:：]{1,10}[:：]\s*", "", t) for t in text.split("\n") if t.strip()]
            while len(turns) >= 2:
                n = 2 * rng.randint(1, min(4, len(turns) // 2))
                out.append(chat(turns[:n]))
                turns = turns[n:]
            continue
        title, _, body = text.partition("\n\n")
        chinese = name.startswith("zh")
        if name == "zh_wiki" and title.startswith("# "):
            ask = rng.choice(["介绍一下{}。", "什么是{}？", "请简单说明{}。", "{}是什么？"])
            out.append(chat([ask.format(title[2:].strip()), body.strip()[: rng.randint(60, 240)]]))
        elif name == "en_textbooks" and title.startswith("# "):
            ask = rng.choice(["Tell me about {}.", "Write a short text about {}.", "Explain {}."])
            out.append(chat([ask.format(title[2:].strip()), body.strip()[: rng.randint(200, 700)]]))
        for _ in range(1 + len(text) // 6000):
            start = rng.randrange(max(1, len(text) - 600))
            piece = text[start : start + (300 if chinese else 700)]
            cut = len(piece) // 4
            ask = "继续写下去：\n" if chinese else "Continue the text:\n"
            if name.startswith("code"):
                ask = rng.choice(["Continue this code:\n", "Complete the code:\n", "补全代码：\n"])
            out.append(chat([ask + piece[:cut], piece[cut:]]))
    rng.shuffle(out)
    return out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with Qwen2's pre-tokenizer and ChatML tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(ADDED)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    special = {tokenizer.token_to_id(t): t for t in SPECIAL}
    added = {tokenizer.token_to_id(t): t for t in ADDED}
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": t, **entry, "special": i in special} for i, t in (special | added).items()
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def joint_loss(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, mtp_weight: float) -> torch.Tensor:
    """Next-token loss + mtp_weight x depth-1 MTP loss, gradients through the whole model (MiMo's pre-training)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    segments = segment_ids(positions, mask)
    embeds = model.model.embed_tokens(ids)
    # Step 0 of the targets is the next token, which the MTP targets start one after.
    (mtp,) = rollout(model.head, hidden, embeds, positions, segments, model.model.rotary_emb, 1, "exact")
    targets, valid = step_targets(ids, segments, None, 1)
    next_valid = segments[:, 1:] >= 0
    main = F.cross_entropy(model.lm_head(hidden[:, :-1][next_valid]), ids[:, 1:][next_valid])
    draft = F.cross_entropy(model.lm_head(mtp[valid[0]]), targets[0][valid[0]])
    return torch.stack([main, draft]), main + mtp_weight * draft


def text_batches(tokens: torch.Tensor, rows: int, length: int, seed: int):
    """Endless [rows, length] windows of the token stream, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = tokens[offset : offset + (len(tokens) - offset) // length * length].view(-1, length)
        order = torch.randperm(len(windows), generator=generator)
        for i in range(0, len(order) - rows + 1, rows):
            ids = windows[order[i : i + rows]].long()
            yield ids, torch.ones_like(ids)


def chat_batches(rows: list[list[int]], tokens_per_batch: int, seed: int, pad: int):
    """Endless padded batches of whole conversations of similar length."""
    rng = random.Random(seed)
    while True:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + rng.random() * 24)
        batches, batch = [], []
        for i in order:
            batch.append(i)
            if len(batch) * len(rows[i]) >= tokens_per_batch:
                batches.append(batch)
                batch = []
        rng.shuffle(batches)
        for batch in batches:
            width = max(len(rows[i]) for i in batch)
            ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in batch])
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch])
            yield ids, mask


def optimizers(model: torch.nn.Module):
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_model(model: torch.nn.Module, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    end, turn_end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    config = {**CONFIG, "bos_token_id": end, "eos_token_id": turn_end, "pad_token_id": end}
    (out / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    (out / "configuration_mimo.py").write_text(CONFIGURATION_MIMO)
    generation = {"bos_token_id": end, "do_sample": False, "eos_token_id": [turn_end, end], "pad_token_id": end}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, out)
    tensors = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("output/tiny-mimo"))
    parser.add_argument("--text_steps", type=int, default=1300)
    parser.add_argument("--chat_steps", type=int, default=1300)
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--mtp_weight", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    cache = args.work_dir / "data.pt"
    if not cache.exists():
        rng = random.Random(args.seed)
        docs = documents(args.data)
        chats = conversations(args.data, docs, rng)
        sample = [t[:20000] for _, t in docs[::3]] + chats[::4]
        tokenizer = train_tokenizer(sample)
        end = tokenizer.token_to_id("<|endoftext|>")
        rng.shuffle(docs)
        stream = [i for e in tokenizer.encode_batch([t for _, t in docs]) for i in (*e.ids, end)]
        rows = [e.ids for e in tokenizer.encode_batch(chats)]
        rows = [r for r in rows if 30 <= len(r) <= 512]
        data = {"tokenizer": tokenizer.to_str(), "stream": torch.tensor(stream, dtype=torch.int16), "rows": rows}
        torch.save(data, cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").rename(cache)
    data = torch.load(cache, weights_only=True)
    tokenizer = Tokenizer.from_str(data["tokenizer"])
    print(f"text {len(data['stream']):,} tokens, chat {sum(map(len, data['rows'])):,} in {len(data['rows']):,} rows")

    torch.manual_seed(args.seed)
    model = build_class(FAMILIES[0])(MiMoConfig(**CONFIG))
    torch.nn.Module.train(model, True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optims = optimizers(model)
    state_file, start = args.work_dir / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        start = state["step"]
    texts = text_batches(data["stream"], args.batch_tokens // 256, 256, args.seed + start)
    end = tokenizer.token_to_id("<|endoftext|>")
    chats = chat_batches(data["rows"], args.batch_tokens, args.seed + start, end)
    total = args.text_steps + args.chat_steps
    began, averages = time.time(), torch.zeros(2)
    for step in range(start, total):
        ids, mask = next(texts if step < args.text_steps else chats)
        # Warm-up, constant, then a linear decay over the last 40 %, most of it on chat.
        lr = args.learning_rate * min(1.0, (step + 1) / 100, max(0.02, (total - step) / (0.4 * total)))
        for optim, scale in zip(optims, (1.0, 0.75), strict=True):
            for group in optim.param_groups:
                group["lr"] = lr * scale
        with torch.autocast("cpu", torch.bfloat16):
            parts, loss = joint_loss(model, ids, mask, args.mtp_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        averages = parts.detach() if step == start else 0.97 * averages + 0.03 * parts.detach()
        if step % 20 == 0 or step == total - 1:
            spent = time.time() - began
            left = spent / (step - start + 1) * (total - step - 1)
            print(
                f"step {step}/{total} next {averages[0]:.3f} mtp {averages[1]:.3f} lr {lr:.2e} "
                f"{spent / 60:.1f} min, {left / 60:.1f} left",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step == total - 1:
            state = {"model": model.state_dict(), "optims": [o.state_dict() for o in optims], "step": step + 1}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").rename(state_file)
            assert math.isfinite(loss.item())
    save_model(model, tokenizer, args.output_dir)


if __name__ == "__main__":
    main()
