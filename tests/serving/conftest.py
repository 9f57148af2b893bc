"""A real server with real sockets, in a thread of the test's process, and a client that shares no code with it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image
from websockets.sync.client import connect

CHECKPOINTS = Path(__file__).parents[2] / "spaces" / "action_demo" / "checkpoints"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On which answers are the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shipped():
    """`shipped(name)`: a shipped checkpoint, its seed 0, and the observation that lies beside it."""
    from hf_vla.serving.models import ServedModels

    known = {}

    def get(name):
        if name not in known:
            folder = CHECKPOINTS / name
            models = ServedModels(str(folder), seed=0)
            known[name] = SimpleNamespace(folder=folder, models=models, observation=observation_of(folder))
        return known[name]

    return get


def observation_of(folder):
    frame = json.loads((folder / "frame.json").read_text())
    ((camera, picture),) = frame["images"].items()
    observation = {f"observation.images.{camera}": np.asarray(Image.open(folder / picture)), "task": frame["task"]}
    if frame["state"] is not None:
        observation["observation.state"] = np.array(frame["state"], np.float32)
    return observation


@pytest.fixture(scope="session")
def vary():
    """Other pictures and states of the same robot: `vary(observation, index)`."""

    def make(observation, index):
        rng, varied = np.random.default_rng(index), dict(observation)
        for key, value in observation.items():
            if key.startswith("observation.images."):
                varied[key] = np.roll(value, rng.integers(0, 96, 2), axis=(0, 1)) // int(rng.integers(1, 4))
        if "observation.state" in observation:
            noise = rng.normal(0, 0.02, observation["observation.state"].shape)
            varied["observation.state"] = (observation["observation.state"] + noise).astype(np.float32)
        return varied

    return make


class Running:
    """A server in a thread."""

    def __init__(self, models, **options):
        from hf_vla.serving.server import PolicyServer, ServerOptions

        self._loop, self._up, self._stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
        self.port, self.error = None, None

        async def main():
            self.server = PolicyServer(models, ServerOptions(port=0, **options))
            await self.server.run(self._stop, self._started)

        def work():
            try:
                self._loop.run_until_complete(main())
            except BaseException as error:
                self.error = error
            finally:
                self._up.set()

        self._thread = threading.Thread(target=work)
        self._thread.start()
        self._up.wait()

    def _started(self, port):
        self.port = port
        self._up.set()

    @property
    def url(self):
        return f"ws://127.0.0.1:{self.port}"

    def begin_to_stop(self):
        self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self):
        if self._thread.is_alive():
            self.begin_to_stop()
        self._thread.join()
        self._loop.close()
        assert self.error is None, self.error


@pytest.fixture
def serve():
    """Start a server: `serve(models, **options)`."""
    running = []

    def start(models, **options):
        running.append(Running(models, **options))
        return running[-1]

    yield start
    for each in running:
        each.stop()


class Process:
    """`hf-vla serve` in a process of its own."""

    def __init__(self, *arguments, **environment):
        command = [sys.executable, "-c", "from hf_vla.cli.main import app; app()", "serve", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.log = []  # read all the time, or a full pipe would stop the process
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self._reader.start()
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("Serving "):
                self.url = line.split()[-1]
                self.port = int(self.url.rpartition(":")[2])
                break

    @property
    def memory(self):
        """Bytes in RAM."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def stop(self, how=signal.SIGTERM):
        """End it; returns its exit code."""
        self.process.send_signal(how)
        code = self.process.wait(60)
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@pytest.fixture
def process():
    """Start one: `process("CHECKPOINT", "--seed", 0)`."""
    processes = []

    def start(*arguments, **environment):
        processes.append(Process(*arguments, **environment))
        return processes[-1]

    yield start
    for each in processes:
        if each.process.poll() is None:
            each.stop(signal.SIGKILL)


def encode(value):
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(value)


def decode(value):
    if b"__ndarray__" in value:
        return np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])
    return value


class Plain:
    """What openpi's client does, in a few lines."""

    def __init__(self, url, **options):
        self.context = connect(url, compression=None, max_size=None, proxy=None, **options)
        self.connection = self.context.__enter__()
        self.metadata = msgpack.unpackb(self.connection.recv(timeout=30), object_hook=decode)

    def ask(self, message):
        """The answer: a dictionary, or the text of an error."""
        self.send(message)
        return self.receive()

    def send(self, message):
        raw = message if isinstance(message, (bytes, str)) else msgpack.packb(message, default=encode)
        self.connection.send(raw)

    def receive(self):
        answer = self.connection.recv(timeout=30)
        return answer if isinstance(answer, str) else msgpack.unpackb(answer, object_hook=decode)


@pytest.fixture
def plain():
    """Connect: `plain(url)`."""
    clients = []

    def make(url, **options):
        clients.append(Plain(url, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.context.__exit__(None, None, None)


@pytest.fixture
def raw():
    """A websocket of one's own, to misuse: `raw(port)` is the socket behind the opening handshake."""
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
    request = f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n\r\n"

    connections = []

    def make(port):
        connection = socket.create_connection(("127.0.0.1", port))
        connections.append(connection)
        connection.settimeout(30)
        connection.sendall(request.encode())
        said = b""
        while b"\r\n\r\n" not in said:
            said += connection.recv(1)
        assert said.startswith(b"HTTP/1.1 101 ")
        return connection

    yield make
    for connection in connections:
        connection.close()


@pytest.fixture
def gate(monkeypatch):
    """Hold a model back: `with gate(model) as held` lets no prediction begin before `held.open()`."""

    class Held:
        def __init__(self, model):
            self._open, self.reached, self.calls = threading.Event(), threading.Event(), 0
            predict = model.predict_action

            def wait(**inputs):
                self.calls += 1
                self.reached.set()
                assert self._open.wait(60)
                return predict(**inputs)

            monkeypatch.setattr(model, "predict_action", wait)

        def open(self):
            self._open.set()

    held = []

    def make(model):
        held.append(Held(model))
        return held[-1]

    yield make
    for each in held:
        each.open()
