#!/usr/bin/env bash
# From a fresh clone to a better draft head, on a CPU: self-distil, clean, mix, train, export, measure before and after.
#
#   bash examples/quickstart.sh
#
# Uses the active virtual environment, or makes .venv and installs into it. Everything is written below
# output/quickstart (OUT=... changes that, SEED=... the seeds); finished steps are not repeated, so an interrupted
# run can simply be started again.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v fastmtp >/dev/null; then
  if [ ! -x .venv/bin/fastmtp ]; then
    echo "== install into .venv"
    python3 -m venv .venv
    .venv/bin/pip install --quiet -c constraints.txt -e '.[train]'
  fi
  PATH="$PWD/.venv/bin:$PATH"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

model=examples/tiny-mimo
out=${OUT:-output/quickstart}
seed=${SEED:-0}

echo "== 1/6 self-distillation: the model answers our prompts (temperature 0.6, top-k 20, top-p 0.95)"
if [ ! -f "$out/distilled.jsonl" ]; then
  fastmtp distill --model $model --prompts examples/prompts/train.jsonl --output "$out/distilled.jsonl" \
    --max_new_tokens 160 --seed "$seed"
fi

echo "== 2/6 cleaning: truncated, repetitive, duplicate answers, and prompts that we measure on"
if [ ! -f "$out/clean.jsonl" ]; then
  fastmtp clean --inputs "$out/distilled.jsonl" --output "$out/clean.jsonl" --model $model \
    --decontaminate examples/prompts/eval.jsonl
fi

echo "== 3/6 mixing: shares of tokens, and a validation set"
if [ ! -d "$out/mixed" ]; then
  fastmtp mix --inputs "$out/clean.jsonl" --output_dir "$out/mixed" --model $model \
    --shares general=0.44 zh=0.33 code=0.23 --val_ratio 0.03 --seed "$seed"
fi

echo "== 4/6 training: swift sft, backbone frozen, K = 3"
if [ ! -e "$out/train/best" ]; then
  started=$(ls -d "$out"/train/checkpoint-* 2>/dev/null || true)  # then the newest whole one is resumed from
  swift sft recipes/quickstart_cpu.yaml --dataset "fastmtp-self-distill:$out/mixed/train.jsonl" \
    --val_dataset "fastmtp-self-distill:$out/mixed/val.jsonl" \
    --output_dir "$out/train" --seed $((42 + seed)) ${started:+--resume_from_checkpoint "$out/train"}
fi

echo "== 5/6 export: a checkpoint that SGLang and vLLM serve"
if [ ! -d "$out/export" ]; then
  swift export --adapters "$out/train/best" --output_dir "$out/export"
fi

echo "== 6/6 before and after, on prompts about topics that were never trained on"
rm -rf "$out/simulate"
fastmtp simulate --model $model --adapters "$out/train/best" --dataset examples/prompts/eval.jsonl \
  --num_steps 5 --max_new_tokens 160 --output_dir "$out/simulate"
echo "plot: $out/simulate/simulate.png    model: $out/export"
