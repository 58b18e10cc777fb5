"""Does `kvroute check --live` find nothing wrong with a real vLLM server, and name six injected mismatches in words?

Two servers: one as it should be, one without KV events. Every case prints a line; the first that fails ends the run with
status 1.
"""

import argparse
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

from engine import MODEL, Vllm

SEED = "0"
CONFIG = """\
plugins:
  - type: precise-prefix-cache-producer
    name: precise
    parameters:
      tokenProcessorConfig: {{blockSizeTokens: {block_size}, hashSeed: "{seed}"}}
  - type: prefix-cache-scorer
    parameters: {{prefixMatchInfoProducerName: precise}}
"""


class Case:
    """Runs checks of one set-up after the other."""

    def __init__(self, kvroute, model_dir, scratch):
        self.kvroute, self.model_dir, self.scratch = kvroute, model_dir, scratch
        self.tokenizer = f"{model_dir}/tokenizer.json"

    def config(self, block_size=32, seed=SEED):
        path = f"{self.scratch}/config.yaml"
        with open(path, "w") as file:
            file.write(CONFIG.format(block_size=block_size, seed=seed))
        return path

    def changed_tokenizer(self, name, file, change):
        """A copy of the model's tokenizer with one file changed; gives the path of its tokenizer.json."""
        folder = f"{self.scratch}/{name}"
        os.makedirs(folder)
        for entry in os.listdir(self.model_dir):
            if entry.startswith("tokenizer") or entry.startswith("chat_template"):
                shutil.copy(f"{self.model_dir}/{entry}", folder)
        with open(f"{folder}/{file}") as source:
            content = json.load(source)
        change(content)
        with open(f"{folder}/{file}", "w") as target:
            json.dump(content, target, ensure_ascii=False)
        return f"{folder}/tokenizer.json"

    def run(self, url, config=None, tokenizer=None, as_json=True, more=()):
        command = [
            self.kvroute, "check", config or self.config(), "--live", "--endpoint", url,
            "--tokenizer", tokenizer or self.tokenizer, "--model", MODEL, *more,
        ]
        done = subprocess.run(command + ["--json"] * as_json, capture_output=True, text=True, timeout=300)
        if not as_json:
            return done.returncode, done.stdout
        assert done.returncode in (0, 1), f"{done.returncode}: {done.stdout}{done.stderr}"
        findings = json.loads(done.stdout)["live"]["endpoints"][0]["findings"]
        return done.returncode, {f["check"]: f for f in findings}

    def named(self, name, check, status, words, url, also=(), **how):
        """The finding says these words, and nothing else but `also` is other than fine."""
        code, findings = self.run(url, **how)
        found = findings[check]
        assert code == (1 if status == "wrong" else 0), f"{name}: exit code {code}"
        assert found["status"] == status, f"{name}: {found}"
        for word in words:
            assert word in found["found"], f"{name}: {word} is missing in: {found['found']}"
        assert found["change"], f"{name}: {found}"
        for other, finding in findings.items():
            assert other in (check, *also) or finding["status"] == "ok", f"{name}: {finding}"
        print(f"ok   {name}: {status}: {found['found']}\n       -> {found['change']}")


def without_merges(tokenizer):
    merges = tokenizer["model"]["merges"]
    del merges[len(merges) // 2 :]


def other_template(config):
    config["chat_template"] = "Be brief. " + config["chat_template"]


def main():
    parser = argparse.ArgumentParser()
    for name in ("venv", "model", "kvroute", "logs"):
        parser.add_argument(f"--{name}", required=True, type=os.path.abspath)
    args = parser.parse_args()
    os.environ["PYTHONHASHSEED"] = SEED
    cbor = ("--prefix-caching-hash-algo", "sha256_cbor")
    a = Vllm(args.venv, args.model, args.logs, 8101, cbor)
    b = Vllm(args.venv, args.model, args.logs, 8102, cbor, events_on=False)
    for engine in (a, b):
        atexit.register(engine.kill)
        engine.start()
    for engine in (a, b):
        engine.wait_ready()
    print("ok   two vLLM servers are up, the second without KV events")
    del os.environ["PYTHONHASHSEED"]
    scratch = tempfile.mkdtemp(prefix="kvroute-check-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    case = Case(args.kvroute, args.model, scratch)

    code, table = case.run(a.url, as_json=False)
    print(table)
    code, findings = case.run(a.url)
    bad = [f for f in findings.values() if f["status"] != "ok"]
    assert code == 0 and not bad, f"a healthy server: {code}, {bad}"
    print(f"ok   healthy: {len(findings)} findings, all ok")

    case.named(
        "block size", "block_size", "wrong", ["the block size differs", "says 64", "hold 32 tokens"],
        a.url, config=case.config(block_size=64),
    )
    case.named(
        "hash seed", "first_hash", "warning", ["the hash seed differs", "says `7`", "with seed `0`"],
        a.url, config=case.config(seed="7"),
    )
    template = case.changed_tokenizer("template", "tokenizer_config.json", other_template)
    case.named(
        "template", "template", "wrong", ["the chat template differs", "token 0 (from 0) is"],
        a.url, tokenizer=template,
    )
    tokenizer = case.changed_tokenizer("tokenizer", "tokenizer.json", without_merges)
    case.named(
        "tokenizer", "tokenizer", "wrong", ["the tokenizer differs", "at the engine"],
        a.url, also=["template"], tokenizer=tokenizer,
    )
    case.named("events off", "events", "wrong", ["events are off"], b.url)
    case.named(
        "events off, ports given", "events", "wrong", ["events are off, or the port is wrong"],
        b.url, more=["--kv-events-port", str(b.events)],
    )
    case.named(
        "wrong port (that of events)", "reachable", "wrong", ["the port is wrong", "a ZeroMQ socket answers"],
        f"http://127.0.0.1:{a.events}",
    )
    case.named(
        "wrong port (nobody there)", "reachable", "wrong", ["connection refused", "the port is wrong"],
        "http://127.0.0.1:8199",
    )


if __name__ == "__main__":
    begin = time.monotonic()
    try:
        main()
    except AssertionError as failure:
        print(f"FAIL {failure}")
        sys.exit(1)
    print(f"all checks passed in {time.monotonic() - begin:.0f} s")
