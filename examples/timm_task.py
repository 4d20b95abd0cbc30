"""ClassroomKD as a task of timm's, on scikit-learn's handwritten digits.

    pip install -c constraints.txt -e ".[examples]"
    python examples/timm_task.py

timm's distillation task has one teacher; this one has several, each of which gets its images
normalised as it wants them. Nothing is downloaded; ``--seed`` chooses the first weights.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from classroomkd import ClassroomLoss
from classroomkd.torchvision import import_torchvision

import_torchvision()  # timm does, and fails if it was built for another torch
import timm  # noqa: E402
from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask  # noqa: E402


class ClassroomTask(LogitDistillationTask):
    def __init__(self, student, mentors, **options):
        super().__init__(student, mentors[0], **options)
        self.mentors = torch.nn.ModuleList(map(DistillationTeacher, mentors)).requires_grad_(False)
        self.classroom_loss = ClassroomLoss(mentor_weight="auto", task_weight=1.0)

    def forward(self, images, targets):
        logits, own = self.trainable_module(images), (self.student_mean, self.student_std)
        with torch.no_grad():
            of_mentors = [mentor(mentor.normalize_input(images, *own)) for mentor in self.mentors]
        return {"loss": self.classroom_loss(logits, of_mentors, targets), "output": logits}


def fit(task, images, targets):
    network = task.get_trainable_module().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(1200).split(32):
            task(images[rows], targets[rows])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    predicted = network.eval()(images[1200:]).argmax(1)
    return f"{(predicted == targets[1200:]).float().mean():.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    epochs = parser.parse_args().epochs
    pixels, targets = map(torch.tensor, load_digits(return_X_y=True))
    images = F.interpolate(pixels.view(-1, 1, 8, 8).float() / 8 - 1, size=32).expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    names = ("test_resnet", "test_efficientnet", "test_convnext", "test_convnext")
    *mentors, alone, taught = (timm.create_model(name, num_classes=10) for name in names)
    one, two, three = (fit(ClassificationTask(n), images, targets) for n in (*mentors, alone))
    four = fit(ClassroomTask(taught, mentors), images, targets)  # which freezes the mentors
    print(f"held-out accuracy: mentors {one}, {two}, alone {three}, in the classroom {four}")
