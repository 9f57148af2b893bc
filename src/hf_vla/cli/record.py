"""`hf-vla record`: an expert's demonstrations in a simulator become a LeRobot dataset."""

from pathlib import Path
from typing import Annotated

import typer


def record(
    env: Annotated[str, typer.Option(help="Simulator, such as metaworld.")],
    tasks: Annotated[str, typer.Option(help="Tasks and splits, with commas between them, such as mt10.")],
    out: Annotated[
        Path, typer.Option(help="Folder to write; new, or of a recording that was interrupted.", file_okay=False)
    ],
    episodes: Annotated[int, typer.Option(min=1, help="Successful episodes of every task.")] = 50,
    cameras: Annotated[
        str | None, typer.Option(help="Names, with commas between them; default: the simulator's choice.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="Pixels of every camera, such as 128 or 320x240.")
    ] = None,
    rendering: Annotated[
        str, typer.Option(help="fast: without shadows, reflections and multisampling; or full.")
    ] = "fast",
    noise: Annotated[
        float,
        typer.Option(
            help="Spread of the noise on what is executed, not on what is recorded, as a share of half the range; "
            "such demonstrations show how to come back."
        ),
    ] = 0.0,
    noise_steps: Annotated[
        int, typer.Option(min=1, help="Above 1: pushes of so many control steps, and rests of twice as many.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(help="First seed of every task; default: the first that no evaluation uses.")
    ] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Steps after which an attempt has failed; default: the simulator's.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Simulate in so many processes; one per core.")] = 1,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the dataset when it is complete.")
    ] = None,
):
    """Record an expert's successful episodes.

    A recording that was interrupted goes on where it stopped when it is run again.
    """
    from rich.console import Console
    from rich.markup import escape

    from hf_vla.data.recording.publishing import push_dataset
    from hf_vla.evaluation.demonstrations import RecordingPlan
    from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED
    from hf_vla.evaluation.envs.registry import simulator

    simulated = simulator(env)
    plan = RecordingPlan(
        env,
        simulated.select(tasks),
        episodes,
        sizes(simulated.default_cameras, cameras, size),
        rendering,
        noise,
        noise_steps,
        FIRST_RECORDING_SEED if seed is None else seed,
        horizon,
    )
    console = Console()
    try:
        recorded = _record(plan, out, processes, console)
    except KeyboardInterrupt:
        console.print(f"Interrupted; the same command goes on with {escape(str(out))}.", highlight=False)
        raise
    console.print(_table(recorded))
    console.print(f"Wrote {escape(str(out))}: {sum(task.episodes for task in recorded.values())} episodes.")
    if given_up := [task for task, found in recorded.items() if found.given_up]:
        failures = recorded[given_up[0]].in_a_row
        raise ValueError(
            f"Gave up {', '.join(given_up)} after {failures} failures in a row: the dataset has fewer than {episodes} "
            "episodes of it. Less --noise or a longer --horizon may help."
        )
    if push_to_hub is not None:
        console.print(f"Pushed to {push_dataset(out, push_to_hub)}", highlight=False)


def sizes(default, cameras, size):
    """Width and height in pixels of every camera.

    Args:
        default (`Mapping[str, tuple[int, int]]`): of the simulator's own choice.
        cameras (`str`, *optional*): names, with commas between them.
        size (`str`, *optional*): "128", or "320x240"; as large as the default's first camera otherwise.

    Raises:
        ValueError: the size is none.
    """
    names = list(default) if cameras is None else [name.strip() for name in cameras.split(",")]
    if size is None:
        return {name: default.get(name, next(iter(default.values()))) for name in names}
    pixels = size.split("x")
    if len(pixels) > 2 or not all(each.isdecimal() and int(each) for each in pixels):
        raise ValueError(f"Expected --size to be pixels like 128 or 320x240, came {size!r}.")
    return dict.fromkeys(names, (int(pixels[0]), int(pixels[-1])))


def _record(plan, out, processes, console):
    """Record with a bar that counts episodes, successes among the attempts, and frames a second."""
    from time import monotonic

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hf_vla.evaluation.recording import record

    columns = (TextColumn("Recording"), BarColumn(), MofNCompleteColumn(), TextColumn("episodes{task.fields[said]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar, began = progress.add_task("", total=len(plan.tasks) * plan.episodes, said=""), monotonic()

        def show(recorded, frames):
            episodes, attempts = (
                sum(getattr(task, name) for task in recorded.values()) for name in ("episodes", "attempts")
            )
            success = f", {episodes / attempts:.0%} success" if attempts else ""
            said = f"{success}, {frames / max(monotonic() - began, 1e-3):.0f} frames/s"
            progress.update(bar, completed=episodes, said=said)

        return record(plan, out, processes, show)


def _table(recorded):
    from rich.table import Table

    table = Table("task")
    for name in ("episodes", "failures", "success"):
        table.add_column(name, justify="right")
    for task, found in recorded.items():
        name = task + (", given up" if found.given_up else "")
        table.add_row(name, str(found.episodes), str(found.failures), f"{found.episodes / found.attempts:.0%}")
    return table
