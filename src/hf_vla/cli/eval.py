"""`hf-vla eval`: success rates in a simulator, with intervals, records and a protocol that others can repeat."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str | None, typer.Option(help="Checkpoint: a folder, or a name on the Hub.")] = None,
    env: Annotated[str | None, typer.Option(help="Simulator, such as metaworld.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks and splits, separated by commas, such as easy.")] = None,
    episodes: Annotated[int, typer.Option(help="Of every task.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; what is there is not run again.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="In which simulators run; default: as many as there are cores.")
    ] = None,
    envs: Annotated[
        int | None, typer.Option(help="Episodes simulated at a time; default: two batches, or two for each process.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of every call of the model; a GPU takes more than 4.")] = 4,
    n_action_steps: Annotated[
        int | None, typer.Option(help="Actions executed per prediction; default: the whole chunk.")
    ] = None,
    ensemble: Annotated[
        float | None, typer.Option(help="Predict at every step and average, with this coefficient; 0.01 is usual.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every task's first episode.")] = 0,
    num_inference_steps: Annotated[
        int | None, typer.Option(help="Denoising steps; default: the checkpoint's.")
    ] = None,
    reasoning_interval: Annotated[int, typer.Option(help="Predictions made under one reasoning in words.")] = 1,
    max_reasoning_tokens: Annotated[
        int | None, typer.Option(help="Longest reasoning of the model's own; 0: act without words.")
    ] = None,
    videos: Annotated[int, typer.Option(help="Episodes of every task that are filmed.")] = 0,
    gif: Annotated[bool, typer.Option("--gif", help="Films as GIF instead of mp4.")] = False,
    probe: Annotated[
        list[str] | None, typer.Option(help="Run the episodes again with blank pictures, swapped instructions, ...")
    ] = None,
    rendering: Annotated[str, typer.Option(help="fast, without shadows, or full.")] = "fast",
    camera: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="The checkpoint's camera ROLE is the simulator's NAME."),
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Dataset whose robot acts, where the checkpoint knows several.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: the accelerator.")] = None,
    horizon: Annotated[int | None, typer.Option(help="Control steps of an episode; default: the simulator's.")] = None,
    open_loop: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="Compare with recorded actions, too; without --env, nothing else."),
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Put the results into the checkpoint's README.md.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Say whether two evaluations of the same episodes differ, and run nothing."),
    ] = None,
):
    """Let a checkpoint act in a simulator, and report how often it succeeds."""
    from rich.console import Console

    console = Console()
    if compare is not None:
        others = {"--model": model, "--env": env, "--tasks": tasks, "--open-loop": open_loop, "--out": out}
        refuse("--compare", **others, **{"--card": card, "--probe": probe, "--videos": videos})
        from hf_vla.evaluation.comparison import compare as compare_folders

        console.print(compare_folders(*compare)[0], soft_wrap=True, markup=False, highlight=False)
        return
    given = {"--model": model} | ({"--env": env, "--tasks": tasks} if env or tasks or not open_loop else {})
    if missing := [name for name, value in given.items() if value is None]:
        raise typer.BadParameter(f"Missing {', '.join(missing)}; or compare two folders with --compare A B.")

    if card and not Path(model, "config.json").is_file():
        raise typer.BadParameter(f"Expected a local checkpoint, came {model!r}.", param_hint="--card")

    from hf_vla.evaluation.model_card import add_to_model_card
    from hf_vla.evaluation.probes import check_probes
    from hf_vla.evaluation.protocol import EvaluationPlan, available_cores
    from hf_vla.evaluation.report import write_report
    from hf_vla.evaluation.rollout import NO_PROBE
    from hf_vla.evaluation.rollout import evaluate as run
    from hf_vla.policy import Policy

    options = {
        "unnorm_key": unnorm_key,
        "n_action_steps": n_action_steps,
        "ensemble_coefficient": ensemble,
        "num_inference_steps": num_inference_steps,
        "reasoning_interval": reasoning_interval if reasoning_interval != 1 else None,
        "max_reasoning_tokens": max_reasoning_tokens,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if env is None:
        refuse("--open-loop without --env", **{"--card": card, "--probe": probe, "--videos": videos})
        folder = out or Path("outputs") / "eval" / f"{Path(model).name}-open-loop"
        policy = Policy.from_pretrained(model, device=device, **options)
        compare_open_loop(policy, open_recorded(policy, open_loop), folder, console)
        return
    plan = EvaluationPlan(
        env, tasks, episodes, seed, horizon, rendering, parse_cameras(camera or []), options, batch_size
    )
    folder = out or Path("outputs") / "eval" / f"{Path(model).name}-{env}-{tasks.replace(',', '-')}"
    check_probes(probe or [], plan.tasks)
    policy = Policy.from_pretrained(model, device=device, **options)
    recorded = open_loop and open_recorded(policy, open_loop)  # before hours of episodes, should it not be there
    for name in [NO_PROBE, *(probe or [])]:
        try:
            with Progress(console, plan, name) as progress:
                records = run(
                    policy.model,
                    policy.processor,
                    plan,
                    folder,
                    model,
                    processes=processes or available_cores(),
                    envs=envs,
                    probe=name,
                    videos=videos,
                    video_suffix=".gif" if gif else ".mp4",
                    on_episode=progress.add,
                )
        except KeyboardInterrupt:
            console.print(f"Interrupted; the same command goes on with {folder}.", markup=False, highlight=False)
            raise
        console.print(success_table(records, name))
        report = write_report(folder)
    if recorded:
        compare_open_loop(policy, recorded, folder, console)
        report = write_report(folder)
    console.print(f"Wrote {report}", highlight=False)
    if card:
        console.print(f"Wrote {add_to_model_card(model, folder)}", highlight=False)


def refuse(what, **options):
    """Raise where options are given that have no use beside another.

    Raises:
        typer.BadParameter: it names them.
    """
    if given := [name for name, value in options.items() if value]:
        raise typer.BadParameter(f"{what} has no use for {', '.join(given)}: leave it out.")


def open_recorded(policy, dataset):
    """Open a dataset in chunks as a policy predicts them."""
    from hf_vla.data.lerobot import LeRobotEpisodes

    return LeRobotEpisodes(dataset, delta_indices={"action": range(policy.processor.action_codec.chunk_size)})


def compare_open_loop(policy, recorded, folder, console):
    """Compare a policy's predictions with recorded actions; the result goes where the report finds it."""
    import json

    from hf_vla.evaluation.probes import probe_dataset
    from hf_vla.evaluation.records import write_whole
    from hf_vla.evaluation.report import OPEN_LOOP, open_loop_section

    result = probe_dataset(policy, recorded)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / OPEN_LOOP, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    console.print(open_loop_section(result), soft_wrap=True, markup=False, highlight=False)
    console.print(f"Wrote {folder / OPEN_LOOP}", markup=False, highlight=False)


def parse_cameras(values):
    """Read `ROLE=NAME` into a dictionary.

    Raises:
        typer.BadParameter: one is something else, or a role comes twice.
    """
    pairs = [value.partition("=")[::2] for value in values]
    if any(not role or not name for role, name in pairs) or len(dict(pairs)) < len(pairs):
        raise typer.BadParameter(f"Expected ROLE=NAME, each role once, came {values}.", param_hint="--camera")
    return dict(pairs)


class Progress:
    """A bar of episodes, with the running success of the task at hand and of all.

    Args:
        console (`rich.console.Console`): where to.
        plan (`EvaluationPlan`): says how many there are.
        probe (`str`): what is being run.
    """

    def __init__(self, console, plan, probe):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self._bar = Bar(*columns, TimeRemainingColumn(), console=console)
        self._number = self._bar.add_task(probe, total=len(plan.tasks) * plan.episodes)
        self._all, self._of_task = [], {}

    def add(self, record):
        """Count an episode."""
        own = self._of_task.setdefault(record.task, [])
        own.append(record.success)
        self._all.append(record.success)
        text = f"{record.task} {sum(own)}/{len(own)}, all {sum(self._all)}/{len(self._all)}"
        self._bar.update(self._number, advance=1, description=text)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()


def success_table(records, probe):
    """Task, success, its interval and the latencies, as a rich table."""
    import numpy as np
    from rich.table import Table

    from hf_vla.evaluation.intervals import wilson

    table = Table(title=None if probe == "none" else f"probe: {probe}")
    table.add_column("task")
    for name in ("success", "95 % interval", "p50 ms", "p95 ms"):
        table.add_column(name, justify="right")
    groups = {task: [each for each in records if each.task == task] for task in dict.fromkeys(r.task for r in records)}
    for task, group in [*groups.items(), ("all", records)]:
        wins, latencies = sum(each.success for each in group), np.concatenate([each.latency_ms for each in group])
        _, low, high = wilson(wins, len(group))
        middle, high_latency = np.percentile(latencies, [50, 95])
        share = f"{wins}/{len(group)} = {wins / len(group):.0%}"
        table.add_row(task, share, f"{low:.0%} .. {high:.0%}", f"{middle:.1f}", f"{high_latency:.1f}")
    return table
