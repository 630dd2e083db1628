#!/usr/bin/env bash
# The paper's ablation, end to end: vanilla MTP, trained on the data's answers, on the model's own, and with token maps;
# K = 0 .. 3, depths to 7, map sizes; tables and plots in the paper's layout.
#
#   DATA=conversations.jsonl bash recipes/paper/run.sh                                  # the tiny model, on a CPU
#   MODEL=MiMo-7B-RL RECIPE=recipes/mimo_7b_rl_8xh20_paper.yaml DATA=.. BASE_URL=http://localhost:30000 SGLANG=/venv/bin/python \
#     TASKS="mt_bench livecodebench math_500 rag nq cnn_dm c_eval" bash recipes/paper/run.sh                    # on GPUs
#
# DATA    conversations with answers (`messages`); without answers, the fixed-data arm is left out
# TASKS   of `fastmtp bench`, or name=FILE; MAP_TASKS: of Table 2   NUM_QUESTIONS  of each task, at most; default: all
# TRAIN   further arguments of `swift sft`                          BASE_URL  a server of MODEL to distill on; default: here
# PLAN    another plan than recipes/paper/bench.yaml
# SGLANG  Python that has SGLang; default: SGLang for a CPU, which is installed (tests/serving)
#
# Finished steps are not repeated: start it again after an interruption. Everything is written below OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
export MODEL=${MODEL:-examples/tiny-mimo} OUT=${OUT:-output/paper}
DATA=${DATA:-examples/prompts/train.jsonl} TASKS=${TASKS:-smoke} RECIPE=${RECIPE:-recipes/quickstart_cpu.yaml}
SIZES=${SIZES:-8192 16384 32768 65536} NEW_TOKENS=${NEW_TOKENS:-1024}
[ "$MODEL" = examples/tiny-mimo ] && SIZES="512 1024 2048 4096" NEW_TOKENS=${TINY_TOKENS:-64}
mkdir -p "$OUT"

step() {  # step FILE-OR-FOLDER COMMAND..: run a command unless what it makes is there
  if [ -e "$1" ]; then return; fi
  echo "== ${*:2}"
  "${@:2}"
}

ARMS=self
grep -q '"role": *"assistant"' "$DATA" && ARMS="fixed self"

step "$OUT/self.jsonl" fastmtp distill --model "$MODEL" --prompts "$DATA" --output "$OUT/self.jsonl" \
  --max_new_tokens "$((NEW_TOKENS < 1024 ? 160 : 4096))" ${BASE_URL:+--base_url $BASE_URL}
[ -e "$OUT/fixed.jsonl" ] || cp "$DATA" "$OUT/fixed.jsonl"
for arm in $ARMS; do
  step "$OUT/$arm-clean.jsonl" fastmtp clean --inputs "$OUT/$arm.jsonl" --output "$OUT/$arm-clean.jsonl" --model "$MODEL"
  step "$OUT/$arm-mixed" fastmtp mix --inputs "$OUT/$arm-clean.jsonl" --output_dir "$OUT/$arm-mixed" --model "$MODEL" \
    --max_repeat 2 --val_ratio "${VAL_RATIO:-0.02}" ${SHARES:+--shares $SHARES} ${TOKENS:+--tokens $TOKENS}
  started=$(ls -d "$OUT/$arm-train"/checkpoint-* 2>/dev/null || true)  # then the newest whole one is resumed from
  step "$OUT/$arm-train/best" swift sft "$RECIPE" --model "$MODEL" --output_dir "$OUT/$arm-train" --add_version false \
    --dataset "fastmtp-self-distill:$OUT/$arm-mixed/train.jsonl" --create_checkpoint_symlink true \
    --val_dataset "fastmtp-self-distill:$OUT/$arm-mixed/val.jsonl" ${TRAIN:-} \
    ${started:+--resume_from_checkpoint "$OUT/$arm-train"}
  step "$OUT/$arm" swift export --adapters "$OUT/$arm-train/best" --output_dir "$OUT/$arm"
done

# Token maps by language from the model's own answers; the best for each, before anything is served.
step "$OUT/maps" fastmtp vocab --inputs "$OUT/self-clean.jsonl" --model "$MODEL" --output_dir "$OUT/maps" --sizes $SIZES
step "$OUT/simulate" fastmtp simulate --model "$MODEL" --adapters $(for arm in $ARMS; do echo "$OUT/$arm-train/best"; done) \
  --dataset "$OUT/self-mixed/val.jsonl" --answers given --num_steps 7 --token_map "$OUT"/maps/*.pt --by language \
  --output_dir "$OUT/simulate" ${SIMULATE:-}

# Real servers: the baseline first, every other against it, on the same prompts.
plan=${PLAN:-recipes/paper/bench.yaml}
if [ "$ARMS" = self ]; then
  sed '/^  fixed:/d' "$plan" > "$OUT/bench.yaml" && plan="$OUT/bench.yaml"
fi
cpu=
if [ -z "${SGLANG:-}" ]; then
  SGLANG=$(bash tests/serving/setup_engine.sh)/bin/python
  cpu=tests/serving/cpu_plan.yaml
fi
export SGLANG
measure() {  # measure NAME PLAN TASKS: results and report of one plan
  step "$OUT/$1/results.json" fastmtp bench --plan $2 $cpu --tasks $3 --max_new_tokens "$NEW_TOKENS" \
    ${NUM_QUESTIONS:+--num_questions $NUM_QUESTIONS} --output_dir "$OUT/$1"
  step "$OUT/$1/report" fastmtp report "$OUT/$1/results.json" --output_dir "$OUT/$1/report"
}
measure ablation "$plan" "$TASKS"
EN_MAPS=$(ls -1v "$OUT"/maps/en-*.pt 2>/dev/null | paste -sd,) ZH_MAPS=$(ls -1v "$OUT"/maps/zh-*.pt 2>/dev/null | paste -sd,)
export EN_MAPS ZH_MAPS
if [ -n "$EN_MAPS" ] && [ -n "$ZH_MAPS" ] && [ -n "${MAP_TASKS=$TASKS}" ]; then
  measure map-sizes recipes/paper/maps.yaml "$MAP_TASKS"
fi
echo "reports: $OUT/*/report/report.html    predicted: $OUT/simulate"
