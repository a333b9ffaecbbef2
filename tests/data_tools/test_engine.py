"""Engines: what is made is the same on each of them, whatever is killed; a dead process is one clear line."""

import functools
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from counting import SCHEMA, Config, produce

from data_tools import timing
from data_tools.dataset import run_stage
from data_tools.engine import Engine, run, tell, worker
from phi1.errors import UserError

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[1]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != timing.FILE}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    run_stage("count", Config(), folder, [], 4, produce, SCHEMA, quiet=True)
    return contents(folder)


def start(
    function: str, folder: pathlib.Path, engine: str = "local", workers: int = 2, shards: int = 4, **environment: str
) -> Any:
    path = os.pathsep.join([str(HERE), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, str(HERE / "counting.py"), function, str(folder), engine, str(workers), str(shards)],
        env=os.environ | {"PYTHONPATH": path, "COUNTING": str(folder.parent)} | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(holds: Callable[[], object], of: Any) -> None:
    """Waits for a state that comes for certain, while the process lives."""
    while not holds():
        assert of.poll() is None, of.stderr.read()
        time.sleep(0.02)


def workers_of(folder: pathlib.Path) -> list[int]:
    return [int(path.stem) for path in folder.parent.glob("*.worker")]


def gone(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_parent_that_ends_takes_its_workers_along_and_the_stage_goes_on(
    how: signal.Signals, tmp_path: pathlib.Path, expected: dict[str, bytes]
) -> None:
    folder = tmp_path / "d"
    parent = start("wait", folder)
    until(lambda: len(workers_of(folder)) == 2 and (folder / "00000.json").exists(), parent)
    parent.send_signal(how)
    parent.wait()
    for pid in workers_of(folder):
        while not gone(pid):
            time.sleep(0.02)
    assert not (folder / "manifest.json").exists()
    (tmp_path / "gate").touch()
    again = start("wait", folder)
    said = again.communicate()[1]
    assert again.returncode == 0 and "going on after 1 of 4 shards" in said
    assert contents(folder) == expected


def test_a_worker_that_is_killed_from_outside_is_one_line(tmp_path: pathlib.Path, expected: dict[str, bytes]) -> None:
    folder = tmp_path / "d"
    parent = start("wait", folder)
    until(lambda: len(workers_of(folder)) == 2, parent)
    os.kill(workers_of(folder)[0], signal.SIGKILL)
    said = parent.communicate()[1]
    assert parent.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: a worker process died (killed, or out of memory)")
    (tmp_path / "gate").touch()
    assert start("wait", folder).wait() == 0
    assert contents(folder) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_what_tasks_tell_is_heard_and_workers_have_numbers(workers: int, tmp_path: pathlib.Path) -> None:
    heard: list[int] = []
    task = functools.partial(_telling, tmp_path, workers)
    made = list(run(Engine(workers=workers), task, range(4), tmp_path, heard.append))
    assert sum(heard) == 4 * 30
    by_process = {result["process"]: result["worker"] for result in made}
    assert sorted(by_process.values()) == list(range(workers))  # one process a number
    assert all(by_process[result["process"]] == result["worker"] for result in made)


def _telling(folder: pathlib.Path, workers: int, shard: int) -> dict[str, Any]:
    tell(10)
    (folder / f"{os.getpid()}.here").touch()
    while len(list(folder.glob("*.here"))) < workers:  # all of them take part
        time.sleep(0.02)
    tell(20)
    return {"process": os.getpid(), "worker": worker()}


def test_an_error_of_a_task_ends_all_of_them() -> None:
    with pytest.raises(UserError, match="shard 2 is odd"):
        list(run(Engine(workers=2), _odd, range(4), pathlib.Path()))


def _odd(shard: int) -> dict[str, Any]:
    if shard == 2:
        raise UserError("shard 2 is odd")
    return {"shard": shard}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"task_memory": 0.0}, "--task-memory 0.0"),
        ({"engine": "slurm"}, "--engine slurm: name its partition"),
    ],
)
def test_options_that_make_no_sense_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Engine(**options)


# Slurm: its commands are played by programs that run a job array as sbatch does, one task after the other.

SBATCH = """#!/bin/bash
for last; do :; done
[ -z "$REFUSE" ] || { echo "sbatch: error: invalid partition" >&2; exit 1; }
grep -q merge_stats "$last" && { echo "Submitted batch job 8"; exit 0; }
range=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
grep -q '^#SBATCH --wait$' "$last" || exit 3
echo "$@" >> "$COUNTING/submitted"
for i in $(seq 0 "$range"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=7 SLURM_NODELIST=node RUN_OFFSET=0 bash "$last" >> "$COUNTING/slurm.log" 2>&1 || failed=1
done
echo "Submitted batch job 7"
exit ${failed:-0}
"""


@pytest.fixture
def slurm(tmp_path: pathlib.Path) -> dict[str, str]:
    programs = {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho node\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


needs_datatrove = pytest.mark.skipif(
    importlib.util.find_spec("datatrove") is None, reason="no datatrove (pip install datatrove)"
)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray (pip install ray)")


@needs_datatrove
def test_slurm_makes_the_same_bytes_and_a_task_that_dies_is_one_line(
    tmp_path: pathlib.Path, slurm: dict[str, str]
) -> None:
    died = start("die", tmp_path / "d", "slurm", shards=3, **slurm)
    said = died.communicate()[1]
    assert died.returncode == 1 and "Traceback" not in said
    assert "error: shard 2: its process died (killed by signal 9" in said and "run the same command again" in said
    again = start("produce", tmp_path / "d", "slurm", shards=3, **slurm)
    said = again.communicate()[1]
    assert again.returncode == 0 and "going on after 2 of 3 shards" in said, said
    assert len((tmp_path / "submitted").read_text().splitlines()) == 2
    run_stage("count", Config(), tmp_path / "here", [], 3, produce, SCHEMA, quiet=True)
    assert contents_of_files(tmp_path / "d") == contents(tmp_path / "here")


def contents_of_files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != timing.FILE}


@needs_datatrove
def test_slurm_that_refuses_or_is_not_there_is_one_line(tmp_path: pathlib.Path, slurm: dict[str, str]) -> None:
    refused = start("produce", tmp_path / "d", "slurm", REFUSE="yes", **slurm)
    said = refused.communicate()[1]
    assert (
        refused.returncode == 1 and "error: --engine slurm: sbatch refused the job" in said and "Traceback" not in said
    )
    absent = start("produce", tmp_path / "e", "slurm")
    said = absent.communicate()[1]
    assert absent.returncode == 1 and "there is no `sbatch` here" in said and "Traceback" not in said


@needs_datatrove
@needs_ray
def test_ray_makes_the_same_bytes_and_a_task_that_dies_is_one_line(
    tmp_path: pathlib.Path, expected: dict[str, bytes]
) -> None:
    died = start("die", tmp_path / "d", "ray")
    said = died.communicate()[1]
    assert died.returncode == 1 and "error: shard 2: its process died (killed by signal 9" in said, said
    assert "Traceback" not in said
    again = start("produce", tmp_path / "d", "ray")
    said = again.communicate()[1]
    assert again.returncode == 0 and "going on after 3 of 4 shards" in said, said
    assert contents_of_files(tmp_path / "d") == expected


def test_what_a_stage_took_is_kept_beside_it(tmp_path: pathlib.Path) -> None:
    run_stage("count", Config(), tmp_path, [], 4, produce, SCHEMA, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / timing.FILE).read_text().splitlines()]
    assert [line["shard"] for line in lines[:4]] == [0, 1, 2, 3] and lines[4]["run"] == 4
    took = timing.read(tmp_path)
    assert took is not None and (took.shards, took.rows, took.workers) == (4, 12, 1)
    assert 0 < took.busy <= took.wall
    with open(tmp_path / timing.FILE, "a") as file:
        file.write('{"shard": 1, "rows": 5, "seco')  # as a kill leaves it
    assert timing.read(tmp_path) == took
