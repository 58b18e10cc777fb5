#!/usr/bin/env bash
# What is each term of kvroute's policy worth? Simulates a scenario under the policy and under
# copies of it, in each of which one term is switched off. Takes a scenario and seeds; writes
# configurations, summary.json and the report into target/ablation.
set -euo pipefail
cd "$(dirname "$0")/.."

scenario=${1:-overload-110}
seeds=${2:-2}
policy=config/presets/kvroute.yaml
out=target/ablation
mkdir -p "$out"
rm -f "$out"/*.yaml

cp "$policy" "$out/full.yaml"
terms=$(sed -n 's/^ *\([A-Za-z]*Weight\): .*/\1/p' "$policy")
[ -n "$terms" ] || { echo "$policy has no weights" >&2; exit 1; }
for term in $terms; do
  sed "s/^\( *$term:\) .*/\1 0/" "$policy" >"$out/no-${term%Weight}.yaml"
done
{ cat "$policy"; printf 'kvroute:\n  speculative: false\n'; } >"$out/no-speculation.yaml"

cargo run --release --quiet -- sim --scenario "$scenario" --seeds "$seeds" --out "$out" \
  --config "$out/full.yaml" "$out"/no-*.yaml
