#!/usr/bin/env bash
# Make a virtual environment with stock SGLang on a CPU, for the serving tests and for trying serving on a laptop.
#
#   bash tests/serving/setup_engine.sh [FOLDER]      prints the folder; about a minute, 1.6 GB
#
# SGLang pins other versions than training does, hence an environment of its own (environment.sh).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sglang=${SGLANG_VERSION:-0.5.23} torch=2.13.0 transformers=${TRANSFORMERS_VERSION:-5.19.0} xgrammar=0.2.7
source "$here/environment.sh"

install_engine() {
  $pip install --no-deps "sglang==$sglang" "xgrammar==$xgrammar"  # xgrammar's one heavy need, triton, is stubbed
  $pip install -c "$1/constraints.txt" -r "$here/requirements.txt"
}

make_environment sglang-cpu "$sglang $torch $transformers $xgrammar $(cat "$here/requirements.txt")" "${1:-}"
