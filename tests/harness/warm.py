"""What the server of ranks has loaded and looked up before its first fork.

These modules bring most of what a run imports; the last four are imported by DeepSpeed and torch while they are used.
"""

# ruff: noqa: F401
from __future__ import annotations

import functools

import cpuinfo
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer
import pandas
import torch.utils.cpp_extension
import torch.utils.serialization.config
import transformers.models.bert.modeling_bert
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import dwt_ds.export.verify
import dwt_ds.run.assemble
import harness.ranks

# DeepSpeed asks twice a run, and each time a process is started for it.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()

# Looked up once by every process: patterns of the weights of all models, and for which operators there is a compiler.
get_checkpoint_conversion_mapping("bert")
deepspeed.ops.__compatible_ops__  # noqa: B018
