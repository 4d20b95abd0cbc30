"""Two gloo processes train as one process with the whole batch does."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from image_folders import write_classes
from processes import COMMAND, Running

KINDS = ("alone", "sample", "batch", "scaled", "clipped")

# One epoch of a network without batch norm, some of whose rows do not count, with each kind of
# loss; argv: where to save, batch size of each process.
SCRIPT = f"""
    import sys
    from dataclasses import asdict
    import torch
    import torch.distributed as dist
    from torch import nn
    from small_runs import colours
    from classroomkd.loss.methods import Method, create
    from classroomkd.data import Augmentation, Loaders, ResidentLoader
    from classroomkd.models import NetworkInfo
    from classroomkd.training.evaluation import evaluate, evaluation_loader
    from classroomkd.training.config import TrainingConfig
    from classroomkd.training.distributed import Processes
    from classroomkd.training.mentor_bank import MentorBank
    from classroomkd.training.trainer import Trainer

    torch.set_num_threads(1)
    path, batch_size = sys.argv[1], int(sys.argv[2])

    def network(seed):
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
        return nn.Sequential(*layers)

    class Loader(ResidentLoader):
        def _iterate(self, *arguments):
            for images, targets, indices in super()._iterate(*arguments):
                # More rows of the first share than of the second do not count.
                yield images, torch.where(indices % 5 < 2, -100, targets), indices

    class Scaled(Method):
        # Cross entropy of logits at a temperature that is learnt with the network.

        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(2.0))

        def forward(self, student, mentors, targets):
            return nn.functional.cross_entropy(student.logits / self.temperature, targets)

    processes, outcomes = Processes(torch.device("cpu")), {{}}
    for kind in {KINDS}:
        loader = Loader(
            colours(96),
            batch_size,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            augmentation=Augmentation(1, True),
            shuffle=True,
            drop_last=True,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        mentors, method = None, Scaled() if kind in ("scaled", "clipped") else create("alone")
        clip_norm = 0.2 if kind == "clipped" else None
        if kind in ("sample", "batch"):
            mentors = MentorBank({{"a": network(1), "b": network(2)}}, 3, device="cpu")
            group = dist.group.WORLD if processes.together else None
            method = create("classroom", ranking=kind, process_group=group)
        trainer = Trainer(
            network(0), loader, TrainingConfig(epochs=1, clip_norm=clip_norm), name="toy",
            peak=0.1, mentors=mentors, method=method, processes=processes,
        )
        trainer.train_epoch()
        outcomes[kind] = trainer.network.state_dict() | method.state_dict()
    images = colours(97)  # which two processes cannot share evenly
    info = NetworkInfo("two layers", images.classes, (0.5,) * 3, (0.25,) * 3, 8)
    loaders = Loaders("resident", [images], "cpu")
    held_out = evaluation_loader(loaders, images, info, **processes.place)
    outcomes["evaluation"] = asdict(evaluate(network(0), held_out, processes))
    if processes.is_main:
        torch.save(outcomes, path)
"""


def launch(script, processes, *arguments, cwd=None):
    """Run ``script`` in so many processes, as torchrun would; returns what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    environment = together | {"GLOO_SOCKET_IFNAME": "lo"} if processes > 1 else {}
    started = [
        Running(script, *arguments, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **environment)
        for rank in range(processes)
    ]

    def ended(process):
        if process.wait().returncode != 0:  # the others would wait for it
            for other in started:
                other.kill()

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(ended, started))
    codes = [process.returncode for process in started]
    assert not any(codes), (codes, [process.stderr for process in started])
    return [process.stdout for process in started]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of one process, and of two with half the batch each: the weights by kind, the evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    launch(SCRIPT, 1, folder / "one.pt", 16)
    launch(SCRIPT, 2, folder / "two.pt", 8)
    return [torch.load(folder / f"{name}.pt") for name in ("one", "two")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(outcomes, kind):
    one, two = (each[kind] for each in outcomes)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
    start = torch.nn.Conv2d(3, 8, 3, stride=2)
    torch.manual_seed(0)
    start.reset_parameters()
    assert (one["0.weight"] - start.weight).abs().max() > 0.01  # it did learn
    assert kind != "scaled" or abs(one["temperature"] - 2) > 0.01


@pytest.mark.slow
def test_two_processes_evaluate_as_one(outcomes):
    one, two = (each["evaluation"] for each in outcomes)
    assert one["images"] == 97
    per_class = one.pop("per_class")
    assert len(per_class) == 3
    assert two.pop("per_class") == pytest.approx(per_class)
    assert two == pytest.approx(one)


@pytest.mark.slow
def test_a_whole_run_in_two_processes(tmp_path):
    """From the command line: one folder, written once, with what all images give."""
    write_classes(tmp_path / "data" / "train", 12)
    write_classes(tmp_path / "data" / "val", 5, seed=1)
    options = ["--data", "data", "--student", "resnet8", "--mentors", "resnet8", "--out", "run"]
    options += ["--epochs", "1", "--batch-size", "8", "--image-size", "8", "store=false"]
    (main, other) = launch(COMMAND, 2, "train", *options, cwd=tmp_path)
    assert "report: run/report.html" in main
    assert other == ""
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for result in summary["results"]:
        hits = 15 * result["top1"]
        assert hits == pytest.approx(round(hits), abs=1e-6)
    assert summary["data"]["test_images"] == 15


# In an interpreter that has imported nothing: a module imported after a group may keep it.
LEAVING = """
    code = '''
    import atexit, time
    from pathlib import Path
    import torch

    def workers():
        found = 0
        for file in Path("/proc/self/task").glob("*/comm"):
            try:
                found += "gloo_runloop" in file.read_text()
            except OSError:  # it has just ended
                pass
        return found

    def after_the_group():
        for _ in range(1000):  # a thread that was joined is still listed for a moment
            if workers():
                time.sleep(0.01)
        print(workers())

    atexit.register(after_the_group)  # what is registered later runs before
    from classroomkd.training.distributed import Processes

    processes = Processes(torch.device("cpu"))
    network = processes.wrap(torch.nn.Linear(5, 3))
    network(torch.ones(2, 5)).sum().backward()
    processes.sum(torch.ones(3))
    print(workers() > 0)
    '''
    import os, sys
    os.execv(sys.executable, [sys.executable, "-c", code])
"""


@pytest.mark.slow
def test_threads_of_the_process_group_end_before_python_does():
    """One that frees a tensor while Python finalizes aborts the process."""
    for printed in launch(LEAVING, 2):
        assert printed.split() == ["True", "0"]


STORE = """
    import os, sys
    from pathlib import Path
    os.environ["CLASSROOMKD_CACHE"] = sys.argv[1] + "/cache" + os.environ.get("RANK", "0")
    from small_runs import stored_run
    from classroomkd.runs import training_run

    training_run.write_report = lambda out: None
    for run in ("first", "second"):
        _, text = stored_run(Path(sys.argv[1]) / run, "alone=false", "training.batch_size=8")
        print(run, "taken from" in text)
"""


@pytest.mark.slow
def test_the_main_processs_store_serves_all(tmp_path):
    """Each machine may have a cache of its own: a mentor is in one of them, and taken by all."""
    main, _ = launch(STORE, 2, tmp_path)
    assert main.split() == ["first", "False", "second", "True"]
    assert len(list((tmp_path / "cache0" / "mentors").glob("*.safetensors"))) == 1
    assert not (tmp_path / "cache1" / "mentors").exists()


CACHED = """
    import os, sys
    from pathlib import Path
    os.environ["CLASSROOMKD_CACHE"] = sys.argv[1] + "/cache"
    from rich.console import Console
    from small_runs import colours, recipe
    from classroomkd.runs import training_run
    from classroomkd.training.mentor_bank import MentorBank

    training_run.write_report = lambda out: None
    asked, ask = [], MentorBank.__call__

    def spy(self, images, names=None):
        asked.append(len(images))
        return ask(self, images, names)

    MentorBank.__call__ = spy
    for name in ("without", "first", "second"):
        asked.clear()
        cache = "mentor_cache=" + ("null" if name == "without" else "{}")
        made = recipe("alone=false", "mentors=[resnet8]", "store=true", cache)
        with open(os.devnull, "w") as nothing:
            run = training_run.TrainingRun(made, Console(file=nothing))
            run.run(colours(28), colours(13, 1), Path(sys.argv[1]) / name)
        print(name, asked)
"""


@pytest.mark.slow
def test_processes_keep_and_read_each_its_share_of_logits(tmp_path):
    """The same bits as of as many processes without a cache."""
    for printed in launch(CACHED, 2, tmp_path):
        whole = [4] * 6  # of three steps in each of two epochs
        assert printed == f"without {whole}\nfirst {whole}\nsecond []\n"
    files = [tmp_path / name / "student.safetensors" for name in ("without", "first", "second")]
    assert len({file.read_bytes() for file in files}) == 1
