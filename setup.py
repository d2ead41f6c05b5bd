"""Packaging of dwt_ds. The loss kernels are a distribution of their own: `pip install ./kernels .` installs both."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("dwt_ds").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

STUDY = ["accelerate>=1.3", "matplotlib>=3.8", "scikit-learn>=1.4", "scipy>=1.11"]
MONITOR = ["tensorboard>=2.15"]
QUANTIZATION = ["torchao>=0.18"]
LAMB = ["pytorch-optimizer>=4.1"]
COMPLETION = ["argcomplete>=3.1"]
# Dictionaries that know the words of Chinese and Thai; 100 MB.
WORDS = ["jieba>=0.42.1", "pythainlp>=5.0"]

setup(
    name="dwt-ds",
    version=VERSION,
    description="Distillation from a weak teacher: pre-train masked language models on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["dwt_ds", "dwt_ds.*"]), "dwt_ds.ds_configs"],
    package_dir={"dwt_ds": "dwt_ds", "dwt_ds.ds_configs": "ds_configs"},
    package_data={
        "dwt_ds": ["py.typed", "config/recipes/*.yaml", "study/grids/*.yaml"],
        "dwt_ds.ds_configs": ["*.json"],
    },
    install_requires=[
        # Released together, with the same version: see kernels/setup.py.
        f"dwt-kernels=={VERSION}",
        "torch>=2.11",
        # The guard against bad numbers needs DeepSpeed to skip steps as 0.19.8 does.
        "deepspeed>=0.19.8",
        "transformers>=5.17",
        "datasets>=5.0",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "pyarrow>=24",
        "pydantic>=2.11",
        "typing_extensions>=4.10",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "safetensors>=0.8",
        "psutil>=5.9",
        "syntok>=1.4.4",
        # Which marks end a sentence in which script. syntok and transformers need it, too.
        "regex>=2025.10.22",
        "xxhash>=3.4",
        # DeepSpeed compiles its operators at first use.
        "ninja>=1.11",
        "setuptools>=70",
    ],
    extras_require={
        "study": STUDY,
        "monitor": MONITOR,
        "wandb": ["wandb>=0.16"],
        "quantization": QUANTIZATION,
        "lamb": LAMB,
        "words": WORDS,
        "completion": COMPLETION,
        "dev": [
            *STUDY,
            *MONITOR,
            *QUANTIZATION,
            *LAMB,
            *COMPLETION,
            "hypothesis>=6.100",
            # For docs/first_run.ipynb.
            "ipykernel>=6.29",
            "mypy>=1.10",
            "nbclient>=0.10",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["dwt-ds=dwt_ds.cli.main:main"]},
)
