"""The settings of a run: one dataclass tree, filled from a YAML recipe and then from dotted overrides.

A name carries the unit where the number needs one. What is not here is decided elsewhere: vocabulary and sequence
length by the data folder, precision and ZeRO stage by the DeepSpeed JSON.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from dwt_ds.base.words import check_fits_a_line
from dwt_ds.config.objective import DistillConfig
from dwt_ds.config.quantization import parse_quantization
from dwt_ds.config.validate import STRICT

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Of random numbers; generators take 64 bits with a sign."""
AttentionChoice = Literal["auto", "eager", "sdpa", "flash_attention_2"]
LayerNormChoice = Literal["auto", "apex", "torch"]

_Decay = Annotated[float, Field(ge=0, lt=1)]


def expand_path(text: str) -> str:
    """`text` with each ${NAME} replaced by the environment's; any other $ stands for itself."""
    path = text
    for name in re.findall(r"\$\{(\w+)\}", text):
        if name not in os.environ:
            raise ValueError(f"={text!r}: {name} is not set; export it, or write the path out")
        path = path.replace(f"${{{name}}}", os.environ[name])
    if not path:
        raise ValueError("='': is empty; name a file or folder")
    try:
        return check_fits_a_line(path)
    except ValueError as error:
        raise ValueError(f"={error}") from None


PathText = Annotated[str, AfterValidator(expand_path)]
"""A file, a folder, or a name on the Hugging Face hub, as the user wrote it; ${NAME} is an environment variable."""


def _check_set_names(sets: dict[str, str]) -> dict[str, str]:
    """`sets`, whose names become parts of keys in metrics.jsonl and of file names."""
    for name, path in sets.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise ValueError(f"{name!r}={path!r}: call a set by 1 to 64 of the letters a-z and A-Z, digits, _ and -")
    return sets


EvalSets = Annotated[dict[str, PathText], AfterValidator(_check_set_names)]
"""Name -> data folder."""


def _off_of_yaml(value: Any) -> Any:
    """YAML reads the word off as false."""
    return "off" if value is False else value


@dataclass(config=STRICT)
class DataConfig:
    """The prepared data folder and how tokens are masked."""

    dir: PathText = "data/pretrain"
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
    """Mask all pieces of a word together; the data folder says where words start."""
    workers: NonNegativeInt | Literal["auto"] = "auto"
    """Loader processes per rank; 0: batches are made in the training process; auto: 1 on a GPU, 0 on a CPU. Rows and
    masks do not depend on it."""

    def __post_init__(self) -> None:
        if self.mask_share + self.random_share > 1:
            raise ValueError(f"mask_share={self.mask_share} + random_share={self.random_share} is above 1; lower one")


@dataclass(config=STRICT)
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
    """Width of the feed-forward layers; null: 4 x hidden_size."""
    max_positions: PositiveInt = 512
    """Longest sequence, in tokens, that the position embeddings allow."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout probability of hidden states, attention weights and embeddings."""
    attention: AttentionChoice = "auto"
    """Attention implementation; auto: sdpa on a GPU if the family has it, else eager."""
    init: str = "random"
    """Initial weights: random, or grown from the teacher's by a depth map (remap, the paper's; stack, bert2bert,
    interlace), a width method (fna, net2net, fpi, aki), or both, as in stack+fpi. See docs/growth.md."""
    quantization: str | dict[str, Any] = "none"
    """Quantization-aware training: none, w8a8, w4a8, or a mapping with weight_bits, activation_bits, modules,
    start_step and group_size; see docs/quantization.md."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further fields of the Hugging Face configuration, by their names there."""

    def __post_init__(self) -> None:
        parse_quantization(self.quantization, "quantization")


@dataclass(config=STRICT)
class TeacherConfig:
    """The frozen model, usually smaller, whose predictions the student learns from."""

    path: PathText | None = None
    """Hugging Face folder or name; null: the student trains alone, which is how teachers are made."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the teacher's forward pass; auto: the student's."""
    kernel_inject: bool | Literal["auto"] = False
    """DeepSpeed's injected inference kernels; auto: if a trial on every rank finds that they run and give the same
    logits."""
    sharded: bool = False
    """Shard the teacher's weights over the ranks and gather them layer by layer (ZeRO-3), for a teacher that does not
    fit on every rank. Its head is not sharded."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teacher. Leave it off for models you do not trust."""
    vocabulary: Literal["same", "shared"] = "same"
    """same: the teacher's vocabulary must be the data folder's; shared: it may be another, and the soft loss compares
    both models' predictions on the entries that both vocabularies have."""
    release: Literal["auto", "never"] = "auto"
    """auto: the teacher is freed once the soft weight is 0 for good, and the student trains on alone; never: it stays
    to the end."""
    release_after_steps: PositiveInt | None = None
    """With an adaptive soft weight: the teacher is freed when the weight has been low (`release_below_share`) for this
    many optimizer steps; null: soft_weight.average_steps."""
    release_below_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """With an adaptive soft weight: the weight is low while it is below this share of `start`. After the release the
    loss is the cross-entropy alone, so a large share cuts the soft loss off while it still has weight."""

    def __post_init__(self) -> None:
        if self.sharded and self.kernel_inject is True:
            raise ValueError("kernel_inject=true: not for a sharded teacher; set it to auto, or sharded to false")


@dataclass(config=STRICT)
class TrainConfig:
    """Length, batch, optimizer numbers, and how often things happen. Steps are optimizer steps."""

    max_steps: PositiveInt | None = None
    """Length of the run in optimizer steps; overrides `epochs`."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over the data; a `max_steps` of the recipe or its base must be set to null then."""
    micro_batch_size: PositiveInt = 16
    """Rows of one forward pass on one rank."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per rank and optimizer step."""
    learning_rate: PositiveFloat = 5e-4
    """Peak learning rate."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps over which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of all parameters, biases and norms included, if the optimizer has it."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm; 0: no clipping."""
    log_every: PositiveInt = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations; 0: only at the end."""
    eval_rows: PositiveInt | None = None
    """Validation rows of each evaluation, of the data folder and of each of `eval_sets`; null: all."""
    eval_mask_probability: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the tokens that evaluations of the student mask, so that runs with different `data.mask_probability`
    compare; null: as in training. The teacher's own loss is measured as in training."""
    eval_sets: EvalSets | None = None
    """Further data folders, NAME: FOLDER, made with the same tokenizer. Each evaluation measures the student's loss on
    their held-out rows, too: `eval_hard_loss.NAME` in metrics.jsonl. null: none."""
    checkpoint_every: NonNegativeInt = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_last: PositiveInt = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    keep_every: NonNegativeInt = 0
    """Checkpoints at multiples of this many steps are never deleted; 0: no such checkpoints."""
    spike_sigma: PositiveFloat | None = None
    """Skip a step whose hard loss exceeds the mean of the last `spike_window` steps by this many standard deviations;
    null: skip none."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Number of steps whose hard losses `spike_sigma` compares with."""
    skip_window: PositiveInt = 100
    """Number of recent steps in which `max_skipped_share` counts the skipped ones."""
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """The run stops if more than this share of the last `skip_window` steps was skipped."""
    collective_timeout_seconds: PositiveFloat = 1800.0
    """A rank that waits longer than this for the others stops with an error."""
    report_stuck_after_seconds: PositiveFloat = 300.0
    """If no step ends for this long, rank 0 reports which rank the others wait for, and where that rank is. At
    most half of `collective_timeout_seconds`, after which the run ends."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and recompute the rest: less memory, a third more work."""
    compile: Annotated[Literal["auto", "off", "layers"], BeforeValidator(_off_of_yaml)] = "auto"
    """torch.compile for the encoder layers of student and teacher, one by one; auto: on a GPU, unless ZeRO's stage
    is 3."""
    cuda_graphs: Annotated[Literal["auto", "off"], BeforeValidator(_off_of_yaml)] = "auto"
    """CUDA graphs on a GPU, for micro-batches whose shape recurs; auto: the teacher's forward pass and, under ZeRO-2,
    the student's passes. docs/speed.md says what can be combined with it."""
    export_every: NonNegativeInt = 0
    """Steps between exports to `export/step_XXXXXXXX`, which GLUE can score later; 0: only the final model."""
    expected_world_size: PositiveInt | None = None
    """Number of ranks the run must have; with any other number it stops before training. null: any number."""

    def warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps over which the learning rate rises, in a run of `total_steps`."""
        return max(1, round(self.warmup_ratio * total_steps))


@dataclass(config=STRICT)
class FusedConfig:
    """Fused modules of NVIDIA's apex. Its optimizers are chosen in the DeepSpeed JSON."""

    layer_norm: LayerNormChoice = "auto"
    """Layer norm of the student; auto: apex's if a probe finds that it runs and gives the same results."""


@dataclass(config=STRICT)
class RunConfig:
    """All settings of a run, except for those of the DeepSpeed JSON."""

    output_dir: PathText = "runs/pretrain"
    """The run's folder: resolved settings, metrics, checkpoints, export."""
    seed: Seed = 42
    """Seed of weights, dropout, row order and masks."""
    deepspeed_config: PathText = "zero2_bf16"
    """DeepSpeed JSON: a path, or the name of a packaged one."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Changes to the DeepSpeed JSON, nested like it."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data folder and the masking."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The model that is trained."""
    fused: FusedConfig = field(default_factory=FusedConfig)
    """Fused modules of NVIDIA's apex."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen model that the student learns from."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """The objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch, optimizer numbers, intervals."""

    def __post_init__(self) -> None:
        shares = self.teacher.path is not None and self.teacher.vocabulary == "shared"
        if shares and self.distill.soft_positions != "labelled":
            raise ValueError(
                f"distill.soft_positions={self.distill.soft_positions!r}: with teacher.vocabulary=shared the soft loss "
                "is on masked words that both vocabularies have; use labelled"
            )
        layer, layers = self.distill.hidden_layer or 1, self.student.layers
        if self.distill.hidden_weight and layer >= layers:
            raise ValueError(
                f"distill.hidden_layer={layer}: must be one below the student's last, and student.layers is {layers}; "
                "lower it, or set hidden_weight to 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for YAML."""
        plain = asdict(self)
        plain["train"]["betas"] = list(plain["train"]["betas"])
        return plain
