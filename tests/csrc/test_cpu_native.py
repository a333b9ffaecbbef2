"""csrc/cpu as programs of their own (attention_test.cpp, block_test.cpp): under sanitizers, with small mistakes put
in.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess

import amx_emulator
import pytest
from cpu_isa import ISAS

from kernels import native

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ (Debian: apt-get install g++)")


AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx_bf16": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
"""As CMakeLists.txt's add_isa."""
clang = pytest.mark.skipif(
    shutil.which("clang++") is None, reason="no clang++ (Debian: apt-get install clang libomp-dev)"
)


def _build(test: str, csrc: pathlib.Path, program: pathlib.Path, *flags: str, compiler: str = "g++") -> None:
    """`program` from `test`.cpp with the kernels in `csrc`; an error to compile is an error here."""
    source = ROOT / "tests" / "csrc" / f"{test}.cpp"
    command = [compiler, "-std=c++20", "-fopenmp", "-w", "-O0", f"-I{csrc}", "-DPHI1_ISA=tested", *flags, source]
    subprocess.run([*command, "-o", program], check=True)


def _run(program: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, env={**os.environ, **environment})


VECTOR_ISAS = [isa for isa in ISAS if isa != "amx_bf16"]


@pytest.mark.parametrize("isa", [pytest.param(isa, marks=() if isa == "portable" else clang) for isa in VECTOR_ISAS])
@pytest.mark.parametrize("test", ["attention_test", "block_test"])
def test_under_address_and_undefined_behaviour_sanitizers(test: str, isa: str, tmp_path: pathlib.Path) -> None:
    """Every tensor ends where its heap block ends, so a lane too many is an error.

    The vector instruction sets with clang, which instruments the unrolled register blocks in seconds (GCC 12 does not
    get through AVX-512 in minutes).
    """
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", *FLAGS[isa].split())
    program = tmp_path / "sanitized"
    _build(test, ROOT / "csrc", program, *flags, compiler="g++" if isa == "portable" else "clang++")
    done = _run(program)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr[-2000:]


@clang
@amx_emulator.needs_tiles
@pytest.mark.parametrize("test", ["attention_test", "block_test"])
def test_tiles_under_sanitizers(test: str, tmp_path: pathlib.Path) -> None:
    """In bf16, the emulator's accesses checked like the kernels'; fresh memory holds NaN."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    emulator = amx_emulator.build_if_needed(tmp_path / "emulator.o", *flags, compiler="clang++")
    program = tmp_path / "sanitized"
    flags = (*flags, *FLAGS["amx_bf16"].split(), *emulator)
    _build(test, ROOT / "csrc", program, *flags, compiler="clang++")
    done = _run(program, "bf16", ASAN_OPTIONS="max_malloc_fill_size=100000000:malloc_fill_byte=255")
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr[-2000:]


def _races(test: str, csrc: pathlib.Path, program: pathlib.Path) -> int:
    """Data races that ThreadSanitizer reports; Archer tells it of OpenMP's barriers, which it would not see."""
    resources = subprocess.run(["clang++", "-print-resource-dir"], capture_output=True, text=True, check=True).stdout
    archer = pathlib.Path(resources.strip()).parents[1] / "libarcher.so"
    if not archer.exists():
        pytest.skip(f"{archer} is missing (Debian: apt-get install libomp-dev)")
    _build(test, csrc, program, "-g", "-O1", "-fsanitize=thread", compiler="clang++")
    done = _run(program, OMP_TOOL_LIBRARIES=str(archer), TSAN_OPTIONS="ignore_noninstrumented_modules=1")
    assert done.stdout.endswith("ok\n") or "ThreadSanitizer" in done.stderr, done.stdout + done.stderr[-2000:]
    return done.stderr.count("WARNING: ThreadSanitizer: data race")


@clang
@pytest.mark.parametrize(
    ("test", "file", "order", "none"),
    [
        (
            "attention_test",
            "attention_forward.inl",
            "schedule(dynamic)\n      for (int64_t key",
            "schedule(dynamic) nowait\n      for (int64_t key",
        ),
        (
            "attention_test",
            "attention_backward.inl",
            "summed.load(std::memory_order_acquire) < start",
            "summed.load(std::memory_order_relaxed) < start",
        ),
        (
            "block_test",
            "block.inl",
            "schedule(static)\n    for (int64_t chunk",
            "schedule(static) nowait\n    for (int64_t chunk",
        ),
    ],
)
def test_threads_do_not_race(test: str, file: str, order: str, none: str, tmp_path: pathlib.Path) -> None:
    """And without the barrier after the first loop, or the order between two blocks, they do: the check sees it."""
    assert _races(test, ROOT / "csrc", tmp_path / "program") == 0
    csrc = _copy(tmp_path / "csrc")
    path = csrc / "cpu" / file
    text = path.read_text()
    assert order in text
    path.write_text(text.replace(order, none))
    assert _races(test, csrc, tmp_path / "racing") > 0


def _copy(to: pathlib.Path) -> pathlib.Path:
    shutil.copytree(ROOT / "csrc", to, ignore=shutil.ignore_patterns("cuda", "emulator"))
    return to


# (file, what is there, what is put in its place)
MUTATIONS = [
    ("attention_forward.inl", "lane >= limit", "lane > limit"),
    ("attention_forward.inl", "key >= visible ? kPanel", "key > visible ? kPanel"),
    ("attention_forward.inl", "first + offset + 1 - start", "first + offset + 2 - start"),
    ("attention_forward.inl", "r < seen[from]; r += Dot::k", "r < seen[0]; r += Dot::k"),
    ("attention_forward.inl", "padded_keys(p) - from)", "padded_keys(p))"),
    ("attention_forward.inl", "panels - 1 - of_problem % panels", "of_problem % (panels - 1)"),
    ("attention.inl", "end = first + kLanes;", "end = first + kLanes - 1;"),
    ("attention.inl", "(a + done, b", "(a, b"),
    ("attention.inl", "(panels - i) * kPanel", "(panels - i) * kPanel - 1"),
    ("attention_backward.inl", "first + offset + 1 - start", "first + offset + 2 - start"),
    ("attention_backward.inl", "seen[blind] <= r", "seen[blind] < r"),
    ("attention_backward.inl", "seen + (i - from) * kVecs", "seen"),
    ("attention_forward.inl", "sum[n] *= shrink[n];", ""),
    ("attention.inl", "n * kLanes) * factor[n];", "n * kLanes);"),
    ("attention_forward.inl", "head / group *", "head % args.kv_heads *"),
    ("attention_backward.inl", "index * args.heads + kv_head", "index * args.kv_heads + kv_head"),
    ("attention_forward.inl", "before[n] = greatest[n];", "before[n] = start > 0 ? greatest[n] : vfloat{};"),
    ("attention_forward.inl", "greatest[n] == hidden ? vfloat{} : greatest[n]", "greatest[n]"),
    ("attention.inl", "if (greatest == __builtin_inff()) return greatest;", ""),
    ("attention_backward.inl", "if (lse == -__builtin_inff()) return __builtin_inff();", ""),
    ("attention_backward.inl", "first < 0 ? 0 : args.causal", "args.causal"),
    ("attention_backward.inl", "vmin(vfloat{}, fma(", "vmin(splat(1e38f), fma("),
    ("attention_decode.inl", "top[r] == -__builtin_inff() ? 0 : top[r]", "top[r]"),
    ("cross_entropy.inl", "splat(-3.40282347e38f)", "splat(-__builtin_inff())"),
    ("attention_decode.inl", "query[r] + 1 + p.seqlen_k", "query[r] + p.seqlen_k"),
    ("attention_decode.inl", "(first + r) / p.seqlen_q", "(first + r) % p.seqlen_q"),
    ("attention_decode.inl", "visible[row + m] - start", "visible[row] - start"),
    ("attention_decode.inl", "item % parts * together", "item % parts"),
    ("attention_decode.inl", "smaller(start + kFewKeys, most[row / kBlock])", "most[row / kBlock]"),
    ("attention_decode.inl", "if (start >= most[row / kBlock]) continue;", "if (start > 0) continue;"),
    ("attention_decode.inl", "sums += e;", "sums = e;"),
    ("attention_backward.inl", "lane >= limit", "lane > limit"),
    ("attention_backward.inl", "(x[i] - delta)", "x[i]"),
    ("attention_backward.inl", "keep_lanes(tile.keep[r + m + i][n], x[i]) * dropout_scale", "x[i]"),
    ("attention_backward.inl", "i = larger(from, first_panel)", "i = larger(from, first_panel + 1)"),
    (
        "attention_backward.inl",
        "g < group; ++g) {\n    const int64_t plane",
        "g < 1; ++g) {\n    const int64_t plane",
    ),
    ("attention_backward.inl", "prepare(from + i % count", "prepare(i % count"),
    ("attention_backward.inl", "block(from + i % count", "block(i % count"),
    ("attention_backward.inl", "write(from + i % count, i % count, i / count", "write(from + i % count, i % count, 0"),
    ("attention_backward.inl", "(panel.summed);", "(panel.summed); if (start > 0) return;"),
    ("attention.inl", "+ part * pairs)", "+ part * pairs + 1)"),
    ("attention.inl", "(first_group + q) * 4", "first_group * 4"),
    ("attention.inl", "bits[key] >> (skipped + v", "bits[key] >> (v"),
    ("attention.inl", "I / 4 % 2 * 2 + I / 8 % 2", "I / 4 % 2 + I / 8 % 2 * 2"),
    ("attention.inl", "q * kGroup < skipped + kPanel", "q * kGroup < kPanel"),
    ("attention.inl", "+ odd + 8 * i]", "+ 1 - odd + 8 * i]"),
    ("vector.h", "round < 7", "round < 6"),
    ("vector.h", "12582912.0f + 127.0f", "12582912.0f + 126.0f"),
    ("vector.h", "0x1.ebf9bcp-3f", "0x1.ebp-3f"),
    ("vector.h", "c[2] = high0 ^ c[3] ^ k1", "c[2] = high0 ^ c[3] ^ k0"),
    ("layer_norm.inl", "keep_lanes((1u << n) - 1, d)", "d"),
    ("layer_norm.inl", "+ args.eps", ""),
    ("layer_norm.inl", "- normed * mean_dn", ""),
    ("layer_norm.inl", "d += vload(residual + i, n)", "d += vload(grad + i, n)"),
    ("layer_norm.inl", "which ? args.grad_bias : args.grad_weight", "which ? args.grad_weight : args.grad_bias"),
    ("layer_norm.inl", "(chunk + 1) * kSumRows", "(chunk + 1) * kSumRows - 1"),
    ("elementwise.inl", "i < chunks", "i < 1"),
    ("half.inl", "(u >> 16) & 1u)) >> 16, quiet", "(u >> 16) & 1u) + 0x8000u) >> 16, quiet"),
    ("block.inl", "a * c - b * s", "a * c + b * s"),
    ("block.inl", "cos, sin, -1.0f", "cos, sin, 1.0f"),
    ("block.inl", "b += vload(bias + half + i, n)", "b += vload(bias + i, n)"),
    ("block.inl", "vload(z + turned + i, n) + vload(bias + turned + i, n)", "vload(z + turned + i, n)"),
    ("block.inl", "args.position_batch_stride + t", "args.position_batch_stride + b"),
    ("activation.inl", "splat(6 * c * cubic)", "splat(2 * c * cubic)"),
    ("activation.inl", "value * (1.0f - sigmoid)", "value * sigmoid"),
    ("activation.inl", "{positive * positive,", "{positive,"),
    ("activation.inl", "positive + positive}", "positive}"),
    ("block.inl", "add_to(column + first_u + i, d, n);", ""),
    ("block.inl", "if constexpr (kDropout) y *= vload(factor + i, n);", ""),
    ("block.inl", "vload(h + i, n) + vload(bias + i, n)", "vload(h + i, n)"),
    ("dropout.inl", "offset = 1", "offset = 0"),
    ("dropout.inl", "kept ? args_.dropout_scale", "kept ? 1.0f"),
    ("dropout.inl", "words[2 * half][lane], in", "words[2 * (1 - half)][lane], in"),
    ("dropout.inl", "row / 2 != pair_", "pair_ < 0"),
    ("dropout.inl", "factor_ + row % 2 *", "factor_ + 0 *"),
    ("add_product.inl", "upper(high) | upper(low) >> 16", "upper(low) | upper(high) >> 16"),
    ("add_product.inl", "upper(high) | upper(low) >> 16", "upper(high)"),
    ("add_product.inl", "if (!args.first) sum +=", "sum +="),
    (
        "add_product.inl",
        "vstore(reinterpret_cast<T*>(args.high + i), sum, n);",
        "split((vuint)sum, args.high + i, args.low + i, n);",
    ),
    ("add_product.inl", "std::memcpy(low, &lower, size_t(n)", "std::memcpy(low, &lower, size_t(n) / 2"),
    ("product.inl", "smaller(n, args.columns - 1)", "smaller(n, args.columns - 2)"),
    ("product.inl", "row(first + j) + k;", "row(first + j);"),
    ("product.inl", "x + b * kRows * x_stride + k;", "x + b * kRows * x_stride;"),
    ("product.inl", "sums + b * kRows * kVecs;", "sums + b * kRows;"),
    ("product.inl", "vload(w[j] + k, n)", "vload(w[0] + k, n)"),
    ("product.inl", "c[r][j] = sums[r * kVecs + j];", "c[r][j] = vfloat{};"),
    ("product.inl", "for (int i = 1; i < kLanes; ++i) part[0] += part[i];", ""),
    ("product.inl", "r * args.x_stride + k", "r * args.width + k"),
    ("product.inl", "smaller(kLanes, args.rows - r)", "smaller(kLanes - 1, args.rows - r)"),
    ("cross_entropy.inl", "vload(total + i) * exp_below<T>(before, highest)", "vload(total + i)"),
    (
        "cross_entropy.inl",
        "vload(strips.total + at) * exp_below<T>(vload(strips.top + at), highest)",
        "vload(strips.total + at)",
    ),
    ("cross_entropy.inl", "= vmax(vload(strips.top + s * padded + row), highest)", "= vload(strips.top + row)"),
    ("cross_entropy.inl", "smaller(kTileColumns, last - column)", "kTileColumns - 1"),
    ("cross_entropy.inl", "= strip.top + row, *total = strip.total + row", "= strip.top, *total = strip.total"),
    ("cross_entropy.inl", "if (target == args.ignore_index) continue;", ""),
    ("cross_entropy.inl", "(vfloat)((vint)p & keep)", "p"),
    ("cross_entropy.inl", "args.bias_sums[target] -= 1.0f;", ""),
    ("cross_entropy.inl", "rows.scale[row] - 1.0f", "rows.scale[row]"),
    ("cross_entropy.inl", "1.0f + 2.0f * args.z_loss * lse", "1.0f + args.z_loss * lse"),
    ("cross_entropy.inl", "+ args.z_loss * lse * lse", "+ args.z_loss * lse"),
    ("cross_entropy.inl", "target >= last", "target > last"),
    ("cross_entropy.inl", "if (i >= args.rows) continue;", "if (i >= args.rows - 1) continue;"),
]
TILE_MUTATIONS = [
    ("attention_tiles.inl", "tile_zero<n>();", ""),
    ("attention_tiles.inl", "tile_load<n, LDC>(from + n * kLanes)", "tile_load<n, LDC>(from)"),
    ("attention_tiles.inl", "tile_load<Pair.b, LDB>(b + n * kLanes)", "tile_load<Pair.b, LDB>(b)"),
    ("attention_tiles.inl", "if (k < steps) step", "if (false) step"),
    ("attention_tiles.inl", "k + kWhole.lanes <= steps", "k < steps"),
    ("attention_tiles.inl", "tile_multiply<n, Pair.a, Pair.b>", "tile_multiply<n, Pair.b, Pair.a>"),
    ("attention_tiles.inl", "First + n>()", "n>()"),
    ("attention_tiles.inl", "rows = kTileLanes, sum_vecs", "rows = kRows, sum_vecs"),
    ("attention_tiles.inl", "set(pair.b, pair.lanes, kTileLanes)", "set(pair.b, kTileLanes, kTileLanes)"),
    ("attention_tiles.inl", '__asm__ volatile("ldtilecfg %0" ::"m"(shapes));', ""),
    ("attention_tiles.inl", "(vuint)x[1] + 0x8000u", "(vuint)x[0] + 0x8000u"),
    ("attention_tiles_forward.inl", "at >= visible ? kPanel : args.causal", "args.causal"),
    ("attention_tiles_forward.inl", "lane >= limit", "lane > limit"),
    ("attention_tiles_forward.inl", "key + kStrip <= first + offset + 1", "key + kStrip <= first + offset + kStrip"),
    ("attention_tiles_forward.inl", "sum[n] *= shrink;", ""),
    ("attention_tiles_forward.inl", "vstore(at, vload(at) * shrink);", ""),
    ("attention_tiles_forward.inl", "greatest == hidden ? vfloat{} : greatest;", "greatest;"),
    ("attention_tiles_forward.inl", "(total[n] <= 0x1p14f) & (taken", "(taken"),
    ("attention_tiles_forward.inl", "(total[n] <= 0x1p14f) & (taken[n] > hidden)", "total[n] <= 0x1p14f"),
    ("attention_tiles_forward.inl", "packed.k + next * width", "packed.k + key * width"),
    ("attention_tiles_forward.inl", "(before + n * kLanes)", "(before)"),
    ("attention_tiles_forward.inl", "multiply<i - kVecs>(v, p)", "multiply<i - kVecs>(k, p)"),
    ("attention_tiles_forward.inl", "d += kTileLanes;\n        continue;", "continue;"),
    ("attention_tiles_forward.inl", "    sums[n] += x[j];", ""),
    ("attention_tiles_forward.inl", "keep_lanes(scratch.keep[m + j][n], x[j])", "x[j]"),
    ("attention_tiles_forward.inl", "if (full)", "if (true)"),
    ("product_lanes.inl", "(args.width - first) * int64_t(sizeof(T))", "args.width * int64_t(sizeof(T))"),
    ("product_lanes.inl", "at + kLine <= bytes", "at < bytes"),
    ("product_lanes.inl", "smaller(kLine, bytes - at)", "kLine"),
    ("product_lanes.inl", "lanes + (begin - first)", "lanes"),
    ("product_lanes.inl", "tile_zero<0>();", ""),
    ("product_lanes.inl", "transpose(y);", ""),
    ("product_lanes.inl", "r * args.x_stride + first", "r * args.width + first"),
    ("product_lanes.inl", "begin < args.columns; begin", "begin < args.columns - kSide; begin"),
]
BLOCK_FILES = (
    "activation.inl",
    "add_product.inl",
    "layer_norm.inl",
    "elementwise.inl",
    "half.inl",
    "block.inl",
    "dropout.inl",
    "cross_entropy.inl",
    "product.inl",
    "product_lanes.inl",
)


def _verdict(number: int, mutation: tuple[str, str, str], folder: pathlib.Path, *flags: str) -> str:
    """ "killed" if the program, built with `flags`, notices the mutation; `number` is its folder's name."""
    file, old, new = mutation
    csrc = _copy(folder / str(number) / "csrc")
    path = csrc / "cpu" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))
    test = "block_test" if file in BLOCK_FILES else "attention_test"
    program = folder / str(number) / "program"
    _build(test, csrc, program, *flags)
    done = _run(program, *(("bf16",) if flags else ()))
    return "killed" if done.returncode != 0 else f"survived: {file}: {old!r} -> {new!r}"


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("isa", "mutations"),
    [("portable", MUTATIONS), pytest.param("amx_bf16", TILE_MUTATIONS, marks=amx_emulator.needs_tiles)],
    ids=["portable", "amx_bf16"],
)
def test_mutations_are_noticed(isa: str, mutations: list[tuple[str, str, str]], tmp_path: pathlib.Path) -> None:
    flags = FLAGS[isa].split()
    if isa == "amx_bf16":
        flags += amx_emulator.build_if_needed(tmp_path / "emulator.o")
    for file, old, _ in mutations:
        assert (ROOT / "csrc" / "cpu" / file).read_text().count(old) == 1, f"{file}: {old!r}"
    chosen = list(enumerate(mutations))[:: 1 if os.environ.get("PHI1_MUTANTS") == "all" else 6]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda item: _verdict(*item, tmp_path, *flags), chosen))
    survived = [verdict for verdict in verdicts if verdict != "killed"]
    print(f"killed {len(verdicts) - len(survived)} of {len(verdicts)}")
    assert not survived, "\n".join(survived)


@pytest.mark.skipif(not ISAS or "amx_bf16" in ISAS, reason="needs the native module and a CPU or a system without AMX")
def test_why_amx_cannot_be_used_is_said() -> None:
    """On a CPU without it that is the reason; where Linux refuses its registers (a small sigaltstack), that is
    another.
    """
    (amx,) = (isa for isa in native.ISAS if isa.name == "amx_bf16")
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    expected = "this CPU has no AMX-BF16" if "avx512_bf16" in flags else "this CPU lacks AVX"
    assert ("Linux refuses" if "amx_bf16" in flags else expected) in amx.missing
