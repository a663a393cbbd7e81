"""Package metadata. Ranges say what the code was run with; constraints.txt has the exact pins."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
SKLEARN = "scikit-learn>=1.7.2,<2"
HTTP = "aiohttp>=3.14.5,<4"

setup(
    name="dit_ds",
    version="0.4.0",
    description="Diffusion transformers (DiT) trained at scale with DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=["dit_ds"],
    package_data={"dit_ds": ["recipes/*.yaml"]},
    # Lower bounds are the oldest versions of constraints.txt (those for Python 3.10, where they
    # differ), with which the tests pass; upper bounds the next release that may break us.
    # DeepSpeed's is tight: we read ZeRO's partitions.
    install_requires=[
        "torch>=2.13,<3",
        "deepspeed>=0.19.8,<0.20",
        "diffusers>=0.41,<1",
        "webdataset>=1.0.2,<2",
        "numpy>=2.2.6,<3",
        "tensorboard>=2.21,<3",
        "pyyaml>=6.0.3,<7",
        "pydantic>=2.14,<3",
        "safetensors>=0.8,<1",
        "fsspec>=2026.9,<2028",
        "tqdm>=4.70,<5",
        "pillow>=12.3,<14",
    ],
    extras_require={
        "quickstart": [SKLEARN],
        # Data sets at https://. For s3:// and gs://: pip install "fsspec[s3]", "fsspec[gs]".
        "remote": [HTTP],
        "test": ["pytest>=9,<10", "pytest-timeout>=2.4,<3", "hypothesis>=6.150,<7", SKLEARN, HTTP],
        "dev": [
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "pre-commit>=4.6,<5",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
