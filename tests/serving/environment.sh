# Sourced by setup_engine.sh and setup_vllm.sh: a virtual environment with an engine, made once.
#
# `make_environment NAME PINS [FOLDER]` prints the folder; the sourcing script defines `install_engine`, which is called
# in the folder with $pip and $here, and defines $torch and $transformers. Without FOLDER it lives in the user's cache
# under a name made from the pins. A folder that is complete is left as it is; tests that run side by side make it once.
make_environment() {
  local name=$1 pins=$2 folder=${3:-}
  pins=$(printf '%s' "$pins" | sha256sum | cut -c1-12)
  folder=${folder:-${XDG_CACHE_HOME:-$HOME/.cache}/swift_fastmtp/$name-$pins}
  mkdir -p "$(dirname "$folder")"
  exec 9>"$folder.lock" && flock 9
  if [ ! -f "$folder/complete" ]; then
    rm -rf "$folder"
    {
      python3 -m venv "$folder"
      # torch is pinned for every step: several packages would pull a CUDA build.
      printf 'torch==%s\ntransformers==%s\n' "$torch" "$transformers" > "$folder/constraints.txt"
      pip="$folder/bin/pip --quiet --disable-pip-version-check"
      $pip install -c "$folder/constraints.txt" torch transformers
      install_engine "$folder"
      touch "$folder/complete"
    } >&2
  fi
  echo "$folder"
}
