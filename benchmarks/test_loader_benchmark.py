"""The loaders under pytest-benchmark: wall times of whole epochs, waiting for the GPU.

    pytest benchmarks/test_loader_benchmark.py

`loaders.py` beside this compares them with other people's, and measures more.
"""

import pytest

from classroomkd.errors import UserError
from loader_rows import OPENERS, Setting
from loaders import pack_beton, random_images
from measure import DEVICE, synchronize

IMAGES, BATCH = 4096, 512


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    half = (0.5, 0.5, 0.5)
    setting = Setting(folder, IMAGES, (32, 32, 3), BATCH, 2, DEVICE, half, half)
    setting.save(random_images(IMAGES, 32))
    pack_beton(setting)
    return setting


@pytest.mark.parametrize(
    ("name", "workers"),
    [("resident", 0), ("ffcv", 1), ("torch", 2), ("torchvision's transforms", 2)],
)
def test_epoch(benchmark, setting, name, workers):
    try:
        loader = OPENERS[name](setting, workers)()
    except UserError as error:
        pytest.skip(str(error))

    def epoch():
        count = sum(len(batch[1]) for batch in loader)
        synchronize()
        return count

    assert benchmark.pedantic(epoch, rounds=5, warmup_rounds=1) == IMAGES
    if hasattr(loader, "close"):
        loader.close()
