"""DeepSpeed JSON files as Hugging Face's documentation shows them, for its Trainer."""

from __future__ import annotations

from deepspeed.runtime.config import DeepSpeedConfig
from harness.ds_values import Resolve, autos

TRAINER_PRECISION = {
    "bf16": {"enabled": "auto"},
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
}
TRAINER_BATCH = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
TRAINER_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
TRAINER_WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


def test_a_trainers_zero_2_file_with_offload_works(resolve: Resolve) -> None:
    _, values = resolve(
        {
            **TRAINER_PRECISION,
            **TRAINER_BATCH,
            "optimizer": TRAINER_ADAMW,
            "scheduler": {"type": "WarmupLR", "params": TRAINER_WARMUP},
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "allgather_partitions": True,
                "allgather_bucket_size": 2e8,
                "overlap_comm": True,
                "reduce_scatter": True,
                "reduce_bucket_size": 2e8,
                "contiguous_gradients": True,
            },
        }
    )
    assert autos(values) == []
    assert values["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 5e-4,
        "warmup_num_steps": 5,
    }
    config = DeepSpeedConfig({**values, "train_batch_size": 16})
    assert (config.bfloat16_config.enabled, config.float16_config.enabled) == (True, False)


def test_a_trainers_zero_3_file_with_nvme_works_and_its_buckets_follow_the_width(resolve: Resolve) -> None:
    _, values = resolve(
        {
            **TRAINER_PRECISION,
            **TRAINER_BATCH,
            "optimizer": TRAINER_ADAMW,
            "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", **TRAINER_WARMUP}},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_count": 4},
                "offload_param": {"device": "nvme", "nvme_path": "/x", "buffer_size": 1e8, "max_in_cpu": 1e9},
                "overlap_comm": True,
                "contiguous_gradients": True,
                "sub_group_size": 1e9,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "aio": {"block_size": 262144, "queue_depth": 32},
            "communication_data_type": "fp32",
            "checkpoint": {"use_node_local_storage": False},
            "activation_checkpointing": {"partition_activations": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        "student.hidden_size=100",
    )
    assert autos(values) == []
    zero = values["zero_optimization"]
    # transformers' HfTrainerDeepSpeedConfig.trainer_config_finalize fills them by the same products.
    assert zero["reduce_bucket_size"] == 10_000
    assert zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    DeepSpeedConfig({**values, "train_batch_size": 16})
