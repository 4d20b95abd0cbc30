"""Published results for the classrooms of `classroomkd reproduce`."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Top-1 in percent."""

    teacher: float
    alone: float
    kd: float
    best: float


# Teacher, student alone and KD from the tables of RepDistiller (Tian, Krishnan, Isola: Contrastive
# Representation Distillation, ICLR 2020, and its repository); the best from NTCE-KD.
PUBLISHED = {
    ("resnet56", "resnet20"): Published(72.34, 69.06, 70.66, 73.46),
    ("resnet110", "resnet32"): Published(74.31, 71.14, 73.08, 75.71),
    ("resnet32x4", "resnet8x4"): Published(79.42, 72.50, 73.33, 78.66),
    ("wrn_40_2", "wrn_16_2"): Published(75.61, 73.26, 74.92, 77.65),
    ("wrn_40_2", "wrn_40_1"): Published(75.61, 71.98, 73.54, 76.44),
    ("vgg13", "vgg8"): Published(74.64, 70.36, 72.98, 76.33),
    ("resnet50", "mobilenetv2"): Published(79.34, 64.60, 67.35, 72.85),
    ("vgg13", "mobilenetv2"): Published(74.64, 64.60, 67.37, 72.06),
    ("resnet32x4", "shufflenetv1"): Published(79.42, 70.50, 74.07, 78.43),
    ("resnet32x4", "shufflenetv2"): Published(79.42, 71.82, 74.45, 79.43),
    ("wrn_40_2", "shufflenetv1"): Published(75.61, 70.50, 74.83, 78.66),
}
PUBLISHED_FROM = (
    "Published: top-1 on CIFAR-100's test images after 240 epochs; teacher, alone and KD from "
    "RepDistiller's tables; best from NTCE-KD, which uses stronger augmentation."
)
PUBLISHED_EPOCHS = 240
