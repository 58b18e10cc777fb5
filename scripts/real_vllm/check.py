"""Does kvroute predict what two real vLLM servers deliver, and does it notice and heal trouble?

Every check prints a line; the first that fails ends the run with status 1.
"""

import argparse
import atexit
import json
import os
import subprocess
import sys
import time

from engine import MODEL, LossyRelay, Vllm, http, wait_until

ROUTER, ADMIN = "http://127.0.0.1:8180", "http://127.0.0.1:8190"
WORDS = "amber basin cedar delta ember fjord grove harbor island jungle kernel lagoon meadow nectar orchid".split()


def text(seed, words):
    """Words that depend on the seed alone."""
    state, chosen = seed * 2654435761 % 2**32, []
    for _ in range(words):
        state = (1103515245 * state + 12345) % 2**31
        chosen.append(WORDS[(state >> 8) % len(WORDS)])
    return " ".join(chosen)


def completion(group, question):
    prompt = f"Rules of group {group}: {text(group, 260)}\nQuestion {question}: {text(1000 + question, 20)}"
    return "/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0}


def conversation(group, turns):
    messages = [{"role": "system", "content": f"You are assistant {group}. {text(50 + group, 200)}"}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Turn {turn}: {text(2000 + 10 * group + turn, 25)}"})
        if turn + 1 < turns:
            messages.append({"role": "assistant", "content": f"Answer {turn}: {text(3000 + turn, 15)}"})
    return "/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0}


def response(group, question):
    """The responses API: instructions are the system message."""
    body = {"instructions": f"You are responder {group}. {text(70 + group, 180)}", "input": text(4000 + question, 30)}
    return "/v1/responses", {"model": MODEL, **body, "max_output_tokens": 8, "temperature": 0}


def tools(group):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": parameters}}
    path, body = conversation(group, 1)
    return path, {**body, "tools": [tool], "tool_choice": "none", "chat_template_kwargs": {"enable_thinking": False}}


def usage_of(body):
    """Prompt tokens and those of them that were cached, under the names of either API."""
    usage = json.loads(body)["usage"]
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


class Router:
    """The router under test and what its admin address says."""

    def __init__(self, command, log):
        self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        atexit.register(self.process.kill)

    @staticmethod
    def admin(path):
        status, _, body = http("GET", ADMIN + path)
        assert status == 200, f"{path}: {status} {body}"
        return json.loads(body)

    def index(self):
        return {e["endpoint"]: e for e in self.admin("/index")["endpoints"]}

    def stream(self, endpoint):
        return self.index()[endpoint]["stream"]

    def settle(self):
        """Waits until no event is under way: the same counts in three looks."""
        looks = []

        def quiet():
            looks.append([e["stream"]["messages"] for e in self.index().values()])
            return len(looks) >= 4 and looks[-1] == looks[-2] == looks[-3] == looks[-4]

        wait_until("events have arrived", quiet)

    def ask(self, path, body):
        """One request after everything before it has settled: endpoint, chosen and delivered tokens."""
        self.settle()
        status, headers, answer = http("POST", ROUTER + path, body)
        assert status == 200, f"{path}: {status} {answer}"
        headers = {name.lower(): value for name, value in headers.items()}
        decision = self.admin(f"/decisions/{headers['x-request-id']}")
        prompt, delivered = usage_of(answer)
        return {
            "endpoint": headers["x-kvroute-endpoint"],
            "mode": decision["decision"]["mode"],
            "chosen": decision["decision"]["chosen_tokens"],
            "prompt_predicted": decision["decision"]["prompt_tokens"],
            "prompt": prompt,
            "delivered": delivered,
        }


def expect(router, name, requests):
    """Sends the requests one after the other; each must deliver what was predicted."""
    reused = prompt = 0
    for path, body in requests:
        got = router.ask(path, body)
        assert got["prompt_predicted"] == got["prompt"], f"{name}: token counts differ: {got}"
        assert got["chosen"] == got["delivered"], f"{name}: predicted is not delivered: {got}"
        assert got["mode"] == "precise", f"{name}: not precise: {got}"
        reused, prompt = reused + got["delivered"], prompt + got["prompt"]
    print(f"ok   {name}: {len(requests)} requests, chosen = delivered for each; {reused} of {prompt} tokens reused")


def shared_prefix_workload(round_at):
    requests = [completion(group, 10 * round_at + user) for user in range(4) for group in range(4)]
    requests += [conversation(group, turns) for turns in (1, 2, 3) for group in range(2)]
    requests += [response(0, question) for question in range(2)] + [tools(0), tools(0)]
    return requests


def endpoint_of(engine):
    return f"127.0.0.1:{engine.port}"


def check_restart(router, a):
    before = router.stream(endpoint_of(a))["counters"]["resets"]
    a.kill()
    survivors = [router.ask(*completion(0, 100 + i))["endpoint"] for i in range(3)]
    assert all(e != endpoint_of(a) for e in survivors), survivors
    print("ok   engine killed: requests go to the other one, no error")
    a.start()
    a.wait_ready()

    def serving_again():
        router.ask(*completion(90, 1))
        status, _, _ = http("POST", a.url + "/v1/completions", completion(91, 1)[1])
        stream = router.stream(endpoint_of(a))
        return status == 200 and stream["state"] == "live" and stream["counters"]["resets"] > before

    wait_until("the restarted engine's stream is live again and its old blocks are gone", serving_again, 120)
    print("ok   engine restarted: old blocks forgotten, stream live")


def check_reset(router, engines):
    through, beside = engines
    for engine in engines:
        status, _, body = http("POST", engine.url + "/reset_prefix_cache")
        assert status == 200, body
    # The engine says so with its next step only; that step's request reveals it.
    for engine in engines:
        http("POST", engine.url + "/v1/completions", completion(80, engine.port)[1])
    wait_until(
        "both resets are noticed",
        lambda: all(e["blocks"]["resident"] < 40 for e in router.index().values()),
    )
    print("ok   reset_prefix_cache on both engines: noticed")


def check_lost_event(router, a, relay):
    before = router.stream(endpoint_of(a))["counters"]
    relay.to_lose = 1
    http("POST", a.url + "/v1/completions", completion(70, 1)[1])
    wait_until("the relay has lost a message", lambda: relay.lost == 1)
    http("POST", a.url + "/v1/completions", completion(71, 1)[1])

    def healed():
        stream = router.stream(endpoint_of(a))
        counters = stream["counters"]
        return stream["state"] == "live" and counters["gaps"] > before["gaps"] and counters["replays"] > before["replays"]

    wait_until("the gap is noticed and replayed", healed)
    got = router.ask(*completion(70, 1))
    assert got["endpoint"] == endpoint_of(a) and got["chosen"] == got["delivered"] > 0, got
    print(f"ok   lost event: gap noticed, replayed; its blocks are known ({got['delivered']} tokens reused)")


def main():
    parser = argparse.ArgumentParser()
    for name in ("venv", "model", "kvroute", "logs"):
        parser.add_argument(f"--{name}", required=True, type=os.path.abspath)
    args = parser.parse_args()
    os.makedirs(args.logs, exist_ok=True)
    a, b = (Vllm(args.venv, args.model, args.logs, port) for port in (8101, 8102))
    for engine in (a, b):
        atexit.register(engine.kill)
        engine.start()
    relay = LossyRelay(a.events, 9201)
    for engine in (a, b):
        engine.wait_ready()
    print("ok   two vLLM servers are up")
    command = [
        args.kvroute, "serve", "--http", ROUTER[7:], "--admin", ADMIN[7:],
        "--tokenizer", f"{args.model}/tokenizer.json",
        "--endpoint", f"{a.url},events=tcp://127.0.0.1:9201,replay=tcp://127.0.0.1:{a.replay}",
        "--endpoint", b.url,
    ]
    router = Router(command, open(f"{args.logs}/kvroute.log", "w"))
    wait_until("the router is ready", lambda: http("GET", ADMIN + "/readyz")[0] == 200)
    # A stream is live from its first batch on; an idle engine has none to send.
    for engine in (a, b):
        wait_until(
            f"events of {engine.port} arrive",
            lambda engine=engine: http("POST", engine.url + "/v1/completions", completion(99, 1)[1])
            and router.stream(endpoint_of(engine))["state"] == "live",
        )
    expect(router, "shared prefixes and conversations", shared_prefix_workload(0))
    check_lost_event(router, a, relay)
    expect(router, "after the lost event", shared_prefix_workload(1))
    check_restart(router, a)
    expect(router, "after the restart", shared_prefix_workload(2))
    check_reset(router, (a, b))
    expect(router, "after the reset", shared_prefix_workload(3))
    summary = router.admin("/index")["ledger"]
    print("ledger:", json.dumps(summary))


if __name__ == "__main__":
    begin = time.monotonic()
    try:
        main()
    except AssertionError as failure:
        print(f"FAIL {failure}")
        sys.exit(1)
    print(f"all checks passed in {time.monotonic() - begin:.0f} s")
