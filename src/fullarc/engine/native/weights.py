"""The fused weights as the C kernels read them: panels of 64 columns, and the structures that point to them.

The structures mirror matrix.h and layer.h field by field. Every width is rounded up to whole vectors of LANES and
filled with zeros, which add nothing.
"""

import ctypes
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullarc.config.model import ModelConfig
from fullarc.engine.fused import FusedAttention, FusedFFN, FusedLayer, FusedMoE, Part, fuse
from fullarc.engine.native.memory import Arena
from fullarc.model import GlmMoeDsa
from fullarc.model.ops import rope_tables

LANES, PANEL = 16, 64
F32, BF16, INT8, INT4 = range(4)
ZERO_POINT = 128  # of inputs, which are unsigned
NIBBLE = 8  # added to 4-bit weights

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


def whole(size: int) -> int:
    """`size` rounded up to whole vectors."""
    return -(-size // LANES) * LANES


class Matrix(ctypes.Structure):
    """matrix.h, Matrix."""

    _fields_ = (("kind", _INT), ("inputs", _INT), ("outputs", _INT), ("w", _POINTER), ("scale", _POINTER),
                ("bias", _POINTER))  # fmt: skip


class Product(ctypes.Structure):
    """layer.h, Product."""

    _fields_ = (("parts", _INT), ("part", Matrix * 4))

    @property
    def outputs(self) -> int:
        """Width of a result."""
        return sum(part.outputs for part in self.part[: self.parts])


class Layer(ctypes.Structure):
    """layer.h, Layer."""

    _fields_ = (
        ("has_index", _INT), ("experts", _INT),
        *((name, _POINTER) for name in ("norm", "q_norm", "kv_norm", "index_norm", "index_bias", "ffn_norm")),
        *((name, Product) for name in ("hidden", "q", "index_q", "out")),
        ("q_up", ctypes.POINTER(Matrix)), ("v_up", ctypes.POINTER(Matrix)),
        *((name, Matrix) for name in ("gate_up", "down", "router")), ("router_bias", _POINTER),
        ("experts_gate_up", ctypes.POINTER(Matrix)), ("experts_down", ctypes.POINTER(Matrix)),
    )  # fmt: skip


class Model(ctypes.Structure):
    """layer.h, Model."""

    _fields_ = (
        *((name, _INT) for name in (
            "layers", "hidden", "heads", "q_rank", "latent", "rope", "nope", "value", "index_heads", "index_dim",
            "topk", "experts", "chosen", "groups", "groups_chosen", "normalise", "inner", "expert_inner",
        )),
        *((name, _FLOAT) for name in ("eps", "latent_eps", "routed_scale", "q_scale")),
        ("layer", ctypes.POINTER(Layer)), *((name, _POINTER) for name in ("embed", "norm", "cos", "sin")),
        ("head", Product), *((name, _POINTER) for name in ("mtp_enorm", "mtp_hnorm", "mtp_norm")),
        ("mtp_join", Product), ("mtp_head", Product),
    )  # fmt: skip


@dataclass(frozen=True)
class NativeWeights:
    """Everything a forward pass reads; `version` names it in replies and keys the prefix cache.

    Attributes:
        has_mtp: whether drafts can be made.
        kept: what the pointers of `model` point to.
    """

    config: ModelConfig
    version: str
    model: Model
    dtype: str = "fp32"
    has_mtp: bool = False
    kept: list[Any] = field(default_factory=list, repr=False)


class Packer:
    """Makes structures out of tensors, and keeps what they point to."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.arena = dtype, Arena()
        self.arrays: list[Any] = []

    def vector(self, values: Tensor) -> int:
        """Address of fp32 values, filled up with zeros."""
        return self.arena.keep(F.pad(values.detach().float(), (0, -len(values) % LANES)))

    def table(self, values: Tensor) -> int:
        """Address of fp32 values as they are."""
        return self.arena.keep(values.detach().float())

    def matrix(self, part: Part, exact: bool = False) -> Matrix:
        """One matrix; its rows (the outputs) are filled up to whole vectors."""
        weight = F.pad(part.weight.detach().float(), (0, 0, 0, -len(part.weight) % LANES))
        outputs, inputs = weight.shape
        kind = part.kind("fp32" if exact else self.dtype)
        if kind == "fp32":
            return Matrix(F32, inputs, outputs, self._panels(weight))
        if kind == "bf16":
            return Matrix(BF16, inputs, outputs, self._panels(F.pad(weight, (0, inputs % 2)).bfloat16()))
        assert part.scale is not None
        scale = F.pad(part.scale.flatten(), (0, outputs - len(part.scale)))
        q = (weight / scale.where(scale != 0, 1.0)[:, None]).round().to(torch.int32)
        bias = self.arena.keep(q.sum(1, dtype=torch.int32) * ZERO_POINT)
        if q.min() >= -NIBBLE and q.max() < NIBBLE:
            words = F.pad(q, (0, -inputs % 8)).unflatten(1, (-1, 2, 4)) + NIBBLE
            packed = (words[:, :, 0] + 16 * words[:, :, 1]).to(torch.uint8).flatten(1)
            return Matrix(INT4, inputs, outputs, self._panels(packed), self.arena.keep(scale), bias)
        packed = F.pad(q, (0, -inputs % 4)).to(torch.int8)
        return Matrix(INT8, inputs, outputs, self._panels(packed), self.arena.keep(scale), bias)

    def product(self, parts: Sequence[Part]) -> Product:
        """Several matrices side by side, each filled up to whole vectors; neighbours of one kind become one."""
        joined: list[Part] = []
        for part in map(_filled, parts):
            last = joined[-1] if joined else None
            if last is not None and last.kind(self.dtype) == part.kind(self.dtype):
                scale = None
                if last.scale is not None and part.scale is not None:
                    scale = torch.cat((last.scale, part.scale))
                joined[-1] = Part(torch.cat((last.weight, part.weight)), scale, last.exact)
            else:
                joined.append(part)
        return Product(len(joined), (Matrix * 4)(*map(self.matrix, joined)))

    def gated(self, gate: Part, up: Part) -> Matrix:
        """Gate and up of a SwiGLU in turn, so that a panel holds both of the same columns."""
        gate, up = _filled(gate), _filled(up)
        size = len(gate.weight)
        runs = [torch.arange(at, min(at + PANEL // 2, size)) for at in range(0, size, PANEL // 2)]
        order = torch.cat([torch.cat((run, size + run)) for run in runs])
        scale = None if gate.scale is None or up.scale is None else torch.cat((gate.scale, up.scale))
        return self.matrix(Part(torch.cat((gate.weight, up.weight)), scale).at(order))

    def several(self, matrices: Iterable[Matrix]) -> Any:
        """An array of matrices."""
        made = list(matrices)
        array = (Matrix * len(made))(*made)
        self.arrays.append(array)
        return array

    def _panels(self, rows: Tensor) -> int:
        """Address of rows [O, bytes] as words of 4 bytes in panels [words][64]."""
        words = rows.contiguous().view(torch.int32).T
        full = words.shape[1] // PANEL * PANEL
        panels = words[:, :full].unflatten(1, (-1, PANEL)).transpose(0, 1)
        return self.arena.keep(torch.cat((panels.flatten(), words[:, full:].flatten())))


def _filled(part: Part, rows: int = 0) -> Part:
    """The part with zero rows up to whole vectors (or up to `rows`)."""
    more = (rows or whole(len(part.weight))) - len(part.weight)
    scale = None if part.scale is None else F.pad(part.scale, (0, 0, 0, more))
    return Part(F.pad(part.weight, (0, 0, 0, more)), scale, part.exact)


def _by_head(part: Part, heads: int) -> Part:
    """Rows [H * d, I] with every head filled up to whole vectors."""
    weight_HdI = part.weight.unflatten(0, (heads, -1))
    more = -weight_HdI.shape[1] % LANES
    scale = part.scale
    if scale is not None:
        scale = F.pad(scale.unflatten(0, (heads, -1)), (0, 0, 0, more)).flatten(0, 1)
    return Part(F.pad(weight_HdI, (0, 0, 0, more)).flatten(0, 1), scale, part.exact)


def _from_heads(part: Part, heads: int) -> Part:
    """Columns [O, H * d] with every head filled up to whole vectors."""
    weight_OHd = part.weight.unflatten(1, (heads, -1))
    return Part(F.pad(weight_OHd, (0, -weight_OHd.shape[2] % LANES)).flatten(1), part.scale, part.exact)


def _attention(made: Packer, layer: Layer, w: FusedAttention, c: ModelConfig) -> None:
    heads = c.num_attention_heads
    layer.norm, layer.q_norm, layer.kv_norm = map(made.vector, (w.norm, w.q_norm, w.kv_norm))
    layer.hidden = made.product(w.hidden)
    layer.q, layer.out = (
        made.product([_by_head(w.queries.part, heads)]),
        made.product([_from_heads(w.outputs.part, heads)]),
    )
    if w.queries.up is not None:
        up_HCN = (w.queries.up * w.scale).mT
        rows = whole(c.kv_lora_rank + c.qk_rope_head_dim)
        layer.q_up = made.several(made.matrix(_filled(Part(up_CN), rows), exact=True) for up_CN in up_HCN)
    if w.outputs.up is not None:
        layer.v_up = made.several(made.matrix(Part(up_VC), exact=True) for up_VC in w.outputs.up)
    if w.index_q is not None and w.index_norm is not None:
        layer.has_index = 1
        layer.index_norm, layer.index_bias = map(made.vector, w.index_norm)
        layer.index_q = made.product([_by_head(Part(w.index_q.flatten(0, 1), exact=True), c.index_n_heads)])


def _ffn(made: Packer, layer: Layer, w: FusedFFN) -> None:
    layer.gate_up, layer.down = made.gated(w.gate, w.up), made.matrix(w.down)


def _layer(made: Packer, w: FusedLayer, c: ModelConfig) -> Layer:
    layer = Layer()
    _attention(made, layer, w.attention, c)
    layer.ffn_norm = made.vector(w.ffn_norm)
    _ffn_or_moe(made, layer, w.ffn, c)
    return layer


def _ffn_or_moe(made: Packer, layer: Layer, w: FusedFFN | FusedMoE, c: ModelConfig) -> None:
    if not isinstance(w, FusedMoE):
        _ffn(made, layer, w)
        return
    layer.experts, router = c.n_routed_experts, w.router
    layer.router = made.matrix(Part(router.weight, exact=True))
    layer.router_bias = made.vector(router.e_score_correction_bias)
    size = c.moe_intermediate_size
    layer.experts_gate_up = made.several(
        made.gated(both.at(slice(size)), both.at(slice(size, None))) for both in _experts(w.gate_up)
    )
    layer.experts_down = made.several(map(made.matrix, _experts(w.down)))
    if w.shared is not None:
        _ffn(made, layer, w.shared)


def _experts(part: Part) -> list[Part]:
    """Stacked experts one by one."""
    scales: Sequence[Tensor | None] = [None] * len(part.weight) if part.scale is None else list(part.scale)
    return [Part(weight, scale) for weight, scale in zip(part.weight, scales, strict=True)]


@torch.no_grad()
def pack(model: GlmMoeDsa, version: str = "0", dtype: str = "fp32") -> NativeWeights:
    """The weights of `model` (any dtype) for computing in `dtype`; matrices of integers stay so. It is not kept.

    Raises FullarcError for one of the paper's comparison attentions.
    """
    model, c = model.float(), model.config
    layers, mtp = fuse(model, dtype)
    made = Packer(dtype)
    structures = [_layer(made, layer, c) for layer in [*layers, *([mtp.layer] if mtp else [])]]
    array = (Layer * len(structures))(*structures)
    cos, sin = rope_tables(torch.arange(c.max_position_embeddings), c.qk_rope_head_dim, c.rope_theta)
    embed = model.embed_tokens.weight
    out = Model(
        len(layers), c.hidden_size, c.num_attention_heads, c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim,
        c.qk_nope_head_dim, c.v_head_dim, c.index_n_heads, c.index_head_dim, _topk(c), c.n_routed_experts,
        c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.intermediate_size, c.moe_intermediate_size,
        c.rms_norm_eps, c.latent_norm_eps, c.routed_scaling_factor, layers[0].attention.scale,
        array, made.table(embed.bfloat16() if dtype == "bf16" else embed), made.vector(model.norm.weight),
        made.table(cos), made.table(sin), made.product([Part(model.lm_head.weight)]),
    )  # fmt: skip
    if mtp:
        out.mtp_enorm, out.mtp_hnorm, out.mtp_norm = map(made.vector, (mtp.enorm, mtp.hnorm, mtp.norm))
        out.mtp_join = made.product([_join(mtp.join, c.hidden_size)])
        out.mtp_head = made.product([_rounded(model.lm_head.weight)])
    return NativeWeights(c, version, out, dtype, mtp is not None, [array, made])


@torch.no_grad()
def adapt(base: NativeWeights, model: GlmMoeDsa, attention: Set[int], ffn: Set[int]) -> NativeWeights:
    """`base`, but of the layers that are named the attention and the FFN of `model`; all else is shared."""
    layers, mtp = fuse(model.float(), base.dtype)
    made, fused = Packer(base.dtype), [*layers, *([mtp.layer] if mtp else [])]
    array = (Layer * len(fused))(*base.model.layer[: len(fused)])
    for number, (layer, w) in enumerate(zip(array, fused, strict=True)):
        if number in attention:
            _attention(made, layer, w.attention, base.config)
        if number in ffn:
            _ffn_or_moe(made, layer, w.ffn, base.config)
    out = Model.from_buffer_copy(base.model)
    out.layer = array
    return replace(base, model=out, kept=[array, made, *base.kept])


def _rounded(weight: Tensor) -> Part:
    """Rows in 8 bits, for drafts, which may be wrong."""
    return Part(weight, weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127)


def _join(part: Part, hidden: int) -> Part:
    """Columns [O, 2 D], both halves filled up to whole vectors."""
    return _from_heads(part, 2) if hidden % LANES else part


def _topk(c: ModelConfig) -> int:
    """Keys that a query sees: where attention is dense, more than there can be."""
    return c.max_position_embeddings if c.dense_attention else c.index_topk
