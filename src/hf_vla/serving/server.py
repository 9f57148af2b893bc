"""The websocket server: who may connect, what a message may be, and how all of it ends."""

import asyncio
import errno
import hmac
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from ssl import SSLContext
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from hf_vla.policy import Policy
from hf_vla.serving.engine import Engine, Prediction
from hf_vla.serving.metrics import CONTENT_TYPE, Metrics
from hf_vla.serving.models import ServedModels
from hf_vla.serving.observations import take_fields, translate
from hf_vla.serving.protocol import RefusedRequest, pack, unpack

logger = logging.getLogger(__name__)
# it would log a traceback for everything that somebody sends to a port
_websockets_logger = logging.getLogger("hf_vla.serving.websockets")
_websockets_logger.setLevel(logging.CRITICAL + 1)
CLOSE_S = 3.0  # for a client to say goodbye
HANDSHAKE_S = 5.0  # of TLS, in which a connection is not counted yet
OPENING = 64  # connections that may be about to open, or ask for the server's health, beside those that are open
TOO_BIG = 1009


@dataclass(frozen=True)
class ServerOptions:
    """Limits and secrets of a server.

    Args:
        host (`str`), port (`int`): to listen at; port 0: any that is free.
        max_payload (`int`): bytes of a message.
        max_connections (`int`): clients at a time.
        max_queue (`int`): requests that wait for the model at a time.
        batch_size (`int`), window_s (`float`): see [`~hf_vla.serving.engine.Engine`].
        deadline_s (`float`, *optional*): for which a request may wait for the model; no prediction is made for a robot
            that has moved on.
        ping_s (`float`): between pings, and for their answers: a client that is gone is noticed after twice as long.
            Also for a client to take an answer.
        open_s (`float`): for a connection to open.
        stop_s (`float`): for answers that are under way when the server is stopped.
        token (`str`, *optional*): which clients have to show.
        ssl (`SSLContext`, *optional*): to encrypt with.
        rename (`Mapping[str, str]`), any_aspect (`bool`): see [`~hf_vla.serving.observations.translate`].
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_payload: int = 16 * 2**20
    max_connections: int = 128
    max_queue: int = 256
    batch_size: int = 1
    window_s: float = 0.005
    deadline_s: float | None = None
    ping_s: float = 20.0
    open_s: float = 10.0
    stop_s: float = 30.0
    token: str | None = field(default=None, repr=False)
    ssl: SSLContext | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    any_aspect: bool = False


@dataclass
class _Client:
    """What the server keeps for one connection, which no other connection sees."""

    number: int
    policy: Policy
    adapter: str | None
    closed: asyncio.Task


class PolicyServer:
    """Answers observations with chunks of actions, in openpi's protocol.

    Args:
        models ([`~hf_vla.serving.models.ServedModels`])
        options ([`ServerOptions`])
    """

    def __init__(self, models: ServedModels, options: ServerOptions):
        self.models, self.options = models, options
        self.metrics = Metrics()
        self.engine = Engine(options.batch_size, options.window_s, options.max_queue, self.metrics.observe_call)
        self.metrics.queue.set_function(lambda: self.engine.queue_length)
        self._metadata = pack(models.metadata())
        self._numbers = itertools.count(1)
        self._stopping, self._busy = False, 0
        self._idle = asyncio.Condition()
        self._transports = 0

    async def run(self, stop: asyncio.Event, started: Callable[[int], None] = lambda port: None) -> None:
        """Serve until told to stop; then finish what is under way, and say goodbye to the clients.

        Args:
            stop (`asyncio.Event`)
            started (`Callable[[int], None]`): called with the port once connections are accepted.

        Raises:
            OSError: the port is in use, or may not be used.
        """
        options = self.options
        try:
            async with serve(
                self._handle,
                options.host,
                options.port,
                process_request=self._on_request,
                create_connection=self._connection,
                origins=[None],  # a web page in somebody's browser is no robot
                compression=None,
                max_size=options.max_payload,
                max_queue=1,  # frames in memory that nobody has asked for
                open_timeout=options.open_s,
                ping_interval=options.ping_s,
                ping_timeout=options.ping_s,
                close_timeout=CLOSE_S,
                logger=_websockets_logger,
                server_header=None,
                ssl=options.ssl,
                **({"ssl_handshake_timeout": min(options.open_s, HANDSHAKE_S)} if options.ssl else {}),
            ) as server:
                started(server.sockets[0].getsockname()[1])
                await stop.wait()
                self._stopping = True
                logger.info("event=stopping in_flight=%d", self._busy)
                try:
                    async with asyncio.timeout(options.stop_s), self._idle:
                        await self._idle.wait_for(lambda: self._busy == 0)
                except TimeoutError:
                    logger.warning("event=stopping_late in_flight=%d", self._busy)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
                raise
            why = os.strerror(error.errno).lower()
            raise OSError(f"Cannot listen at {options.host}, port {options.port} ({why}): choose others.") from error
        finally:
            await asyncio.to_thread(self.engine.stop)
        logger.info("event=stopped")

    def _connection(self, *args, **kwargs):
        return _Connection(*args, server_of=self, **kwargs)

    def _on_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer what is no websocket; refuse whom we do not know, and who is one too many."""
        if request.path == "/healthz":
            healthy = self.engine.alive and not self._stopping
            return connection.respond(HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, "OK\n" * healthy)
        if not self._knows(request):
            return self._refuse(connection, "unauthorized", HTTPStatus.UNAUTHORIZED, "Give this server's token.")
        if request.path == "/metrics":
            response = connection.respond(HTTPStatus.OK, self.metrics.to_text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE
            return response
        if self._stopping:
            return self._refuse(connection, "stopping", HTTPStatus.SERVICE_UNAVAILABLE, "The server is stopping.")
        if self.engine.clients >= self.options.max_connections:
            sentence = f"{self.options.max_connections} clients are connected already."
            return self._refuse(connection, "full", HTTPStatus.SERVICE_UNAVAILABLE, sentence)
        return None

    def _refuse(self, connection, kind, status, sentence):
        self.metrics.errors.labels(kind).inc()
        logger.info("event=refused kind=%s", kind)
        return connection.respond(status, f"{sentence}\n")

    def _knows(self, request):
        if self.options.token is None:
            return True
        given = request.headers.get_all("Authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        known = hmac.compare_digest(token.encode(errors="surrogateescape"), self.options.token.encode())
        return scheme.lower() in ("bearer", "api-key") and known  # the latter is what openpi's client says

    async def _handle(self, connection: ServerConnection) -> None:
        """Talk to one client."""
        number = next(self._numbers)
        closed = asyncio.create_task(connection.wait_closed())
        client = _Client(number, self.models.policy(), None, closed)
        self.engine.clients += 1
        self.metrics.connections.inc()
        logger.info("event=connected client=%d", number)
        try:
            await connection.send(self._metadata)
            async for message in connection:
                self._busy += 1
                try:
                    answer = await self._answer(client, message)
                    async with asyncio.timeout(self.options.ping_s):
                        await connection.send(answer)
                finally:
                    self._busy -= 1
                    async with self._idle:
                        self._idle.notify_all()
        except ConnectionClosed as error:
            own = error.sent.code if error.sent is not None and not error.rcvd_then_sent else None
            if own is not None and own not in (1000, 1001, 1011):
                self.metrics.errors.labels("oversized" if own == TOO_BIG else "malformed").inc()
        except TimeoutError:  # it does not read, so no ping will reach it either
            self.metrics.errors.labels("slow").inc()
            connection.transport.abort()
        except Exception:
            logger.exception("event=connection_failed client=%d", number)
        finally:
            closed.cancel()
            self.engine.clients -= 1
            self.metrics.connections.dec()
            logger.info("event=disconnected client=%d code=%s", number, connection.close_code)

    async def _answer(self, client: _Client, message: str | bytes) -> str | bytes:
        """Answer one message: bytes with actions, or a text with what is wrong."""
        begun = time.perf_counter()
        self.metrics.requests.inc()
        try:
            answer = await self._act(client, message, begun)
            logger.debug("event=answered client=%d ms=%.1f", client.number, (time.perf_counter() - begun) * 1e3)
            return pack(answer)
        except RefusedRequest as refusal:
            return self._report(client, refusal)
        except Exception:
            logger.exception("event=request_failed client=%d", client.number)
            return self._report(client, RefusedRequest("internal", "The server failed; its log says why."))
        finally:
            self.metrics.latency.observe(time.perf_counter() - begun)

    def _report(self, client, refusal):
        self.metrics.errors.labels(refusal.kind).inc()
        logger.info("event=refused client=%d kind=%s", client.number, refusal.kind)  # its sentence may quote data
        return refusal.to_text()

    async def _act(self, client: _Client, message: str | bytes, begun: float) -> dict[str, Any]:
        if self._stopping:
            raise RefusedRequest("stopping", "The server is stopping.")
        if isinstance(message, str):
            raise RefusedRequest("malformed", "Expected a binary message of msgpack, came a text.")
        try:
            content = unpack(message)
        except ValueError as error:
            raise RefusedRequest("malformed", str(error)) from None
        try:
            fields = take_fields(content)
            reasoning, predicts = fields.get("reasoning"), fields.get("predict")
            policy, adapter = client.policy, fields.get("adapter")
            if adapter != client.adapter:
                policy = self.models.policy(adapter)
            observation = translate(content, policy, self.options.rename, self.options.any_aspect)
            resets_only = fields.get("reset", False) and not observation
            if not resets_only:
                policy.check(observation, reasoning)
                if predicts is None and self.models.contracts[adapter]["n_obs_steps"] > 1:
                    raise ValueError(_needs_every_step(self.models.contracts[adapter]["n_obs_steps"]))
            client.policy, client.adapter = policy, adapter
            if fields.get("reset", False):
                policy.reset()
            if resets_only:
                return {}
            if predicts is False:
                policy.remember(observation)
                return {}
        except ValueError as error:
            raise RefusedRequest("observation", str(error)) from None
        try:
            prediction = await self._predict(client, observation, reasoning)
        except RefusedRequest as refusal:
            if refusal.kind != "observation":  # the control step has been, with or without an answer
                policy.remember(observation)
            raise
        timing = {"infer_ms": prediction.infer_s * 1e3, "queue_ms": prediction.queue_s * 1e3}
        timing["total_ms"] = (time.perf_counter() - begun) * 1e3
        answer = {"actions": prediction.actions, "server_timing": timing}
        return answer if prediction.reasoning is None else answer | {"reasoning": prediction.reasoning}

    async def _predict(self, client, observation, reasoning) -> Prediction:
        """Wait for the model, as long as it is worth it."""
        future = self.engine.submit(client.policy, observation, reasoning)
        answer = asyncio.wrap_future(future)
        deadline = self.options.deadline_s
        await asyncio.wait({answer, client.closed}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() and future.cancel():
            if client.closed.done():
                raise RefusedRequest("left", "The client has left; no prediction was made.")
            raise RefusedRequest("deadline", f"It waited {deadline * 1e3:g} ms for the model; no prediction was made.")
        return await answer


def _needs_every_step(count):
    return (
        f"This checkpoint sees the last {count} control steps: send the observation of every one of them, with "
        "'predict': True where you need actions, else 'predict': False; and 'reset': True with an episode's first."
    )


class _Connection(ServerConnection):
    """Knows how many there are, those that say nothing included."""

    def __init__(self, *args, server_of, **kwargs):
        super().__init__(*args, **kwargs)
        self._server_of = server_of

    def connection_made(self, transport):
        """Count a connection; one too many is not listened to."""
        self._server_of._transports += 1
        super().connection_made(transport)
        if self._server_of._transports > self._server_of.options.max_connections + OPENING:
            self._server_of.metrics.errors.labels("full").inc()
            transport.abort()

    def connection_lost(self, exc):
        """Count it no longer."""
        self._server_of._transports -= 1
        super().connection_lost(exc)


def serve_until_signalled(
    models: ServedModels, options: ServerOptions, started: Callable[[int], None] = lambda port: None
) -> None:
    """Serve until this process is told to end (SIGTERM, SIGINT); the second time it ends at once.

    Args:
        models, options, started: see [`PolicyServer`].

    Raises:
        OSError: see `PolicyServer.run`.
    """

    async def run():
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_signal():
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_DFL)
            stop.set()

        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, on_signal)
        await PolicyServer(models, options).run(stop, started)

    asyncio.run(run())
