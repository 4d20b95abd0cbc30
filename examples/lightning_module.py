"""ClassroomKD in a LightningModule, on scikit-learn's handwritten digits.

    pip install -c constraints.txt -e ".[examples]"
    python examples/lightning_module.py
trains two mentors on 1,200 digits, and a student on 120, alone and in their classroom. For ten
classes, seeds 10 to 12 chose mentor weights of 1/4 ("auto"); docs/teaching.md shows seeds 0 to 4.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from classroomkd import ClassroomLoss
from classroomkd.torchvision import import_torchvision

import_torchvision()  # Lightning does, and fails if it was built for another torch
import lightning  # noqa: E402


class Classroom(lightning.LightningModule):
    def __init__(self, student, mentors=()):
        super().__init__()
        # A tuple and no ModuleList, so that mentors are neither trained nor saved in checkpoints.
        self.student, self.mentors = student, tuple(mentor.eval() for mentor in mentors)
        self.classroom_loss = ClassroomLoss(mentor_weight="auto", task_weight=1.0)

    def training_step(self, batch, batch_idx):
        images, targets = batch[0] + 0.2 * torch.randn_like(batch[0]), batch[1]
        if not self.mentors:
            return nn.functional.cross_entropy(self.student(images), targets)
        with torch.no_grad():
            mentor_logits = [mentor.to(self.device)(images) for mentor in self.mentors]
        return self.classroom_loss(self.student(images), mentor_logits, targets)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    epochs, seed = vars(parser.parse_args()).values()
    pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
    data = TensorDataset(pixels.float() / 16, digits)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)

    def fit(width, count, mentors=()):
        lightning.seed_everything(seed + width)
        loader = DataLoader(Subset(data, range(count)), 64 if count > 500 else 8, shuffle=True)
        network = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        lightning.Trainer(max_epochs=epochs, **quiet).fit(Classroom(network, mentors), loader)
        return network, f"{(network(data[1200:][0]).argmax(1) == digits[1200:]).float().mean():.4f}"

    (teacher, one), (peer, two), (_, three) = fit(256, 1200), fit(32, 1200), fit(32, 120)
    _, four = fit(32, 120, [teacher, peer])
    print(f"held-out accuracy: mentors {one}, {two}, alone {three}, in the classroom {four}")
