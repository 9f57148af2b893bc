"""A robot's side of a policy server."""

import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, InvalidURI
from websockets.sync.client import connect

from hf_vla.serving.protocol import RefusedRequest, pack, unpack

MAX_ANSWER = 64 * 2**20
CLOSE_S = 1.0  # for a server to say goodbye


class PolicyClient:
    """A connection to a policy server, ours or openpi's; one episode at a time.

    ```python
    with PolicyClient("ws://127.0.0.1:8000") as client:
        client.reset()
        chunk = client.predict_chunk({"observation.images.front": image, "task": "pick up the red cube"})
    ```

    Args:
        url (`str`): `ws://host:port`, or `wss://`.
        token (`str`, *optional*): of a server that wants one.
        timeout (`float`): seconds for the connection, and for every question with its answer.
        ssl (`SSLContext`, *optional*): of a `wss` server with a certificate of its own.

    Raises:
        ConnectionError: nobody is there, or the server refuses; the text says why.
        ValueError: this is no address.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 10.0, ssl=None):
        self.url, self.timeout, self._context = url, timeout, ExitStack()
        headers = None if token is None else {"Authorization": f"Bearer {token}"}
        options = {} if ssl is None else {"ssl": ssl}
        try:
            opened = connect(
                url,
                additional_headers=headers,
                compression=None,
                max_size=MAX_ANSWER,
                open_timeout=timeout,
                close_timeout=min(timeout, CLOSE_S),
                proxy=None,
                **options,
            )
            self._connection = self._context.enter_context(opened)  # a later websockets connects here
        except InvalidURI as error:
            raise ValueError(f"Expected an address like ws://127.0.0.1:8000, came {url!r}: {error}") from None
        except InvalidStatus as error:
            said = error.response.body.decode(errors="replace").strip()[:200]
            raise ConnectionError(f"{url} refuses ({error.response.status_code}): {said}") from None
        except (OSError, InvalidHandshake, InvalidMessage) as error:
            raise ConnectionError(f"No policy server answers at {url}: {error}") from None
        try:
            self.metadata: dict[str, Any] = self._exchange()
        except BaseException:
            self.close()
            raise
        self._has_episodes = self.metadata.get("server") == "hf_vla"  # openpi's would hand `reset` on to the model

    def predict_chunk(self, observation: dict[str, Any], reset: bool = False, **fields: Any) -> np.ndarray:
        """Ask for the next actions.

        Args:
            observation (`dict`): see [`~hf_vla.policy.Policy.predict_chunk`]; pictures uint8 (H, W, 3).
            reset (`bool`): whether an episode begins; see `reset`.
            fields: of the request: `reasoning`, `adapter`.

        Returns:
            `np.ndarray` of shape `(chunk_size, action_dim)`: float32, robot units.

        Raises:
            RefusedRequest: a ValueError with the server's sentence, and its kind; the connection goes on.
            ConnectionError: the connection is lost, or no answer came in time; make a new one.
        """
        if self._has_episodes:
            fields["reset"] = reset
        return self.infer({**observation, **fields})["actions"]

    def reset(self) -> None:
        """Say that an episode begins; openpi's servers, which keep nothing, are not told."""
        if self._has_episodes:
            self.infer({"reset": True})

    def infer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return the answer; raises as `predict_chunk` does."""
        return self._exchange(pack(message))

    def close(self) -> None:
        """Say goodbye."""
        self._context.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _exchange(self, question=None):
        """Send, and wait for what comes then: both in `timeout` seconds, of which websockets knows for the latter."""
        deadline = time.monotonic() + self.timeout
        watchdog = threading.Timer(self.timeout, self._hang_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            if question is not None:
                self._connection.send(question)
            answer = self._connection.recv()
        except ConnectionClosed as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(f"{self.url} gave no answer within {self.timeout:g} s.") from None
            raise self._lost(error) from None
        except BaseException:  # Ctrl-C, such as in a notebook
            self._hang_up()
            raise
        finally:
            watchdog.cancel()
        if isinstance(answer, str):
            raise RefusedRequest.from_text(answer)
        return unpack(answer)

    def _hang_up(self):
        """End the connection: what came now would be taken for the answer to the next question."""
        with suppress(OSError):  # it is closed already
            # not that of an SSLSocket, which would let go of its key while another thread is sending
            socket.socket.shutdown(self._connection.socket, socket.SHUT_RDWR)

    def _lost(self, error):
        said = "" if error.rcvd is None else f" It said: {error.rcvd.code} {error.rcvd.reason}".rstrip()
        return ConnectionError(f"The connection to {self.url} is lost.{said}")
