"""Draws the figures of README and docs: docs/figures/*.svg.

    python docs/figures.py

Boxes and arrows are SVG elements, no drawing package. `tests/docs` checks that the files are what this script writes.
"""

import dataclasses
import html
import itertools
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent / "figures"
BOX_HEIGHT, LINE = 46, 16
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.small{font-size:11px;fill:#57606a}.title{font-weight:600}"
    "rect{fill:#fff;stroke:#57606a;rx:6}.ours{fill:#ddf4ff;stroke:#0969da}.group{fill:#f6f8fa;stroke:#d0d7de}"
    "path{stroke:#57606a;fill:none;marker-end:url(#head)}"
)
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z" style="fill:#57606a;stroke:none;marker-end:none"/></marker></defs>'
)


@dataclasses.dataclass(frozen=True)
class Box:
    """A box with a title and smaller lines under it."""

    x: int
    y: int
    width: int
    title: str
    lines: tuple[str, ...] = ()
    kind: str = ""
    height: int = 0

    @property
    def tall(self) -> int:
        return self.height or BOX_HEIGHT - LINE + LINE * max(1, len(self.lines)) + (8 if self.lines else 0)

    def svg(self) -> str:
        top = self.y + 20
        text = [f'<text class="title" x="{self.x + 10}" y="{top}">{html.escape(self.title)}</text>']
        for i, line in enumerate(self.lines):
            text.append(f'<text class="small" x="{self.x + 10}" y="{top + LINE * (i + 1)}">{html.escape(line)}</text>')
        box = f'<rect class="{self.kind}" x="{self.x}" y="{self.y}" width="{self.width}" height="{self.tall}"/>'
        return box + "".join(text)


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """An arrow that leaves and arrives level, or straight where both ends have one x."""
    (x, y), (u, v) = start, end
    middle = (x + u) // 2
    return f'<path d="M{x} {y}L{u} {v}"/>' if x == u or y == v else f'<path d="M{x} {y}H{middle}V{v}H{u}"/>'


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """The whole file, with its title for those who do not see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>{HEAD}"
        f'<rect x="0" y="0" width="{width}" height="{height}" style="fill:#fff;stroke:none"/>{"".join(parts)}</svg>\n'
    )


def pipeline() -> str:
    """Data → tokens → train → evaluate, with the package of each part."""
    data = Box(10, 10, 380, "data_tools", kind="group", height=252)
    filtered = Box(24, 44, 170, "filtered code", ("ingest → annotate →", "embed → classify → filter"), "ours")
    written = Box(206, 44, 170, "textbooks, exercises", ("synthesize: an LLM, or", "the offline teacher"), "ours")
    clean = Box(24, 132, 352, "decontaminate", ("13-grams, syntax trees, embeddings, against HumanEval",), "ours")
    tokens = Box(24, 200, 352, "tokenize", ("shards of uint16 tokens and their loss masks",), "ours")
    models = Box(430, 10, 250, "phi1", kind="group", height=252)
    train = Box(444, 44, 222, "train", ("pretrain, then finetune;", "torchrun, resumable to the bit"), "ours")
    evaluate = Box(444, 124, 222, "evaluate", ("HumanEval, run in a sandbox;", "an LLM's grade from 0 to 10"), "ours")
    export = Box(444, 204, 222, "generate, export", ("Hugging Face in and out",), "ours")
    kernels = Box(430, 276, 250, "kernels", ("rotary · attention · layer norm · block · loss",), "ours")
    native = Box(10, 276, 380, "csrc", ("CUDA C++; C++ with AMX, AVX-512, AVX2; an emulator",), "ours")
    parts = [
        box.svg() for box in (data, models, filtered, written, clean, tokens, train, evaluate, export, kernels, native)
    ]
    parts += [
        arrow((109, filtered.y + filtered.tall), (109, clean.y)),
        arrow((291, written.y + written.tall), (291, clean.y)),
        arrow((200, clean.y + clean.tall), (200, tokens.y)),
        arrow((376, 224), (444, 70)),
        arrow((555, train.y + train.tall), (555, evaluate.y)),
        arrow((555, evaluate.y + evaluate.tall), (555, export.y)),
        arrow((555, 276), (555, 262)),
        arrow((390, 300), (430, 300)),
    ]
    return drawing(
        690, 340, "phi1: data to tokens to a trained model to its scores, and the packages they are in", parts
    )


def dispatch() -> str:
    """How a call of an op finds the version that serves it."""
    call = Box(10, 60, 190, "flash_attention(q, k, v)", ("checks: argument, value,", "what would work"))
    forced = Box(240, 10, 230, "asked for?", ("backend=, use_backend,", "PHI1_KERNELS, PHI1_ISA"))
    order = Box(
        240, 112, 230, "automatic: an order", ("the resumed run's; this user's", "(phi1 tune); ours; a fixed one")
    )
    first = Box(510, 60, 200, "the first that serves", ("what it needs of the machine,", "which calls it refuses"))
    names = (
        "cuda/hopper, cuda/mma",
        "cpu/amx_bf16, avx512_bf16, avx512, avx2",
        "triton/descriptors, …/pointers, …/product",
        "torch, reference",
    )
    boxes = [Box(750, 8 + 44 * i, 380, name, (), "ours", 36) for i, name in enumerate(names)]
    parts = [box.svg() for box in (call, forced, order, first, *boxes)]
    parts += [
        arrow((200, 90), (240, 40)),
        arrow((200, 90), (240, 142)),
        arrow((470, 40), (510, 90)),
        arrow((470, 142), (510, 90)),
    ]
    parts += [arrow((710, 90), (750, box.y + 18)) for box in boxes]
    return drawing(1140, 190, "how a call finds its kernel", parts)


def block() -> str:
    """The fused parallel block: two matrix products and one kernel after each."""
    y, steps = 20, []
    rows = [
        ("x", "(tokens, hidden)", "", 116),
        ("LayerNorm", "n", "ours", 110),
        ("n W_inᵀ", "z = [q | k | v | u]", "", 150),
        ("one kernel", "bias, rotary, GELU(u + b)", "ours", 190),
        ("attention", "reads z, writes g", "ours", 140),
        ("g W_outᵀ", "g = [attention | MLP]", "", 160),
        ("one kernel", "bias, dropout, + x", "ours", 140),
    ]
    x, parts = 10, []
    for title, line, kind, width in rows:
        steps.append(Box(x, y, width, title, (line,), kind))
        x += width + 26
    parts = [box.svg() for box in steps]
    parts += [arrow((a.x + a.width, y + 26), (b.x, y + 26)) for a, b in itertools.pairwise(steps)]
    return drawing(x - 16, 96, "the parallel block: two products and one kernel after each", parts)


RESULTS = FOLDER.parents[1] / "bench" / "results"
MACHINE = "authenticamd-family-25-avx512-bf16"
BARS = [
    ("attn", "1x2048x8x64 bf16 causal", "forward", "attention, forward"),
    ("attn", "1x2048x8x64 bf16 causal", "both", "… with the backward pass"),
    ("attn", "1x2048x8x128 bf16 causal", "both", "… head_dim 128"),
    ("attn", "1x2048x8x64 fp32 causal", "both", "… in fp32"),
    ("block", "2x1024x512x8x64x2048 bf16", "forward + backward", "a whole layer"),
    ("loss", "4096x512x51200 bf16", "forward + backward", "lm_head and loss"),
    ("loss", "4096x512x51200 fp32", "forward + backward", "… in fp32"),
    ("train", "2x1024x512x8x51200 bf16", "step", "a training step"),
]
"""(benchmark, case, work, what the bar says)."""


def results() -> str:
    """Time of the fastest peer over ours, from bench/results, on the one kind of machine that has whole tables."""
    parts, y, scale = [], 46, 150
    parts.append(
        '<text class="title" x="10" y="20">Time of the fastest peer over ours (1 = as fast), two cores of an AMD EPYC '
        "(Zen 4)</text>"
    )
    for benchmark, case, work, label in BARS:
        rows = json.loads((RESULTS / f"{benchmark}-{MACHINE}.json").read_text())["rows"]
        rows = [row for row in rows if (row["case"], row["work"]) == (case, work) and row["seconds"] is not None]
        ours = min(row["seconds"] for row in rows if row["ours"])
        peer = min((row for row in rows if not row["ours"]), key=lambda row: row["seconds"])
        ratio = peer["seconds"] / ours
        parts.append(f'<text x="10" y="{y + 13}">{label}</text>')
        parts.append(
            f'<rect class="ours" x="210" y="{y}" width="{scale * ratio:.0f}" height="18" style="rx:2"/>'
            f'<text class="small" x="{216 + scale * ratio:.0f}" y="{y + 13}">{ratio:.2f} × '
            f"{html.escape(peer['implementation'])}</text>"
        )
        y += 26
    parts.append(f'<path d="M{210 + scale} 34V{y}" style="marker-end:none;stroke-dasharray:3"/>')
    return drawing(820, y + 10, "speed on a CPU against the fastest peer, from bench/results", parts)


FIGURES = {"pipeline.svg": pipeline, "dispatch.svg": dispatch, "block.svg": block, "results.svg": results}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(f"wrote {FOLDER / name}")
