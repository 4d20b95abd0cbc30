"""ClassroomKD for pose estimation by heatmaps, on stick figures that are drawn here.

    pip install -c constraints.txt -e .
    python examples/pose.py

Each joint's heatmap is a row of the loss. docs/dense.md says what it shows.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from classroomkd import fused_classroom_loss

SIZE, CELLS = 32, 16  # pixels along a side of an image, and of a heatmap
BONES = ((0, 1), (1, 2), (1, 3), (1, 4), (0, 5), (0, 6))  # hip, neck, head, two hands, two feet


def drawn(count):
    """Noisy images [N, 1, H, W], joints [N, J, 2] as (x, y), and which are seen [N, J]."""
    upright, swing = torch.tensor([[0, 0, 1.2, -1.2, 2.7, -2.7], [0.2, 0.2, 0.9, 0.9, 0.3, 0.3]])
    angle = upright + swing * torch.randn(count, 6)
    length = torch.tensor([8, 4, 8, 8, 8, 8]) * (0.8 + 0.4 * torch.rand(count, 1))
    bones = length.unsqueeze(2) * torch.stack([angle.sin(), -angle.cos()], 2)
    joints, images = [SIZE * (0.35 + 0.3 * torch.rand(count, 2))], torch.zeros(count, SIZE, SIZE)
    grid = torch.stack(torch.meshgrid(*2 * [torch.arange(SIZE)], indexing="xy"), -1)
    for number, (start, _) in enumerate(BONES):
        joints.append(joints[start] + bones[:, number])
        a, line = joints[start][:, None, None], bones[:, number, None, None]
        along = ((grid - a) * line).sum(-1, True) / line.square().sum(-1, True)
        distance = (grid - a - along.clamp(0, 1) * line).norm(dim=-1)
        images = images.maximum((1.5 - distance).clamp(0, 1))
    joints, square = torch.stack(joints, 1), SIZE * torch.rand(count, 1, 1, 2)
    images = torch.where(((grid - square).abs() < 5).all(-1), 0.5, images)  # hides a part
    seen = ((joints - square[:, 0]).abs().amax(-1) >= 5) & (joints == joints.clamp(0, SIZE)).all(-1)
    return (images + 0.2 * torch.randn(images.shape)).unsqueeze(1), joints, seen


def network(width):  # from images [B, 1, H, W] to a heatmap's logits for each joint [B, J, H·W / 4]
    layers, wide = [], 2 * width
    for inputs, outputs, stride in ((1, width, 2), (width, wide, 2), *2 * [(wide, wide, 1)]):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    head = nn.Conv2d(wide, 1 + len(BONES), 3, padding=1)
    return nn.Sequential(*layers, nn.Upsample(scale_factor=2, mode="bilinear"), head, nn.Flatten(2))


def train(student, mentors, images, joints, seen, steps):
    cells = 0.5 + torch.cartesian_prod(*2 * [torch.arange(CELLS)]).flip(1)  # centres, as (x, y)
    distances = ((joints + 0.5) * CELLS / SIZE).unsqueeze(2) - cells
    heatmaps = torch.softmax(-distances.square().sum(-1) / 2, -1)  # Gaussians of one cell
    options = {"mentor_weight": 0.2, "task_weight": 1.0, "temperature": 4.0}
    optimizer = torch.optim.AdamW(student.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for chosen in torch.randint(len(images), (steps, 32)):
        logits, targets = student(images[chosen]).flatten(0, 1), heatmaps[chosen].flatten(0, 1)
        of_mentors = [mentor(images[chosen]).flatten(0, 1) for mentor in mentors]  # [B·J, H·W]
        weight = seen[chosen].flatten().float()  # nothing to learn from a joint that is hidden
        loss = cross_entropy(logits, targets, reduction="none") @ weight / weight.sum()
        if mentors:
            loss = fused_classroom_loss(logits, of_mentors, targets, row_weight=weight, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.eval().requires_grad_(False)


def pck(student, images, joints, seen):
    """The share of the seen joints that are found to within two pixels."""
    cell = student(images).argmax(-1)
    found = (torch.stack([cell % CELLS, cell // CELLS], -1) + 0.5) * SIZE / CELLS - 0.5
    return ((found - joints).norm(dim=-1) < 2)[seen].float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    steps, seed = vars(parser.parse_args()).values()
    torch.manual_seed(seed)
    data, test = drawn(512), drawn(512)
    networks = [train(network(16), [], *data, steps), train(network(8), [], *data, steps // 2)]
    for mentors in ([], [*networks]):
        torch.manual_seed(seed)  # the same first weights and batches
        networks.append(train(network(4), mentors, *data, steps))
    found = [f"{pck(one, *test):.4f}" for one in networks]
    print("held-out PCK: mentors {}, {}, alone {}, in the classroom {}".format(*found))
