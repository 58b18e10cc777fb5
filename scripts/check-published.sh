#!/usr/bin/env bash
# Does the simulated benchmark agree with the published one? Reads the summary.json of
#   kvroute sim --scenario b2b-saas --config random load estimated precise kvroute --out DIR
set -euo pipefail

awk '
  function fail(what) { print "benchmark: " what; failed = 1 }
  function near(what, is, should) {
    if (is < 0.9 * should || is > 1.1 * should) fail(what " is " is ", published: " should)
  }
  # The file is indented by two: the columns of a line tell where it is.
  match($0, /^ *"[a-z0-9_]+": /) {
    indent = match($0, /"/) - 1
    split($0, parts, "\"")
    key = parts[2]
    value = $2
    gsub(/[",]/, "", value)
    if (indent == 6) section = key
    if (indent == 6 && key == "name") { run = value; runs[run] = 1 }
    if (section == "summary" && indent == 8) block = key
    if (section == "summary" && key == "output_tokens_per_s") tokens[run] = value
    if (section == "summary" && block == "ttft_s" && key == "mean") mean[run] = value
    if (section == "summary" && block == "ttft_s" && key == "p90") p90[run] = value
    if (section == "published" && indent == 8) block = key
    if (section == "published" && block == "summary" && key == "output_tokens_per_s")
      published[run] = value
    if (section == "stages" && key == "rate") rate = value
    if (section == "stages" && indent == 10) block = key
    if (section == "stages" && block == "ttft_s" && key == "mean") {
      stages++
      if ((run == "precise" || run == "kvroute") && value + 0 >= 1)
        fail(run " at " rate " requests/s: first tokens after " value " s, not below a second")
      if ((run == "random" || run == "load") && rate + 0 >= 20 && value + 0 < 10)
        fail(run " at " rate " requests/s: first tokens after " value " s, not tens of seconds")
    }
  }
  END {
    for (name in published) { compared++; near(name ": tokens/s", tokens[name], published[name]) }
    if (compared != 4) fail(compared + 0 " published configurations, not 4")
    if (stages < 5 * 16) fail(stages + 0 " stages")
    if (!("kvroute" in runs)) fail("no run is called kvroute")
    if (tokens["kvroute"] + 0 < tokens["precise"] + 0)
      fail("kvroute: " tokens["kvroute"] " tokens/s, precise: " tokens["precise"])
    if (p90["kvroute"] + 0 >= p90["precise"] + 0)
      fail("kvroute: TTFT p90 " p90["kvroute"] " s, precise: " p90["precise"] " s")
    if (!failed) print "benchmark: as published, and kvroute not behind precise"
    exit failed
  }' "${1:?usage: check-published.sh SUMMARY.JSON}"
