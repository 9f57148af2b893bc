"""`hf-vla serve`: a checkpoint behind a websocket, in openpi's protocol."""

from pathlib import Path
from typing import Annotated

import typer

TOKEN_VARIABLE = "HF_VLA_SERVE_TOKEN"
LEAST_TOKEN = 16  # characters


def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder, or a name on the Hub.")],
    host: Annotated[str, typer.Option(help="Address to listen at; default: this computer alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Adapter of the checkpoint, folder or Hub name; a request names it."),
    ] = None,
    unnorm_key: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]KEY", help="Dataset whose robot is driven, where several are known; adapter's."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="THEIRS=OURS", help="What a robot calls it, and our name; THEIRS= is not looked at."),
    ] = None,
    any_aspect: Annotated[
        bool, typer.Option("--any-aspect", help="Take pictures wider or higher than the camera's, and squash them.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of every call of the model; default 8 on a GPU, 1 on the CPU.")
    ] = None,
    batch_window_ms: Annotated[
        float, typer.Option(min=0.0, max=60_000.0, help="For which a request waits for others.")
    ] = 5.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for the model.")] = 256,
    max_connections: Annotated[int, typer.Option(min=1, help="Clients at a time.")] = 128,
    max_payload_mb: Annotated[float, typer.Option(min=0.001, max=1024.0, help="Of one message.")] = 16.0,
    deadline_ms: Annotated[
        float | None, typer.Option(min=1.0, help="For which a request may wait for the model; default: any time.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the token that clients have to show; or set {TOKEN_VARIABLE}.")
    ] = None,
    insecure_no_token: Annotated[
        bool, typer.Option("--insecure-no-token", help="Let everybody who reaches --host drive the robot.")
    ] = False,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file with the certificate's chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with its key.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes heads that draw noise repeatable.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(help="Denoising steps; default: the checkpoint's.")
    ] = None,
    reasoning_interval: Annotated[int, typer.Option(help="Predictions made under one reasoning in words.")] = 1,
    max_reasoning_tokens: Annotated[
        int | None, typer.Option(help="Longest reasoning of the model's own; 0: act without words.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: the accelerator.")] = None,
    log_level: Annotated[str, typer.Option(help="debug has a line for every request.")] = "info",
):
    """Serve a checkpoint to robots, in the protocol of openpi's client."""
    import logging

    from rich.console import Console

    token = read_token(token_file)
    check_exposure(host, token, insecure_no_token)
    context = make_context(tls_certificate, tls_key)
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(
            f"Expected debug, info, warning or error, came {log_level!r}.", param_hint="--log-level"
        )
    adapters = parse_pairs(adapter or [], "--adapter")
    keys = dict(parse_key(each) for each in unnorm_key or [])
    names = parse_pairs(rename or [], "--rename")

    from hf_vla.serving.models import ServedModels
    from hf_vla.serving.observations import check_rename, parse_rename
    from hf_vla.serving.server import ServerOptions, serve_until_signalled

    logging.basicConfig(format="time=%(asctime)s level=%(levelname)s %(message)s")
    logging.getLogger("hf_vla.serving").setLevel(log_level.upper())
    names = parse_rename(names)  # before the model, which takes longer
    models = ServedModels(
        model,
        adapters,
        keys,
        device,
        seed=seed,
        num_inference_steps=num_inference_steps,
        reasoning_interval=reasoning_interval,
        max_reasoning_tokens=max_reasoning_tokens,
    )
    check_rename(names, [models.policy(name) for name in (None, *models.adapters)])
    options = ServerOptions(
        host=host,
        port=port,
        max_payload=int(max_payload_mb * 2**20),
        max_connections=max_connections,
        max_queue=max_queue,
        batch_size=batch_size or (1 if models.device.type == "cpu" else 8),
        window_s=batch_window_ms / 1e3,
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
        token=token,
        ssl=context,
        rename=names,
        any_aspect=any_aspect,
    )
    console = Console()

    def started(port):
        for name in models.adapters:
            console.print(f"Adapter {name}: shares {models.shared[name]:.1%} of its weights.", highlight=False)
        scheme = "ws" if context is None else "wss"
        shown = f"[{host}]" if ":" in host else host
        console.print(f"Serving {models.name} at {scheme}://{shown}:{port}", markup=False, highlight=False)

    serve_until_signalled(models, options, started)


def read_token(path):
    """Read the token from a file or the environment; None where there is neither.

    Raises:
        ValueError: it is too short to be a secret, or no single word.
    """
    import os

    token = os.environ.get(TOKEN_VARIABLE) if path is None else path.read_text(encoding="utf-8").strip()
    if token is None:
        return None
    if len(token) < LEAST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise ValueError(
            f"Expected a token of one word of {LEAST_TOKEN} ASCII characters or more in "
            f"{TOKEN_VARIABLE if path is None else str(path)!r}; python -c 'import secrets; "
            "print(secrets.token_urlsafe())' makes one."
        )
    return token


def check_exposure(host, token, insecure):
    """Refuse to let everybody on a network drive a robot, unless it is said that this is meant.

    Raises:
        ValueError: others reach this address, and there is no token.
    """
    import ipaddress

    try:
        alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = host == "localhost"
    if not alone and token is None and not insecure:
        raise ValueError(
            f"Whoever reaches {host!r} could drive the robot: give --token-file, or set {TOKEN_VARIABLE}; or say "
            "--insecure-no-token if the network lets in nobody else."
        )


def make_context(certificate, key):
    """What a server encrypts with; None without a certificate.

    Raises:
        ValueError: one of the two files is not given, or they are not usable.
    """
    import ssl

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ValueError("Give both --tls-certificate and --tls-key.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ValueError(f"{str(certificate)!r} and {str(key)!r} are no certificate with its key: {error}") from None
    return context


def parse_pairs(values, option):
    """Read `A=B` into a dictionary.

    Raises:
        typer.BadParameter: there is no sign in it, or a name comes twice.
    """
    pairs = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not name or not equals or name in pairs:
            raise typer.BadParameter(f"Expected NAME=VALUE, each name once, came {value!r}.", param_hint=option)
        pairs[name] = rest
    return pairs


def parse_key(value):
    """Read `[NAME=]KEY` into an adapter's name, None for the checkpoint's own, and a dataset."""
    name, equals, key = value.rpartition("=")
    return (name, key) if equals else (None, value)
