"""What every stage can be told: one frozen pydantic model per stage type, one field per choice.

Invariant: a setting has one name, one unit (in its description) and one default that is right for GLM-5's method;
whatever depends on the size of the run comes from the size table (`config.sizes`). Nothing here imports torch.
Equation and section numbers are those of the GLM-5 paper (arXiv 2602.15763).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ALTERNATIVES = "Share of the demonstrations that show a task's other way, where it has one."

Parallel = Literal["zero1", "fsdp2", "fsdp2+ep", "cp", "pp"]
EngineDtype = Literal["fp32", "bf16", "fp8"]
PIPELINE_FILL = 4
"""Default micro-batches for each stage of a pipeline, which then idles at most a fifth of the time."""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Compute(Settings):
    """How a stage's passes are computed; the weights, their gradients and the optimizer are fp32 always."""

    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Activations and products; router, indexer scores, norms, softmax and output layer stay fp32.",
    )
    checkpoint_activations: bool = Field(
        False, description="Keep only each layer's input and compute the rest again: less memory, same bits."
    )


class LMStage(Compute):
    """Next-token training: pre-training, mid-training, sparse attention and SFT share these."""

    steps: int = Field(100, ge=0, description="Optimizer steps.")
    seq_len: int = Field(256, ge=8, description="Row length T in tokens.")
    batch_tokens: int = Field(4096, ge=8, description="Tokens per optimizer step; a multiple of seq_len.")
    batch_warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps over which the batch grows from batch_start_tokens to batch_tokens; 0 = none.",
    )
    batch_start_tokens: int = Field(
        0, ge=0, description="Tokens of the first step of a batch warm-up, which grows in multiples of them."
    )
    micro_batch_rows: int = Field(
        0, ge=0, description="Rows per forward pass; 0 = half of the (first) batch, or a share each."
    )
    optimizer: Literal["muon_split", "muon", "adamw"] = Field(
        "muon_split",
        description="muon_split orthogonalises the MLA up-projections head by head (2.1); embeddings, norms "
        "and biases are always on AdamW.",
    )
    lr: float = Field(2e-4, ge=0, description="Peak learning rate (Muon updates are scaled to RMS 0.2).")
    adamw_scale: float = Field(
        1.0, gt=0, description="Learning rate of the parameters on AdamW, relative to lr."
    )
    lr_end: float = Field(4e-5, ge=0, description="Learning rate after the last step.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Decay from lr to lr_end."
    )
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up from 0 to lr.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay per unit of learning rate.")
    grad_clip: float = Field(1.0, gt=0, description="Global gradient norm limit.")
    mtp_steps: int = Field(3, ge=0, le=8, description="Multi-token prediction depths trained (2.1); 0 = off.")
    mtp_weight: float = Field(0.3, ge=0, description="Weight of the mean MTP loss.")
    mtp_rows: float = Field(
        1.0, gt=0, le=1, description="Share of each batch's rows the MTP loss is taken on."
    )
    mtp_detached: bool = Field(
        False, description="The MTP loss trains the MTP layer only; the rest learns as without it."
    )
    aux_loss: float = Field(1e-4, ge=0, description="Weight of the sequence-level router balance loss.")
    router_bias_rate: float = Field(1e-3, ge=0, description="Loss-free balancing: bias change per step.")
    indexer_weight: float = Field(
        0.0, ge=0, description="Weight of the indexer's KL; 0 = the indexer is frozen."
    )
    save_every: int = Field(50, ge=1, description="Steps between resumable checkpoints.")
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    threads: int = Field(
        0,
        ge=0,
        description="Forward passes computed at once; 0 = the recipe's threads. "
        "One in a process whose passes are shared: fsdp2, cp and pp.",
    )
    compile: bool = Field(
        False, description="Layers as C++, compiled in the first step: a minute that long stages earn back."
    )
    processes: int = Field(1, ge=1, description="Processes that share each step.")
    parallel: Parallel = Field(
        "zero1",
        description="What they divide: micro-batches and the optimizer's state (zero1), also weights and gradients "
        "(fsdp2), these while tokens go to divided experts (fsdp2+ep), the positions of each row (cp), or layers (pp).",
    )

    @property
    def batch_rows(self) -> int:
        """Rows per optimizer step."""
        return self.batch_tokens // self.seq_len

    @property
    def first_rows(self) -> int:
        """Rows of the first step, of which all batches are multiples."""
        return self.batch_start_tokens // self.seq_len if self.batch_warmup_steps else self.batch_rows

    @property
    def micro_rows(self) -> int:
        """Rows per forward pass."""
        parts = {"cp": 2, "pp": PIPELINE_FILL * self.processes}.get(self.parallel, self.processes)
        return self.micro_batch_rows or max(1, self.first_rows // max(2, parts))

    @model_validator(mode="after")
    def _batch_is_whole_rows(self) -> "LMStage":
        if self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens {self.batch_tokens} is not a multiple of seq_len {self.seq_len}")
        if self.micro_batch_rows and self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"micro_batch_rows {self.micro_batch_rows} does not divide the {self.batch_rows} rows"
            )
        start = self.batch_start_tokens
        if bool(start) != bool(self.batch_warmup_steps):
            raise ValueError("batch_start_tokens and batch_warmup_steps need each other")
        if start and (start % self.seq_len or self.batch_tokens % start):
            raise ValueError(
                f"batch_start_tokens {start} is not a multiple of seq_len {self.seq_len} that divides batch_tokens "
                f"{self.batch_tokens}"
            )
        if start and self.micro_batch_rows and start // self.seq_len % self.micro_batch_rows:
            raise ValueError(
                f"micro_batch_rows {self.micro_batch_rows} does not divide the {start // self.seq_len} rows of the "
                "first batch"
            )
        if self.parallel == "cp" and self.processes > 1 and self.seq_len % (2 * self.processes):
            raise ValueError(
                f"seq_len {self.seq_len} cannot be cut into two equal runs for each of {self.processes} processes"
            )
        if self.parallel.startswith("fsdp2"):
            for rows in range(self.first_rows, self.batch_rows + 1, self.first_rows):
                if passes := -(-rows // self.micro_rows) % self.processes:
                    raise ValueError(
                        f"a batch of {rows} rows in passes of {self.micro_rows} leaves {passes} of its passes over "
                        f"after equal shares for {self.processes} processes"
                    )
        return self


class Pretrain(LMStage):
    """Raw text, plain concatenation, short context (4.1)."""

    type: Literal["pretrain"] = "pretrain"
    induction: bool = Field(False, description="Begin with induction heads in the first two layers.")


class Midtrain(LMStage):
    """Longer context, best-fit packing, agent trajectories and synthetic long documents up-sampled (2.3)."""

    type: Literal["midtrain"] = "midtrain"
    lr: float = Field(4e-5, ge=0, description="Peak learning rate.")
    lr_end: float = Field(1e-5, ge=0, description="Learning rate after the last step.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear", description="Decay from lr to lr_end."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0 to lr.")
    mtp_weight: float = Field(0.1, ge=0, description="Weight of the mean MTP loss.")
    rope_theta: float = Field(0.0, ge=0, description="RoPE base at the new length; 0 = keep the model's.")
    trajectory_share: float = Field(0.2, ge=0, le=1, description="Share of tokens from agent trajectories.")
    synthetic_share: float = Field(
        0.2, ge=0, le=1, description="Share of tokens from synthetic long documents."
    )
    demos: int = Field(200, ge=0, description="Task demonstrations generated for the trajectory share.")
    alternatives: float = Field(0.5, ge=0, le=1, description=ALTERNATIVES)


class DSA(LMStage):
    """Dense warm-up of the indexer (KL to the attention it will replace), then sparse adaptation (2.1.1)."""

    type: Literal["dsa"] = "dsa"
    lr: float = Field(1e-5, ge=0, description="Learning rate of the sparse adaptation.")
    lr_end: float = Field(1e-5, ge=0, description="Learning rate after the last step.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "constant", description="Decay from lr to lr_end."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up of the sparse adaptation's lr.")
    mtp_weight: float = Field(0.1, ge=0, description="Weight of the mean MTP loss.")
    indexer_steps: int = Field(30, ge=0, description="Steps of dense warm-up: only the indexer is trained.")
    indexer_lr: float = Field(5e-3, ge=0, description="Peak learning rate of the indexer's warm-up.")
    indexer_lr_end: float = Field(2e-4, ge=0, description="Learning rate after the indexer's warm-up.")
    indexer_weight: float = Field(
        1.0, ge=0, description="Weight of the indexer's KL in the sparse adaptation."
    )


class SFT(LMStage):
    """Conversations with thinking and tool calls; only what the assistant says is a target (3.1)."""

    type: Literal["sft"] = "sft"
    lr: float = Field(1e-5, ge=0, description="Peak learning rate.")
    lr_end: float = Field(1e-6, ge=0, description="Learning rate after the last step.")
    mtp_weight: float = Field(0.1, ge=0, description="Weight of the mean MTP loss.")
    router_bias_rate: float = Field(0.0, ge=0, description="Loss-free balancing: bias change per step.")
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the tokens that is synthetic long documents and text, as in mid-training.",
    )
    demos: int = Field(2000, ge=1, description="Conversations generated from the tasks' own demonstrations.")
    alternatives: float = Field(0.5, ge=0, le=1, description=ALTERNATIVES)
    qat_bits: Literal[0, 4, 8] = Field(
        0, description="Quantisation-aware training (2.4): bits of the experts in use; 0 = off."
    )
    qat_group: int = Field(32, ge=0, description="Weights of a row that share a scale; 0 = the whole row.")
    qat_shared: bool = Field(False, description="Quantise the shared experts as well as the routed ones.")
    mix: dict[str, float] = Field(
        {"reasoning": 0.4, "terminal": 0.4, "general": 0.2},
        description="Share of the conversations per kind of task; normalised.",
    )


class RLStage(Compute):
    """Group-relative RL through one loop: batch b is sampled with the weights of step max(0, b - eta)."""

    steps: int = Field(20, ge=0, description="Weight updates.")
    prompts: int = Field(32, ge=1, description="Task instances per step.")
    group_size: int = Field(32, ge=1, description="Episodes per instance (G).")
    eta: int = Field(
        0, ge=0, description="Lag in steps between sampling and training weights; 0 = on-policy."
    )
    tau: int = Field(
        16, ge=0, description="Drop a trajectory whose oldest token is more than tau versions old."
    )
    beta: float = Field(2.0, gt=1, description="pop() keeps train/infer ratios in [1/beta, beta] (Eq. 1).")
    eps_low: float = Field(0.2, ge=0, description="Lower width of the trust region of the ratio.")
    eps_high: float = Field(0.28, ge=0, description="Upper width of the trust region of the ratio.")
    optimizer: Literal["adamw", "muon_split", "muon"] = Field("adamw", description="Update rule.")
    lr: float = Field(1e-6, ge=0, description="Learning rate of the first step.")
    lr_end: float = Field(0.0, ge=0, description="Learning rate of the last step, unless it is constant.")
    schedule: Literal["linear", "constant"] = Field("constant", description="Way from lr to lr_end.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay per unit of learning rate.")
    grad_clip: float = Field(1.0, gt=0, description="Global gradient norm limit.")
    freeze_indexer: bool = Field(True, description="Keep the DSA indexer's weights (3.2).")
    reset_optimizer: bool = Field(
        False, description="Zero the optimizer state after every weight push (4.1)."
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    max_new_tokens: int = Field(256, ge=1, description="Tokens sampled per assistant turn.")
    max_len: int = Field(1024, ge=8, description="Tokens per episode, prompt included.")
    max_turns: int = Field(1, ge=1, description="Assistant turns per episode.")
    mix: dict[str, float] = Field(
        {},
        description="Sampling weight per task family or kind of task (shared by its trained families); "
        "empty = the stage's own kind.",
    )
    micro_batch_tokens: int = Field(8192, ge=8, description="Padded tokens per forward pass of the trainer.")
    concurrency: int = Field(64, ge=1, description="Episodes in flight at once.")
    engines: int = Field(1, ge=1, description="Engine processes that share the sampling.")
    save_every: int = Field(5, ge=1, description="Steps between resumable checkpoints.")
    updates_per_push: int = Field(
        1, ge=1, description="Optimizer updates (minibatches of whole groups) per step and weight push (K)."
    )
    loss_mean: Literal["sequence", "token"] = Field(
        "sequence", description="Every episode counts equally (Eq. 1) or every sampled token does."
    )
    max_restarts: int = Field(
        3, ge=0, description="Restarts of a dead or stuck engine or rollout worker per stage."
    )
    stall_s: float = Field(
        300.0, gt=0, description="Seconds without a finished episode after which the rollout side is stuck."
    )

    @model_validator(mode="after")
    def _episode_fits(self) -> "RLStage":
        if self.max_new_tokens >= self.max_len:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in max_len {self.max_len}"
            )
        if self.eta > self.tau:
            raise ValueError(f"eta {self.eta} > tau {self.tau}: every trajectory would be dropped as stale")
        return self


class ReasoningRL(RLStage):
    """Eq. 1: GRPO with pop(), on-policy, binary rewards from verifiers (3.2)."""

    type: Literal["reasoning_rl"] = "reasoning_rl"


class AgenticRL(RLStage):
    """Eqs 3-5: asynchronous, token-exact, double-sided importance sampling, group repair (3.3, 4.1)."""

    type: Literal["agentic_rl"] = "agentic_rl"
    eta: int = Field(
        1, ge=0, description="Lag in steps between sampling and training weights; 0 = on-policy."
    )
    eps_low: float = Field(0.8, ge=0, description="Tokens with a ratio below 1 - eps_low are masked.")
    eps_high: float = Field(3.0, ge=0, description="Tokens with a ratio above 1 + eps_high are masked.")
    reset_optimizer: bool = Field(True, description="Zero the optimizer state after every weight push (4.1).")
    max_turns: int = Field(8, ge=1, description="Assistant turns per episode.")
    loss_mean: Literal["sequence", "token"] = Field(
        "token", description="Every episode counts equally (Eq. 1) or every sampled token does (Eq. 3)."
    )


class GeneralRL(RLStage):
    """Rule rewards on format, length and language (3.4); outcome and generative rewards are not built yet."""

    type: Literal["general_rl"] = "general_rl"
    mix: dict[str, float] = Field(
        {"general": 0.75, "reasoning": 0.25},
        description="Sampling weight per task family or kind of task; some reasoning, so that it is kept.",
    )


class Distil(RLStage):
    """Eq. 2: on-policy distillation from earlier stages; the advantage is the teacher's log-ratio (3.5)."""

    type: Literal["distil"] = "distil"
    prompts: int = Field(1024, ge=1, description="Task instances per step.")
    group_size: int = Field(1, ge=1, description="Episodes per instance (G).")
    max_turns: int = Field(8, ge=1, description="Assistant turns per episode.")
    teachers: dict[str, str] = Field(
        {"reasoning": "reasoning_rl", "terminal": "agentic_rl", "general": "general_rl"},
        description="Which earlier stage teaches which kind of task.",
    )


Stage = Annotated[
    Pretrain | Midtrain | DSA | SFT | ReasoningRL | AgenticRL | GeneralRL | Distil,
    Field(discriminator="type"),
]
STAGE_TYPES: dict[str, type[Settings]] = {
    cls.model_fields["type"].default: cls
    for cls in (Pretrain, Midtrain, DSA, SFT, ReasoningRL, AgenticRL, GeneralRL, Distil)
}
"""Stage types in the order of the arc."""


class Data(Settings):
    """Documents to token rows (2.2)."""

    sources: list[str] = Field(
        ["builtin"],
        description="Built-in sources (builtin = all: local, debian-mix), or paths of text, JSONL, Parquet.",
    )
    unseen: list[str] = Field(
        [], description="Sources never trained on, kept for the held-out bits per byte."
    )
    max_mb: float = Field(8.0, gt=0, description="Megabytes of raw text read at most, all sources together.")
    heldout_fraction: float = Field(0.05, gt=0, lt=1, description="Share of documents held out by hash.")
    min_chars: int = Field(200, ge=0, description="Shorter documents are dropped.")
    max_chars: int = Field(30_000, ge=1, description="Longer documents are cut into pieces of this length.")
    dedup_threshold: float = Field(
        0.8, gt=0, le=1, description="MinHash similarity from which a document is a copy."
    )
    tokenizer_mb: float = Field(4.0, gt=0, description="Megabytes of text the tokenizer is trained on.")
    language_weight: int = Field(
        0, ge=0, description="Times the training tasks' own language enters the tokenizer's sample."
    )


class TaskSettings(Settings):
    """Which task families a run knows."""

    families: dict[str, list[str]] = Field(
        {},
        description="Families trained on, per kind of task; a kind not named here has all of its trained families.",
    )


class EngineSettings(Settings):
    """Where tokens come from during RL and evaluation."""

    url: str = Field("", description="A running server with SGLang's endpoints; empty = start our own.")
    max_batch: int = Field(64, ge=1, description="Sequences decoded together.")
    max_len: int = Field(2048, ge=8, description="Tokens per sequence, prompt included.")
    threads: int = Field(1, ge=1, description="CPU threads of the engine process.")
    dtype: EngineDtype = Field(
        "fp32",
        description="What our own engine samples in during RL; fp8 is emulated. The trainer corrects for the "
        "difference (rho) and logs it. Evaluations have their own (eval.dtype).",
    )


class SandboxSettings(Settings):
    """Where untrusted code runs."""

    backend: Literal["bubblewrap", "unsafe-local"] = Field("bubblewrap", description="Isolation.")
    timeout_s: float = Field(10.0, gt=0, description="Seconds per command.")
    memory_mb: int = Field(512, ge=16, description="Address space limit per process in MiB.")
    output_chars: int = Field(2000, ge=16, description="Characters of a command's output shown to the agent.")


class EvalSettings(Settings):
    """The stage x benchmark table."""

    after: Literal["each", "last"] = Field(
        "each", description="Evaluate after each stage or only at the end."
    )
    heldout_tokens: int = Field(32_768, ge=1, description="Tokens per held-out set for bits per byte.")
    problems: int = Field(32, ge=1, description="Problems per reasoning family.")
    instructions: int = Field(8, ge=1, description="Instructions per general family.")
    episodes: int = Field(8, ge=1, description="Agent episodes per terminal family.")
    needle_lengths: list[int] = Field(
        [256, 512, 1024], description="Context lengths of the needle tests in tokens."
    )
    needles: int = Field(8, ge=1, description="Needle tests per length.")
    max_new_tokens: int = Field(256, ge=1, description="Tokens sampled per assistant turn.")
    max_turns: int = Field(8, ge=1, description="Assistant turns per agent episode.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 = greedy.")
    dtype: EngineDtype = Field(
        "fp32", description="What the engine computes in; fp8 is emulated. Drafts are counted in fp32."
    )
