"""For every key of a DeepSpeed JSON that can change the arithmetic: settings with a value other than its default.

`key_ranks.py` trains under them on two ranks and compares with plain AdamW; `test_ds_key_table.py` says how.
"""

from __future__ import annotations

from typing import Any

from dwt_ds.base.trees import merge, set_place

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True}},
}
EVERY_STAGE, UNDER_ZERO, SHARDED = (0, 1, 2, 3), (1, 2, 3), (2, 3)
BOTH = ("fp32", "bf16")


Tried = tuple[str, tuple[Any, ...], tuple[int, ...], tuple[str, ...], dict[str, Any]]


def tried(
    key: str, *values: Any, stages: tuple[int, ...], precisions: tuple[str, ...] = ("bf16",), **beside: Any
) -> Tried:
    """Values of a key, where to try them, and settings beside it: of `zero_optimization` (`zero`), others (`top`)."""
    return key, values, stages, precisions, beside


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# DeepSpeed's buffers of the default size take a gigabyte. key_ranks.py puts a folder of its own in.
NVME = {"offload_param": {"device": "nvme", "nvme_path": "nvme", "buffer_size": 1000}}
# Key, values, ZeRO stages, precisions, settings beside it.
TRIED = [
    tried("communication_data_type", "fp32", stages=EVERY_STAGE),
    tried("communication_data_type", "bf16", "fp16", stages=EVERY_STAGE, precisions=("fp32",)),
    tried("dataloader_drop_last", True, stages=(2,)),
    tried("disable_allgather", True, stages=(0, 1, 2), precisions=BOTH),
    tried("disable_python_gc", True, stages=EVERY_STAGE),
    tried("dump_state", True, stages=(2,)),
    tried("gradient_allreduce_op", "sum", stages=(0, 1, 2), precisions=BOTH),
    tried("gradient_clipping", 0.1, stages=EVERY_STAGE, precisions=("fp32", "bf16", "fp16")),
    tried("gradient_predivide_factor", 2.0, stages=(0, 1), precisions=BOTH),
    tried("log_level", "info", stages=(2,)),
    tried("memory_breakdown", True, stages=(2, 3)),
    tried("prescale_gradients", True, stages=(0, 1), precisions=BOTH),
    tried("prescale_gradients", True, stages=SHARDED, precisions=BOTH, zero={"reduce_scatter": False}),
    tried("seq_parallel_communication_data_type", "bf16", stages=(2,)),
    tried("steps_per_print", 1, stages=(2,)),
    tried("vocabulary_size", 4, stages=(2,)),
    tried("wall_clock_breakdown", True, stages=EVERY_STAGE),
    tried("zero_allow_untested_optimizer", True, stages=(2, 3)),
    tried(
        "zero_force_ds_cpu_optimizer",
        False,
        stages=UNDER_ZERO,
        zero=OFFLOAD,
        top={"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
    ),
    tried("zero_optimization.contiguous_gradients", False, stages=UNDER_ZERO, precisions=BOTH),
    tried("zero_optimization.reduce_scatter", False, stages=UNDER_ZERO, precisions=BOTH),
    tried("zero_optimization.reduce_bucket_size", 40, stages=UNDER_ZERO, precisions=BOTH),
    tried("zero_optimization.use_multi_rank_bucket_allreduce", False, stages=(1, 2), precisions=BOTH),
    tried("zero_optimization.allgather_partitions", False, stages=(1, 2), precisions=BOTH),
    tried("zero_optimization.allgather_bucket_size", 40, stages=(1, 2), precisions=BOTH),
    tried("zero_optimization.overlap_comm", True, False, stages=UNDER_ZERO, precisions=BOTH),
    tried("zero_optimization.compute_grad_norm", True, stages=(2,)),
    tried("zero_optimization.elastic_checkpoint", True, stages=(3,), precisions=BOTH),
    tried("zero_optimization.offload_param", {"device": "cpu"}, stages=(3,), precisions=BOTH),
    tried(
        "zero_optimization.offload_param",
        {"device": "cpu", "pin_memory": False, "buffer_count": 2, "buffer_size": 1000, "max_in_cpu": 100},
        stages=(3,),
        zero=OFFLOAD,
    ),
    tried("zero_optimization.offload_param", NVME["offload_param"], stages=(3,), precisions=BOTH),
    tried("zero_optimization.offload_param", NVME["offload_param"], stages=(3,), precisions=BOTH, zero=OFFLOAD),
    tried(
        "zero_optimization.offload_optimizer", {"device": "cpu"}, stages=UNDER_ZERO, precisions=("fp32", "bf16", "fp16")
    ),
    tried(
        "zero_optimization.offload_optimizer",
        {"device": "cpu", "buffer_count": 2, "fast_init": True, "pin_memory": False},
        stages=UNDER_ZERO,
    ),
    tried("zero_optimization.offload_optimizer", {"device": "cpu", "ratio": 0.5}, stages=(3,), precisions=BOTH),
    tried(
        "zero_optimization.offload_optimizer",
        {"device": "cpu", "pipeline_read": True, "pipeline_write": True},
        stages=UNDER_ZERO,
    ),
    tried("zero_optimization.offload_optimizer", {"device": "cpu", "cpuadam_cores_perc": 0.5}, stages=(2, 3)),
    tried("zero_optimization.sub_group_size", 40, stages=(3,), precisions=BOTH),
    tried("zero_optimization.sub_group_size", 40, stages=(3,), zero=OFFLOAD),
    tried("zero_optimization.stage3_prefetch_bucket_size", 10, 0, stages=(3,), precisions=BOTH),
    tried("zero_optimization.stage3_param_persistence_threshold", 20, 100000, stages=(3,), precisions=BOTH),
    tried(
        "zero_optimization.stage3_model_persistence_threshold",
        20,
        stages=(3,),
        precisions=BOTH,
        zero={"stage3_param_persistence_threshold": 100000},
    ),
    tried("zero_optimization.stage3_max_live_parameters", 10, stages=(3,), precisions=BOTH),
    tried("zero_optimization.stage3_max_reuse_distance", 10, stages=(3,), precisions=BOTH),
    tried("zero_optimization.stage3_gather_16bit_weights_on_model_save", True, stages=(3,), precisions=BOTH),
    tried("zero_optimization.stage3_gather_fp16_weights_on_model_save", True, stages=(3,)),
    tried("zero_optimization.stage3_use_all_reduce_for_fetch_params", True, stages=(3,), precisions=BOTH),
    tried("zero_optimization.stage3_allgather_sequential", True, stages=(3,), precisions=BOTH),
    tried("zero_optimization.prefetch_bucket_size", 10, stages=(3,)),
    tried("zero_optimization.param_persistence_threshold", 20, stages=(3,)),
    tried("zero_optimization.ignore_unused_parameters", False, stages=UNDER_ZERO, precisions=BOTH),
    tried("zero_optimization.parameter_alignment", True, stages=UNDER_ZERO, precisions=BOTH),
    tried("zero_optimization.zero_hpz_partition_size", 2, stages=(3,), precisions=BOTH),
    tried("zero_optimization.memory_efficient_linear", False, stages=(3,), precisions=BOTH),
    tried("zero_optimization.override_module_apply", False, stages=(3,)),
    tried("zero_optimization.log_trace_cache_warnings", True, stages=(3,)),
    tried("zero_optimization.enable_sanity_checks", True, stages=UNDER_ZERO),
    tried("zero_optimization.save_muon_momentum_buffer_in_memory", True, stages=(3,)),
    tried("zero_optimization.leaf_module", {"names": ["second"]}, stages=(3,), precisions=BOTH),
    tried("bf16.immediate_grad_update", True, stages=EVERY_STAGE),
    tried("bf16.check_grad_overflow", True, stages=EVERY_STAGE),
    tried(
        "bf16.bf16_optimizer_states",
        True,
        stages=(2, 3),
        zero=OFFLOAD,
        top={"bf16": {"bf16_master_weights_and_grads": True}},
    ),
    tried("fp16.auto_cast", True, stages=EVERY_STAGE, precisions=("fp16",)),
    tried("fp16.loss_scale", 8.0, stages=EVERY_STAGE, precisions=("fp16",)),
    tried("fp16.initial_scale_power", 4, stages=EVERY_STAGE, precisions=("fp16",)),
    tried("fp16.loss_scale_window", 1, stages=EVERY_STAGE, precisions=("fp16",)),
    tried("fp16.hysteresis", 1, stages=EVERY_STAGE, precisions=("fp16",)),
    tried("fp16.consecutive_hysteresis", True, stages=EVERY_STAGE, precisions=("fp16",)),
    tried("fp16.min_loss_scale", 4, stages=EVERY_STAGE, precisions=("fp16",)),
    tried(
        "torch_autocast.enabled",
        True,
        stages=EVERY_STAGE,
        precisions=("fp32",),
        top={"torch_autocast": {"dtype": "bfloat16"}},
    ),
    tried(
        "torch_autocast.dtype",
        "bf16",
        stages=EVERY_STAGE,
        precisions=("fp32",),
        top={"torch_autocast": {"enabled": True}},
    ),
    tried(
        "torch_autocast.lower_precision_safe_modules",
        ["torch.nn.Linear"],
        stages=EVERY_STAGE,
        precisions=("fp32",),
        top={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    ),
    tried("data_types.param_dtype", "bf16", stages=EVERY_STAGE),
    tried("data_types.buffer_dtype", "fp32", stages=EVERY_STAGE),
    tried("data_types.keep_in_fp32_modules", ["norm"], stages=EVERY_STAGE),
    tried("activation_checkpointing.partition_activations", True, stages=(2,)),
    tried("activation_checkpointing.number_checkpoints", 2, stages=(2,)),
    tried(
        "activation_checkpointing.contiguous_memory_optimization",
        True,
        stages=(2,),
        top={"activation_checkpointing": {"partition_activations": True, "number_checkpoints": 2}},
    ),
    tried("activation_checkpointing.synchronize_checkpoint_boundary", True, stages=(2,)),
    tried("activation_checkpointing.cpu_checkpointing", True, stages=(2,)),
    tried("activation_checkpointing.profile", True, stages=(2,)),
    tried("checkpoint.tag_validation", "Fail", stages=EVERY_STAGE),
    tried("checkpoint.parallel_write.pipeline_stage", True, stages=EVERY_STAGE),
    tried("timers.throughput.enabled", False, stages=EVERY_STAGE),
    tried("timers.throughput.synchronized", False, stages=EVERY_STAGE),
    tried("gradient_predivide_factor", 2.0, stages=(2,), precisions=BOTH, zero={"reduce_scatter": False}),
    tried(
        "prescale_gradients",
        True,
        stages=(0, 1, 2),
        precisions=BOTH,
        top={"gradient_predivide_factor": 2.0},
        zero={"reduce_scatter": False},
    ),
    tried("zero_optimization.load_from_fp32_weights", False, stages=(3,), precisions=BOTH),
    tried("zero_optimization.round_robin_gradients", True, stages=(3,), precisions=BOTH),
    tried("data_types.grad_accum_dtype", "fp32", stages=(2, 3), precisions=("bf16", "fp16")),
    tried("data_types.grad_accum_dtype", "bf16", stages=UNDER_ZERO, precisions=("fp32",)),
    tried(
        "flops_profiler",
        {
            "enabled": True,
            "profile_step": 2,
            "module_depth": 1,
            "top_modules": 2,
            "detailed": False,
            "recompute_fwd_factor": 0.5,
            "output_file": "/dev/null",
        },
        stages=EVERY_STAGE,
    ),
    tried(
        "comms_logger",
        {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["all_reduce"], "debug": True},
        stages=EVERY_STAGE,
    ),
    tried(
        "aio",
        {
            "block_size": 4096,
            "queue_depth": 2,
            "intra_op_parallelism": 2,
            "single_submit": True,
            "overlap_events": False,
            "use_gds": False,
        },
        stages=(3,),
        precisions=BOTH,
        zero=NVME,
    ),
    tried("zero_optimization.leaf_module", {"classes": ["torch.nn.modules.linear.Linear"]}, stages=(3,)),
    tried("zero_optimization.leaf_module", {"name_suffixes": ["second"]}, stages=(3,)),
]


def cases() -> dict[str, dict[str, Any]]:
    """Name -> settings; a name begins with the key."""
    found: dict[str, dict[str, Any]] = {}
    for key, values, stages, precisions, beside in TRIED:
        for value in values:
            for stage in stages:
                for precision in precisions:
                    settings = merge(PRECISIONS[precision], beside.get("top", {}))
                    if stage:
                        settings = merge(settings, {"zero_optimization": {"stage": stage, **beside.get("zero", {})}})
                    set_place(settings, key, value)
                    if stage or not key.startswith("zero_opt"):
                        found[f"{key}={value} ZeRO-{stage} {precision} {beside or ''}".strip()] = settings
    return found


def on_nvme(settings: dict[str, Any]) -> bool:
    """Whether it keeps parameters on an NVMe drive, which needs libaio."""
    return settings.get("zero_optimization", {}).get("offload_param", {}).get("device") == "nvme"
