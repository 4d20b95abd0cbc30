"""ClassroomKD in a LightningModule, on scikit-learn's handwritten digits.

    pip install -c constraints.txt -e ".[examples]"
    python examples/lightning_module.py

Trains two perceptrons on two thirds of the digits and, on a tenth of these, another one twice:
alone and with the first two as mentors. Mentors help most if they know more than the student's few
images show; noise gives them many variants of these. With ten classes, the mentor weight should be
below the paper's 1: here 3/8. ``--seed`` sets the split and the initial weights.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from classroomkd import ClassroomLoss
from classroomkd.torchvision import import_torchvision

import_torchvision()  # Lightning imports it too, and fails with another build of torch

import lightning  # noqa: E402


class Classroom(lightning.LightningModule):
    """A student that learns from ``mentors``, or alone if there are none."""

    def __init__(self, student, mentors=()):
        super().__init__()
        self.student = student
        # A tuple, not a ModuleList, so that mentors are neither trained nor saved in checkpoints.
        self.mentors = tuple(mentor.eval() for mentor in mentors)
        self.classroom_loss = ClassroomLoss(temperature=12.0, mentor_weight=0.375)

    def on_fit_start(self):
        for mentor in self.mentors:
            mentor.to(self.device)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        images = images + 0.2 * torch.randn_like(images)
        logits = self.student(images)
        if not self.mentors:
            return F.cross_entropy(logits, targets)
        with torch.no_grad():
            mentor_logits = [mentor(images) for mentor in self.mentors]
        loss, report = self.classroom_loss(logits, mentor_logits, targets, return_report=True)
        active = {f"active/{m}": share for m, share in enumerate(report.active_share)}
        self.log_dict(active, on_step=False, on_epoch=True)  # read from the device once per epoch
        return loss

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        self.log("accuracy", (self.student(images).argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def perceptron(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = {"max_epochs": arguments.epochs, "enable_progress_bar": False}
    options |= {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    lightning.seed_everything(arguments.seed)
    pixels, targets = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16).float(), torch.tensor(targets))
    train_set, test_set = random_split(data, [2 / 3, 1 / 3])
    few, _ = random_split(train_set, [0.1, 0.9])
    loader, loader_of_few = (
        DataLoader(train_set, 64, shuffle=True),
        DataLoader(few, 8, shuffle=True),
    )

    def fit(module, loader):
        trainer = lightning.Trainer(**options)
        trainer.fit(module, loader, DataLoader(test_set, 200))
        return trainer.callback_metrics

    mentors = [perceptron(256), perceptron(32)]
    teacher, peer = (fit(Classroom(mentor), loader)["accuracy"] for mentor in mentors)
    student = perceptron(32)
    alone = fit(Classroom(copy.deepcopy(student)), loader_of_few)
    taught = fit(Classroom(student, mentors), loader_of_few)
    print(
        f"held-out accuracy: mentors {teacher:.4f}, {peer:.4f}, student alone "
        f"{alone['accuracy']:.4f}, in the classroom {taught['accuracy']:.4f}"
    )
    print(f"share of the rows taught: {taught['active/0']:.2f}, {taught['active/1']:.2f}")
