"""ClassroomKD for semantic segmentation, on shapes that are drawn here.

    pip install -c constraints.txt -e .
    python examples/segmentation.py

Every pixel is a row of the loss, and rare classes weigh more. docs/dense.md says what it shows.
"""

import argparse

import torch
from torch import nn

from classroomkd import fused_classroom_loss

SIZE, CLASSES = 32, 4  # pixels along a side; background, disc, square, cross


def drawn(count):
    """Noisy images [N, 1, H, W] of three shapes each, and the class of every pixel [N, H, W]."""
    images, classes = torch.zeros(count, SIZE, SIZE), torch.zeros(count, SIZE, SIZE).long()
    grid = torch.stack(torch.meshgrid(*2 * [torch.arange(SIZE)], indexing="ij"))
    for _ in range(3):
        y, x = (grid - SIZE * torch.rand(count, 2, 1, 1)).abs().unbind(1)
        radius, kind = 4 + 3 * torch.rand(count, 1, 1), torch.randint(3, (count,))
        disc, square = x.hypot(y) < radius, x.maximum(y) < 0.9 * radius
        cross = (x.minimum(y) < 0.4 * radius) & (x.maximum(y) < radius)
        shape = torch.stack([disc, square, cross], 1)[torch.arange(count), kind]
        images = torch.where(shape, 0.4 + 0.6 * torch.rand(count, 1, 1), images)
        classes = torch.where(shape, 1 + kind[:, None, None], classes)
    return (images + 0.1 * torch.randn(images.shape)).unsqueeze(1), classes


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        down = [nn.MaxPool2d(2), block(width, 2 * width), nn.MaxPool2d(2)]
        up = [nn.Upsample(scale_factor=2), block(4 * width, 2 * width), nn.Upsample(scale_factor=2)]
        self.fine = block(1, width)
        self.coarse = nn.Sequential(*down, block(2 * width, 4 * width), *up)
        self.head = nn.Sequential(block(3 * width, width), nn.Conv2d(width, CLASSES, 1))

    def forward(self, images):
        fine = self.fine(images)
        return self.head(torch.cat([fine, self.coarse(fine)], 1))


def train(network, mentors, images, classes, steps):
    weight = (classes.numel() / classes.flatten().bincount()).sqrt()  # of C classes; rare ones more
    options = {"mentor_weight": "auto", "task_weight": 1.0, "class_weight": weight}
    optimizer = torch.optim.AdamW(network.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for chosen in torch.randint(len(images), (steps, 16)):
        logits, targets = network(images[chosen]), classes[chosen]  # [B, C, H, W], [B, H, W]
        of_mentors = [mentor(images[chosen]) for mentor in mentors]
        loss = nn.functional.cross_entropy(logits, targets, weight)
        if mentors:
            loss = fused_classroom_loss(logits, of_mentors, targets, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def mean_iou(network, images, classes):
    pairs = (CLASSES * classes + network(images).argmax(1)).flatten()
    pairs = pairs.bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)
    return (pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())).mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    steps, seed = vars(parser.parse_args()).values()
    torch.manual_seed(seed)
    train_set, test_set = drawn(256), drawn(256)
    networks = [train(UNet(12), [], *train_set, steps), train(UNet(6), [], *train_set, steps // 2)]
    for mentors in ([], [*networks]):
        torch.manual_seed(seed)  # the same first weights and batches
        networks.append(train(UNet(4), mentors, *train_set, steps))
    found = [f"{mean_iou(network, *test_set):.4f}" for network in networks]
    print("held-out mean IoU: mentors {}, {}, alone {}, in the classroom {}".format(*found))
