"""Settings that DeepSpeed would refuse once its engine starts are refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest
from harness.ds_values import Resolve
from harness.errors import error_of

BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


# What DeepSpeed 0.19.8 raised for it when `start_student` was called is behind each line.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (  # NotImplementedError: unsupported mix
        {**BF16, "data_types": {"grad_accum_dtype": "fp32"}},
        "my.json: data_types.grad_accum_dtype=fp32: without ZeRO, gradients are accumulated in the dtype of the "
        "weights, bf16; remove it, or set zero_optimization.stage to 1, 2 or 3",
    ),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "my.json: data_types.grad_accum_dtype=bf16: without ZeRO"),
    # ValueError: not a valid DtypeEnum
    ({**zero(2), "data_types": {"grad_accum_dtype": "fp23"}}, "my.json: data_types.grad_accum_dtype='fp23': must be"),
    (
        {**zero(2), "data_types": {"buffer_dtype": "fp23"}},
        "my.json: data_types.buffer_dtype='fp23': must be one of fp32, bf16",
    ),
    # AssertionError: conflicts with the enabled precision mode
    (
        {**BF16, **zero(2), "data_types": {"param_dtype": "fp32"}},
        "my.json: data_types.param_dtype=fp32: the JSON's precision is bf16; remove it",
    ),
    # AssertionError: not yet supported with ZeRO-2 with reduce scatter enabled
    (
        {**zero(2), "prescale_gradients": True},
        "my.json: prescale_gradients=True: ZeRO-2 cannot do that with reduce-scat",
    ),
    (
        {**zero(2), "gradient_predivide_factor": 2.0},
        "my.json: gradient_predivide_factor=2.0: ZeRO-2 cannot do that with",
    ),
    # AssertionError: Master weights feature requires ZeRO-2 Offload with DeepSpeedCPUAdam
    (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}, **zero(2)},
        "my.json: bf16.bf16_master_weights_and_grads=true: DeepSpeed has 16-bit master weights with an offloaded optim",
    ),
    # Exception: The deprecated version of ZeRO Stage 1 is not supported
    (zero(1, legacy_stage1=True), "my.json: zero_optimization.legacy_stage1=true: DeepSpeed removed it; remove the"),
    # RuntimeError: output with shape [1] doesn't match the broadcast shape, in the backward pass
    (
        zero(3, stage3_module_granularity_threshold=1000000),
        "my.json: zero_optimization.stage3_module_granularity_threshold=1000000: DeepSpeed would gather models as a",
    ),
    (zero(3, module_granularity_threshold=10), "my.json: zero_optimization.module_granularity_threshold=10: DeepSpeed"),
    # TypeError: expected str, bytes or os.PathLike object, not NoneType
    (
        zero(3, offload_param={"device": "nvme"}),
        "my.json: zero_optimization.offload_param: nvme needs an nvme_path; add it",
    ),
    (
        zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
        "my.json: zero_optimization.offload_optimizer.device=nvme: DeepSpeed has NVMe under ZeRO-3 only",
    ),
    (
        zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
        "my.json: zero_optimization.offload_optimizer.device=nvme: DeepSpeed 0.19.8 does not read such",
    ),
    ({**zero(3), "aio": {"use_gds": True}}, "my.json: aio.use_gds=true: it needs a GPU's kernels"),
    # GradScaler skips the step, and the engine counts it as taken.
    (
        {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
        "my.json: torch_autocast.dtype=fp16: without ZeRO, DeepSpeed does not report the steps it skips",
    ),
    (
        {"torch_autocast": {"enabled": True}},
        "my.json: torch_autocast.dtype: missing; torch would take fp16 on a GPU, and DeepSpeed would not scale the",
    ),
    (
        {"bf16": {"enabled": True}, "bfloat16": {"enabled": True}},
        "my.json: bfloat16: another name of the section bf16, which is also there; keep one of the two",
    ),
    (
        {
            "bfloat16": {"enabled": True, "bf16_master_weights_and_grads": True},
            **zero(2, offload_optimizer={"device": "cpu"}),
        },
        "my.json: bf16.bf16_master_weights_and_grads=true: a resume would round Adam's moments to 16 bits; remove it, ",
    ),
    # What follows trains, saves or resumes wrongly on two ranks (harness/key_cases.py).
    (
        {**zero(3, reduce_scatter=False), "gradient_predivide_factor": 2.0},
        "my.json: gradient_predivide_factor=2.0: ZeRO-3 would divide the gradients by it and not multiply",
    ),
    (zero(2, round_robin_gradients=True), "my.json: zero_optimization.round_robin_gradients=true: DeepSpeed loses tra"),
    (
        zero(1, load_from_fp32_weights=False),
        "my.json: zero_optimization.load_from_fp32_weights=false: a resume would begin from weights rounded",
    ),
    (zero(2, elastic_checkpoint=True), "my.json: zero_optimization.elastic_checkpoint=true: DeepSpeed does not read"),
    *(
        (
            zero(n, pipeline_loading_checkpoint=True),
            "my.json: zero_optimization.pipeline_loading_checkpoint=true: on sev",
        )
        for n in (2, 3)
    ),
    (zero(3, zero_quantized_weights=True), "my.json: zero_optimization.zero_quantized_weights=true: it needs a GPU's"),
    (
        zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
        "my.json: zero_optimization.offload_optimizer.super_offload=true: it needs a GPU's kernels",
    ),
    (
        {"checkpoint": {"use_node_local_storage": True}},
        "my.json: checkpoint.use_node_local_storage=true: a run's folder",
    ),
    ({"checkpoint": {"checkpoint_serialization": False}}, "my.json: checkpoint.checkpoint_serialization=false: DeepS"),
    (
        {**BF16, **zero(1), "data_types": {"grad_accum_dtype": "fp32"}},
        "my.json: data_types.grad_accum_dtype=fp32: under ZeRO-1 with bf16, DeepSpeed changes to an optimizer",
    ),
    (
        {
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
            **zero(2, offload_optimizer={"device": "cpu"}),
        },
        "my.json: bf16.bf16_master_weights_and_grads=true: a resume would round Adam's moments to 16 bits; remove it, ",
    ),
    (
        {
            "fp16": {"enabled": True, "fp16_master_weights_and_grads": True},
            **zero(2, offload_optimizer={"device": "cpu"}),
        },
        "my.json: fp16.fp16_master_weights_and_grads=true: a resume would round Adam's moments to 16 bits; remove it",
    ),
    # ZeroDivisionError, in the first step
    ({"steps_per_print": 0}, "my.json: steps_per_print=0: must be above 0; DeepSpeed divides by it"),
    ({"gradient_predivide_factor": 0}, "my.json: gradient_predivide_factor=0: must be above 0; DeepSpeed divides by"),
    # AssertionError: allgather_bucket_size must be a multiple of nccl_start_alignment_factor, 2
    (
        zero(2, allgather_bucket_size=5),
        "my.json: zero_optimization.allgather_bucket_size=5: must be even under ZeRO-2; add 1",
    ),
    ({"log_level": "loud"}, "my.json: log_level='loud': must be one of debug, info"),
    # What DeepSpeed's own configuration class refuses.
    (
        {**zero(3), "gradient_allreduce_op": "sum"},
        "my.json: DeepSpeed refuses these settings: gradient_allreduce_op='sum' is not supported with ZeRO stage 3",
    ),
    ({"gradient_allreduce_op": "max"}, "my.json: DeepSpeed refuses these settings: Invalid gradient_allreduce_op."),
    (
        {"communication_data_type": "int8"},
        "my.json: DeepSpeed refuses these settings: Invalid communication_data_type.",
    ),
    (
        zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        "my.json: DeepSpeed refuses these settings: Assertion failed, Partial offloading only supported for",
    ),
    (
        {"checkpoint": {"tag_validation": "maybe"}},
        "my.json: DeepSpeed refuses these settings: Checkpoint config contains invalid tag_validation value of MAYBE",
    ),
]


@pytest.mark.parametrize(("ds", "message"), REFUSED)
def test_settings_that_exclude_each_other_are_refused_in_one_line(
    ds: dict[str, Any], message: str, resolve: Resolve
) -> None:
    assert error_of(resolve, ds).startswith(message)


def test_an_override_is_named(resolve: Resolve) -> None:
    with pytest.raises(ValueError, match=r"^deepspeed\.data_types\.grad_accum_dtype=fp32: without ZeRO"):
        resolve(BF16, "deepspeed.data_types.grad_accum_dtype=fp32")


@pytest.mark.parametrize(
    "ds",
    [
        {**BF16, "data_types": {"grad_accum_dtype": "bfloat16"}},
        {**BF16, **zero(2), "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16", "buffer_dtype": "fp32"}},
        {**FP16, **zero(3), "data_types": {"grad_accum_dtype": None}},
        {**zero(1), "prescale_gradients": True},
        {**zero(2, reduce_scatter=False), "gradient_predivide_factor": 2.0},
        {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
        {
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
            **zero(2, offload_optimizer={"device": "cpu"}),
        },
    ],
)
def test_settings_that_go_together_are_taken(ds: dict[str, Any], resolve: Resolve) -> None:
    resolve(ds)
