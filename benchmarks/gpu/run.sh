#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes, without a network.
#
#   bash benchmarks/gpu/run.sh [FOLDER]               default output/gpu; one GPU, from Ampere on
#   DEVICE=cpu bash benchmarks/gpu/run.sh [FOLDER]    the same steps in small, to try the script itself
#   PARTS="kernels step" bash benchmarks/gpu/run.sh   some of them only
#
# Needs Python with torch, triton, transformers, pytest and hypothesis; nothing is installed but what lies as wheels in
# $WHEELS, if that is set. Each part has its own limit, writes a log and its figures, and does not stop the others; the
# last lines say how each ended, and the exit status is 1 if one failed.
#
#   kernels     Triton kernels of the loss and of the routed head, compiled, against the plain form (the suite's tests)
#   sampler     SGLang's kernel for sampled drafts against the papers' verification, 200,000 chains each; needs SGLang, or
#               its sglang/kernels/ops/speculative/reject_sampling.py as $SGLANG_CHAIN_SAMPLER
#   attention   torch's flash kernels, as the exact rollout calls them, against float64
#   step        a training step at MiMo-7B's widths, random weights, against the reference step and the arithmetic floor
#   routed      the draft's output matrix: full, with a static map, routed; microseconds and share of bandwidth
#   study       a head for SmolLM2 from nothing (study.sh), if $STUDY_DATA is set
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-output/gpu}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 1
fi
{ nvidia-smi 2>&1; "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|numpy) '; } > "$folder/machine.txt"

status=0
summary=()
part() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  echo "== $name"
  timeout -k 10 "$seconds" "$@" > "$folder/$name.log" 2>&1 < /dev/null
  local code=$?
  [ $code -eq 0 ] || { status=1; tail -15 "$folder/$name.log"; }
  summary+=("$name: $([ $code -eq 0 ] && echo done || echo "failed ($code)"), $((SECONDS - began)) s")
}

# Without the suite's conftest, which needs what training and serving need.
part kernels 150 env PYTHONPATH="$PWD/tests:$PYTHONPATH" $([ "$device" = cpu ] && echo TRITON_INTERPRET=1) \
  "$python" -m pytest -q -n 8 --maxprocesses 8 --dist load --noconftest tests/test_triton.py tests/test_routed_head.py
part attention 60 "$python" benchmarks/gpu/attention.py --device "$device" --output "$folder/attention.json"
if [ "$device" = cuda ]; then
  part sampler 60 env PYTHONPATH="$PWD/tests:$PYTHONPATH" \
    "$python" -m pytest -q -o addopts= --noconftest tests/test_chain_sampler.py
  part step 170 "$python" benchmarks/training/step.py --device cuda --shape mimo-7b --dtype bfloat16 --length 2048 \
    --layers 36 --repeats 3 --no_memory --output "$folder/training_step"
  part routed 90 "$python" benchmarks/serving/routed_head.py --output "$folder/routed_head"
  [ -z "${STUDY_DATA:-}" ] || part study 460 bash benchmarks/gpu/study.sh "$folder/smollm2" "$STUDY_DATA"
else
  part step 300 "$python" benchmarks/training/step.py --layers 2 --length 64 --repeats 1 --no_memory \
    --output "$folder/training_step"
fi
printf '%s\n' "${summary[@]}" | tee "$folder/summary.txt"
exit $status
