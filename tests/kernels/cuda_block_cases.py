"""What the CUDA parallel block is tested on: its pieces against their formulas, the block against eager PyTorch."""

import dataclasses

import torch
from error_rule import check
from test_block import ACTIVATIONS
from torch import Tensor

from kernels import BlockShape, parallel_block, reference
from kernels.fused_block import Dropout, Layout, Pieces
from kernels.registry import implementation, machine_of

SEED = -7  # taken modulo 2^64: both halves of the key count
RESULTS = ("y", "dx", "dnorm_weight", "dnorm_bias", "dw_in", "db_in", "dw_out", "db_out")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `parallel_block`."""

    name: str
    batch: int = 1
    seq: int = 11
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    rotary: int = 16
    hidden: int = 40
    inner: int = 24
    documents: tuple[int, ...] = ()
    """Lengths; empty: each batch entry is one."""
    positions: str = ""
    """ "shared": (seq,), "batch": (batch, seq), "": the index in the sequence."""
    p: float = 0.0
    """Of both dropouts."""
    activation: str = "gelu_new"

    @property
    def shape(self) -> BlockShape:
        heads = self.heads, self.kv_heads, self.head_dim
        return BlockShape(*heads, attention_dropout=self.p, residual_dropout=self.p, activation=self.activation)

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def tokens(self) -> int:
        return self.batch * self.seq


CASES = [
    Case("one_token", seq=1),
    Case("grouped", batch=2, heads=4, kv_heads=2, rotary=32, inner=80),
    Case("phi1", seq=70, kv_heads=2, head_dim=64, rotary=32, hidden=128, inner=136, p=0.25),
    Case("documents", batch=2, seq=20, head_dim=64, rotary=64, documents=(3, 1, 25, 11), positions="batch", p=0.25),
    Case("head_dim_128", seq=5, head_dim=128, rotary=48, positions="shared"),
    Case("relu2", seq=5, activation="relu2"),
    # More columns than one block of threads takes, of q, k and v, of u and of the residual.
    Case("strips", seq=3, heads=24, kv_heads=6, head_dim=64, rotary=32, hidden=1032, inner=1040, p=0.25),
]


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], dict[str, object]]:
    """(x, six parameters, cos, sin) and the options of `parallel_block`. Every number random."""
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device)

    width, attention = case.qkv_width + case.inner, case.heads * case.head_dim
    tensors = [
        randn(case.batch, case.seq, case.hidden),
        randn(case.hidden),
        randn(case.hidden, scale=0.1),
        randn(width, case.hidden, scale=case.hidden**-0.5),
        randn(width, scale=0.1),
        randn(case.hidden, attention + case.inner, scale=0.1),
        randn(case.hidden, scale=0.1),
        *(t.to(device) for t in reference.rotary_table(96, case.rotary)),
    ]
    options: dict[str, object] = {
        "shape": case.shape,
        "dropout_seed": SEED,
    }
    if case.positions:
        shape = (case.batch, case.seq) if case.positions == "batch" else (case.seq,)
        options["positions"] = torch.randint(96, shape, generator=generator).to(device)
    if case.documents:
        ends = torch.tensor([0, *case.documents]).cumsum(0)
        options["cu_seqlens"] = ends.to(torch.int32).to(device)
    return tensors, options


def _gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """y and the gradients by a fixed grad_y that is not contiguous."""
    grad = torch.randn(y.transpose(0, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype).to(y.device))]


def run(tensors: list[Tensor], options: dict[str, object], backend: str) -> list[Tensor]:
    """y and its gradients as in RESULTS."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:7]]
    return _gradients(parallel_block(*leaves, *tensors[7:], **options, backend=backend), leaves)  # type: ignore[arg-type]


def _drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    return x * keep * reference.dropout_scale(p) if p else x


def eager(tensors: list[Tensor], options: dict[str, object], case: Case) -> list[Tensor]:
    """y and its gradients by the formulas, every intermediate in the inputs' dtype."""
    x, gain, shift, w_in, b_in, w_out, b_out = leaves = [t.detach().clone().requires_grad_() for t in tensors[:7]]
    dtype, tokens = x.dtype, case.tokens
    rows = x.reshape(tokens, case.hidden)
    centred = rows - rows.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * gain + shift
    z = normed @ w_in.T + b_in
    dim, half = case.head_dim, case.rotary // 2
    q, k, v, u = z.split([case.heads * dim, case.kv_heads * dim, case.kv_heads * dim, case.inner], -1)
    where = options.get("positions", torch.arange(case.seq))
    assert isinstance(where, Tensor)
    where = where.expand(case.batch, case.seq).reshape(tokens)
    cos, sin = (t[where][:, None].to(dtype) for t in tensors[7:])

    def turn(t: Tensor) -> Tensor:
        a, b, rest = t[..., :half], t[..., half : 2 * half], t[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    q, k, v = (t.unflatten(-1, (-1, dim)) for t in (q, k, v))
    q, k, v = (t.repeat_interleave(case.heads // t.shape[1], 1).transpose(0, 1) for t in (turn(q), turn(k), v))
    lengths, parts = case.documents or (case.seq,) * case.batch, []
    start = 0
    for index, n in enumerate(lengths):
        part = slice(start, start + n)
        scores = (q[:, part] * dim**-0.5) @ k[:, part].transpose(-1, -2)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        plane, at = index * case.heads + torch.arange(case.heads)[:, None, None], torch.arange(n)
        keep = reference.attention_keep(SEED, plane, at[:, None], at[None], case.p)
        parts.append(_drop(torch.softmax(scores.masked_fill(hidden, float("-inf")), -1), keep, case.p) @ v[:, part])
        start += n
    attention = torch.cat(parts, 1).transpose(0, 1).reshape(tokens, -1)
    activated = ACTIVATIONS[case.activation](u)
    keep = reference.residual_keep(SEED, tokens, case.hidden, case.p, x.device)
    y = rows + _drop(torch.cat([attention, activated], -1) @ w_out.T + b_out, keep, case.p)
    return _gradients(y.view(x.shape), leaves)


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def check_block(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The error rule for y and the seven gradients."""
    tensors, options = make_inputs(case, dtype)
    truth, low = eager(doubled(tensors), options, case), eager(tensors, options, case)
    found = run(*make_inputs(case, dtype, device), "cuda")
    for name, a, b, c in zip(RESULTS, found, low, truth, strict=True):
        check(f"{case.name}: {name}", a.cpu(), b, c, dtype)


# --------------------------------------------------------------------------------------- the pieces, one by one


def pieces() -> Pieces:
    """Of the `cuda` backend: the emulator's or the GPU's, which no call before this one may have looked at."""
    if torch.cuda.is_available():
        machine_of(torch.device("cuda"))
    found = implementation("parallel_block", "cuda").forward.args[0]  # type: ignore[attr-defined]
    assert isinstance(found, Pieces)
    return found


def _is_rounded(name: str, x: Tensor, truth: Tensor, size: float) -> None:
    """x is the truth rounded once, after float32 arithmetic of numbers up to `size`: half a unit in the last place."""
    error, eps = (x.cpu().double() - truth).abs(), torch.finfo(x.dtype).eps
    bound = truth.abs() * eps / 2 * 1.001 + 8 * torch.finfo(torch.float32).eps * size
    if x.dtype == torch.float16:
        bound = bound.clamp_min(2**-25)
    assert (error <= bound).all(), f"{name}, {x.dtype}: error is {float((error / bound).max()):.3g} bounds"


def _turned(t: Tensor, layout: Layout, inverse: bool) -> Tensor:
    """(tokens, q and k's columns) in float64, turned."""
    heads = t.view(layout.batch, layout.seq, -1, layout.shape.head_dim)
    return reference.rotate(heads, layout.cos, layout.sin, layout.positions, inverse).reshape(t.shape)


def check_projection_in(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """What follows the product with W_in, forward and backward; W_in = 1, so that nothing else is rounded."""
    generator = torch.Generator().manual_seed(5)
    width, first_u = case.qkv_width + case.inner, case.qkv_width
    turned = (case.heads + case.kv_heads) * case.head_dim
    n, grad = (torch.randn(case.tokens, width, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(width, generator=generator).to(dtype)
    grad_activated = torch.randn(case.tokens, case.inner, generator=generator).to(dtype)
    _, options = make_inputs(case, dtype)
    activation, size = reference.ACTIVATIONS[case.activation], 8.0 if case.activation == "gelu_new" else 64.0
    positions = options.get("positions")
    assert positions is None or isinstance(positions, Tensor)
    tables = reference.rotary_table(96, case.rotary)
    layout = Layout(case.shape, case.batch, case.seq, case.inner, *tables, positions)
    there = layout._replace(
        cos=layout.cos.to(device),
        sin=layout.sin.to(device),
        positions=None if positions is None else positions.to(device),
    )

    g = torch.full((case.tokens, 64 + case.inner), 3.0, dtype=dtype, device=device)
    z = pieces().project_in(
        n.to(device), torch.eye(width, dtype=dtype, device=device), bias.to(device), g[:, 64:], there
    )
    biased = n.double() + bias.double()
    _is_rounded("q, k", z[:, :turned], _turned(biased[:, :turned], layout, False), 8.0)
    _is_rounded("v", z[:, turned:first_u], biased[:, turned:first_u], 8.0)
    assert torch.equal(z[:, first_u:].cpu(), n[:, first_u:]), "u keeps no bias"
    _is_rounded("act(u)", g[:, 64:], activation(biased[:, first_u:]), size)
    assert (g[:, :64] == 3).all(), "attention's part of g is left alone"

    g[:, 64:] = grad_activated.to(device)
    grad_z = grad.to(device, copy=True)
    grad_z[:, first_u:] = float("nan")  # not read
    grad_bias = pieces().project_in_backward(grad_z, z, bias.to(device), g[:, 64:], there)
    u = biased[:, first_u:].requires_grad_()
    (slope,) = torch.autograd.grad(activation(u).sum(), u)
    expected = torch.cat(
        [_turned(grad[:, :turned].double(), layout, True), grad[:, turned:first_u].double(), grad_activated * slope], -1
    )
    _is_rounded("gradient of z", grad_z, expected, 8.0)
    _is_rounded("act(u) again", g[:, 64:], activation(u).detach(), size)
    _is_rounded("gradient of b_in", grad_bias, expected.sum(0), 8.0 * case.tokens)
    assert (g[:, :64] == 3).all(), "attention's part of g is left alone"


def check_projection_out(rows: int, columns: int, p: float, dtype: torch.dtype, device: str = "cpu") -> None:
    """What follows the product with W_out = 1, forward and backward; the mask bit for bit."""
    generator = torch.Generator().manual_seed(6)
    h, x, grad = (torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(3))
    bias = torch.randn(columns, generator=generator).to(dtype)
    keep = reference.residual_keep(SEED, rows, columns, p, h.device)
    factor = keep.double() * reference.dropout_scale(p)
    dropout = Dropout(p, SEED)
    y = pieces().project_out(
        h.to(device), torch.eye(columns, dtype=dtype, device=device), bias.to(device), x.to(device), dropout
    )
    _is_rounded("y", y, x.double() + factor * (h.double() + bias.double()), 8.0)
    assert torch.equal(y.cpu()[~keep], x[~keep]), "what is dropped leaves x's bits"
    there = grad.to(device)
    grad_h, grad_bias = pieces().project_out_backward(there, dropout)
    _is_rounded("gradient of h", grad_h, factor * grad.double(), 8.0)
    assert torch.equal(grad_h.cpu() == 0, ~keep | (grad == 0)), "the mask of the backward pass"
    assert p or grad_h.data_ptr() == there.data_ptr(), "without dropout there is nothing to write"
    _is_rounded("gradient of b_out", grad_bias, (factor * grad.double()).sum(0), 8.0 * rows)
