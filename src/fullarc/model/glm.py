"""GLM-5: embedding, decoder layers, output layer, one MTP layer applied several times (GLM-5 section 2.1).

What the paper compares these with is here as well: grouped-query attention and sliding windows in place of MLA's, and
a separate MTP layer for every step (DeepSeek-V3 section 2.2).

Invariant: a position's output depends on earlier-or-equal positions of its own document only, through attention,
the indexer's choice and MTP alike. Packing several documents in a row changes nothing in any of them.
Products are in `compute_dtype`, of which the embedding makes the first activations and every matrix takes its input's.
In the weights' dtype (fp32) whatever that is: the norms, RoPE, softmax, the router, the indexer's head weights and
scores, the final states and the output layer. Shape suffixes: see ops.py; L = MoE layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fullarc.config.model import ModelConfig
from fullarc.model.context import WHOLE, Context
from fullarc.model.gqa import GQA
from fullarc.model.indexer import Index
from fullarc.model.induction import start_with_induction
from fullarc.model.mla import MLA
from fullarc.model.moe import FFN, Experts, MoE, Router, RoutingStats
from fullarc.model.ops import RMSNorm
from fullarc.model.quant import Linear, QuantScheme
from fullarc.model.visibility import Visibility, look

OUTPUT_STD = 0.02


@dataclass
class TrunkOutput:
    """Result of the decoder layers.

    Attributes:
        hidden_BTD: states after the final norm, in the dtype of the weights.
        index_kl: mean indexer KL over layers, None when it was off.
        router_load_LE: tokens per MoE layer and expert.
        aux_loss: mean sequence balance loss over MoE layers.
    """

    hidden_BTD: Tensor
    index_kl: Tensor | None
    router_load_LE: Tensor
    aux_loss: Tensor


@dataclass
class MTPOutput:
    """Result of the MTP steps: `hidden[d]` at position t predicts token t + 2 + d; the rest as in TrunkOutput.

    `router_load_LE` has a row for each MTP layer, summed over its steps.
    """

    hidden: list[Tensor]
    index_kl: Tensor | None
    router_load_LE: Tensor
    aux_loss: Tensor


@dataclass
class ModelOutput:
    """What `model(input_ids)` returns: logits [B, T, V], states [B, T, D] and the trunk's by-products."""

    logits: Tensor
    hidden: Tensor
    trunk: TrunkOutput = field(repr=False)


class LayerOutput(NamedTuple):
    """States after a layer, its indexer's KL, its routing, and the indexer that the next layer may share."""

    hidden_BTD: Tensor
    kl: Tensor | None
    stats: RoutingStats | None
    chooser: Index | None


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: ModelConfig, layer: int | None = None) -> None:
        """`layer`: its number; None for the MTP layer."""
        super().__init__()
        dense = layer is not None and layer < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: MLA | GQA = GQA(config) if config.gqa_kv_heads else MLA(config, layer)
        self.window = 0 if layer is None else config.window(layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: FFN | MoE = FFN(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, h_BTD: Tensor, seen: Visibility, index: Index | None = None) -> LayerOutput:
        attended, kl, index = self.self_attn(self.input_layernorm(h_BTD), seen, index)
        h_BTD = h_BTD + attended
        normed = self.post_attention_layernorm(h_BTD)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp(normed, seen.valid_BT, seen.context)
            return LayerOutput(h_BTD + out, kl, stats, index)
        return LayerOutput(h_BTD + self.mlp(normed), kl, None, index)


class MTPLayer(DecoderLayer):
    """One more decoder layer that joins the running state with the next token's embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def join(self, embedding: Tensor, h: Tensor) -> Tensor:
        """eh_proj([enorm(embedding); hnorm(h)]), the embedding first, in its dtype."""
        return self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(h).to(embedding.dtype)), -1))


class GlmMoeDsa(nn.Module):
    """The network. `model(input_ids).logits` is [B, T, V]; the trainer uses `trunk` and `mtp` directly.

    Attributes:
        compute_dtype: dtype of activations and products; None: that of the weights.
        checkpoint_activations: keep only the input of each layer for the backward pass, which computes the rest again;
            to the bit the same gradients.
    """

    compute_dtype: torch.dtype | None = None
    checkpoint_activations = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.context: Context = WHOLE
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp_layer = MTPLayer(config) if config.num_nextn_predict_layers else None
        self.mtp_later = nn.ModuleList(MTPLayer(config) for _ in range(1, config.num_nextn_predict_layers))

    @property
    def mtp_layers(self) -> list[MTPLayer]:
        """The MTP layers in the order of their steps; the last one is applied again in all steps that follow."""
        first = [] if self.mtp_layer is None else [self.mtp_layer]
        return [*first, *cast("Iterable[MTPLayer]", self.mtp_later)]

    def init_weights(self, seed: int, induction: bool = False) -> "GlmMoeDsa":
        """Draw all weights, a pure function of the arguments; norms stay at one.

        Matrices come from N(0, initializer_range²). Embeddings come from N(0, 1): what a layer adds to the residual
        stream then starts smaller than the token it is added to, and tokens keep their identity through the layers.
        The output layer starts at OUTPUT_STD, so that the first predictions are near uniform. With `induction` the
        first two layers begin with heads that look up what followed the same token before (`model.induction`).
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            std = self.config.initializer_range
            weights: list[Tensor] = []
            if isinstance(module, nn.Embedding):
                weights, std = [module.weight], 1.0
            elif module is self.lm_head:
                weights, std = [module.weight], min(std, OUTPUT_STD)
            elif isinstance(module, nn.Linear | Router):
                weights = [module.weight]
            elif isinstance(module, Experts):
                weights = [module.gate_up_proj, module.down_proj]
            for weight in weights:
                nn.init.normal_(weight, std=std, generator=generator)
        if induction:
            start_with_induction(self, generator)
        return self

    def quantize_experts(self, scheme: QuantScheme | None, shared: bool = False) -> "GlmMoeDsa":
        """From now on compute with routed experts (with `shared`, also the shared ones) quantised by `scheme`.

        The weights themselves stay as they are, and so do checkpoints and optimizers: gradients pass straight
        through (quantisation-aware training, GLM-5 section 2.4). None: compute with the weights as stored.

        Raises:
            FullarcError: the group does not divide the experts' rows.
        """
        if scheme is not None:
            for inputs in (self.config.hidden_size, self.config.moe_intermediate_size):
                scheme.groups(inputs)
        for module in self.modules():
            if isinstance(module, MoE):
                module.quantize_experts(scheme, shared)
        return self

    def forward(
        self, input_ids: Tensor, doc_ids: Tensor | None = None, parent_ids: Tensor | None = None
    ) -> ModelOutput:
        """Logits for token ids [B, T]. Raises ValueError for ids out of range or too many positions."""
        trunk = self.trunk(input_ids, doc_ids, parent_ids)
        return ModelOutput(self.lm_head(trunk.hidden_BTD), trunk.hidden_BTD, trunk)

    def trunk(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        parent_ids: Tensor | None = None,
        indexer_loss: str = "off",
    ) -> TrunkOutput:
        """Run the decoder layers.

        Args:
            input_ids: token ids [B, T].
            doc_ids: document number of each token [B, T]; 0 is padding; None means one document a row.
            parent_ids: for each token, the document of the same row that its own one continues [B, T], 0 if none.
                Several continuations of one prefix are computed exactly as if each carried its own copy of it.
            indexer_loss: "off", "dense" (warm-up: attention stays dense) or "sparse".
        """
        self._check(input_ids, doc_ids, parent_ids)
        seen = self._seen(self.layers, input_ids, doc_ids, parent_ids, indexer_loss)
        h_BTD, kls, stats = self._apply_layers(self.layers, self._embed(self.context.own(input_ids)), seen)
        hidden_BTD = self.norm(h_BTD.to(self.norm.weight.dtype))
        return TrunkOutput(hidden_BTD, *self._summary(kls, stats, hidden_BTD))

    def mtp(
        self,
        hidden_BTD: Tensor,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        parent_ids: Tensor | None = None,
        steps: int = 3,
        indexer_loss: str = "off",
        first: int = 0,
        detached: bool = False,
    ) -> MTPOutput:
        """Apply the shared MTP layer, or the steps' own layers in turn, `steps` times to the trunk's post-norm states.

        Step d reads the embedding of token t + 1 + d; the state carried to the next step is the post-norm one.
        Embeddings beyond the end of a document are zero. See `shift_targets` for the targets. `first` is the number
        of the step that the first one counts as where steps have layers of their own. If `detached`, gradients end
        in the MTP layers' own parameters: not in the embedding, and not in the trunk.
        """
        layers = self.mtp_layers
        if not layers:
            raise ValueError("num_nextn_predict_layers is 0: this model has no MTP layer")
        self._check(input_ids, doc_ids, parent_ids)
        if hidden_BTD.shape != (*self.context.own(input_ids).shape, self.config.hidden_size):
            raise ValueError(
                f"hidden_BTD {tuple(hidden_BTD.shape)} does not belong to input_ids {tuple(input_ids.shape)}"
            )
        seen = self._look(input_ids, doc_ids, parent_ids, indexer_loss)
        embedded = self._embed(input_ids)
        if detached:
            embedded, hidden_BTD = embedded.detach(), hidden_BTD.detach()
        h, outputs, kls, stats = hidden_BTD, [], [], []
        turns = [min(first + step, len(layers) - 1) for step in range(steps)]
        for step, turn in enumerate(turns):
            layer = layers[turn]
            joined = layer.join(seen.context.own(_shift(embedded, step + 1, doc_ids)), h)
            h, kl, layer_stats, _ = self._apply_layer(layer, joined, seen)
            h = layer.norm(h.to(hidden_BTD.dtype))
            outputs.append(h)
            kls.append(kl)
            stats.append(layer_stats)
        kl, load_SE, aux = self._summary(kls, stats, hidden_BTD)
        load_LE = load_SE.new_zeros(len(layers), load_SE.shape[1])
        return MTPOutput(
            outputs, kl, load_LE.index_add_(0, torch.tensor(turns, device=load_SE.device), load_SE), aux
        )

    @torch.no_grad()
    def update_router_bias(self, load_LE: Tensor, rate: float) -> None:
        """Move each router's bias by `rate` towards balance: up where the load is under the mean.

        `load_LE` has a row for each MoE layer of the trunk, and one more for each MTP layer if they were run.
        """
        layers = cast("list[DecoderLayer]", [*self.layers, *self.mtp_layers])
        routers = [layer.mlp.gate for layer in layers if isinstance(layer.mlp, MoE)]
        if len(load_LE) == len(routers) - len(self.mtp_layers):
            routers = routers[: len(load_LE)]  # no MTP layer was run
        for router, load_E in zip(routers, load_LE, strict=True):
            router.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)

    # --- helpers --------------------

    def _embed(self, input_ids: Tensor) -> Tensor:
        embedded = self.embed_tokens(input_ids)
        return embedded.to(self.compute_dtype or embedded.dtype)

    def _seen(
        self,
        layers: Iterable[nn.Module],
        input_ids: Tensor,
        doc_ids: Tensor | None,
        parent_ids: Tensor | None,
        indexer_loss: str,
    ) -> dict[int, Visibility]:
        """What may be seen in these layers, for each of their windows."""
        windows = sorted({cast("DecoderLayer", layer).window for layer in layers})
        return {
            window: self._look(input_ids, doc_ids, parent_ids, indexer_loss, window) for window in windows
        }

    def _look(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None,
        parent_ids: Tensor | None,
        indexer_loss: str,
        window: int = 0,
    ) -> Visibility:
        shape, device = input_ids.shape, input_ids.device
        return look(self.config, shape, device, doc_ids, parent_ids, indexer_loss, window, self.context)

    def _apply_layers(
        self, layers: Iterable[nn.Module], h_BTD: Tensor, seen: dict[int, Visibility]
    ) -> tuple[Tensor, list[Tensor | None], list[RoutingStats | None]]:
        """States after a run of decoder layers, the first of which has its own indexer; each one's KL and routing."""
        kls: list[Tensor | None] = []
        stats: list[RoutingStats | None] = []
        index = None
        for layer in layers:
            window = cast("DecoderLayer", layer).window
            h_BTD, kl, layer_stats, index = self._apply_layer(layer, h_BTD, seen[window], index)
            kls.append(kl)
            stats.append(layer_stats)
        return h_BTD, kls, stats

    def _apply_layer(
        self, layer: nn.Module, h_BTD: Tensor, seen: Visibility, index: Index | None = None
    ) -> LayerOutput:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, h_BTD, seen, index, use_reentrant=False, preserve_rng_state=False)
        return layer(h_BTD, seen, index)

    def _check(self, input_ids: Tensor, doc_ids: Tensor | None, parent_ids: Tensor | None) -> None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers [batch, time], got {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        if parent_ids is not None and doc_ids is None:
            raise ValueError("parent_ids need doc_ids: a prefix is a document")
        for name, ids in (("doc_ids", doc_ids), ("parent_ids", parent_ids)):
            if ids is not None and ids.shape != input_ids.shape:
                raise ValueError(
                    f"{name} {tuple(ids.shape)} must have the shape of input_ids {tuple(input_ids.shape)}"
                )
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1]} positions exceed max_position_embeddings {self.config.max_position_embeddings}"
            )
        if (
            input_ids.numel()
            and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.config.vocab_size
        ):
            raise ValueError(f"input_ids contain a token outside 0..{self.config.vocab_size - 1}")

    @staticmethod
    def _summary(
        kls: list[Tensor | None], stats: list[RoutingStats | None], like: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        found = [kl for kl in kls if kl is not None]
        routed = [entry for entry in stats if entry is not None]
        index_kl = torch.stack(found).mean() if found else None
        if not routed:
            return index_kl, like.new_zeros(0, 0), like.new_zeros(())
        return (
            index_kl,
            torch.stack([s.load_E for s in routed]),
            torch.stack([s.aux_loss for s in routed]).mean(),
        )


def _shift(x_BTD: Tensor, by: int, doc_ids: Tensor | None) -> Tensor:
    """`x` moved `by` positions to the left; zero where that leaves the row or the document."""
    shifted = torch.zeros_like(x_BTD)
    kept = x_BTD[:, by:]
    if doc_ids is not None:
        kept = kept * (doc_ids[:, by:] == doc_ids[:, : kept.shape[1]])[..., None]
    shifted[:, : kept.shape[1]] = kept
    return shifted


def shift_targets(
    targets_BT: Tensor, loss_BT: Tensor, doc_ids: Tensor | None, by: int
) -> tuple[Tensor, Tensor]:
    """Targets and loss weights seen from `by` positions earlier: by=1 is next-token prediction, by=2+d is MTP step d.

    Weights are zero where the target lies beyond the row or in another document, and on padding.
    """
    shifted, weight = torch.zeros_like(targets_BT), torch.zeros_like(loss_BT)
    size = targets_BT.shape[1] - by
    if size <= 0:
        return shifted, weight
    shifted[:, :size] = targets_BT[:, by:]
    weight[:, :size] = loss_BT[:, by:]
    if doc_ids is not None:
        weight[:, :size] *= ((doc_ids[:, by:] == doc_ids[:, :size]) & (doc_ids[:, :size] > 0)).to(
            weight.dtype
        )
    return shifted, weight
