"""What several tests need: a small task, a small trained-looking model, and quiet progress bars."""

import gc
import os
import sys

import pytest

from workbench import machine

os.environ.setdefault("WORKBENCH_PROGRESS", os.devnull)
# several processes side by side: each on cores of its own, and so its notebooks
if "PYTEST_XDIST_WORKER" in os.environ:
    place, among = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")), int(
        os.environ["PYTEST_XDIST_WORKER_COUNT"])
    own = machine.processors()[place::among] or machine.processors()
    os.sched_setaffinity(0, own)
    os.environ.setdefault("OMP_NUM_THREADS", str(len(own)))

import torch  # noqa: E402

from workbench.subjects import data, models  # noqa: E402
from workbench.subjects.tasks import Task  # noqa: E402


def pytest_collection_modifyitems(items):
    """Notebooks first, so that none runs at the end while other processes have nothing left to
    do."""
    items.sort(key=lambda item: "the_notebooks_of_the_house" not in item.name)


def pytest_collection_finish():
    """What was imported and collected is looked through for garbage no more."""
    gc.freeze()


@pytest.fixture(autouse=True)
def closed():
    """What a test draws is closed behind it, so that none of many keeps the others' figures."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def task() -> Task:
    return data.load("fashion_mnist")


@pytest.fixture(scope="session")
def model(task):
    return models.load("resnet20", task)


@pytest.fixture(scope="session")
def tiny(task) -> Task:
    """The same task with 384 training images, 100 validation and 200 test images."""
    from dataclasses import replace

    return replace(task, train=task.train.subset(384), validation=task.validation.subset(100),
                   test=task.test.subset(200))


@pytest.fixture
def network():
    """A network small enough for the slowest test: convolution, norm, convolution, linear."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
                  torch.nn.Conv2d(4, 6, 3, stride=2),
                  torch.nn.Flatten(), torch.nn.LazyLinear(10)]
        built = torch.nn.Sequential(*layers).eval()
        built(torch.zeros(1, 1, 28, 28))
        built[1].running_mean.normal_()
        built[1].running_var.uniform_(0.5, 2)
    return built
