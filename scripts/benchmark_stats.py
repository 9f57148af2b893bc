"""Rows per second and memory of `hf-vla stats`: `OMP_NUM_THREADS=1 python scripts/benchmark_stats.py`.

Each size is written once, as a LeRobot v3.0 dataset of a 7-D action and an 8-D state in files of a million rows, and
read in processes of their own: by the floor (pyarrow reading the same columns, nothing else), by one worker, and by
--workers. CPU seconds are those of all its processes, and what the share of the floor is of: other programs disturb
them less than the time on the clock. The peak is the largest resident memory of any one process. 100 million rows
take 7 GB of disk and have a flag.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import datasketches  # noqa: F401  (fails here, not in a worker)
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_vla.data.checks.scan import BATCH_ROWS, plan_scan
from hf_vla.data.checks.scan_processes import scan_datasets

FILE_ROWS, EPISODE_ROWS = 1_000_000, 200
SIZES = {"action": 7, "observation.state": 8}


def write_dataset(root, rows):
    """Random walks, so that pages are neither constant nor compressible."""
    episodes = rows // EPISODE_ROWS
    features = {key: {"dtype": "float32", "shape": [size], "names": None} for key, size in SIZES.items()}
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    }
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    files = np.arange(episodes) * EPISODE_ROWS // FILE_ROWS
    table = {"episode_index": np.arange(episodes), "length": np.full(episodes, EPISODE_ROWS)}
    table = pa.table(table | {"data/chunk_index": np.zeros(episodes, int), "data/file_index": files})
    pq.write_table(table, root / "meta/episodes/chunk-000/file-000.parquet")
    for file in track(range(0, rows, FILE_ROWS), f"writing {rows:,} rows", transient=True):
        generator, index = np.random.default_rng(file), np.arange(file, min(file + FILE_ROWS, rows))
        columns = {
            key: pa.FixedSizeListArray.from_arrays(
                generator.standard_normal((len(index), size), np.float32).cumsum(0, np.float32).ravel(), size
            )
            for key, size in SIZES.items()
        }
        columns |= {"episode_index": index // EPISODE_ROWS, "frame_index": index % EPISODE_ROWS, "index": index}
        pq.write_table(pa.table(columns), root / f"data/chunk-000/file-{file // FILE_ROWS:03d}.parquet")


def read_alone(root):
    for path in sorted(root.glob("data/*/*.parquet")):
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches(
                BATCH_ROWS, columns=["episode_index", "frame_index", *SIZES], use_threads=False
            ):
                pass


def scan(root, workers):
    (found,) = scan_datasets([plan_scan(root)], workers)
    for column in found.columns.values():
        column.statistics.summary()


def measure(pipe, function, *arguments):
    start, before = time.perf_counter(), time.process_time()
    function(*arguments)
    seconds = time.perf_counter() - start
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    pipe.send((seconds, cpu - before, max(usage.ru_maxrss for usage in usages) / 1024))


def in_a_process(function, *arguments):
    """Seconds, CPU seconds, and the peak of resident memory in MiB."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(there, function, *arguments))
    process.start()
    result = here.recv()
    process.join()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--hundred", action="store_true", help="100 million rows, too")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--folder", help="where the generated data go, and are deleted")
    args = parser.parse_args()
    table = Table("rows", "", "seconds", "CPU seconds", "million rows per CPU second", "of the floor", "peak MiB")
    for millions in [*args.millions, *[100] * args.hundred]:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            root, rows = Path(folder), millions * 1_000_000
            # in processes of their own, since a process starts with the peak of the one that starts it
            in_a_process(write_dataset, root, rows)
            in_a_process(read_alone, root)  # for the page cache
            cases = {"pyarrow alone": (read_alone, root), "1 worker": (scan, root, 1)}
            if args.workers > 1:
                cases[f"{args.workers} workers"] = (scan, root, args.workers)
            floor = None
            for name, case in cases.items():
                seconds, cpu, peak = in_a_process(*case)
                floor = floor or cpu
                numbers = f"{seconds:.2f} {cpu:.2f} {millions / cpu:.2f} {floor / cpu:.2f} {peak:.0f}"
                table.add_row(f"{millions} M", name, *numbers.split())
    console = Console()
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, numpy {np.__version__}, "
        f"pyarrow {pa.__version__}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    )


if __name__ == "__main__":
    main()
