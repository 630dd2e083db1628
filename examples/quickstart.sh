#!/usr/bin/env bash
# From a fresh clone to a better draft head, on a CPU: self-distil, clean, mix, train, measure before and after, export.
#
#   bash examples/quickstart.sh
#
# Uses the active virtual environment, or makes .venv and installs into it. The steps are those of
# examples/quickstart.yaml. Everything is written below output/quickstart (OUT=... changes that, SEED=... the seeds);
# finished steps are not repeated, so an interrupted run can simply be started again.
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

out=${OUT:-output/quickstart}
fastmtp run examples/quickstart.yaml --output_dir "$out" --seed "${SEED:-0}"
echo "plot: $out/simulate/simulate.png    model: $out/export"
