"""Datasets scanned by several processes, file by file."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context

from hf_vla.data.checks.scan import DatasetScan, ScanPlan


def scan_datasets(
    plans: Sequence[ScanPlan], workers: int = 1, progress: Callable[[str, int], None] | None = None
) -> Iterator[DatasetScan]:
    """Read datasets once, file by file in several processes, and yield each as soon as it is done.

    What is found does not depend on the number of processes, but for the last digits of mean and std and, beyond two
    million rows, the sketches' stated error. Memory does not depend on the number of rows: every process holds one
    dataset's state at a time.

    Args:
        plans (`Sequence[ScanPlan]`): the datasets.
        workers (`int`, defaults to 1): processes; 1 reads in this one.
        progress (`Callable`, *optional*): is told the dataset's name and how many more rows are read.

    Raises:
        ValueError: two datasets of one name, a file that cannot be read or does not hold what it should.
        ChildProcessError: a process died; the text names the file.
    """
    if len({plan.name for plan in plans}) < len(plans):
        raise ValueError(f"Expected every dataset once, came {[plan.name for plan in plans]}.")
    progress = progress or (lambda name, rows: None)
    if workers > 1:
        yield from _scan_in_processes(plans, workers, progress)
        return
    for plan in plans:
        scan = DatasetScan(plan)
        for path in plan.files:
            for rows in scan.read(path):
                progress(plan.name, rows)
        scan.check()
        yield scan


def _scan_in_processes(plans, workers, progress):
    """Hand out the files one by one. A worker keeps its part of a dataset until it goes on to another one."""
    tasks = deque((plan, path) for plan in plans for path in plan.files)
    scans = {plan.name: DatasetScan(plan) for plan in plans}
    unread = {plan.name: len(plan.files) for plan in plans}
    holders = {plan.name: set() for plan in plans}
    context, processes, current = get_context("spawn"), {}, {}
    try:
        for _ in range(min(workers, len(tasks))):
            pipe, end = context.Pipe()
            processes[pipe] = context.Process(target=_work, args=(end,), daemon=True)
            processes[pipe].start()
            end.close()
        while processes:
            for pipe in connection.wait([*processes]):
                try:
                    message = pipe.recv()
                    if message is None:  # it wants a file
                        before, _ = current.get(pipe, (None, None))
                        if before is not None:
                            unread[before.name] -= 1
                        plan, path = tasks.popleft() if tasks else (None, None)
                        pipe.send((plan if plan is not before else None, path))
                        if plan is not None:
                            current[pipe] = plan, path
                            holders[plan.name].add(pipe)
                except (EOFError, OSError):
                    process = processes.pop(pipe)
                    process.join()
                    if process.exitcode:
                        plan, path = current.get(pipe, (None, "no file yet"))
                        raise ChildProcessError(
                            f"The process that read {path} died with exit code {process.exitcode}; where memory ran "
                            "out, give fewer workers."
                        ) from None
                    continue
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, int):
                    progress(current[pipe][0].name, message)
                elif isinstance(message, DatasetScan):
                    name = message.name
                    scans[name].merge(message)
                    holders[name].remove(pipe)
                    if not unread[name] and not holders[name]:
                        scans[name].check()
                        yield scans.pop(name)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _work(pipe: connection.Connection) -> None:
    """Scan the files that come through the pipe: the whole life of a worker."""
    scan = None
    try:
        pipe.send(None)
        while True:
            plan, path = pipe.recv()
            if scan is not None and (plan is not None or path is None):
                pipe.send(scan)
            if path is None:
                return
            if plan is not None:
                scan = DatasetScan(plan)
            for rows in scan.read(path):
                pipe.send(rows)
            pipe.send(None)
    except KeyboardInterrupt:  # reaches every process of a terminal; the first one says so
        return
    except Exception as error:  # whatever it is, the first process must know
        pipe.send(error)
