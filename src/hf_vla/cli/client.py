"""`hf-vla client`: asks a policy server for an action chunk, and how long that takes."""

from pathlib import Path
from typing import Annotated

import typer


def client(
    url: Annotated[str, typer.Argument(help="Of the server, such as ws://127.0.0.1:8000.")],
    image: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]FILE", help="Picture from the robot's camera; of several, NAME=FILE for each."),
    ],
    text: Annotated[str, typer.Option(help='Instruction, such as "pick up the red cube".')],
    state: Annotated[
        str | None, typer.Option(help="The robot's state, '0.1 0.2 ...', where the checkpoint needs it.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Of the server's, by its name.")] = None,
    reasoning: Annotated[str | None, typer.Option(help="What to act under, instead of the model's own words.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Ask so many times, and say how long an answer takes.")] = 1,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the server's token; or set HF_VLA_SERVE_TOKEN.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file of a server's certificate that nobody else vouches for.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for every answer.")] = 30.0,
    contract: Annotated[
        bool, typer.Option("--contract", help="Print all that the server says of its checkpoint, JSON.")
    ] = False,
):
    """Try a policy server."""
    import ssl
    import time

    import numpy as np
    from rich.console import Console
    from rich.markup import escape

    from hf_vla.actions.spec import ActionSpec, CameraSpec
    from hf_vla.cli.predict import name_cameras, open_upright, parse_images, parse_numbers
    from hf_vla.cli.render import chunk_table
    from hf_vla.cli.serve import read_token
    from hf_vla.serving.client import PolicyClient

    files, numbers, console = parse_images(image), state and parse_numbers(state), Console()
    context = None if tls_certificate is None else ssl.create_default_context(cafile=tls_certificate)
    with PolicyClient(url, read_token(token_file), timeout, context) as server:
        if server.metadata.get("server") != "hf_vla":
            raise ValueError(f"Expected a server of hf_vla, which says what it needs, came {server.metadata}.")
        known = server.metadata["adapters"]
        if adapter is not None and adapter not in known:
            raise ValueError(f"The server has no adapter {adapter!r}; it has {sorted(known)}.")
        needs = server.metadata if adapter is None else known[adapter]
        if contract:
            console.print_json(data=server.metadata)
        cameras = [CameraSpec.from_dict(camera) for camera in needs["cameras"]]
        message = {"task": text} | ({} if adapter is None else {"adapter": adapter})
        message |= {} if reasoning is None else {"reasoning": reasoning}
        for camera, path in name_cameras(files, cameras).items():
            picture = None if path is None else np.asarray(open_upright(path).convert("RGB"))
            message[f"observation.images.{camera}"] = picture
        if numbers is not None:
            message["observation.state"] = np.array(numbers, np.float32)
        if needs["n_obs_steps"] > 1:
            message["predict"] = True
        seconds = []
        for _ in range(repeat):
            begun = time.perf_counter()
            answer = server.infer(message)
            seconds.append(time.perf_counter() - begun)
    if "reasoning" in answer:
        console.print(f"Reasoning: {escape(repr(answer['reasoning']))}", highlight=False)
    spec = needs["action"] and ActionSpec.from_dict(needs["action"])
    console.print(chunk_table(answer["actions"], spec, title=f"{text} ({needs['unnorm_key']})"))
    half, most = np.percentile(seconds, [50, 95]) * 1e3
    model = answer["server_timing"]["infer_ms"]
    console.print(
        f"{repeat} answers: p50 {half:.1f} ms, p95 {most:.1f} ms, the model's part of the last {model:.1f} ms.",
        highlight=False,
    )
