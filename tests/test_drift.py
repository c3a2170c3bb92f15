"""The monitor is silent on images like its own, names the layers that drifted and when, and wins
accuracy back."""

import math

import pytest
import torch

from workbench.graph.layers import named
from workbench.methods import drift


@pytest.fixture(scope="module")
def seen(task):
    return list(task.validation.subset(400).batches(100))


def darker(images):
    """Pixels at an eighth of their brightness and contrast, as the network's normalised input."""
    black = images.min()
    return black + 0.125 * (images - black)


def top1(call, task, change):
    batches = list(task.test.subset(600).batches(100))
    return sum(int((call(change(images)).argmax(1) == labels).sum())
               for images, labels in batches) / 600


def test_images_like_its_own_raise_no_alarm_and_change_nothing(model, task, seen):
    monitor = drift.Monitor(model, seen, compensate=True)
    images, _ = next(task.test.batches(100))
    with torch.no_grad():
        monitor.close()
        expected = model(images)
    monitor = drift.Monitor(model, seen, compensate=True)
    found = monitor(images)
    monitor.close()
    assert not monitor.table().drifted.any()
    assert torch.allclose(found, expected, atol=1e-5)
    assert list(monitor.table().layer) == list(named(model))


def test_darker_images_are_noticed_with_their_place_and_moment(model, task, seen):
    monitor = drift.Monitor(model, seen)
    batches = [images for images, _ in task.test.subset(600).batches(100)]
    for place, images in enumerate(batches):
        monitor(images if place < 3 else darker(images))
    monitor.close()
    table = monitor.table().set_index("layer")
    assert table.drifted["conv1"]
    assert 4 <= table.since["conv1"] <= 6
    monitor.reset()
    assert monitor.table().empty


def test_compensation_wins_back_most_of_what_darkness_took(model, task, seen):
    whole, dark = (top1(model, task, change) for change in (lambda images: images, darker))
    monitor = drift.Monitor(model, seen, compensate=True)
    top1(monitor, task, darker)  # the averages settle
    fixed = top1(monitor, task, darker)
    monitor.close()
    assert dark < whole - 0.1
    assert fixed - dark > 0.5 * (whole - dark)


def test_a_running_average_equals_the_loop():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    torch.nn.init.ones_(model[0].weight)
    monitor = drift.Monitor(model, [(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), None)], momentum=0.5)
    mean, squares = 1.0, 2.0  # of 0 and 2
    for value in (3.0, 5.0):
        monitor(torch.tensor([[value, 0.0], [value, 2.0]]))  # y = value, value + 2
        mean = 0.5 * mean + 0.5 * (value + 1)
        squares = 0.5 * squares + 0.5 * (value**2 + (value + 2) ** 2) / 2
    found = monitor.running["0"]
    assert [v.item() for v in found] == [mean, squares]
    assert monitor.table().mean_shift.item() == pytest.approx(abs(mean - 1) / 1)
    assert monitor.table().std_stretch.item() == pytest.approx(
        abs(math.log((squares - mean**2) ** 0.5)))


def test_single_images_like_its_own_raise_no_alarm(model, task, seen):
    monitor = drift.Monitor(model, seen)
    for images, _ in task.test.subset(150).batches(1):
        monitor(images)
    monitor.close()
    assert not monitor.table().drifted.any()


def test_only_calls_through_the_monitor_are_watched(model, task, seen):
    monitor = drift.Monitor(model, seen, compensate=True)
    images, _ = next(task.test.batches(50))
    with torch.no_grad():
        model(darker(images))
    monitor.close()
    assert monitor.table().empty


@pytest.mark.parametrize(("options", "words"), [({"limit": 0}, "limit is 0"),
                                                ({"momentum": 0}, "momentum 0"),
                                                ({"layers": "layer9"},
                                                 "no layer matches 'layer9'")])
def test_bad_input_gets_one_line(model, seen, options, words):
    with pytest.raises(ValueError, match=words):
        drift.Monitor(model, seen, **options)


def test_a_monitor_without_images_is_refused_and_leaves_no_hook(model):
    with pytest.raises(ValueError, match="the baseline saw no examples"):
        drift.Monitor(model, [])
    assert not any(layer._forward_hooks for layer in named(model).values())


def test_a_batch_with_nan_is_not_remembered(model, task, seen):
    monitor = drift.Monitor(model, seen, compensate=True)
    images, _ = next(task.test.batches(8))
    spoilt = images.clone()
    spoilt[0, 0, 0, 0] = float("nan")
    monitor(spoilt)
    assert monitor(images).isfinite().all()
    assert monitor.table().mean_shift.notna().all()
