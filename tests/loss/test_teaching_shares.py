"""Which classes each mentor teaches, against the report of the method's own loss."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from classroomkd.loss.methods import Outputs, create
from classroomkd.training.distributed import Processes
from classroomkd.training.evaluation import TeachingShares, evaluate
from small_runs import records, stored_run

CLASSES, IMAGES = 4, 60
PROCESSES = Processes(torch.device("cpu"))


class Table(nn.Module):
    """Gives every image, which is its number, logits of its own."""

    def __init__(self, seed: int, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = scale * torch.randn(IMAGES, CLASSES, generator=generator)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.rows[images]


TARGETS = torch.randint(3, (IMAGES,), generator=torch.Generator().manual_seed(9))  # no class 3
LOADER = [
    (torch.arange(IMAGES)[part], TARGETS[part], None) for part in (slice(0, 37), slice(37, None))
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"knowledge_filter": "correct"},
        {"knowledge_filter": "correct_and_better"},
        {"knowledge_filter": "none"},
        {"rank_decimals": 1},
        {"label_smoothing": 0.5},
        {"standardise": True},
        {"ranking": "batch"},
        {"ranking": "batch", "rank_decimals": 2, "standardise": True},
    ],
)
def test_a_class_is_taught_where_the_loss_teaches_it(options):
    method = create("classroom", **options)
    mentors = {"near": Table(1, 1.0), "far": Table(2, 5.0)}
    teaching = TeachingShares(method, mentors, LOADER, PROCESSES)
    found = []
    for student in (Table(3, 0.5), Table(4, 3.0)):
        evaluate(student, LOADER, watch=teaching.watch)
        found.append(teaching.shares())

        def report(rows: torch.Tensor, student: Table = student) -> list[float]:
            logits = student.rows[rows].clone().requires_grad_()
            taught = [Outputs(mentor.rows[rows]) for mentor in mentors.values()]
            return method.backward(Outputs(logits), taught, TARGETS[rows])[1].active_share.tolist()

        for place, shares in enumerate(found[-1].values()):
            for number in range(3):
                rows = torch.arange(IMAGES)  # of which a batch ranking makes one batch
                if options.get("ranking") != "batch":
                    rows = rows[number == TARGETS]
                expected = report(rows)[place]
                assert shares[number] == pytest.approx(expected, abs=1e-4)
            assert shares[3] is None
    assert found[0] != found[1] or options.get("knowledge_filter") in ("correct", "none")
    assert [mentor.calls for mentor in mentors.values()] == [2, 2], "once a batch, for all epochs"


@pytest.mark.usefixtures("store")
def test_runs_record_it_by_their_own_filter(tmp_path):
    stored_run(tmp_path / "all", "loss.knowledge_filter=none", "training.epochs=2")
    stored_run(tmp_path / "better", "training.epochs=2")
    everything, better = (
        [
            [shares for numbers in record["mentors"].values() for shares in numbers["taught"]]
            for record in records(tmp_path / run)
            if record["phase"] == "student"
        ]
        for run in ("all", "better")
    )
    assert len(everything) == len(better) == 2, "of every epoch"
    assert {share for epoch in everything for share in epoch} == {1.0}
    assert {share for epoch in better for share in epoch} - {1.0}
    assert "taught" not in json.loads((tmp_path / "all" / "summary.json").read_text())


@pytest.mark.usefixtures("store")
def test_a_run_says_how_it_was_started(tmp_path, monkeypatch):
    called = ["/opt/env/bin/classroomkd", "train", "--data", "my photos", "loss.temperature=4"]
    monkeypatch.setattr("sys.argv", called)
    stored_run(tmp_path / "run", "training.epochs=1")
    (line,) = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    start = json.loads(line)
    assert start["command"] == "classroomkd train --data 'my photos' loss.temperature=4"
    assert start["versions"]["torch"] == torch.__version__
    assert start["processor"]
    assert start["cores"] >= 1
    assert start["started"].endswith("+00:00")
