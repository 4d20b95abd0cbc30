"""Packaging. The kernels stand at the top of the tree and install as ``classroomkd.kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "classroomkd/__init__.py").read_text(), re.M)
# Outside the repository its pictures and links to its files lead nowhere.
README = re.sub(
    r"!\[[^]]*\]\((?!https?:)[^)]*\)\n+|\[([^]]*)\]\((?!https?:)[^)]*\)",
    r"\1",
    (HERE / "README.md").read_text(encoding="utf-8"),
)

TIMM, TENSORBOARD = ["timm>=1.0"], ["tensorboard>=2.17"]
EXAMPLES = ["accelerate>=1.1", "lightning>=2.4", "transformers>=5.23", "trl>=1.16"]
TRAIN = [
    "filelock>=4",
    "matplotlib>=3.8",
    "omegaconf>=2.4",
    "pillow>=10",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4",
    "scikit-learn>=1.4",
    "scipy>=1.10",
    "torchvision>=0.21",
]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]
TEST = [
    "hypothesis>=6.100",
    "mypy>=1.13",
    "psutil>=5.9",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.5",
    "ruff>=0.8",
    "selenium>=4.20",
    "setuptools>=77",
    "types-psutil",
    "types-pyyaml",
]

setup(
    name="classroomkd",
    version=VERSION[1],
    description="Multi-mentor knowledge distillation with a fused Triton loss",
    long_description=README,
    long_description_content_type="text/markdown",
    author="The classroomkd developers",
    project_urls={"Paper": "https://arxiv.org/abs/2409.20237"},
    keywords="knowledge distillation, multi-teacher, PyTorch, Triton, model compression",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    package_data={"classroomkd": ["py.typed", "recipes/**/*.yaml"]},
    python_requires=">=3.11",
    packages=[*find_packages(include=["classroomkd", "classroomkd.*"]), "classroomkd.kernels"],
    package_dir={"classroomkd": "classroomkd", "classroomkd.kernels": "kernels"},
    install_requires=[  # what the loss needs
        "torch>=2.6",
        "triton>=3.2; sys_platform == 'linux'",
        "numba>=0.60",
        "numpy>=1.26",
    ],
    extras_require={
        "train": TRAIN,  # the command line, training and reports
        "ffcv": ["opencv-python-headless>=4.9", "setuptools", "tqdm>=4.66"],
        "timm": TIMM,
        "tensorboard": TENSORBOARD,
        "liger": ["liger-kernel>=0.5"],
        "docs": DOCS,
        "examples": TRAIN + EXAMPLES,
        "test": TRAIN + TEST + DOCS + EXAMPLES + TIMM + TENSORBOARD,
    },
    entry_points={"console_scripts": ["classroomkd = classroomkd.cli:main"]},
)
