"""Starts, kills and asks real vLLM servers; stands between one of them and its subscriber to lose messages."""

import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request

MODEL = "tiny-qwen3"


def http(method, url, body=None, headers=None, timeout=120):
    """Status, headers and decoded body of one exchange; an error status is an answer, not an exception."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method)
    request.add_header("content-type", "application/json")
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()


def wait_until(what, condition, seconds=60.0):
    """Polls until the condition holds; fails with its name when it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            value = condition()
            if value:
                return value
        except OSError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:.0f} s in vain: {what}")


class Vllm:
    """One server on three ports: HTTP, KV events (PUB), replay (ROUTER)."""

    def __init__(self, venv, model_dir, logs, port, more=(), events_on=True):
        self.more, self.events_on = more, events_on
        self.venv, self.model_dir, self.logs, self.port = venv, model_dir, logs, port
        self.events, self.replay = port + 1000, port + 2000
        self.process = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.events}",
            "replay_endpoint": f"tcp://*:{self.replay}",
            "buffer_steps": 10000,
            "topic": f"kv@127.0.0.1:{self.port}@{MODEL}",
        }
        environment = dict(
            os.environ,
            VLLM_TARGET_DEVICE="cpu",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_SERVER_DEV_MODE="1",
            VLLM_NO_USAGE_STATS="1",
            VLLM_HOST_IP="127.0.0.1",
            VLLM_LOOPBACK_IP="127.0.0.1",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
        )
        command = [
            f"{self.venv}/bin/vllm", "serve", self.model_dir, "--served-model-name", MODEL,
            "--host", "127.0.0.1", "--port", str(self.port),
            "--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager",
            "--max-model-len", "1024", "--max-num-seqs", "8",
            "--block-size", "32", "--num-gpu-blocks-override", "256",
            "--kv-cache-memory-bytes", "268435456",
            "--enable-prefix-caching", "--enable-prompt-tokens-details",
            *self.more,
        ]
        if self.events_on:
            command += ["--kv-events-config", json.dumps(events)]
        os.makedirs(self.logs, exist_ok=True)
        log = open(f"{self.logs}/vllm-{self.port}.log", "a")
        self.process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_ready(self, seconds=400):
        def healthy():
            if self.process.poll() is not None:
                raise AssertionError(f"vLLM on port {self.port} ended: see {self.logs}/vllm-{self.port}.log")
            return http("GET", f"{self.url}/health", timeout=5)[0] == 200

        wait_until(f"vLLM on port {self.port} is healthy", healthy, seconds)

    def kill(self):
        """As a crash does it: the whole process group, no goodbye."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class LossyRelay:
    """Passes one engine's events on to another port and can lose the next ones."""

    def __init__(self, from_port, to_port):
        import zmq

        context = zmq.Context.instance()
        self.source = context.socket(zmq.SUB)
        self.source.setsockopt(zmq.SUBSCRIBE, b"")
        self.source.connect(f"tcp://127.0.0.1:{from_port}")
        self.sink = context.socket(zmq.PUB)
        self.sink.bind(f"tcp://127.0.0.1:{to_port}")
        self.to_lose = 0
        self.lost = 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            frames = self.source.recv_multipart()
            if self.to_lose > 0:
                self.to_lose -= 1
                self.lost += 1
            else:
                self.sink.send_multipart(frames)
