#!/usr/bin/env bash
# `fastmtp run` on several machines of a Slurm cluster. NOT RUN HERE: this project had no cluster; its syntax is tested,
# and so are the commands that `fastmtp run` makes of it. Read it before you submit it, and change what your site needs.
#
#   MODEL=MiMo-7B-RL PROMPTS=prompts.jsonl sbatch examples/slurm.sh
#
# First a server of the model on every machine, which share the answers; then training over all of them, as ms-swift
# does it: NNODES, NODE_RANK, MASTER_ADDR and NPROC_PER_NODE make `swift sft` start torchrun on each. Submitted again
# after a time limit or a lost machine, it goes on. OUT must be on a disk that all machines see.
#SBATCH --job-name=fastmtp
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
: "${MODEL:?folder of the model}" "${PROMPTS:?file of prompts}"
OUT=${OUT:-output/slurm} RECIPE=${RECIPE:-recipes/mimo_7b_rl_8xh20.yaml} PORT=${PORT:-30000}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
mkdir -p "$OUT/logs"

plan=$OUT/plan.yaml
cat > "$plan" <<EOF
model: $MODEL
prompts: $PROMPTS
output_dir: $OUT
train:
  recipe: $RECIPE
  launcher: [srun, --ntasks-per-node=1, bash, -c, 'NODE_RANK=\$SLURM_NODEID exec "\$@"', swift]
  environment: {NNODES: "$SLURM_NNODES", MASTER_ADDR: "${hosts[0]}", MASTER_PORT: "29500", NPROC_PER_NODE: "8"}
EOF

# The answers, and what is made of them. Servers that are needed no more leave the GPUs to training.
if [ ! -d "$OUT/mixed" ]; then
  srun --output="$OUT/logs/server-%N.log" python -m sglang.launch_server --model-path "$MODEL" --trust-remote-code \
    --host 0.0.0.0 --port "$PORT" --dp-size 8 &
  servers=$!
  trap 'kill $servers 2>/dev/null || true' EXIT
  for host in "${hosts[@]}"; do
    until curl --silent --fail "http://$host:$PORT/health" >/dev/null; do
      kill -0 $servers
      sleep 5
    done
  done
  urls=("${hosts[@]/#/http://}")
  fastmtp run "$plan" --base_url "${urls[@]/%/:$PORT}" --until mix
  kill $servers
  wait $servers || true
fi

fastmtp run "$plan"
