"""Packaging. The kernels stand at the top of the tree and install as ``classroomkd.kernels``."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="classroomkd",
    version="0.1.0",
    description="Multi-mentor knowledge distillation with a fused Triton loss",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_data={"classroomkd": ["py.typed", "recipes/**/*.yaml"]},
    python_requires=">=3.11",
    packages=[*find_packages(include=["classroomkd", "classroomkd.*"]), "classroomkd.kernels"],
    package_dir={"classroomkd": "classroomkd", "classroomkd.kernels": "kernels"},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "triton>=3.2; sys_platform == 'linux'",
        "numba>=0.60",
        "numpy>=1.26",
        "omegaconf>=2.4",
        "pillow>=10",
        "plotly>=6",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.10",
    ],
    extras_require={
        "test": [
            "accelerate>=1.1",
            "hypothesis>=6.100",
            "lightning>=2.4",
            "matplotlib>=3.8",
            "psutil>=5.9",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.5",
            "ruff>=0.8",
            "selenium>=4.20",
            "tensorboard>=2.17",
            "timm>=1.0",
            "transformers>=5.23",
        ],
        "bench": ["matplotlib>=3.8", "pytest-benchmark>=5"],
        "examples": ["accelerate>=1.1", "lightning>=2.4", "transformers>=5.23"],
        "liger": ["liger-kernel>=0.5"],
        "timm": ["timm>=1.0"],
        "tensorboard": ["tensorboard>=2.17"],
        "ffcv": ["opencv-python-headless>=4.9", "setuptools", "tqdm>=4.66"],
    },
    entry_points={"console_scripts": ["classroomkd = classroomkd.cli:main"]},
)
