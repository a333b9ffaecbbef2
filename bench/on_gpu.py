"""Everything that a GPU is needed for, in one call of minutes, on a machine with a CUDA toolkit and no package index.

    bench/on_gpu.sh [--out FOLDER] [--total SECONDS] [--only STEP,STEP] [--rehearse]

Is it right, how fast is it, why, then the rest: in this order, because the minutes may end anywhere. Each step is a
process of its own with a limit in seconds; one that fails or runs out of time is a line of the summary and does not
stop the next. After each step the folder gets gpu.tgz (all logs and tables so far) and summary.txt. The exit status is
1 if any step failed. Needs torch, triton, pybind11, cmake, ninja, pytest with xdist, and nvcc; ncu and
compute-sanitizer where they are.

.gpu/, where it exists, holds what was made beforehand (--prebuild PYTHON makes it, for the GPU machine's version of
Python, e.g. python3.12): the native module and the programs of twins.cu, of which what does not load is built again
there; and the packages that the trainer's command line needs (PACKAGES).
--rehearse runs the same steps without a GPU: the CUDA kernels under the emulator, toy sizes, a stand-in for nvidia-smi.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# FLOP of a token of phi-1 at sequence 2,048, input embedding not counted, attention in full; an H100 SXM's data sheet.
PHI1_TOKEN_FLOP, H100_FLOPS = 9.09e9, 989e12
# Pure Python, of any version; the rest of what a trainer imports comes with torch's images.
PACKAGES = ("tyro", "docstring-parser", "typeguard")


@dataclasses.dataclass(frozen=True)
class Step:
    """One process, or several side by side."""

    name: str
    limit: int
    """Seconds."""
    commands: dict[str, list[str]]
    """By the name of their logs."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    digest: Callable[[Path, Path], list[str]] | None = None
    """(folder, log) -> lines of the summary."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """What differs between a GPU and a rehearsal."""

    python: str
    device: str
    test_device: str
    """The id of the tests that run there."""
    out: Path

    @property
    def rehearsal(self) -> bool:
        """Without a GPU, under the emulator."""
        return self.device == "cpu"

    def script(self, name: str) -> list[str]:
        """The command that runs a script of this folder."""
        return [self.python, *(["bench/rehearse.py"] if self.rehearsal else []), f"bench/{name}.py"]


# ------------------------------------------------------------------------------------------------------- the steps


def pytest(mode: Mode, *arguments: str, workers: int = 1, limit: int = 25) -> list[str]:
    """The machine may lack plugins that pyproject.toml's options name. On a GPU a kernel that does not return ends its
    test's process, not the step's time; a thread must end it, for no signal reaches a process that waits for a GPU.
    """
    stops = importlib.util.find_spec("pytest_timeout") is not None and not mode.rehearsal
    plain = [
        "-q",
        "-o",
        "addopts=--import-mode=importlib",
        *(("-o", "timeout_method=thread") if stops else ()),
        "-o",
        f"timeout={limit if stops else 0}",
        "-W",
        "ignore::pytest.PytestConfigWarning",
    ]
    spread = ["-n", str(workers)] if workers > 1 else []
    return [mode.python, "-m", "pytest", *plain, *spread, *arguments]


def right(mode: Mode) -> Step:
    """Each kernel's tests, in a process each: an error of one leaves the others' device alone."""

    def tests(name: str, select: str) -> list[str]:
        return pytest(mode, f"tests/kernels/test_cuda_{name}.py", "-k", f"{mode.test_device} and ({select})")

    small = mode.rehearsal
    few = " and (one_full_32 or packed_128)" if small else ""
    commands = {
        f"attention-{version}-{name}": tests("attention", f"error_rule and {version}- and dtype{i}{few}")
        for version in ("mma", "hopper", *(() if small else ("hopper_wide",)))
        for i, name in enumerate(("bf16",) if small else ("bf16", "fp16"))
    }
    commands |= {
        "rotary": tests("rotary", "rotary_is" if not small else "rotary_is and shape1 and dtype1"),
        "layer_norm": tests("layer_norm", "equal" if small else "norm"),
        "block": tests("block", "rounded or many_chunks" if small else "gpu"),
        "loss": tests("loss", "all_ignored" if small else "gpu"),
    }
    if not small:
        commands["repeats"] = pytest(mode, "tests/kernels/test_cuda_attention.py", "-k", "same_bits")
    environment = {
        "CUDA_LAUNCH_BLOCKING": "1",
        "OMP_NUM_THREADS": "2",
        "PHI1_ERROR_LOG": str(mode.out / "errors.jsonl"),
    }
    return Step("right", 200 if small else 60, commands, environment, digest_errors)


def bench(mode: Mode, name: str, script: str, limit: int, skip: str, *, shapes: str, toy: str) -> Step:
    """One of bench's scripts; its table is in the log, its JSON written after each group."""
    command = [
        *mode.script(script),
        "--quick",
        "--device",
        mode.device,
        "--shapes",
        toy if mode.rehearsal else shapes,
        "--dtypes",
        "bf16",
        "--json",
        str(mode.out / f"{name}.json"),
        "--skip",
        skip,
    ]
    return Step(name, limit, {name: command}, digest=digest_rates)


def probe(mode: Mode, program: str, limit: int, *, under: tuple[str, ...] = (), **environment: str) -> Step:
    """A program of bench/gpu_probe.py, on a GPU under a tool, by whose name or last word the step is called."""
    name = f"{program}-{under[0] if under[-1].startswith('-') else under[-1]}" if under else program
    run = [*mode.script("gpu_probe"), program, "--device", mode.device]
    return Step(name, limit, {name: [*(() if mode.rehearsal else under), *run]}, environment, digest_marked)


# One launch of each attention kernel, without and with dropout, the clocks left as they are.
_NCU = (
    "ncu",
    "--clock-control",
    "none",
    "--kernel-name",
    "regex:attention",
    "--launch-skip",
    "4",
    "--launch-count",
    "8",
    *(
        f"--section={s}"
        for s in ("SpeedOfLight", "ComputeWorkloadAnalysis", "InstructionStats", "LaunchStats", "WarpStateStats")
    ),
)
_SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--kernel-name", "kns=phi1", "--tool")


def steps(mode: Mode) -> list[Step]:
    """In the order in which they matter."""
    few = "8x2048x32x64,1x16384x32x64,8x2048x16x64,8x2048x16x128"
    peers = "pointers|Flex|math|flash_attn|mem-eff|SDPA$"
    small = mode.rehearsal
    left_out = "cpu/|hopper_wide"  # but in attention's own table
    left_out_of_layers = f"{left_out}|mma" if small else left_out  # the emulator takes its time
    result = [right(mode)]
    if not small:
        run = f"test -x .gpu/twins || {{ mkdir -p .gpu && {shlex.join(twins_build())}; }} && .gpu/twins"
        result.insert(0, Step("twins", 60, {"twins": ["bash", "-c", run]}))
    result += [
        bench(mode, "attn", "attn", 75, f"triton|{left_out if small else 'cpu/'}|{peers}", shapes=few, toy="1x64x1x64"),
        bench(
            mode,
            "train",
            "train",
            75,
            f"triton|compiled|torch$|phi1$|{left_out_of_layers}",
            shapes="8x2048x2048x24x51200",
            toy="1x64x64x1x512",
        ),
        probe(mode, "layer", 30),
        probe(mode, "attention", 45, under=_NCU),
        probe(mode, "loss-chunks", 30),
        probe(mode, "elementwise", 30),
        bench(
            mode,
            "block",
            "block",
            45,
            f"compiled|triton|{left_out_of_layers}",
            shapes="8x2048x2048x32x64x8192",
            toy="1x64x64x1x64x128",
        ),
        bench(mode, "rotary", "rotary", 30, f"compiled|{left_out}", shapes="8x2048x32x64", toy="1x16x2x64"),
    ]
    if not small:
        result.append(probe(mode, "triton", 75, TRITON_PRINT_AUTOTUNING="1"))
        skip = f"phi1 cuda|{left_out}|{peers}"
        result.append(bench(mode, "attn-triton", "attn", 45, skip, shapes="8x2048x32x64", toy=""))
    for tool in ("memcheck", "racecheck"):
        # Without torch's caching, so that memcheck sees each tensor's end; blocking, so that an error is its kernel's.
        plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
        result.append(probe(mode, "calls", 60, under=(*_SANITIZER, tool), **plain))
    if not small:
        # What the tests hold of every backend, and of the trainer, where device="auto" is the GPU.
        names = ("seeds", "rotary", "triton_norm", "triton_loss", "triton_block", "triton_attention")
        cases = "error_rule or 1023x1024 or gqa or dropout or documents_unequal or packed_128"
        select = f"captured or (triton and bfloat16 and not mutation and ({cases}))"
        files = [f"tests/kernels/test_{name}.py" for name in names]
        kernels = pytest(mode, "-vv", *files, "-k", select, workers=6, limit=60)
        files = [f"tests/phi1/test_{name}.py" for name in ("train", "train_resuming", "generate", "model")]
        trainer = pytest(mode, "-vv", *files, workers=6, limit=60)
        beside = {"kernels": kernels, "trainer": trainer}
        result.append(Step("tests", 110, beside, {"OMP_NUM_THREADS": "1"}, digest_failed))
        result.append(
            bench(
                mode, "attn-flex", "attn", 60, f"triton|math|mem-eff|torch$|{left_out}", shapes="8x2048x32x64", toy=""
            )
        )
        result.append(bench(mode, "loss", "loss", 40, f"triton|{left_out}", shapes="16384x2048x51200", toy=""))
    return result


# ------------------------------------------------------------------------------------------------------ the digest


def digest_errors(out: Path, log: Path) -> list[str]:
    """For each kernel the greatest error over what the rule allows, and how many of its tests passed."""
    lines = []
    worst: dict[str, tuple[float, str]] = {}
    path = out / "errors.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        share = entry["error"] / entry["allowed"] if entry["allowed"] else float(entry["error"] > 0) * 1e9
        kernel = entry["test"].split("::")[0].rsplit("test_cuda_", 1)[-1].removesuffix(".py")
        worst[kernel] = max(worst.get(kernel, (0.0, "")), (share, f"{entry['what']} {entry['dtype']}"))
    for kernel, (share, what) in worst.items():
        lines.append(f"  {kernel}: greatest error {share:.2f} of what is allowed ({what})")
    for file in sorted(out.glob("right-*.log")):
        last = [
            x for x in file.read_text().splitlines() if re.search(r"\d+ (passed|failed|error|skipped)|no tests ran", x)
        ]
        lines.append(
            f"  {file.stem.removeprefix('right-')}: {last[-1].strip('= ') if last else 'no result, see its log'}"
        )
    return lines


def digest_rates(out: Path, log: Path) -> list[str]:
    """A line a case: the rate of each implementation in each work, ours with its ratio to the fastest peer."""
    path = out / f"{log.stem}.json"
    if not path.exists():
        return []
    table = json.loads(path.read_text())
    cases: dict[str, dict[str, list[str]]] = {}
    for row in table["rows"]:
        found = cases.setdefault(row["case"], {}).setdefault(row["implementation"], [])
        if row["rate"] is not None:
            text = f"{row['rate']:.0f}" + (f" ({row['ratio']:.2f})" if row["ours"] and row["ratio"] else "")
            if log.stem.startswith("train"):
                batch, seq = (int(x) for x in row["case"].split("x")[:2])
                micro_batches = 2 if row["work"] == "loop" else 1  # bench/loops.py
                tokens = micro_batches * batch * seq / row["seconds"]
                share = 100 * tokens * PHI1_TOKEN_FLOP / H100_FLOPS
                text += f", {tokens:,.0f} tokens/s, strict MFU {share:.1f}%, {row['peak_bytes'] / 2**30:.0f} GiB"
            found.append(text)
        elif row["ours"] and re.match(r"\w+(Error|Exception|Interrupt): ", row["unavailable"]):
            found.append(row["unavailable"][:90])  # a failure; what a version is not made for is no news
    works = " / ".join(dict.fromkeys(row["work"] for row in table["rows"]))
    lines = [f"  {table['unit']}, {works} (times the fastest peer)"]
    for case, names in cases.items():
        lines.append(f"  {case}: " + "; ".join(f"{name} {' / '.join(found)}" for name, found in names.items() if found))
    return lines


def digest_failed(out: Path, log: Path) -> list[str]:
    """The tests that failed, also of a run that did not reach its end."""
    lines = []
    for file in sorted(out.glob("tests-*.log")):
        text = file.read_text()
        ends = re.findall(r"^=+ (.*\d+ passed.*) =+$", text, re.MULTILINE) or ["did not end"]
        failed = dict.fromkeys(re.findall(r"(?:FAILED|ERROR) (tests/\S+)", text))
        lines.append(f"  {file.stem.removeprefix('tests-')}: {ends[-1]}")
        lines += [f"    failed: {name}" for name in list(failed)[:8]]
    return lines


def digest_marked(out: Path, log: Path) -> list[str]:
    """Lines that the step marked for the summary."""
    return [f"  {line.removeprefix('RATE ')}" for line in log.read_text().splitlines() if line.startswith("RATE ")]


# -------------------------------------------------------------------------------------------------------- running


class Run:
    """The folder, the clock and the summary of one call."""

    def __init__(self, out: Path, back: Path, total: int) -> None:
        self.out, self.back, self.total = out, back, total
        self.started, self.failed = time.monotonic(), False
        self.lines: list[str] = []

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def say(self, line: str) -> None:
        """Prints a line and adds it to the summary."""
        self.lines.append(line)
        print(line, flush=True)

    def keep(self) -> None:
        """Everything so far into the folder that comes back, under a temporary name first."""
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n")
        self.back.mkdir(parents=True, exist_ok=True)
        partial = self.back / "gpu.tgz.tmp"
        with tarfile.open(partial, "w:gz") as archive:
            archive.add(self.out, arcname="gpu")
        partial.replace(self.back / "gpu.tgz")
        shutil.copy(self.out / "summary.txt", self.back)

    def step(self, step: Step) -> bool:
        """Runs it within its limit and what is left; True if every process ended well."""
        begin = self.elapsed()
        limit = min(step.limit, self.total - begin)
        if limit < 5:
            self.failed = True
            self.say(f"{step.name}: not run, {self.total} s are over")
            return False
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), str(ROOT / ".gpu" / "site"))))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | step.environment
        running = {}
        for name, command in step.commands.items():
            log = self.out / (f"{name}.log" if name == step.name else f"{step.name}-{name}.log")
            running[log] = subprocess.Popen(
                command,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        status = {}
        for log, process in running.items():
            try:
                status[log] = process.wait(max(0.1, begin + limit - self.elapsed()))
            except subprocess.TimeoutExpired:
                status[log] = 124
            with contextlib.suppress(ProcessLookupError):  # the group may have ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        bad = {log.stem: code for log, code in status.items() if code}
        self.failed |= bool(bad)
        told = "" if not bad else ", " + ", ".join(f"{name} exit status {code}" for name, code in bad.items())
        self.say(f"{step.name}: {self.elapsed() - begin:.0f} s{told}")
        for log, code in status.items():
            try:
                lines = step.digest(self.out, log) if step.digest and log == next(iter(status)) else []
            except (KeyError, ValueError, OSError) as error:
                lines = [f"  no digest: {type(error).__name__}: {error}"]
            for line in lines:
                self.say(line)
            if code:
                for line in log.read_text().splitlines()[-(3 if len(status) > 1 else 6) :]:
                    self.say(f"  | {line[:160]}")
        self.keep()
        return not bad


def native_module(run: Run, mode: Mode) -> bool:
    """The module made beforehand, or one built here; False if there is none."""
    check = Step("module", 30, {"module": [*mode.script("gpu_probe"), "module", "--device", mode.device]})
    if mode.rehearsal:
        return run.step(check)  # the tests build the emulator
    for module in (ROOT / ".gpu").glob("_native*.so"):
        shutil.copy(module, ROOT / "kernels")
    if run.step(check):
        return True
    build = ROOT / "build" / "on-gpu"
    pybind = subprocess.run(
        [mode.python, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True
    ).stdout.strip()
    configure = ["cmake", "-S", ".", "-B", str(build), *configuration(mode.python, pybind)]
    if not run.step(Step("configure", 30, {"configure": configure})):
        return False
    if not run.step(Step("build", 150, {"build": ["cmake", "--build", str(build), "--target", "_native"]})):
        return False
    for module in build.glob("_native*.so"):
        shutil.copy(module, ROOT / "kernels")
    return run.step(check)


def twins_build() -> list[str]:
    """The command that makes .gpu/twins."""
    source = "tests/csrc/emulator/twins.cu"
    return ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Icsrc", source, "-o", ".gpu/twins"]


def configuration(python: str, pybind: str) -> list[str]:
    """CMake's arguments: machine code for Hopper only, half of the build."""
    return [
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DPHI1_CUDA=on",
        "-DPHI1_CUDA_ARCHS=90a",
        f"-DPython_EXECUTABLE={shutil.which(python) or python}",
        f"-Dpybind11_DIR={pybind}",
    ]


def prebuild(python: str) -> None:
    """.gpu/ for another version of Python, whose headers must be here."""
    pybind = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    )
    build = ROOT / "build" / "prebuilt"
    subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(build), *configuration(python, pybind.stdout.strip())], check=True
    )
    subprocess.run(["cmake", "--build", str(build), "--target", "_native"], check=True)
    (ROOT / ".gpu").mkdir(exist_ok=True)
    for module in build.glob("_native*.so"):
        print(shutil.copy(module, ROOT / ".gpu"))
    subprocess.run(twins_build(), cwd=ROOT, check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--target", ".gpu/site"]
    subprocess.run([*install, "--constraint", "constraints.txt", *PACKAGES], cwd=ROOT, check=True)


def machine(mode: Mode) -> str:
    """The card's line, or its stand-in's."""
    if mode.rehearsal:
        return "rehearsal: no GPU, CUDA kernels under the emulator"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,memory.total", "--format=csv,noheader"]
    versions = [
        mode.python,
        "-c",
        "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)",
    ]
    return " | ".join(
        subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in (query, versions)
    )


def main() -> None:
    """Runs the steps from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "gpu"))
    parser.add_argument("--total", type=int, default=540, help="seconds (default 540)")
    parser.add_argument("--only", help="comma-separated names of steps; default: all, in their order")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at toy size")
    parser.add_argument("--prebuild", metavar="PYTHON", help="make .gpu/ for this Python and stop")
    options = parser.parse_args()
    if options.prebuild:
        prebuild(options.prebuild)
        return
    back = options.out.resolve()
    out = Path(tempfile.mkdtemp(prefix="phi1-gpu-"))
    mode = Mode(sys.executable, *(("cpu", "emulator") if options.rehearse else ("cuda", "gpu")), out)
    wanted = steps(mode)
    if options.rehearse:  # on a machine that others may load: limits are for a GPU's minutes
        wanted = [dataclasses.replace(step, limit=4 * step.limit) for step in wanted]
    if options.only:
        names = options.only.split(",")
        unknown = set(names) - {step.name for step in wanted}
        if unknown:
            parser.error(
                f"--only {', '.join(sorted(unknown))}: the steps are {', '.join(step.name for step in wanted)}"
            )
        wanted = [step for step in wanted if step.name in names]
    run = Run(out, back, options.total)
    run.say(machine(mode))
    if native_module(run, mode):
        for step in wanted:
            run.step(step)
    run.say(
        f"all: {run.elapsed():.0f} s{', with failures' if run.failed else ''}; logs and tables in {back / 'gpu.tgz'}"
    )
    run.keep()
    shutil.rmtree(out)
    raise SystemExit(run.failed)


if __name__ == "__main__":
    main()
