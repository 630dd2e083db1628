#!/usr/bin/env bash
# A fine-tuned model that lost its MTP layer gets it back: tune, lose, graft, heal, and τ after each, on a CPU.
#
#   bash examples/quickstart.sh && bash examples/heal_lost_mtp.sh
#
# The tiny model is saved once through transformers, which drops the layer, and fine-tuned with stock swift as the plain
# Qwen2 that it then is. Everything is written below output/heal (OUT=... changes that); finished steps are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

base=examples/tiny-mimo
out=${OUT:-output/heal}
rows=${ROWS:-output/quickstart/mixed/train.jsonl}
mkdir -p "$out"

if [ ! -d "$out/plain" ]; then
  echo "== 1/5 a save through transformers: the backbone without its MTP layer"
  python - "$base" "$out/plain" <<'PYTHON'
import json, shutil, sys
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

base, out = sys.argv[1:]
config = json.load(open(f"{base}/config.json"))
config = Qwen2Config(**{k: v for k, v in config.items() if k not in ("auto_map", "model_type")})
Qwen2ForCausalLM.from_pretrained(base, config=config, dtype=torch.bfloat16).save_pretrained(out)
for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    shutil.copyfile(f"{base}/{name}", f"{out}/{name}")
PYTHON
fi

if [ ! -d "$out/tuned/checkpoint-30" ]; then
  echo "== 2/5 full fine-tuning with stock swift; nothing of this package takes part"
  SWIFT_FASTMTP_AUTOLOAD=0 swift sft --model "$out/plain" --model_type qwen2 --template qwen \
    --tuner_type full --dataset "$rows" --torch_dtype float32 --fp16 false --max_length 256 --max_steps 30 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --learning_rate 4e-3 --save_steps 30 \
    --save_only_model true --add_version false --split_dataset_ratio 0 \
    --dataloader_num_workers 0 --check_model false --output_dir "$out/tuned"
fi

echo "== 3/5 lost, and grafted"
fastmtp inspect "$out/tuned/checkpoint-30" || echo "exit status $?"
if [ ! -d "$out/grafted" ]; then
  fastmtp graft --model "$out/tuned/checkpoint-30" --donor "$base" --output_dir "$out/grafted"
fi
fastmtp inspect "$out/grafted"
fastmtp doctor "$out/grafted"

if [ ! -d "$out/healed/checkpoint-60" ]; then
  echo "== 4/5 healing: swift sft, backbone frozen"
  swift sft --model_type fastmtp --model "$out/grafted" --dataset "$rows" --torch_dtype float32 --fp16 false \
    --max_length 256 --max_steps 60 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 \
    --learning_rate 1e-3 --save_steps 60 --add_version false \
    --split_dataset_ratio 0 --dataloader_num_workers 0 --check_model false --output_dir "$out/healed"
fi

echo "== 5/5 before: the base and its head"
rm -rf "$out/before" "$out/after"
fastmtp simulate --model "$base" --dataset examples/prompts/eval.jsonl --max_new_tokens 96 --output_dir "$out/before"
echo "== 5/5 after: the tuned model with the grafted, and with the healed head"
fastmtp simulate --model "$out/grafted" --adapters "$out/healed/checkpoint-60" --dataset examples/prompts/eval.jsonl \
  --max_new_tokens 96 --output_dir "$out/after"
