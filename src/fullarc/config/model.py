"""The shape of a GLM-5 network, in the field names of Hugging Face's `glm_moe_dsa`.

One class describes every model fullarc can build, from a test's toy to the released 744B configuration, so
`config.json` needs no converter. Dense attention is not a flag: it is `index_topk >= max_position_embeddings`,
which selects every key and gives the same logits in any implementation of the format.

Source: GLM-5 paper, Table 10 and the released configuration.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullarc.config.errors import FullarcError

HF_TYPE = "glm_moe_dsa"
VARIANT_TYPE = "fullarc_variant"
_VARIANT_FIELDS = ("gqa_kv_heads", "attention_pattern", "sliding_window")


class ModelConfig(BaseModel):
    """Sizes and constants of one network. Frozen; two equal configurations build equal modules."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(154880, gt=0)
    hidden_size: int = Field(6144, gt=0)
    num_hidden_layers: int = Field(78, gt=0, description="decoder layers, without the MTP layer")
    first_k_dense_replace: int = Field(3, ge=0, description="leading layers with a dense FFN")
    intermediate_size: int = Field(12288, gt=0, description="width of the dense FFN")
    num_attention_heads: int = Field(64, gt=0)
    q_lora_rank: int = Field(2048, gt=0)
    kv_lora_rank: int = Field(512, gt=0)
    qk_nope_head_dim: int = Field(192, gt=0)
    qk_rope_head_dim: int = Field(64, gt=0)
    v_head_dim: int = Field(256, gt=0)
    n_routed_experts: int = Field(256, gt=0)
    n_shared_experts: int = Field(1, ge=0)
    num_experts_per_tok: int = Field(8, gt=0)
    moe_intermediate_size: int = Field(2048, gt=0)
    n_group: int = Field(1, gt=0)
    topk_group: int = Field(1, gt=0)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    index_n_heads: int = Field(32, gt=0)
    index_head_dim: int = Field(128, gt=0)
    index_topk: int = Field(
        2048, gt=0, description="keys a query attends to; >= positions means dense attention"
    )
    index_topk_freq: int = Field(
        1, gt=0, description="IndexShare: one layer of so many has an indexer, the next ones use its choice"
    )
    index_skip_topk_offset: int = Field(
        2, gt=0, description="IndexShare: the first layers, all with their own"
    )
    indexer_types: tuple[Literal["full", "shared"], ...] = Field(
        (), description="IndexShare layer by layer; empty = as the two numbers say"
    )
    max_position_embeddings: int = Field(202752, gt=0)
    rope_theta: float = Field(1_000_000.0, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    latent_norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norms on the q and kv latents")
    initializer_range: float = Field(0.02, gt=0)
    num_nextn_predict_layers: int = Field(
        1, ge=0, description="MTP layers; one is shared by all steps, of several each step has its own"
    )
    gqa_kv_heads: int = Field(
        0, ge=0, description="grouped-query attention with so many key and value heads; 0 = MLA"
    )
    attention_pattern: str = Field(
        "", pattern="^[FS]*$", description="a letter per layer: full or sliding-window; empty = all full"
    )
    sliding_window: int = Field(
        0, ge=0, description="keys that a query of a sliding-window layer sees, itself included"
    )
    eos_token_id: tuple[int, ...] = (154820, 154827, 154829)
    pad_token_id: int = 154820

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        need(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even: RoPE rotates pairs")
        need(self.index_head_dim >= self.qk_rope_head_dim, "index_head_dim must be at least qk_rope_head_dim")
        need(
            self.num_experts_per_tok <= self.n_routed_experts, "num_experts_per_tok exceeds n_routed_experts"
        )
        need(self.n_routed_experts % self.n_group == 0, "n_routed_experts must be a multiple of n_group")
        need(self.topk_group <= self.n_group, "topk_group exceeds n_group")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        need(
            self.num_experts_per_tok <= reachable,
            "num_experts_per_tok exceeds the experts of topk_group groups",
        )
        need(
            self.first_k_dense_replace <= self.num_hidden_layers,
            "first_k_dense_replace exceeds num_hidden_layers",
        )
        types = self.indexer_types
        need(
            len(types) in (0, self.num_hidden_layers),
            "indexer_types must name every one of the num_hidden_layers layers",
        )
        need(
            "shared" not in types[:1],
            "indexer_types must begin with full: there is nothing to share before",
        )
        need(
            self.gqa_kv_heads == 0 or self.num_attention_heads % self.gqa_kv_heads == 0,
            "num_attention_heads must be a multiple of gqa_kv_heads",
        )
        need(
            len(self.attention_pattern) in (0, self.num_hidden_layers),
            "attention_pattern must have a letter for each of the num_hidden_layers layers",
        )
        need(
            ("S" in self.attention_pattern) == (self.sliding_window > 0),
            "sliding_window must be set where attention_pattern has an S, and only there",
        )
        need(
            not self.sliding_window or self.index_topk_freq == 1 and "shared" not in types,
            "layers with a sliding_window cannot share another layer's indexer",
        )
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: nope + rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def variant(self) -> str:
        """Which of the paper's comparison attentions this is, in words; empty for GLM-5's own."""
        gqa = "grouped-query attention" if self.gqa_kv_heads else ""
        window = "sliding-window layers" if self.sliding_window else ""
        return " and ".join(filter(None, (gqa, window)))

    def window(self, layer: int) -> int:
        """Keys that a query of a decoder layer may see at most, itself included; 0 = all."""
        return self.sliding_window if self.attention_pattern[layer : layer + 1] == "S" else 0

    def has_indexer(self, layer: int) -> bool:
        """Whether a decoder layer chooses its keys itself; else it takes the choice of the last one that does.

        Every layer of GLM-5 does. IndexShare (arXiv 2603.12201): GLM-5.2 has 4 and 3 here, so 0, 1, 2, 6, 10, …
        """
        if self.gqa_kv_heads:
            return False
        if self.indexer_types:
            return self.indexer_types[layer] == "full"
        return max(layer - self.index_skip_topk_offset + 1, 0) % self.index_topk_freq == 0

    @property
    def index_groups(self) -> list[range]:
        """Runs of layers that use one indexer's choice, the first layer's; of one layer where there are none."""
        layers = self.num_hidden_layers
        starts = [layer for layer in range(layers) if self.gqa_kv_heads or self.has_indexer(layer)]
        return [range(*run) for run in zip(starts, [*starts[1:], layers], strict=True)]

    @property
    def dense_attention(self) -> bool:
        """True while every query attends to all earlier keys (before the DSA stage)."""
        return self.index_topk >= self.max_position_embeddings

    def parameter_count(self, with_mtp: bool = False) -> int:
        """Number of weights, embeddings and output layer included, router bias buffers not."""
        d, h = self.hidden_size, self.num_attention_heads
        attention = d * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * h * self.qk_head_dim
        attention += d * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        attention += self.kv_lora_rank * h * (self.qk_nope_head_dim + self.v_head_dim)
        if self.gqa_kv_heads:
            attention = d * (h * self.qk_head_dim + self.gqa_kv_heads * (self.qk_head_dim + self.v_head_dim))
        attention += h * self.v_head_dim * d
        index = self.q_lora_rank * self.index_n_heads * self.index_head_dim + d * self.index_head_dim
        index += 2 * self.index_head_dim + d * self.index_n_heads
        expert = 3 * d * self.moe_intermediate_size
        moe = (self.n_routed_experts + self.n_shared_experts) * expert + self.n_routed_experts * d
        common = attention + 2 * d
        sparse_layers = self.num_hidden_layers - self.first_k_dense_replace
        total = self.num_hidden_layers * common + sparse_layers * moe
        total += self.first_k_dense_replace * 3 * d * self.intermediate_size
        total += sum(map(self.has_indexer, range(self.num_hidden_layers))) * index
        total += 2 * self.vocab_size * d + d
        if with_mtp:
            index = 0 if self.gqa_kv_heads else index
            total += self.num_nextn_predict_layers * (common + index + moe + 2 * d * d + 3 * d)
        return total

    def to_hf(self) -> dict[str, Any]:
        """The content of `config.json`, in the form of the released checkpoint.

        No other program has the attentions of the paper's comparisons (`variant`): with one, the type of the model is
        VARIANT_TYPE, which they refuse, instead of one that they would load and compute wrongly.
        """
        fields = self.model_dump()
        for name in _VARIANT_FIELDS if not self.variant else ():
            del fields[name]
        theta = fields.pop("rope_theta")
        fields["eos_token_id"] = list(fields["eos_token_id"])
        if types := list(fields.pop("indexer_types")):
            fields["indexer_types"] = types
        return {
            "architectures": ["FullarcVariantForCausalLM" if self.variant else "GlmMoeDsaForCausalLM"],
            "model_type": VARIANT_TYPE if self.variant else HF_TYPE,
            **fields,
            "num_key_value_heads": self.gqa_kv_heads or self.num_attention_heads,
            "qk_head_dim": self.qk_head_dim,
            "head_dim": self.qk_rope_head_dim,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "indexer_rope_interleave": True,
            "rope_interleave": True,
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": False,
            "use_cache": True,
            "dtype": "float32",
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read a `config.json`. Raises FullarcError for another architecture or sizes that cannot be."""
        if config.get("model_type") not in (HF_TYPE, VARIANT_TYPE):
            raise FullarcError(
                f"config.json describes a model of type {config.get('model_type')!r}, not 'glm_moe_dsa'.",
                "Point at a GLM-5 checkpoint folder.",
            )
        rope = config.get("rope_parameters") or {}
        values = {key: config[key] for key in cls.model_fields if key in config and config[key] is not None}
        values["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
        eos = values.get("eos_token_id", ())
        values["eos_token_id"] = (eos,) if isinstance(eos, int) else tuple(eos)
        if not values.get("indexer_types") and isinstance(config.get("index_topk_pattern"), str):
            kinds = {"F": "full", "S": "shared"}
            values["indexer_types"] = tuple(kinds.get(kind, kind) for kind in config["index_topk_pattern"])
        try:
            return cls(**values)
        except ValidationError as error:
            raise FullarcError(f"config.json: {_reason(error)}.", "Use another checkpoint.") from None


_LAPTOP = dict(
    vocab_size=2048, q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
    n_routed_experts=8, num_experts_per_tok=2, index_n_heads=8, index_head_dim=32, rope_theta=10_000.0,
    initializer_range=0.02, max_position_embeddings=2048, index_topk=2048, first_k_dense_replace=1,
    eos_token_id=(0, 1, 2), pad_token_id=0,
)  # fmt: skip

_TABLE_1 = dict(hidden_size=128, q_lora_rank=96, kv_lora_rank=64, qk_rope_head_dim=8)
ATTENTIONS: dict[str, dict[str, int]] = {
    "mla": _TABLE_1 | dict(num_attention_heads=6, qk_nope_head_dim=16, v_head_dim=20),
    "mla-256": _TABLE_1 | dict(num_attention_heads=4, qk_nope_head_dim=24, v_head_dim=32),
    "gqa": _TABLE_1 | dict(num_attention_heads=6, qk_nope_head_dim=16, v_head_dim=32, gqa_kv_heads=3),
}
"""Table 1's attentions at hidden size 128; their matrices have the same number of parameters.

MLA-256 has a third of the heads less, each 4/3 as wide: 24 → 32 dimensions of queries and keys, as 192 → 256.
"""

SIZES: dict[str, dict[str, Any]] = {
    "nano": _LAPTOP
    | dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
           moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16, n_routed_experts=4, index_head_dim=16),
    "1m": _LAPTOP
    | dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192,
           moe_intermediate_size=32, initializer_range=0.06, qk_nope_head_dim=32, v_head_dim=48, kv_lora_rank=64),
    "2m": _LAPTOP
    | dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
           moe_intermediate_size=64, initializer_range=0.06, qk_nope_head_dim=32, v_head_dim=48, kv_lora_rank=96),
    "5m": _LAPTOP
    | dict(vocab_size=4096, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=512,
           moe_intermediate_size=96, n_routed_experts=16, q_lora_rank=96, kv_lora_rank=64),
    "20m": _LAPTOP
    | dict(vocab_size=8192, hidden_size=320, num_hidden_layers=8, num_attention_heads=10, intermediate_size=896,
           moe_intermediate_size=160, n_routed_experts=16, num_experts_per_tok=4, q_lora_rank=160, kv_lora_rank=96),
    # the released widths of attention and indexer, which the kernels of SGLang and vLLM insist on; all else is small
    "tiny-std": _LAPTOP
    | dict(vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
           moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, q_lora_rank=256, kv_lora_rank=512,
           qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, index_n_heads=32, index_head_dim=128,
           max_position_embeddings=8192),
    "glm5-744b": {},
}  # fmt: skip


def preset(size: str, **overrides: Any) -> ModelConfig:
    """The network of one position of the size dial, with single fields replaced by `overrides`.

    Raises FullarcError for an unknown size or for sizes that cannot be together.
    """
    if size not in SIZES:
        raise FullarcError(f"There is no model size {size!r}.", f"Sizes are: {', '.join(SIZES)}.")
    try:
        return ModelConfig(**(SIZES[size] | overrides))
    except ValidationError as error:
        raise FullarcError(f"model: {_reason(error)}.") from None


def _reason(error: ValidationError) -> str:
    """The first thing that is wrong, with its field."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{'.'.join(map(str, first['loc']))}: {reason}" if first["loc"] else reason
