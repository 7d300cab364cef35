"""In which precision passes run, and what they keep: by watching every operation and every living tensor."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from live_bytes import peak_bytes
from test_checkpoint import kill_after, same_bits, tiny, tiny_phase
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fullarc.config.model import preset
from fullarc.config.stages import Compute, ReasoningRL
from fullarc.model import GlmMoeDsa, load_model
from fullarc.rl.learner import Learner
from fullarc.train import Batch, LmLoss, OptimSettings, Rows, Trainer, evaluate, prepare, run_phase, trained
from fullarc.train.losses import indexer_warmup_loss
from fullarc.train.parallel import launch

BF16, CHECKPOINTED = Compute(precision="bf16"), Compute(checkpoint_activations=True)
ALL = trained(indexer=True, mtp=True)
LOSS = LmLoss(mtp_steps=2, aux_weight=1e-3, index_weight=1.0)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")
FP32_OPS = ("_softmax", "_log_softmax", "logsumexp", "rsqrt", "native_layer_norm", "topk", "sigmoid")


def sparse_model(how=None, length=96, **overrides):
    """index_topk is far below the length, so that the indexer chooses; its keys are gathered from `3 * topk` on."""
    config = preset("nano", vocab_size=64, max_position_embeddings=length, **{"index_topk": 8} | overrides)
    model = GlmMoeDsa(config).init_weights(1)
    return model if how is None else prepare(model, how)


def batch(rows=2, length=96, isolate=True):
    """Two documents and padding in each row."""
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    docs = torch.ones_like(ids)
    docs[:, length // 3 :], docs[:, -5:] = 2, 0
    return Batch(ids, docs > 0, docs, torch.zeros_like(ids), isolate)


class Watch(TorchDispatchMode):
    """The dtype of the operands of every forward operation, by the innermost module that runs it."""

    def __init__(self, model):
        super().__init__()
        self.seen, self.stack = set(), ["outside"]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name))
            module.register_forward_hook(lambda *_: self.stack.pop() and None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.is_floating_point():
                self.seen.add((func.overloadpacket.__name__, self.stack[-1], arg.dtype))
        return func(*args, **(kwargs or {}))

    def dtypes(self, chosen, ops=PRODUCTS):
        """Dtypes of these operations in the modules whose name `chosen` accepts; there must be some."""
        found = {dtype for op, name, dtype in self.seen if op in ops and chosen(name)}
        assert found, "nothing of this ran"
        return found


def modules_of(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("topk, gathered", [(8, True), (64, False)])
def test_bf16_is_where_it_may_be_and_nowhere_else(topk, gathered):
    model = sparse_model(BF16, length=192, index_topk=topk)
    with Watch(model) as watch:
        out = LOSS(model, batch(length=192))
    fp32, bf16 = {torch.float32}, {torch.bfloat16}
    linear = {name for name in modules_of(model, nn.Linear) if "weights_proj" not in name} - {"lm_head"}
    assert watch.dtypes(lambda name: name in linear) == bf16
    assert {name for _, name, _ in watch.seen} >= linear, "every one of them ran"
    assert watch.dtypes(lambda name: name.endswith(".experts")) == bf16
    if not gathered:
        assert watch.dtypes(lambda name: name.endswith("self_attn"), PRODUCTS[-1:]) == bf16
    scores = watch.dtypes(lambda name: name.endswith("self_attn"), ("bmm", "relu"))
    assert scores == fp32, "the indexer's, and those of gathered keys"
    for part in ("mlp.gate", "indexer.weights_proj"):
        assert watch.dtypes(lambda name, part=part: name.endswith(part)) == fp32, part
    assert watch.dtypes(lambda name: name == "outside", ("mm",)) == fp32, "the output layer"
    norms = watch.dtypes(lambda name: "norm" in name, ("_fused_rms_norm", *FP32_OPS))
    assert norms == watch.dtypes(lambda name: True, FP32_OPS) == fp32
    assert out.total.dtype == torch.float32


@pytest.mark.slow
def test_weights_gradients_and_optimizer_stay_fp32_and_bf16_learns_as_fp32(make_rows):
    """The loss falls as far, within a hundredth of what it fell."""
    last, first = {}, {}
    for precision in ("fp32", "bf16"):
        model = sparse_model(Compute(precision=precision), length=32, index_topk=32)
        trainer = Trainer(model, OptimSettings(), lambda _: 0.02, trained(indexer=False, mtp=True), 1e-3)
        loss, rows = LmLoss(mtp_steps=1), Rows(make_rows(precision, n=8), 8, 0)
        held = rows.next().split(4)
        first[precision] = evaluate(model, held)["loss"]
        for _ in range(40):
            trainer.step(rows.next().split(4), loss)
        last[precision] = evaluate(model, held)["loss"]
        tensors = [*model.state_dict().values(), *trainer.optimizer.tensors().values()]
        tensors += [parameter.grad for parameter in trainer.parameters.values()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert 0 < abs(first["bf16"] - first["fp32"]) < 0.01, "another rounding, the same model"
    fell = first["fp32"] - last["fp32"]
    assert fell > 2 and abs(last["bf16"] - last["fp32"]) < 0.01 * fell


@pytest.mark.slow
def test_a_killed_bf16_stage_ends_with_the_same_bits(make_rows, tmp_path):
    rows, how = make_rows(n=10), "precision='bf16', checkpoint_activations=True"
    phase = replace(tiny_phase(rows), compute=BF16)
    run_phase(phase, tiny, tmp_path / "straight")
    kill_after(5, rows, tmp_path / "killed", how)
    run_phase(
        phase, tiny, tmp_path / "killed"
    )  # checkpointed until it was killed, not any more: the same bits
    assert same_bits(tmp_path / "straight", tmp_path / "killed")
    run_phase(tiny_phase(rows), tiny, tmp_path / "fp32")
    assert not same_bits(tmp_path / "straight", tmp_path / "fp32")
    weights = load_model(tmp_path / "straight").state_dict().values()
    assert {value.dtype for value in weights} == {torch.float32}


# --- checkpointing --------------------


def gradients(model, part, loss):
    out = loss(model, part)
    chosen = [p for n, p in model.named_parameters() if loss is not WARMUP or ".indexer." in n]
    grads = torch.autograd.grad(out.total, chosen, allow_unused=True)
    return out, dict(zip([n for n, _ in model.named_parameters()], grads, strict=False))


WARMUP = partial(indexer_warmup_loss, mtp_steps=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("isolate, topk", [(True, 8), (False, 8), (False, 72), (False, 192)])
@pytest.mark.parametrize("loss", [LOSS, WARMUP, LmLoss(mtp_steps=0)], ids=["sparse", "warm-up", "plain"])
def test_gradients_loss_and_loads_are_those_of_everything_kept(loss, isolate, topk, precision):
    shared = {"indexer_types": ("full", "shared"), "index_topk": topk}
    model, part = sparse_model(length=192, **shared), batch(length=192, isolate=isolate)
    kept, expected = gradients(prepare(model, Compute(precision=precision)), part, loss)
    how = Compute(precision=precision, checkpoint_activations=True)
    again, grads = gradients(prepare(model, how), part, loss)
    assert torch.equal(kept.total, again.total) and kept.metrics == again.metrics
    assert sum(grad is not None for grad in grads.values()) > 5
    for name, grad in grads.items():
        assert grad is expected[name] is None or torch.equal(grad, expected[name]), name
    if kept.router_load_LE is not None:
        tokens = 2 * 192 if not isolate else int((part.docs_BT > 0).sum())
        assert torch.equal(kept.router_load_LE, again.router_load_LE), "counted once"
        assert kept.router_load_LE[0].sum() == tokens * model.config.num_experts_per_tok


@pytest.mark.parametrize(
    "loss", [LOSS, LmLoss(mtp_steps=3), LmLoss(mtp_steps=0)], ids=["dsa", "mtp", "plain"]
)
def test_less_is_kept_and_alive_at_once(loss):
    peaks, saved = {}, {}
    for kept in (True, False):
        model = sparse_model(Compute(checkpoint_activations=not kept), num_hidden_layers=6, length=192)
        part = batch(rows=4, length=192)
        peaks[kept] = peak_bytes(lambda model=model, part=part: loss(model, part).total.backward())
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = loss(model, part)
        saved[kept] = sum(storages.values()) - sum(p.nbytes for p in model.parameters())
        del out
    assert saved[False] < saved[True] / 4
    assert peaks[False] < peaks[True] / 2


def test_the_indexers_warm_up_holds_the_attention_of_one_head_at_a_time():
    peaks = {}
    for heads in (4, 32):
        model = sparse_model(length=512, num_attention_heads=heads)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".indexer." in name)
        part = batch(rows=1, length=512, isolate=False)
        peaks[heads] = peak_bytes(
            lambda model=model, part=part: indexer_warmup_loss(model, part).total.backward()
        )
    assert peaks[32] < 2 * peaks[4]


def test_a_step_without_gradient_keeps_nothing_to_compute_again(monkeypatch):
    monkeypatch.setattr("fullarc.model.glm.checkpoint", lambda *_, **__: pytest.fail("checkpointed"))
    assert evaluate(sparse_model(CHECKPOINTED), [batch()])["loss"] > 0


# --- everywhere --------------------


@pytest.mark.slow
@pytest.mark.parametrize("parallel, apart", [("zero1", 1e-5), ("fsdp2", 1e-5), ("fsdp2+ep", 0.05)])
def test_two_processes_train_as_one_in_bf16_with_checkpointing(make_rows, tmp_path, parallel, apart):
    """As a share of the way they went; experts round the sum of both ranks' gradients to bf16, not each rank's."""
    import rank_jobs
    from test_checkpoint import tiny

    how = Compute(precision="bf16", checkpoint_activations=True)
    rows, changes = make_rows(), {"compute": how, "parallel": parallel}
    rank_jobs.phase(rank_jobs.ALONE, rows, tmp_path / "one", 0, **changes)
    launch(partial(rank_jobs.phase, **changes), 2, rows, tmp_path / "two")
    one, two = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    start = tiny().state_dict()

    def distance(a, b):
        return sum((a[name] - b[name]).square().sum() for name in start).sqrt()

    assert distance(one, two) < apart * distance(one, start)


def test_rl_computes_as_its_settings_say():
    settings = ReasoningRL(precision="bf16", checkpoint_activations=True)
    model = Learner(sparse_model(), settings).model
    assert model.compute_dtype == torch.bfloat16 and model.checkpoint_activations
