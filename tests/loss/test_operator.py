"""The fused loss as a citizen of PyTorch: compile, autocast, DDP, CUDA graphs, no reading back."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import library, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from classroomkd import (
    ClassroomLoss,
    classroom_loss,
    fused_classroom_loss,
    fused_classroom_loss_and_grad,
)
from classroomkd.loss import fused, operators
from classrooms import classroom
from processes import group_of_two

# No Triton here: spawned processes import this module before they choose how to run kernels.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

OPTIONS = {"sample": {}, "batch": {"ranking": "batch", "rank_decimals": 2, "mentor_weight": "auto"}}
N_CLASSES = 10
gpu_only = pytest.mark.parametrize(
    "device", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture
def net(device):
    """A student of one linear layer, 5 features to 10 classes."""
    torch.manual_seed(0)
    return torch.nn.Linear(5, N_CLASSES).to(device)


def batch_of(n_rows, device, n_classes=N_CLASSES):
    """Features [B, 5], mentors' logits [3, B, C] and targets, the second row's ignored."""
    _, mentors, targets = classroom(3, n_rows, n_classes, seed=n_rows).to(device)
    targets[1:2] = -100
    features = torch.randn(n_rows, 5, generator=torch.Generator().manual_seed(n_rows))
    return features.to(device), mentors, targets


def gradients(net):
    return [parameter.grad for parameter in net.parameters()]


@pytest.fixture
def compiled(device, monkeypatch):
    """Compile in one graph, counting how often; what the GPU's path warns of is an error."""
    if device.type == "cpu":
        decide = fused._use_kernels
        monkeypatch.setattr(fused, "_use_kernels", lambda _: decide("cuda"))

    def compile_(function, backend):
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        return torch.compile(function, fullgraph=True, backend=counter), counter

    return compile_


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize(
    ("ranking", "with_report", "backend"),
    [("sample", False, "aot_eager"), ("batch", True, "inductor")],
)
def test_compile(device, net, compiled, ranking, with_report, backend):
    """One graph for every batch size; loss, report and gradients as without compiling."""

    def step(features, mentors, targets):
        logits = net(features)
        result = fused_classroom_loss(
            logits, mentors, targets, return_report=with_report, **OPTIONS[ranking]
        )
        return result if with_report else (result, ())

    fast, graphs = compiled(step, backend)
    for n_rows in (6, 4, 9):
        features, mentors, targets = batch_of(n_rows, device)
        torch._dynamo.mark_dynamic(features, 0)
        torch._dynamo.mark_dynamic(mentors, 1)
        torch._dynamo.mark_dynamic(targets, 0)
        results = []
        for function in (step, fast):
            net.zero_grad()
            loss, report = function(features, mentors, targets)
            loss.backward()
            results.append([loss.detach(), *report, *gradients(net)])
        torch.testing.assert_close(*results)
    assert graphs.frame_count == 1


# Every value of every option that the traced definition branches on; without a weight here, each
# mentor has its own.
ON_A_CPU = {
    "defaults": {"mentor_weight": "auto"},
    "released": {"ranking": "batch", "rank_decimals": 2, "return_report": True},
    "dtkd": {
        **{"mentoring": "dtkd", "knowledge_filter": "correct", "reduction": "sum"},
        "mentor_weight": 0.3,
    },
    "rows": {"reduction": "none", "label_smoothing": 0.1, "task_weight": 0.5},
    "probabilities": {
        **{"knowledge_filter": "correct_and_better", "mentoring": "fixed"},
        "return_report": True,
    },
}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *(("released", True), ("dtkd", True), ("probabilities", True)),
        *(("defaults", False), ("rows", False)),
    ],
)
def test_compile_on_a_cpu(name, dynamic):
    """One graph, forward and backward, whatever the options."""
    assert_compiles_on_a_cpu(ON_A_CPU[name], "aot_eager", dynamic, soft=name == "probabilities")


@pytest.mark.slow
def test_compile_on_a_cpu_with_inductor():
    assert_compiles_on_a_cpu(ON_A_CPU["released"], "inductor", None, soft=False)


def assert_compiles_on_a_cpu(options, backend, dynamic, soft):
    from torch._dynamo.testing import CompileCounterWithBackend

    options = {"mentor_weight": torch.tensor([1.0, 0.0, 2.0])} | options

    def step(student, mentors, targets):
        result = fused_classroom_loss(student, mentors, targets, **options)
        return result if options.get("return_report") else (result, ())

    torch._dynamo.reset()
    graphs, made = CompileCounterWithBackend(backend), set()
    fast = torch.compile(step, fullgraph=True, backend=graphs, dynamic=dynamic)
    for n_rows in (6, 4, 9) if dynamic else (6,):
        student, mentors, targets = classroom(3, n_rows, N_CLASSES, seed=n_rows)
        targets[1] = -100
        if soft:
            targets = torch.softmax(mentors[0], 1)
        results = []
        for function in (step, fast):
            z = student.clone().requires_grad_()
            loss, report = function(z, mentors, targets)
            loss.sum().backward()
            results.append([loss.detach(), *report, z.grad])
        torch.testing.assert_close(*results)
        made.add(graphs.frame_count)
    assert len(made) == 1  # no more graphs for further batch sizes


@pytest.mark.parametrize("name", ["defaults", "released", "probabilities"])
def test_compile_loss_and_grad_on_a_cpu(name):
    options = {"task_weight": 0.5, "mentor_weight": 0.3, **ON_A_CPU[name], "return_report": True}
    torch._dynamo.reset()
    fast = torch.compile(fused_classroom_loss_and_grad, fullgraph=True, backend="aot_eager")
    student, mentors, targets = classroom()
    if name == "probabilities":
        targets = torch.softmax(mentors[0], 1)
    batch = (student.half(), [mentors[0].double(), mentors[1]], targets)
    for scale in (None, torch.tensor(8.0)):
        expected = fused_classroom_loss_and_grad(*batch, scale=scale, **options)
        torch.testing.assert_close(fast(*batch, scale=scale, **options), expected)
    arguments = (student, [*mentors], targets, torch.rand(len(student)), None, torch.tensor(2.0))
    for with_report in (True, False):
        library.opcheck(
            torch.ops.classroomkd.definition_and_grad.default,
            (*arguments, with_report, *ClassroomLoss(**OPTIONS["batch"]).options.flat()),
        )


def test_a_class_out_of_range_on_a_cpu():
    """An error where values can be looked at; in a compiled graph of the definition, NaN."""
    student, mentors, targets = classroom(n_rows=4)
    targets[2] = 10
    torch._dynamo.reset()
    fast = torch.compile(fused_classroom_loss, fullgraph=True, backend="aot_eager")
    for function in (fused_classroom_loss, classroom_loss, fast):
        with pytest.raises(ValueError, match="got 10 in row 2"):
            function(student, mentors, targets)
    rows = fast(student.double(), mentors, targets, reduction="none")
    assert rows.isnan().tolist() == [False, False, True, False]


@pytest.mark.filterwarnings("error:Dynamo")
def test_compile_loss_and_grad(device, net, compiled):
    """With everything optional given; the sizes are not announced as dynamic."""
    weight = torch.tensor([1.0, 0.0, 2.0], device=device)
    scale = torch.tensor(8.0, device=device)

    def step(features, mentors, targets):
        return fused_classroom_loss_and_grad(
            net(features),
            list(mentors),
            targets,
            mentor_weight=weight,
            scale=scale,
            return_report=True,
            label_smoothing=0.1,
        )

    fast, _ = compiled(step, "aot_eager" if device.type == "cpu" else "inductor")
    for n_rows in (6, 1, 0):
        batch = batch_of(n_rows, device)
        torch.testing.assert_close(fast(*batch), step(*batch))


@pytest.mark.filterwarnings("error:Dynamo")
def test_compile_module_under_autocast(device, net, compiled):
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    loss_fn = ClassroomLoss(mentor_weight=[1.0, 0.5, 2.0]).to(device)

    def step(features, mentors, targets):
        with torch.autocast(device.type, dtype):
            return loss_fn(net(features), mentors, targets)

    fast, _ = compiled(step, "aot_eager")
    batch = batch_of(7, device)
    torch.testing.assert_close(fast(*batch), step(*batch))


@pytest.mark.parametrize("ranking", OPTIONS)
def test_autocast(device, net, ranking):
    """Autocast makes the logits half precision and leaves the loss alone."""
    features, mentors, targets = batch_of(7, device)
    with torch.autocast(device.type, torch.bfloat16 if device.type == "cpu" else torch.float16):
        logits = net(features)
        half = mentors.to(logits.dtype)
        loss, report = fused_classroom_loss(
            logits, half, targets, return_report=True, **OPTIONS[ranking]
        )
    assert logits.dtype != torch.float32
    assert loss.dtype == report.kl.dtype == torch.float32
    loss.backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(net))
    z = logits.detach().requires_grad_()
    expected, _ = fused_classroom_loss(z, half, targets, return_report=True, **OPTIONS[ranking])
    expected.backward()
    assert torch.equal(loss, expected)
    torch.testing.assert_close(net.bias.grad, z.grad.float().sum(0), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("ranking", OPTIONS)
def test_mentors_from_inference_mode(device, net, ranking):
    features, mentors, targets = batch_of(7, device)
    expected = fused_classroom_loss(net(features), mentors, targets, **OPTIONS[ranking])
    (expected_grad,) = torch.autograd.grad(expected, net.bias)
    with torch.inference_mode():
        mentors, targets = mentors.clone(), targets.clone()
        direct = fused_classroom_loss_and_grad(net(features), mentors, targets, **OPTIONS[ranking])
    assert mentors.is_inference()
    loss = fused_classroom_loss(net(features), list(mentors), targets, **OPTIONS[ranking])
    (grad,) = torch.autograd.grad(loss, net.bias)
    assert torch.equal(loss, expected)
    assert torch.equal(direct[0], expected)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(direct[1].sum(0), expected_grad)


READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.item,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
}


class NothingReadBack(TorchDispatchMode):
    """Raise where a value or a size that depends on values leaves the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "classroomkd":  # look into the operator too
            with self:
                return getattr(operators, f"_{func._opname}")(*args, **kwargs)
        assert func.overloadpacket not in READS, f"{func} reads a value back"
        result = func(*args, **kwargs)
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in tensors if x.dim()}) <= 1, f"{func} copies across devices"
        return result


def everything(student, mentors, targets):
    """All that the library does with a batch on the device."""
    results = []
    soft = torch.softmax(student.detach().float(), 1)
    weight = torch.ones(len(mentors), device=student.device)
    for options in OPTIONS.values():
        for target in (targets, soft):
            loss, report = fused_classroom_loss(
                student, mentors, target, return_report=True, **{"mentor_weight": weight} | options
            )
            (grad,) = torch.autograd.grad(loss, student)
            direct = fused_classroom_loss_and_grad(
                student, mentors, target, scale=loss.detach(), return_report=True, **options
            )
            rows = fused_classroom_loss(
                student.detach(), mentors, target, reduction="none", **options
            )
            results += [loss.detach(), *report, grad, *direct[:2], *direct[2], rows]
    return results


def test_no_value_is_read_back(device, monkeypatch, request):
    from classroomkd.kernels import launch

    if request.node.callspec.params["device"] == "ptx":
        pytest.skip("what executes PTX reads the tensors")
    if fused.implementation(device.type) is not launch:
        pytest.skip("the CPU's pass waits for nothing")

    def refuse(*_):
        raise AssertionError("a tensor was read into Python")

    student, mentors, targets = classroom(n_mentors=2, n_rows=3).to(device)
    student.requires_grad_()
    everything(student, mentors, targets)  # compiles
    for method in ("tolist", "numpy", "__array__"):  # which no operator goes with on the CPU
        monkeypatch.setattr(torch.Tensor, method, refuse)
    with NothingReadBack():
        everything(student, mentors, targets)


@gpu_only
@pytest.mark.parametrize(("n_rows", "n_classes"), [(64, 100), (1500, 100), (8, 40_000)])
def test_nothing_waits_for_the_gpu(device, n_rows, n_classes):
    """And every run gives the same bits."""
    student, mentors, targets = classroom(3, n_rows, n_classes).to(device)
    student.requires_grad_()
    expected = everything(student, mentors, targets)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        repeats = [everything(student, mentors, targets) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for results in repeats:
        assert all(map(torch.equal, results, expected))


def captured(function, *arguments):
    """A CUDA graph of a call, and the results that each replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*arguments)
    return graph, results


@gpu_only
@pytest.mark.parametrize(("n_rows", "n_classes"), [(64, 100), (1500, 100), (8, 40_000)])
def test_cuda_graph(device, n_rows, n_classes):
    """Replayed on new data."""
    student, mentors, targets = classroom(3, n_rows, n_classes).to(device)
    graph, results = captured(everything, student.requires_grad_(), mentors, targets)
    for seed in (1, 2, 3):
        batch = classroom(3, n_rows, n_classes, seed=seed).to(device)
        with torch.no_grad():
            for static, new in zip((student, mentors, targets), batch, strict=True):
                static.copy_(new)
        graph.replay()
        expected = everything(batch.student.requires_grad_(), batch.mentors, batch.targets)
        assert all(map(torch.equal, results, expected))


@gpu_only
def test_cuda_graphs_side_by_side(device):
    """Launches on two streams, graphs or not, do not count each other's programs."""
    batches = [classroom(3, 2000, 100, seed=seed).to(device) for seed in range(2)]
    for batch in batches:
        batch.student.requires_grad_()
    expected = [everything(*batch) for batch in batches]
    graphs = [captured(everything, *batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, results), same in zip(graphs, expected, strict=True):
        assert all(map(torch.equal, results, same))
    eager = [[], []]
    for _ in range(10):
        for results, batch, stream in zip(eager, batches, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(everything(*batch))
    torch.cuda.synchronize()
    for repeats, same in zip(eager, expected, strict=True):
        assert all(all(map(torch.equal, results, same)) for results in repeats)


@gpu_only
def test_compile_to_cuda_graphs(device, net):
    def step(features, mentors, targets):
        return fused_classroom_loss_and_grad(net(features), mentors, targets)

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for seed in range(6):
        features, mentors, targets = batch_of(64, device)
        features = features + seed
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            loss, grad = (value.clone() for value in fast(features, mentors, targets))
            torch.testing.assert_close((loss, grad), step(features, mentors, targets))


@gpu_only
def test_memory(device):
    """Two gradients and O(B · M) beside the inputs; in one launch, one gradient."""
    student, mentors, targets = classroom(4, 4096, 1000).to(device)
    student.requires_grad_()

    def through_autograd():
        loss, _ = fused_classroom_loss(student, mentors, targets, return_report=True)
        torch.autograd.grad(loss, student)

    def in_one_launch():
        fused_classroom_loss_and_grad(student, mentors, targets, return_report=True)

    for function, n_gradients in ((through_autograd, 2), (in_one_launch, 1)):
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= n_gradients * student.nbytes + 64 * 5 * 4096


@gpu_only
def test_more_than_2_to_the_31_logits(device):
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    n_rows, n_classes = 8200, 262_144
    rng = torch.Generator(device).manual_seed(0)
    student, mentor = (
        torch.empty(n_rows, n_classes, dtype=torch.bfloat16, device=device).normal_(generator=rng)
        for _ in range(2)
    )
    targets = torch.randint(n_classes, (n_rows,), generator=rng, device=device)
    rows = [0, 4096, 8191, 8192, 8199]
    options = {"knowledge_filter": "none", "mentoring": "fixed", "temperature": 4.0}

    z = student[rows].double().requires_grad_()
    expected = classroom_loss(
        z, [mentor[rows].double()], targets[rows], reduction="none", **options
    )
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)

    def check(grad):
        error = (grad[rows].double() - expected_grad).norm(dim=1) / expected_grad.norm(dim=1)
        assert (error < 2**-7).all()

    loss = fused_classroom_loss(
        student.requires_grad_(), [mentor], targets, reduction="none", **options
    )
    torch.testing.assert_close(loss[rows].double(), expected, rtol=1e-4, atol=0)
    check(*torch.autograd.grad(loss.sum(), student))
    del loss
    _, grad = fused_classroom_loss_and_grad(student, [mentor], targets, reduction="sum", **options)
    check(grad)


def in_two_processes(rank, folder):
    """A process of two: each has half the rows, with its own number of valid ones."""
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter  # noqa: F401  readies it

    torch.set_num_threads(1)
    with group_of_two(rank, folder):
        compare_with_all_rows(rank)


def compare_with_all_rows(rank):
    for function, ignored in (
        (classroom_loss, [1, 2, 3]),
        (fused_classroom_loss, [1, 2, 3]),
        (fused_classroom_loss, [0, 1, 2, 3]),
    ):
        fused._INTERPRET = True
        student, mentors, targets = classroom(n_rows=8)
        targets[ignored] = -100
        mine = slice(4 * rank, 4 * rank + 4)

        net = torch.nn.Linear(N_CLASSES, N_CLASSES)
        torch.nn.init.eye_(net.weight)
        torch.nn.init.zeros_(net.bias)
        options = {"ranking": "batch", "reduction": "sum", "return_report": True}
        whole, whole_report = function(net(student), mentors, targets, **options)
        expected = torch.autograd.grad(whole, [*net.parameters()])

        parallel = torch.nn.parallel.DistributedDataParallel(net)
        loss, report = function(
            parallel(student[mine]),
            mentors[:, mine],
            targets[mine],
            process_group=torch.distributed.group.WORLD,
            **options,
        )
        loss.backward()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=0)
        # DDP averages over the processes what a sum over all rows would add up.
        grads = [2 * parameter.grad for parameter in net.parameters()]
        torch.testing.assert_close(grads, [*expected], rtol=1e-5, atol=1e-6)
        if (targets[mine] >= 0).any():  # everyone is ranked by all processes' rows
            torch.testing.assert_close(report.rank_weight, whole_report.rank_weight)


@pytest.mark.slow
def test_ranks_over_a_process_group(tmp_path):
    # Interpreted kernels need a process that has not imported Triton yet.
    multiprocessing.start_processes(in_two_processes, (str(tmp_path),), 2, start_method="spawn")
