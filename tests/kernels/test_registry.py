"""Which version of which backend serves a call, and what is said when none can."""

import asyncio
import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import BackendError, apply_rotary, flash_attention, layer_norm, reference, registry, use_backend
from kernels import machine as machines
from kernels.machine import Machine
from kernels.measured import Cell, Row
from kernels.registry import select

HERE = machines.cpu()
_ORDER = registry.fixed_order(HERE, Cell("apply_rotary", HERE.kind, torch.float32, None, "few", "forward"))
BEST = next(v for v in _ORDER if v.startswith("cpu/") and registry.missing_here(v)(HERE) is None)


def change(monkeypatch, op, version, **fields):
    """For this test, another `Implementation` of a version."""
    found = dataclasses.replace(registry._IMPLEMENTATIONS[op][version], **fields)
    monkeypatch.setitem(registry._IMPLEMENTATIONS[op], version, found)
    registry._forget()


@pytest.fixture(autouse=True)
def _nothing_measured_nor_asked_for(monkeypatch):
    monkeypatch.setattr(registry, "_environment", None)
    monkeypatch.setattr(registry, "_rows", {})
    registry._forget()
    yield
    registry._forget()


@pytest.fixture
def rotary_calls(monkeypatch):
    """Records which version's apply_rotary runs."""
    calls = []
    for name in ("reference", BEST):
        found = registry._IMPLEMENTATIONS["apply_rotary"][name]

        def run(*arguments, name=name, found=found):
            calls.append(name)
            return found.forward(*arguments)

        change(monkeypatch, "apply_rotary", name, forward=run)
    return calls


def measure(
    *versions, op="apply_rotary", kind=HERE.kind, dtype=torch.float32, head_dim=None, size="few", work="forward"
):
    """For this test, a row of the table."""
    row = Row({version: 1.0 / (1 + i) for i, version in enumerate(versions)}, ("here 2026-01-01",))
    registry._rows[Cell(op, kind, dtype, head_dim, size, work)] = row
    registry._forget()


def rotate(**options):
    q = torch.ones(1, 2, 1, 4)
    return apply_rotary(q, q, *reference.rotary_table(2, 4), **options)


def test_the_call_beats_the_block_beats_the_automatic_choice(rotary_calls):
    rotate()
    with use_backend("reference"):
        rotate()
        with use_backend("cpu"):
            rotate()
            rotate(backend="reference")
        rotate()
    rotate()
    assert rotary_calls == [BEST, "reference", BEST, "reference", "reference", BEST]


def test_the_automatic_choice_is_what_was_measured_fastest(rotary_calls):
    measure("reference", BEST)
    rotate()
    assert rotary_calls == ["reference"]
    with use_backend("cpu"):
        rotate()
        rotate(backend="reference")
    assert rotary_calls == ["reference", BEST, "reference"]


@pytest.mark.parametrize(
    "other",
    [
        {"op": "layer_norm"},
        {"kind": "NVIDIA H100, sm_90"},
        {"kind": "AuthenticAMD family 25, other"},
        {"dtype": torch.bfloat16},
        {"head_dim": 4},
        {"size": "long"},
        {"work": "training"},
    ],
    ids=str,
)
def test_a_row_decides_its_own_cell_only(other, rotary_calls):
    measure("reference", **other)
    rotate()
    assert rotary_calls == [BEST]  # the order of what is unmeasured


def test_the_size_and_a_backward_pass_decide(rotary_calls):
    measure("reference", size="short", work="training")
    cos, sin = reference.rotary_table(600, 4)
    for tokens, grad in ((16, True), (17, True), (17, False), (512, True), (513, True)):
        q = torch.ones(1, tokens, 1, 4, requires_grad=grad)
        apply_rotary(q, q.detach(), cos, sin)
        with torch.no_grad():
            apply_rotary(q, q, cos, sin)
    assert rotary_calls == [BEST, BEST, "reference", BEST, BEST, BEST, "reference", BEST, BEST, BEST]


def test_a_fastest_version_that_cannot_serve_the_call_is_passed_over(rotary_calls, monkeypatch):
    measure("cuda", "reference")  # it takes no tensors on a CPU
    rotate()
    for fields in ({"needs": lambda machine: "gone"}, {"refuses": lambda **options: "no"}):
        with monkeypatch.context() as patch:
            change(patch, "apply_rotary", "reference", **fields)
            rotate()
        registry._forget()
    assert rotary_calls == ["reference", BEST, BEST]


def test_the_choice_needs_no_guess_under_compile():
    def chosen(q):
        flash_attention(q, q, q)
        call = {"dtype": q.dtype, "head_dim": q.shape[-1], "size": "few"}
        return registry.choose("flash_attention", q.device, None, **call), q + 1

    for dynamic in (None, True):
        for first, second in (("reference", "cpu/portable"), ("cpu/portable", "reference")):
            torch._dynamo.reset()
            compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            measure(first, second, op="flash_attention", head_dim=32)
            assert [compiled(torch.ones(1, n, 2, 32))[0] for n in (4, 5, 6)] == [first] * 3
            with use_backend(second):
                assert compiled(torch.ones(1, 4, 2, 32))[0] == second
            with registry.held({"flash_attention float32 32 few forward": (second,)}):
                assert compiled(torch.ones(1, 4, 2, 32))[0] == second
            assert compiled(torch.ones(1, 4, 2, 32))[0] == first
            with use_backend(first), use_backend(second):
                with use_backend(first):
                    pass
                assert compiled(torch.ones(1, 4, 2, 32))[0] == second, "the block that is left was of the same name"


def test_a_block_ends_with_an_error_too(rotary_calls):
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    rotate()
    assert rotary_calls == [BEST]


def test_a_block_is_of_its_thread(rotary_calls):
    inside, done = threading.Event(), threading.Event()

    def other():
        with use_backend("reference"):
            inside.set()
            done.wait(60)
            rotate()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    rotate()
    done.set()
    thread.join()
    rotate()
    assert rotary_calls == [BEST, "reference", BEST]


def test_a_block_is_of_its_task(rotary_calls):
    async def inside(turn, others):
        with use_backend("reference"):
            turn.set()
            await others.wait()
            rotate()

    async def outside(turn, others):
        await turn.wait()
        rotate()
        others.set()

    async def both():
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(inside(*events), outside(*events))

    asyncio.run(both())
    assert rotary_calls == [BEST, "reference"]


@pytest.mark.parametrize("thread", [False, True], ids=["same_thread", "another_thread"])
def test_a_checkpoint_recomputes_on_the_backend_of_its_forward(thread, rotary_calls):
    q = torch.ones(1, 2, 1, 4, requires_grad=True)
    tables = reference.rotary_table(2, 4)

    def run(x):
        turned = apply_rotary(x, x, *tables)[0].sin()  # whose derivative needs what is made again
        with use_backend("cpu"):
            return apply_rotary(turned, turned, *tables)[0].sin()

    with use_backend("reference"):
        y = checkpoint(run, q, use_reentrant=False)
        z = checkpoint(run, q, use_reentrant=False)
    assert rotary_calls == ["reference", BEST] * 2
    del rotary_calls[:]
    backward = threading.Thread(target=y.sum().backward) if thread else None
    if backward is None:
        y.sum().backward()
    else:
        backward.start()
        backward.join()
    # The recomputation, then the backward of the op with one of its own.
    assert rotary_calls[:2] == ["reference", BEST] and set(rotary_calls) == {"reference", BEST}, rotary_calls
    assert q.grad is not None
    del rotary_calls[:]
    with use_backend("cpu"):
        z.sum().backward(retain_graph=True)
        z.sum().backward()
    assert rotary_calls.count("reference") == 2


def test_one_version_is_registered_once():
    with pytest.raises(ValueError, match="apply_rotary has a version 'cpu/avx2' already: give the second another name"):
        registry.register("apply_rotary", "cpu/avx2", None)
    with pytest.raises(ValueError, match="version = 'gpu/fast': must begin with one of reference, torch, cpu"):
        registry.register("apply_rotary", "gpu/fast", None)


# ------------------------------------------------------------------------------------------- on faked machines

SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def fake_cpu(vendor: str, best: str, family: int = 25, **missing: str) -> Machine:
    """A CPU whose most capable instruction set is `best`."""
    lacks = {f"cpu/{name}": f"this CPU lacks {name}" for name in SETS[SETS.index(best) + 1 :]}
    return Machine("cpu", f"{vendor} family {family}, {best}", "a CPU", vendor=vendor, missing={**lacks, **missing})


ZEN4, ZEN3 = fake_cpu("AuthenticAMD", "avx512_bf16"), fake_cpu("AuthenticAMD", "avx2")
SAPPHIRE, COOPER, CASCADE = (fake_cpu("GenuineIntel", best, 6) for best in ("amx_bf16", "avx512_bf16", "avx512"))
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3, sm_90", "NVIDIA H100 80GB HBM3", capability=(9, 0))
A100 = Machine("cuda", "NVIDIA A100-SXM4-80GB, sm_80", "NVIDIA A100-SXM4-80GB", capability=(8, 0))


def attention_on(machine, forced=None, dtype=torch.bfloat16, size="long", training=False, head_dim=64, **options):
    return select(
        "flash_attention", machine, forced, dtype=dtype, head_dim=head_dim, size=size, training=training, **options
    )


@pytest.mark.parametrize(
    ("machine", "call", "version"),
    [
        (ZEN4, {}, "cpu/avx512_bf16"),
        (ZEN4, {"dtype": torch.float32}, "cpu/avx512"),
        (ZEN4, {"size": "few"}, "cpu/avx512_bf16"),
        (ZEN3, {}, "cpu/avx2"),
        (ZEN3, {"dtype": torch.float32}, "cpu/avx2"),
        (ZEN3, {"dtype": torch.float32, "size": "few"}, "torch"),
        (ZEN3, {"dtype": torch.float32, "size": "few", "return_lse": True}, "cpu/avx2"),
        (ZEN3, {"dtype": torch.float64}, "torch"),
        (SAPPHIRE, {}, "cpu/amx_bf16"),
        (SAPPHIRE, {"training": True}, "cpu/amx_bf16"),
        (SAPPHIRE, {"dtype": torch.float32}, "cpu/avx512"),
        (SAPPHIRE, {"dtype": torch.float16}, "cpu/avx512"),
        (COOPER, {}, "torch"),
        (COOPER, {"dropout_p": 0.1}, "cpu/avx512"),  # which PyTorch's op does not serve
        (COOPER, {"training": True}, "torch"),
        (COOPER, {"training": True, "head_dim": 32}, "cpu/avx512"),
        (COOPER, {"size": "short"}, "cpu/avx512"),
        (COOPER, {"dtype": torch.float32}, "cpu/avx512"),
        (CASCADE, {}, "torch"),
        (fake_cpu("0x41", "portable"), {}, "torch"),
        (H100, {}, "torch"),
        (H100, {"dropout_p": 0.1}, "cuda/hopper"),
        (H100, {"dropout_p": 0.1, "head_dim": 32}, "cuda/mma"),
        (A100, {"dropout_p": 0.1}, "cuda/mma"),
        (H100, {"dtype": torch.float32, "dropout_p": 0.1}, "reference"),
    ],
    ids=lambda x: x.kind if isinstance(x, Machine) else str(x),
)
def test_the_fixed_order(machine, call, version):
    assert attention_on(machine, **call) == version


def test_a_gpu_follows_its_own_rows():
    fast = ("cuda/mma", "torch")
    measure(*fast, op="flash_attention", kind=H100.kind, dtype=torch.bfloat16, head_dim=64, size="long")
    assert attention_on(H100) == "cuda/mma"
    assert attention_on(H100, training=True) == attention_on(A100) == "torch"
    other = Machine("cuda", "NVIDIA H200, sm_90", "NVIDIA H200", capability=(9, 0))
    assert attention_on(other) == "torch", "a GPU of the same capability is another kind"


def test_what_failed_where_it_was_measured_is_not_taken():
    cell = Cell("flash_attention", ZEN4.kind, torch.bfloat16, 64, "long", "forward")
    registry._rows[cell] = Row({"torch": 1.0}, ("here",), {"cpu/avx512_bf16": "a fault"})
    registry._forget()
    assert attention_on(ZEN4, return_lse=True) == "cpu/avx512"
    assert attention_on(ZEN4, "cpu/avx512_bf16") == "cpu/avx512_bf16"  # asked for by name


def test_a_version_is_forced_and_says_what_it_needs():
    assert attention_on(SAPPHIRE, "cpu/avx2") == "cpu/avx2"
    assert attention_on(COOPER, "cpu") == "cpu/avx512", "the backend's name leaves the version to the order"
    assert attention_on(H100, "cuda/mma") == "cuda/mma"
    with pytest.raises(BackendError, match="'cpu/amx_bf16' cannot serve this call: this CPU lacks amx_bf16; able: "):
        attention_on(ZEN4, "cpu/amx_bf16")
    with pytest.raises(
        BackendError, match=r"'cuda/mma' cannot serve this call: dtype = torch.float32: the kernels multi"
    ):
        attention_on(H100, "cuda/mma", dtype=torch.float32)
    with pytest.raises(BackendError, match="'cpu' cannot serve this call: head_dim = 80: the kernels are made for"):
        attention_on(ZEN4, "cpu", head_dim=80)
    if not machines.TRITON_INTERPRETED:
        assert attention_on(H100, "triton/descriptors") == "triton/descriptors"
        with pytest.raises(BackendError, match=r"tensor descriptors are used on Hopper .*, this is NVIDIA A100"):
            attention_on(A100, "triton/descriptors")


def test_a_version_that_only_other_ops_have_asks_for_its_backend():
    assert select("apply_rotary", H100, "cuda/mma", dtype=torch.bfloat16) == "cuda"


def test_amx_refused_by_the_system_says_so():
    why = "this CPU has AMX, but the kernel refuses its registers"
    refused = dataclasses.replace(SAPPHIRE, missing={"cpu/amx_bf16": why})
    assert attention_on(refused, size="short") == "cpu/avx512"
    with pytest.raises(BackendError, match=f"'cpu/amx_bf16' cannot serve this call: {why}; able"):
        attention_on(refused, "cpu/amx_bf16")


def test_a_held_order_is_kept():
    kept = {"flash_attention bfloat16 64 long forward": ("cpu/avx2", "torch")}
    with registry.held(kept):
        assert attention_on(ZEN4) == "cpu/avx2"
        assert attention_on(ZEN4, training=True) == "cpu/avx512_bf16"
        assert attention_on(ZEN4, "torch") == "torch"
    assert attention_on(ZEN4) == "cpu/avx512_bf16"


def _python(code: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )


def test_environment_variable():
    code = (
        "import torch, kernels\n"
        "from kernels import registry\n"
        "print(registry.choose('apply_rotary', torch.device('cpu'), None, dtype=torch.float32))\n"
        "with kernels.use_backend('torch'):\n"
        "    print(registry.choose('apply_rotary', torch.device('cpu'), None, dtype=torch.float32))\n"
    )
    done = _python(code, PHI1_KERNELS="reference")
    assert done.stdout.split() == ["reference", "torch"], done.stderr
    done = _python("import kernels", PHI1_KERNELS="fast")
    assert done.returncode != 0
    assert (
        "environment variable PHI1_KERNELS = 'fast': must be one of reference, torch, cpu, triton, cuda" in done.stderr
    )


def test_an_instruction_set_is_the_short_form_of_a_version():
    code = (
        "import torch, kernels\n"
        "print(kernels.registry.choose('apply_rotary', torch.device('cpu'), None, dtype=torch.float32))\n"
    )
    for variables in ({"PHI1_ISA": "portable"}, {"PHI1_ISA": "portable", "PHI1_KERNELS": "cpu/portable"}):
        assert _python(code, **variables).stdout.split() == ["cpu/portable"]
    done = _python("import kernels", PHI1_ISA="sse9")
    assert done.stderr.splitlines()[-1].endswith(
        "environment variable PHI1_ISA = 'sse9': must be one of amx_bf16, avx512_bf16, avx512, avx2, portable"
    )
    done = _python("import kernels", PHI1_ISA="portable", PHI1_KERNELS="torch")
    assert (
        "PHI1_ISA = 'portable' is short for PHI1_KERNELS = 'cpu/portable', which is 'torch': unset one" in done.stderr
    )


def test_an_instruction_set_that_this_cpu_lacks_is_one_line():
    lacking = [(v, why) for v, why in HERE.missing.items() if v.startswith("cpu/")]
    if not lacking:
        pytest.skip("needs a CPU that lacks an instruction set of ours: this one has all")
    version, why = lacking[0]
    done = _python("import kernels", PHI1_ISA=version.removeprefix("cpu/"))
    assert done.stderr.splitlines()[-1].endswith(f"environment variable PHI1_ISA = {version[4:]!r}: {why}")
    done = _python("from phi1.cli import main; raise SystemExit(main(['doctor']))", PHI1_KERNELS=version)
    assert done.stderr == f"phi1: error: environment variable PHI1_KERNELS = {version!r}: {why}\n"
    assert done.returncode == 2


def test_unknown_names():
    with pytest.raises(BackendError, match="backend = 'fast': must be one of reference, torch, cpu, triton, cuda"):
        rotate(backend="fast")
    with pytest.raises(BackendError, match=r"use_backend\(name\) = 'fast'"), use_backend("fast"):
        pass


def test_a_forced_backend_is_never_replaced():
    q = torch.ones(1, 2, 1, 32)
    with pytest.raises(BackendError) as error:
        flash_attention(q, q, q, dropout_p=0.1, backend="torch")
    assert str(error.value).startswith(
        "flash_attention: backend 'torch' cannot serve this call: dropout_p = 0.1: scaled_dot_product_attention "
        "cannot draw the mask from dropout_seed; able: reference"
    )
    with registry.replacing("cpu"), use_backend("cpu"):
        registry.register("apply_rotary", "cpu", None)
        with pytest.raises(BackendError, match="layer_norm has no cpu backend; able: reference, torch"):
            layer_norm(torch.ones(1, 4), torch.ones(4), torch.ones(4))
    assert flash_attention(q, q, q, dropout_p=0.1).shape == q.shape  # unforced, another takes it


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_backend_without_a_gpu_says_why():
    with pytest.raises(
        BackendError, match=r"backend 'cuda' cannot serve this call: (torch.cuda.is_available|kernels._native)"
    ):
        rotate(backend="cuda")


def test_a_device_that_nothing_serves():
    q = torch.ones(1, 2, 1, 4)
    with pytest.raises(BackendError, match="it takes tensors on cpu or cuda, not on meta"):
        layer_norm(q.to("meta"), torch.ones(4, device="meta"), torch.ones(4, device="meta"), backend="torch")
    with pytest.raises(BackendError, match="layer_norm: no backend serves tensors on 'meta'; move them to cpu or cuda"):
        layer_norm(q.to("meta"), torch.ones(4, device="meta"), torch.ones(4, device="meta"))
