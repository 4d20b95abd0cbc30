"""The loss and its gradient under pytest-benchmark: wall times, waiting for the GPU.

    pytest benchmarks/ --benchmark-group-by=param:title

`loss.py` beside this measures the device's own time, and more.
"""

import pytest

from loss import GPU, IMPLEMENTATIONS, NAMED, SMALL_NAMED, THIS, input_sets
from measure import synchronize

CASES = NAMED if GPU else SMALL_NAMED


@pytest.mark.parametrize("title", CASES)
@pytest.mark.parametrize("name", [THIS, "fused_classroom_loss + backward", "eager"])
def test_loss_and_gradient(benchmark, name, title):
    case = CASES[title]
    _, make = IMPLEMENTATIONS[name]
    call = make(case.ranking)
    arguments = input_sets(case, 1)[0]

    def run():
        loss, _ = call(*arguments)
        synchronize()
        return loss

    assert benchmark(run).isfinite()
