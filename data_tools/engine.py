"""Where a stage's tasks run: in processes of this machine, on Ray, or on Slurm.

A task is a shard, and a picklable function makes it from its number alone, so that where and in which order tasks run
changes nothing. Ray and Slurm are datatrove's executors (a shard is a rank of its pipeline). datatrove's local
one is not used: it waits for ever for a worker that was killed (so does its Ray one, which is why a rank watches its
task from another process here), reads no model only once, and takes 0.5 s to import.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import importlib.util
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from phi1.errors import UserError
from phi1.files import atomic_write, write_json

Task = Callable[[int], dict[str, Any]]
_AGAIN = "what was finished is kept: run the same command again to go on"
START_SECONDS = 10.0
"""Work that is shorter is done by one process."""
_POLL_SECONDS = 0.2  # between two looks at what others have done


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """Options of all stages that work shard by shard. None of them changes a byte of the result."""

    workers: int = dataclasses.field(default_factory=cores, metadata={"no_effect": True})
    """Shards made at a time; by default one for each core of this machine."""

    engine: Literal["local", "ray", "slurm"] = dataclasses.field(default="local", metadata={"no_effect": True})
    """Where: processes here, the Ray cluster that RAY_ADDRESS or this machine knows, or Slurm. They need
    `pip install -e '.[cluster]'`.
    """

    task_memory: float = dataclasses.field(default=2.0, metadata={"no_effect": True})
    """What Ray and Slurm set aside for a shard, GiB."""

    slurm_partition: str = dataclasses.field(default="", metadata={"no_effect": True})
    """Slurm's partition; needed with --engine slurm."""

    slurm_time: str = dataclasses.field(default="24:00:00", metadata={"no_effect": True})
    """Slurm's time limit of a shard."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: must be at least 1")
        if self.task_memory <= 0:
            raise UserError(f"--task-memory {self.task_memory}: must be more than 0 GiB")
        if self.engine == "slurm" and not self.slurm_partition:
            raise UserError("--engine slurm: name its partition, --slurm-partition NAME (`sinfo` lists them)")


HERE = Engine(workers=1)
"""One shard after the other, in this process: for stages that one model or one server binds."""


def worth(engine: Engine, seconds: float) -> Engine:
    """`engine`, or HERE where it would start processes here for work that takes about so many seconds, and so not gain
    any.

    A worker that needs PyTorch or scikit-learn takes 2 to 5 s to start; two workers save half of the work.
    """
    return HERE if engine.engine == "local" and seconds < START_SECONDS else engine


def _nobody(count: int) -> None:
    pass


_listener: Callable[[int], None] = _nobody
_worker = 0


def tell(count: int) -> None:
    """Called by a task: so much more of its shard's work is done."""
    _listener(count)


def worker() -> int:
    """The number of the process that a task runs in, from 0 and below the number of workers; on a cluster, where each
    task has a process of its own, the shard's.
    """
    return _worker


def run(
    engine: Engine,
    task: Task,
    shards: Sequence[int],
    folder: pathlib.Path,
    told: Callable[[int], None] = _nobody,
) -> Iterator[dict[str, Any]]:
    """Yields what `task(shard)` returns, a JSON-able dict, in the order in which shards are done.

    folder: where a cluster's tasks are told what to do and leave results and logs (removed if all went well); all nodes
    must see it. told: called while tasks run here, with what they `tell` (those of a cluster cannot). Raises UserError
    if a task does or a worker dies, Whatever it is if a task raises something else here.
    """
    if engine.engine != "local":
        yield from _on_cluster(engine, task, shards, folder / "cluster")
    elif engine.workers == 1 or len(shards) <= 1:
        yield from _in_turn(task, shards, told)
    else:
        yield from _in_pool(min(engine.workers, len(shards)), task, shards, told)


def _in_turn(task: Task, shards: Sequence[int], told: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    global _listener
    for shard in shards:
        before, _listener = _listener, told
        try:
            result = task(shard)
        finally:
            _listener = before
        yield result


def _in_pool(workers: int, task: Task, shards: Sequence[int], told: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")  # the parent may hold threads (torch, tokenizers)
    # Each worker counts in a place of its own, which is read without a lock: one that is killed may hold any.
    numbers, counts, seen = context.Value("i", 0), context.RawArray("q", workers), 0
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (task, numbers, counts)) as pool:
        waiting = collections.deque(shards)
        running: set[concurrent.futures.Future[dict[str, Any]]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.add(pool.submit(_do, waiting.popleft()))
                done, running = concurrent.futures.wait(
                    running, timeout=_POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
                )
                if (now := sum(counts)) > seen:
                    told(now - seen)
                    seen = now
                for future in done:
                    yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"a worker process died (killed, or out of memory); {_AGAIN}, with fewer --workers if memory was short"
            ) from error
        except BaseException:
            _stop(pool)
            raise


def _stop(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Ends the workers where they are: what they were making is made again."""
    for process in list((pool._processes or {}).values()):
        process.terminate()


_task: Task | None = None
"""What this worker does."""


def _start_worker(task: Task, numbers: Any, counts: Any) -> None:
    """In a worker: it ends with the process that started it, however that ends, leaves Ctrl-C to it, and is one
    thread. numbers: workers that have started; counts: what the tasks of each told.
    """
    global _task, _worker, _listener
    with numbers.get_lock():
        _worker = numbers.value
        numbers.value += 1

    def add(count: int) -> None:
        counts[_worker] += count

    _task, _listener = task, add
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # read when those libraries are loaded
    parent = multiprocessing.parent_process()
    assert parent is not None
    _end_when(lambda: multiprocessing.connection.wait([parent.sentinel]))


def _do(shard: int) -> dict[str, Any]:
    assert _task is not None
    return _task(shard)


def _end_when(wait: Callable[[], object]) -> None:
    def watch() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# Clusters, through datatrove.


@dataclasses.dataclass
class _Rank:
    """datatrove's pipeline: rank i makes shards[i] in a process of its own, whose death it sees."""

    shards: list[int]
    folder: str
    path: list[str]
    place: str

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        result = _result(pathlib.Path(self.folder), shard := self.shards[rank])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(self.path)}
        command = [sys.executable, "-m", "data_tools.engine", self.folder, str(shard)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=self.place) as process:
            code = process.wait()
        if not result.exists():
            how = f"killed by signal {-code}, or out of memory" if code < 0 else f"exit status {code}"
            write_json(result, {"error": f"shard {shard}: its process died ({how})"})


def _result(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return folder / "results" / f"{shard:05d}.json"


def _on_cluster(engine: Engine, task: Task, shards: Sequence[int], folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    for package in ("datatrove", "ray") if engine.engine == "ray" else ("datatrove",):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--engine {engine.engine} needs the package {package}: pip install -e '.[cluster]'")
    if not shards:
        return
    folder = (folder / f"{time.time_ns()}").absolute()  # of this run: tasks of one that was given up may still go on
    with atomic_write(folder / "task.pickle") as file:
        pickle.dump(task, file)
    launch = {"ray": _ray, "slurm": _slurm}[engine.engine]
    rank = _Rank(list(shards), str(folder), [os.path.abspath(entry) for entry in sys.path], os.getcwd())
    waiting = collections.deque(shards)
    errors: list[str] = []
    launched: concurrent.futures.Future[None] = concurrent.futures.Future()
    threading.Thread(target=_fulfil, args=(launched, launch, engine, rank, folder), daemon=True).start()
    while waiting:
        last = launched.done()
        for shard in [shard for shard in waiting if _result(folder, shard).exists()]:
            waiting.remove(shard)
            result = json.loads(_result(folder, shard).read_text(encoding="utf-8"))
            if "error" in result:
                errors.append(result["error"])
            else:
                yield result
        if last:
            break
        time.sleep(_POLL_SECONDS)
    launched.result()
    if errors:
        raise UserError(f"{errors[0]}{_more(errors)}; {_AGAIN} (logs: {folder})")
    if waiting:
        raise UserError(
            f"{len(waiting)} of {len(shards)} shards were not made on {engine.engine}; {_AGAIN} (logs: {folder})"
        )
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # another run's tasks are there
        folder.parent.rmdir()


def _fulfil(future: "concurrent.futures.Future[None]", function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
        future.set_result(None)
    except BaseException as error:
        future.set_exception(error)


def _more(errors: Sequence[str]) -> str:
    return f" (and {len(errors) - 1} more shards failed)" if len(errors) > 1 else ""


def _options(rank: _Rank, folder: pathlib.Path, engine: Engine) -> dict[str, Any]:
    from datatrove.utils.logging import logger

    logger.remove()  # it writes a screenful for each rank; its files keep that
    return {
        "pipeline": [rank],
        "tasks": len(rank.shards),
        "workers": engine.workers,
        "logging_dir": str(folder),
        "skip_completed": False,  # our receipts say what is whole
    }


def _ray(engine: Engine, rank: _Rank, folder: pathlib.Path) -> None:
    import ray
    from datatrove.executor import RayPipelineExecutor

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    RayPipelineExecutor(**_options(rank, folder, engine), mem_per_cpu_gb=engine.task_memory).run()


def _slurm(engine: Engine, rank: _Rank, folder: pathlib.Path) -> None:
    from datatrove.executor import SlurmPipelineExecutor

    executor = SlurmPipelineExecutor(
        **_options(rank, folder, engine),
        time=engine.slurm_time,
        partition=engine.slurm_partition,
        mem_per_cpu_gb=engine.task_memory,
        job_name="phi1-data",
        qos="",
        env_command=f"export PATH={os.path.dirname(sys.executable)}:$PATH PYTHONPATH={os.pathsep.join(rank.path)}",
        sbatch_args={"wait": ""},  # until the job has ended
    )
    try:
        executor.run()
    except FileNotFoundError as error:
        raise UserError("--engine slurm: there is no `sbatch` here; start it on a login node of the cluster") from error
    except subprocess.CalledProcessError as error:  # what became of each shard is in its result
        if not any((folder / "results").glob("*.json")):
            raise UserError(
                f"--engine slurm: sbatch refused the job (exit status {error.returncode}; logs: {folder})"
            ) from error


def _main(folder: pathlib.Path, shard: int) -> None:
    """A cluster's task, in its own process."""
    global _worker
    _worker = shard
    _end_when(sys.stdin.read)  # its rank is gone
    with open(folder / "task.pickle", "rb") as file:
        task: Task = pickle.load(file)
    try:
        result = task(shard)
    except UserError as error:
        result = {"error": str(error)}
    except Exception as error:  # the run's process cannot see it otherwise
        traceback.print_exc()
        result = {"error": f"shard {shard}: {type(error).__name__}: {error}"}
    write_json(_result(folder, shard), result)


if __name__ == "__main__":
    _main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
