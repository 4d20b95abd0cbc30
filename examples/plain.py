"""ClassroomKD in a plain PyTorch loop, on scikit-learn's handwritten digits.

    pip install -c constraints.txt -e ".[train]"
    python examples/plain.py

Trains a teacher and a peer on 1,198 digits, and on 120 of these the same student twice, alone and
with these mentors, on the GPU if there is one. The networks come from the library's zoo and the
batches from its loader, but the loss needs only logits. A student with all digits has nothing left
to learn from its mentors. With ten classes, the mentor weight should be below the paper's 1: "auto"
is 1/4 for each of two. ``task_weight=1`` gives the labels their full weight; the paper's task
weight, the student's confidence, is too small at first for such a short training. Seeds 10 to 12
chose this; docs/teaching.md has the results of seeds 0 to 4. ``--seed`` sets the initial weights
and the batches.
"""

import argparse

import torch
import torch.nn.functional as F

from classroomkd import fused_classroom_loss_and_grad
from classroomkd.data import Augmentation, ImageSet, ResidentLoader, channel_statistics, digits
from classroomkd.models import create

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(name, mentors, images, epochs, seed):
    """Train a network of the zoo with ``mentors``, or alone if there are none."""
    torch.manual_seed(seed)
    student = create(name, num_classes=10).to(DEVICE)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(images))
    for epoch in range(epochs):
        images.set_epoch(epoch)
        for batch, targets, _ in images:
            logits = student(batch)
            if mentors:
                with torch.no_grad():
                    mentor_logits = [mentor(batch) for mentor in mentors]
                _, gradient = fused_classroom_loss_and_grad(
                    logits, mentor_logits, targets, mentor_weight="auto", task_weight=1.0
                )
                logits.backward(gradient)
            else:
                F.cross_entropy(logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return student.eval()


@torch.no_grad()
def accuracy(network, images):
    correct = sum((network(batch).argmax(1) == targets).sum() for batch, targets, _ in images)
    return int(correct) / images.count


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    epochs, seed = arguments.epochs, arguments.seed
    train_set, test_set = digits()
    mean, std = channel_statistics(train_set)
    options = {"mean": mean, "std": std, "device": DEVICE, "drop_last": False}
    crop = Augmentation(padding=2, flip=False)
    few_set = ImageSet(train_set.images[:120], train_set.targets[:120], train_set.classes)
    images = ResidentLoader(train_set, 64, augmentation=crop, shuffle=True, seed=seed, **options)
    few = ResidentLoader(few_set, 32, augmentation=crop, shuffle=True, seed=seed, **options)
    held_out = ResidentLoader(test_set, 200, augmentation=None, shuffle=False, **options)

    teacher = train("resnet14", [], images, epochs, seed)
    peer = train("resnet8", [], images, (epochs + 1) // 2, seed)  # weak: half the epochs
    alone = train("resnet8", [], few, 6 * epochs, seed)
    taught = train("resnet8", [teacher, peer], few, 6 * epochs, seed)
    shares = [f"{accuracy(network, held_out):.4f}" for network in (teacher, peer, alone, taught)]
    print(
        "held-out accuracy: mentors {}, {}, student alone {}, in the classroom {}".format(*shares)
    )
