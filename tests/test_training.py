"""Training: the same seed gives the same weights, stopped or not; each precision learns; bad runs
are refused."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from workbench.subjects import data, models, states, tasks, training

RECIPE = training.Recipe(epochs=2, batch_size=64, learning_rate=0.05)


def weights(trained: training.Trained) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in trained.model.state_dict().values()])


@pytest.fixture(scope="module")
def start(tiny):
    return models.load("resnet20", tiny, pretrained=False)


@pytest.fixture(scope="module")
def trained(start, tiny):
    return training.fit(start, tiny, recipe=RECIPE)


def test_two_trainings_from_one_seed_end_in_identical_weights(start, tiny, trained):
    assert torch.equal(weights(training.fit(start, tiny, recipe=RECIPE)), weights(trained))


def test_another_seed_ends_elsewhere(start, tiny, trained):
    assert not torch.equal(weights(training.fit(start, tiny, recipe=RECIPE, seed=1)),
                           weights(trained))


def test_the_callers_model_is_left_as_it_was(start, tiny, trained):
    fresh = models.load("resnet20", tiny, pretrained=False)
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(),
                                                 fresh.state_dict().values(), strict=True))
    assert not start.training


@pytest.mark.parametrize("stop", [1, 6, 8])
def test_interrupted_and_resumed_ends_in_the_same_weights(start, tiny, trained, tmp_path,
                                                          monkeypatch, stop):
    check_resuming(start, tiny, RECIPE, trained, tmp_path, monkeypatch, stop)


def test_interrupted_and_resumed_keeps_the_scale_of_fp16(network, tiny, tmp_path, monkeypatch):
    recipe = replace(RECIPE, precision="fp16")
    check_resuming(network, tiny, recipe, training.fit(network, tiny, recipe=recipe), tmp_path,
                   monkeypatch, 4)


def check_resuming(start, tiny, recipe, whole, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0)
    steps = []

    def interrupted(model, batch, objective, progress):
        steps.append(1)
        if len(steps) > stop:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(model(batch.inputs).float(), batch.targets)

    with pytest.raises(KeyboardInterrupt):
        training.fit(start, tiny, recipe=recipe, state=tmp_path / "state.safetensors",
                     loss=interrupted)
    resumed = training.fit(start, tiny, recipe=recipe, state=tmp_path / "state.safetensors")
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))


@pytest.mark.parametrize(("precision", "schedule"), [("fp32", "step"), ("bf16", "constant"),
                                                     ("fp16", "cosine")])
def test_every_precision_and_schedule_learns(network, tiny, precision, schedule):
    recipe = replace(RECIPE, precision=precision, schedule=schedule, epochs=3)
    history = training.fit(network, tiny, recipe=recipe).history
    assert history.loss.iloc[-1] < history.loss.iloc[0]


def test_a_finished_state_is_not_trained_again(start, tiny, trained, tmp_path):
    training.fit(start, tiny, recipe=RECIPE, state=tmp_path / "s")
    calls = []
    again = training.fit(start, tiny, recipe=RECIPE, state=tmp_path / "s",
                         loss=lambda *_: calls.append(1))
    assert not calls
    assert torch.equal(weights(again), weights(trained))


def test_a_finished_training_is_taken_up_where_only_rounding_differs(start, tiny, model, trained,
                                                                     tmp_path, capsys):
    folder = tmp_path / "trained"
    training.fit(start, tiny, recipe=RECIPE, state=tmp_path / "s")
    states.finish(tmp_path / "s", folder / "tiny.safetensors")
    moved = copy.deepcopy(start)
    with torch.no_grad():
        next(moved.parameters()).mul_(1 + 1e-6)
    calls = []
    again = training.fit(moved, tiny, recipe=RECIPE, known=folder,
                         after_step=lambda *_: calls.append(1))
    assert len(calls) == 12  # of another training: with something after each step
    again = training.fit(moved, tiny, recipe=RECIPE, known=folder)
    assert "trained before, 12 steps" in capsys.readouterr().out
    torch.testing.assert_close(weights(again), weights(trained), rtol=1e-3, atol=1e-4)
    assert again.history.equals(training.fit(start, tiny, recipe=RECIPE,
                                             state=tmp_path / "s").history)
    training.fit(model, tiny, recipe=RECIPE, known=folder)
    training.fit(start, tiny, recipe=replace(RECIPE, learning_rate=0.01), known=folder)
    assert "trained before" not in capsys.readouterr().out


def test_an_unfinished_training_is_not_kept_and_a_damaged_one_is_told(start, tiny, tmp_path):
    folder = tmp_path / "trained"

    def interrupted(model, step, _steps):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.fit(start, tiny, recipe=RECIPE, state=tmp_path / "s", after_step=interrupted)
    with pytest.raises(ValueError, match="is at step 6 of 12; go on with it first"):
        states.finish(tmp_path / "s", folder / "tiny.safetensors")
    folder.mkdir()
    (folder / "cut.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"finished training .*cut.safetensors is damaged"):
        training.fit(start, tiny, recipe=RECIPE, known=folder)


def test_a_state_of_another_run_is_refused(start, tiny, tmp_path):
    training.fit(start, tiny, recipe=replace(RECIPE, epochs=1), state=tmp_path / "s")
    with pytest.raises(ValueError, match="its epochs is 1, here 2"):
        training.fit(start, tiny, recipe=RECIPE, state=tmp_path / "s")


def test_a_state_of_another_start_or_another_loss_is_refused(start, tiny, model, tmp_path):
    from workbench.methods import distillation

    short = replace(RECIPE, epochs=1)
    training.fit(start, tiny, recipe=short, state=tmp_path / "s")
    with pytest.raises(ValueError, match="of another run: its start is"):
        training.fit(model, tiny, recipe=short, state=tmp_path / "s")
    with pytest.raises(ValueError, match="of another run: its loss is None"):
        training.fit(start, tiny, recipe=short, state=tmp_path / "s", loss=distillation.loss(model))


def test_a_state_of_other_examples_is_refused(network, tiny, tmp_path):
    recipe = training.Recipe(epochs=1, precision="fp32")
    state = tmp_path / "a.state"
    training.fit(network, tiny, recipe=recipe, state=state)
    other = replace(tiny, train=replace(tiny.train, inputs=tiny.train.inputs.flip(3)))
    with pytest.raises(ValueError, match="is of another run: its stored is"):
        training.fit(network, other, recipe=recipe, state=state)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is no training state; give a path"):
        training.fit(network, tiny, recipe=recipe, state=tmp_path / "model.safetensors")


def test_a_last_example_that_is_left_over_goes_with_the_batch_before():
    task = data.of((torch.randn(9, 4), torch.arange(9) % 3), (torch.randn(3, 4), torch.arange(3)),
                   validation=(torch.randn(3, 4), torch.arange(3)))
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    sizes = []
    net[0].register_forward_hook(lambda _layer, _inputs, out: sizes.append(len(out)))
    training.fit(net, task, recipe=training.Recipe(epochs=1, batch_size=4, precision="fp32"))
    assert sizes[:2] == [4, 5]


def test_a_network_without_weights_to_train_is_told(network, tiny):
    with pytest.raises(ValueError, match=r"no weight of \w+ is to be trained; model.requires"):
        training.fit(copy.deepcopy(network).requires_grad_(False), tiny,
                     recipe=training.Recipe(epochs=1))


def test_a_damaged_state_is_refused(start, tiny, tmp_path):
    training.fit(start, tiny, recipe=replace(RECIPE, epochs=1), state=tmp_path / "s")
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:999])
    with pytest.raises(ValueError, match="is damaged"):
        training.fit(start, tiny, recipe=RECIPE, state=tmp_path / "s")


def test_a_loss_that_explodes_stops_the_training_and_says_where(start, tiny):
    with pytest.raises(ValueError, match=r"training: the loss became nan at step \d+ of 12; "
                       r"lower learning_rate"):
        training.fit(start, tiny, recipe=replace(RECIPE, learning_rate=1e6))


def test_the_step_schedule_divides_by_ten_at_half_and_three_quarters():
    rates = [training.Recipe(schedule="step", learning_rate=1).rate(p)
             for p in (0, 0.49, 0.5, 0.74, 0.75, 1)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_cosine_schedule_falls_from_the_whole_rate_to_none_behind_its_warmup():
    recipe = training.Recipe(schedule="cosine", learning_rate=0.4, warmup=0.2)
    rates = [recipe.rate(progress) for progress in (0, 0.1, 0.2, 0.4, 0.6, 1)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0])


@pytest.mark.parametrize(("field", "value"), [("schedule", "linear"), ("precision", "int8"),
                                              ("epochs", 0), ("batch_size", -1)])
def test_an_impossible_recipe_is_refused(field, value):
    with pytest.raises(ValueError, match=f"recipe: {field} is {value!r}"):
        replace(RECIPE, **{field: value})


def test_augmented_images_are_shifted_and_mirrored_copies():
    image = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6) + 1
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
    possible = [padded[r:r + 6, c:c + 6] for r in range(3) for c in range(3)]
    possible += [p.flip(1) for p in possible]
    made = tasks.augment(image.expand(200, 1, 6, 6), shift=1, flip=True,
                         generator=torch.Generator().manual_seed(0))
    found = {next(i for i, p in enumerate(possible) if torch.equal(p, m[0])) for m in made}
    assert found == set(range(18))
