"""The settings of a run: one dataclass tree, filled from a YAML recipe and then from dotted overrides.

A number whose meaning needs a unit carries it in its name. What is not here is decided elsewhere: the vocabulary
and the sequence length by the data folder, precision and ZeRO stage by the DeepSpeed JSON.
"""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

_Decay = Annotated[float, Field(ge=0, lt=1)]
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(config=_STRICT)
class Schedule:
    """A value that changes over training, from `start` to `end` within the span, and stays at `end` after it."""

    schedule: Literal["constant", "linear", "cosine", "exponential", "step", "adaptive"] = "constant"
    """constant: `start` throughout. step: `start` up to the end of the span, then `end`. adaptive, for the soft weight
    only: between `start` and `end` as the student catches up with the teacher. The others move smoothly."""
    start: float = 1.0
    """Value at step 0."""
    end: float | None = None
    """Value at the end of the span; required by all but `constant` and `adaptive`, which never goes below it (0)."""
    span: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The span as a share of all training steps."""
    span_steps: PositiveInt | None = None
    """The span in optimizer steps; takes the place of `span`."""
    signal: Literal["gap", "projection"] = "projection"
    """adaptive: what the weight follows; see dwt_ds/distill/adaptive.py."""
    width: PositiveFloat = 0.5
    """adaptive, signal `gap`: at so much more loss than the teacher's (nats) the weight is all of `start`."""
    average_steps: PositiveInt = 50
    """adaptive: optimizer steps over which the student's losses are averaged."""

    def __post_init__(self) -> None:
        if self.schedule == "constant":
            if self.end not in (None, self.start):
                raise ValueError(f"end={self.end} has no meaning for a constant; set schedule to linear, say")
        elif self.end is None and self.schedule != "adaptive":
            raise ValueError(f"end is missing; schedule {self.schedule!r} needs the value it goes to")
        if self.schedule == "exponential" and not (self.start > 0 and self.end and self.end > 0):
            raise ValueError(f"start={self.start}, end={self.end}: an exponential needs both above 0; use linear")


def _number_is_a_constant(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    return {"schedule": "constant", "start": value}


Scheduled = Annotated[Schedule, BeforeValidator(_number_is_a_constant)]


@dataclass(config=_STRICT)
class DataConfig:
    """The prepared data folder and how tokens are masked."""

    dir: str = "data/pretrain"
    """Folder that `dwt-ds prepare` wrote; it also sets vocabulary and sequence length."""
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the maskable tokens that become labels."""
    mask_share: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the labelled tokens shown as [MASK]."""
    random_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the labelled tokens shown as a random token; the rest are shown as they are."""
    label_draw: Literal["fixed", "bernoulli"] = "fixed"
    """fixed: the same number of labels in every full row; bernoulli: each token by its own draw."""
    whole_word: bool = False
    """Mask all pieces of a word together."""
    workers: NonNegativeInt = 0
    """Loader processes a rank; 0 makes batches in the training process."""

    def __post_init__(self) -> None:
        if self.mask_share + self.random_share > 1:
            raise ValueError(f"mask_share={self.mask_share} + random_share={self.random_share} is above 1; lower one")


@dataclass(config=_STRICT)
class StudentConfig:
    """The model that is trained."""

    family: str = "bert"
    """Any Hugging Face model type that has a masked-LM class: bert, roberta, distilbert, modernbert, electra, ..."""
    layers: PositiveInt = 6
    """Transformer layers."""
    hidden_size: PositiveInt = 768
    """Width of the hidden states."""
    num_heads: PositiveInt = 12
    """Attention heads; must divide hidden_size."""
    intermediate_size: PositiveInt | None = None
    """Width of the feed-forward layer; null: 4 x hidden_size."""
    max_positions: PositiveInt = 512
    """Longest sequence the position embeddings allow."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout of hidden states, attention and embeddings alike."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; auto: eager on a CPU, sdpa on a GPU."""
    init: str = "random"
    """Where the weights start: random, or filled from the teacher: remap (the paper's), stack, bert2bert or interlace
    for depth; fna, net2net, fpi or aki for width; both as in stack+fpi. See docs/growth.md."""
    quantization: str | dict[str, Any] = "none"
    """Quantization-aware training: none, w8a8, w4a8, or a mapping with weight_bits, activation_bits, modules,
    start_step and group_size; see docs/quantization.md."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further fields of the Hugging Face configuration, by the names they have there."""


@dataclass(config=_STRICT)
class TeacherConfig:
    """The frozen, usually smaller model whose predictions guide the student."""

    path: str | None = None
    """Hugging Face folder or name; null trains the student alone, which is how teachers are made."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the teacher's forward pass; auto: the student's."""
    kernel_inject: bool | Literal["auto"] = "auto"
    """DeepSpeed's injected inference kernels; auto: used where a probe finds that they run and agree."""
    sharded: bool = False
    """Cut the teacher's weights over the ranks and gather them layer by layer (ZeRO-3), for one too large to be whole
    on every rank; its head stays whole."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teacher's folder. Leave it off for models you did not write."""

    def __post_init__(self) -> None:
        if self.sharded and self.kernel_inject is True:
            raise ValueError("kernel_inject=true: not for a sharded teacher; set it to auto, or sharded to false")


@dataclass(config=_STRICT)
class DistillConfig:
    """The objective: hard_weight x cross-entropy + soft_weight x KL(teacher || student)."""

    hard_weight: NonNegativeFloat = 1.0
    """Weight of the masked-token cross-entropy."""
    soft_weight: Scheduled = field(default_factory=Schedule)
    """Weight of the KL divergence: a number, or a mapping with schedule, start, end and span."""
    temperature: Scheduled = field(default_factory=Schedule)
    """Softmax temperature of the soft loss: a number, or a mapping like soft_weight's."""
    soft_positions: Literal["labelled", "all"] = "labelled"
    """Rows of the soft loss: the masked tokens, or every real token."""
    temperature_squared: bool = False
    """Multiply the soft loss by the squared temperature, as Hinton et al. (2015) do; the paper does not."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Loss kernel; auto: Triton on a GPU, torch elsewhere."""
    memory: Literal["auto", "chunked", "logit_free"] = "auto"
    """How the head and the loss share memory; see kernels/README.md."""

    def __post_init__(self) -> None:
        if self.temperature.schedule == "adaptive":
            raise ValueError("temperature.schedule='adaptive': only the soft weight has it; use linear, say")
        if self.soft_weight.schedule == "adaptive":
            if self.soft_weight.start < (self.soft_weight.end or 0.0):
                raise ValueError(f"soft_weight.start={self.soft_weight.start} is below its end; swap them")
            if self.soft_weight.signal == "projection" and self.soft_positions == "all":
                raise ValueError("soft_weight.signal='projection' compares both losses on the same rows; use gap")
        for name, lowest in (("soft_weight", 0.0), ("temperature", None)):
            value: Schedule = getattr(self, name)
            for end in ("start", "end"):
                number = getattr(value, end)
                if number is None:
                    continue
                if lowest is None and number <= 0:
                    raise ValueError(f"{name}.{end}={number} must be above 0")
                if lowest is not None and number < lowest:
                    raise ValueError(f"{name}.{end}={number} must not be negative")


@dataclass(config=_STRICT)
class TrainConfig:
    """Length, batch, optimizer numbers, and how often things happen. Steps are optimizer steps."""

    max_steps: PositiveInt | None = None
    """Length of the run in optimizer steps; takes the place of `epochs`."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over the data."""
    micro_batch_size: PositiveInt = 16
    """Rows a rank sees in one forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches a rank adds up before an optimizer step."""
    learning_rate: PositiveFloat = 5e-4
    """Peak learning rate."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, where the optimizer has it."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm; 0 switches it off."""
    log_every: PositiveInt = 10
    """Steps between logged steps."""
    eval_every: NonNegativeInt = 0
    """Steps between looks at the held-out text; 0: only at the end."""
    eval_rows: PositiveInt | None = None
    """Held-out rows used at each look; null: all."""
    checkpoint_every: NonNegativeInt = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_last: PositiveInt = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    keep_every: NonNegativeInt = 0
    """Checkpoints at multiples of so many steps are kept for good; 0: none."""
    spike_sigma: PositiveFloat | None = None
    """Skip a step whose loss is over the mean of the last `spike_window` steps by so many standard deviations."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Steps whose losses `spike_sigma` looks back on."""
    skip_window: PositiveInt = 100
    """Recent steps over which skipped ones are counted."""
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """The run stops when more than this share of the last `skip_window` steps had to be skipped."""
    collective_timeout_seconds: PositiveFloat = 1800.0
    """A rank that waits longer for the others stops with an error."""
    report_stuck_after_seconds: PositiveFloat = 300.0
    """When no step ends for so long, rank 0 says which rank the others wait for, and where it stands."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest anew: less memory, a third more work."""
    export_every: NonNegativeInt = 0
    """Steps between exports kept at `export/step_XXXXXXXX`, to be scored along the way; 0: only the last model."""
    expected_world_size: PositiveInt | None = None
    """Number of ranks the run must come up with; another number stops it before training."""

    def warmup_steps(self, total_steps: int) -> int:
        """Steps in which the learning rate rises, of a run of `total_steps`."""
        return max(1, round(self.warmup_ratio * total_steps))


@dataclass(config=_STRICT)
class FusedConfig:
    """Fused parts of NVIDIA's apex; its optimizers are named in the DeepSpeed JSON."""

    layer_norm: Literal["auto", "apex", "torch"] = "auto"
    """Layer norm of the student; auto: apex's where a probe finds that it runs and agrees."""


@dataclass(config=_STRICT)
class RunConfig:
    """Everything about a run that is not DeepSpeed's own."""

    output_dir: str = "runs/pretrain"
    """The run's folder: resolved settings, metrics, checkpoints, export."""
    seed: NonNegativeInt = 42
    """Seed of weights, dropout, row order and masks."""
    deepspeed_config: str = "zero2_bf16"
    """DeepSpeed JSON: a path, or the name of a packaged one."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Changes to the DeepSpeed JSON, nested as it is."""
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    fused: FusedConfig = field(default_factory=FusedConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for YAML."""
        plain = asdict(self)
        plain["train"]["betas"] = list(plain["train"]["betas"])
        return plain
