"""Each loss against the paper's formula as a naive loop, at its edges, and by finite
differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.methods import channels, distillation
from workbench.subjects import training

ROWS = torch.Generator().manual_seed(0)
Z_S, Z_T = torch.randn(6, 5, generator=ROWS,
                       dtype=torch.float64), torch.randn(6, 5, generator=ROWS, dtype=torch.float64)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def softmax(row, temperature):
    powers = [math.exp(v / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@settings(max_examples=20)
@given(st.floats(0.5, 20))
def test_soft_targets_equal_a_naive_loop(temperature):
    rows = [kl(softmax(t, temperature), softmax(s, temperature))
            for s, t in zip(Z_S.tolist(), Z_T.tolist(), strict=True)]
    found = distillation.soft_targets(Z_S, Z_T, temperature=temperature)
    assert found.item() == pytest.approx(temperature**2 * sum(rows) / len(rows))


@settings(max_examples=20)
@given(st.floats(0.5, 20), st.floats(0, 3), st.floats(0, 10))
def test_decoupled_equals_a_naive_loop(temperature, alpha, beta):
    total = 0
    for s, t, label in zip(Z_S.tolist(), Z_T.tolist(), LABELS.tolist(), strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        binary = kl([p_t[label], 1 - p_t[label]], [p_s[label], 1 - p_s[label]])
        others = [[v for k, v in enumerate(z) if k != label] for z in (t, s)]
        total += alpha * binary + beta * kl(softmax(others[0], temperature),
                                            softmax(others[1], temperature))
    found = distillation.decoupled(Z_S, Z_T, LABELS, temperature=temperature, alpha=alpha,
                                   beta=beta)
    assert found.item() == pytest.approx(temperature**2 * total / len(Z_S), abs=1e-9)


def test_of_two_classes_nothing_is_left_beside_the_target():
    student, teacher, labels = Z_S[:, :2], Z_T[:, :2], LABELS % 2
    found = distillation.decoupled(student, teacher, labels, temperature=2.0, alpha=1.0, beta=8.0)
    torch.testing.assert_close(found, distillation.soft_targets(student, teacher, temperature=2.0))


def test_the_decoupled_parts_put_together_are_the_whole():
    """KL = TCKD + (1 - p_t of the label) NCKD, equation 7 of the paper."""
    for row in range(6):
        s, t, label = Z_S[row:row + 1], Z_T[row:row + 1], LABELS[row:row + 1]
        rest = 1 - t.softmax(1)[0, label.item()].item()
        found = distillation.decoupled(s, t, label, temperature=1, alpha=1, beta=rest)
        assert found.item() == pytest.approx(distillation.soft_targets(s, t, temperature=1).item())


@pytest.mark.parametrize("loss", [
    lambda z: distillation.soft_targets(z, z), lambda z: distillation.decoupled(z, z, LABELS),
    lambda z: distillation.relational(z, z),
    lambda z: distillation.hint(z[:, :, None, None], z[:, :, None, None]),
    lambda z: distillation.attention(z[:, :, None, None], z[:, :, None, None])])
def test_every_loss_is_zero_when_the_student_is_the_teacher(loss):
    assert loss(Z_S).item() == pytest.approx(0, abs=1e-6)


def test_alpha_0_is_the_labels_alone_and_alpha_1_the_teacher_with_its_t_squared():
    labels_only = distillation.with_labels(Z_S, Z_T, LABELS, temperature=3, alpha=0)
    assert labels_only.item() == pytest.approx(torch.nn.functional.cross_entropy(
        Z_S, LABELS).item())
    assert distillation.with_labels(Z_S, Z_T, LABELS, temperature=3,
                                    alpha=1).item() == pytest.approx(
        distillation.soft_targets(Z_S, Z_T, temperature=3).item())


def test_t_squared_keeps_the_size_of_the_gradient():
    """At high T the gradient of T^2 KL tends to (z_s - z_t) / K for logits of zero mean (Hinton et
    al., equation 4)."""
    s = (Z_S - Z_S.mean(1, keepdim=True)).requires_grad_()
    t = Z_T - Z_T.mean(1, keepdim=True)
    gradient, = torch.autograd.grad(distillation.soft_targets(s, t, temperature=1000), s)
    assert torch.allclose(gradient, (s - t) / 5 / 6, atol=1e-3)


@pytest.mark.parametrize("loss", [
    lambda z: distillation.soft_targets(z, Z_T), lambda z: distillation.decoupled(z, Z_T, LABELS),
    lambda z: distillation.relational(z, Z_T),
    lambda z: distillation.attention(z.view(3, 5, 2, 1), Z_T.view(3, 5, 2, 1)),
    lambda z: distillation.with_labels(z, Z_T, LABELS)])
def test_gradients_equal_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, (Z_S.clone().requires_grad_(),), eps=1e-6, atol=1e-4)


def test_attention_and_hint_equal_naive_loops():
    s, t = torch.randn(2, 3, 2, 2), torch.randn(2, 4, 2, 2)
    maps = [[[sum(v[i, c, y, x] ** 2 for c in range(v.shape[1])) / v.shape[1] for y in range(2)
              for x in range(2)]
             for i in range(2)] for v in (s, t)]
    total = 0
    for a, b in zip(*maps, strict=True):
        norms = [math.sqrt(sum(float(v) ** 2 for v in m)) for m in (a, b)]
        total += sum((float(x) / norms[0] - float(y) / norms[1]) ** 2
                     for x, y in zip(a, b, strict=True))
    assert distillation.attention(s, t).item() == pytest.approx(total / 8, rel=1e-4)
    assert distillation.hint(s, s + 2).item() == pytest.approx(2)


def test_relational_equals_a_naive_loop():
    def huber(a, b):
        return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5

    def relations(z):
        n, rows = len(z), z.tolist()
        apart = [[math.dist(a, b) for b in rows] for a in rows]
        mean = sum(map(sum, apart)) / (n * (n - 1))
        cosines = []
        for j in range(n):
            ways = [[(x - y) / max(math.dist(r, rows[j]), 1e-12)
                     for x, y in zip(r, rows[j], strict=True)] for r in rows]
            cosines += [sum(x * y for x, y in zip(a, b, strict=True)) for a in ways for b in ways]
        return [d / mean for row in apart for d in row], cosines

    (d_s, a_s), (d_t, a_t) = relations(Z_S), relations(Z_T)
    expected = 25 * sum(map(huber, d_s, d_t)) / 36 + 50 * sum(map(huber, a_s, a_t)) / 216
    assert distillation.relational(Z_S, Z_T).item() == pytest.approx(expected, rel=1e-4)


def test_relations_are_exact_where_training_is_in_bfloat16(tiny, model):
    """Distances of rows that lie close together cancel in half precision."""
    batch = next(tiny.test.batches(32))
    images, labels = batch
    loss = distillation.loss(model, "relational", layers=("layer3",), alpha=0.0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        total = loss(model, batch, tiny.objective, 0.0)
        assert total.item() == pytest.approx(torch.nn.functional.cross_entropy(
            model(images).float(), labels).item(), abs=1e-4)


def test_a_last_batch_of_one_image_is_taught_without_relations(tiny, model):
    batch = next(tiny.test.batches(1))
    assert distillation.loss(model, "relational", layers=("layer3",))(model, batch, tiny.objective,
                                                                      0.0).isfinite()


def test_schedules_fall_and_step():
    assert [distillation.falling(4, 1)(p) for p in (0, 0.5, 1)] == [4, 2.5, 1]
    assert [distillation.stages((0, 1.0), (0.3, 0.7))(p)
            for p in (0, 0.29, 0.3, 1)] == [1, 1, 0.7, 0.7]
    with pytest.raises(ValueError, match="rise from 0"):
        distillation.stages((0.2, 1.0))


@pytest.mark.parametrize("kind", [kind for kind in distillation.KINDS if kind != "relations"])
def test_a_student_moves_towards_its_teacher(tiny, model, kind):
    from workbench.subjects import models, training

    student = models.load("resnet20", tiny, pretrained=False, seed=1)
    loss = distillation.loss(model, kind, temperature=distillation.falling(4, 1), weight=0.1,
                             layers=("layer1", "layer2"))
    history = training.fit(student, tiny,
                           recipe=training.Recipe(epochs=3, batch_size=64, learning_rate=0.02),
                           loss=loss).history
    assert history.train_right.iloc[-1] > history.train_right.iloc[0]
    assert not model.training


@pytest.mark.parametrize(("call", "message"), [
    (lambda: distillation.soft_targets(Z_S, Z_T[:, :4]),
     r"the student puts out \(6, 5\), the teacher \(6, 4\)"),
    (lambda: distillation.soft_targets(Z_S, Z_T, temperature=0),
     "temperature is 0, expected more than 0"),
    (lambda: distillation.with_labels(Z_S, Z_T, LABELS, alpha=1.5), "alpha is 1.5"),
    (lambda: distillation.decoupled(Z_S[:, :1], Z_T[:, :1], LABELS * 0), "at least 2 classes"),
    (lambda: distillation.hint(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3)),
     "give a regressor"),
    (lambda: distillation.attention(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4)),
     "choose layers of one size"),
    (lambda: distillation.relational(Z_S[:1], Z_T[:1]), "two or more rows"),
    (lambda: distillation.loss(torch.nn.Identity(), "magic"), "unknown distillation 'magic'"),
    (lambda: distillation.loss(torch.nn.Identity(), "hint"), "needs layers="),
])
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_hints_between_widths_train_their_regressors_and_leave_the_teacher(tiny, model):
    narrow = channels.cut_to(model, channels.score(model, "l1", example=tiny.example), macs=0.5,
                             example=tiny.example,
                             batches=tiny.validation.batches(50))
    layers = ("layer1.0.conv1", "layer3.1.conv1")
    loss = distillation.loss(model, "hint", layers=layers, student=narrow, example=tiny.example)
    between = loss.regressors
    assert all(r.weight.shape[0] > r.weight.shape[1] for r in between.values())
    assert len(distillation.regressors(model, model, dict(zip(layers, layers, strict=True)),
                                       tiny.example)) == 0
    taught = {id(p) for p in loss.parameters()}
    assert taught == {id(p) for p in between.parameters()}, "the teacher is not trained"
    seen = []

    def watching(student, step, steps):
        seen.append(step)

    recipe = training.Recipe(epochs=1, batch_size=64, learning_rate=0.01, precision="fp32")
    before = [p.clone() for p in between.parameters()]
    first = training.fit(narrow, tiny, recipe=recipe, loss=loss, after_step=watching).model
    again = training.fit(narrow, tiny, recipe=recipe, loss=loss).model
    assert seen == list(range(1, 7))
    assert all(torch.equal(a, b) for a, b in zip(before, between.parameters(),
                                                 strict=True)), "a copy is trained"
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(),
                                                 again.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="give a regressor between them"):
        distillation.loss(model, "hint", layers=layers)(narrow, next(tiny.test.batches(4)),
                                                        tiny.objective, 0.0)


def test_regressors_learn(tiny, model):
    narrow = channels.cut_to(model, channels.score(model, "l1", example=tiny.example), macs=0.5,
                             example=tiny.example,
                             batches=tiny.validation.batches(50))
    layers = ("layer2.1.conv1",)
    loss = distillation.loss(model, "hint", layers=layers, weight=1.0, student=narrow,
                             example=tiny.example)
    batch = next(tiny.test.batches(32))
    images, labels = batch
    optimizer, values = torch.optim.SGD(loss.parameters(), 0.05), []
    for _ in range(5):
        value = loss(narrow, batch, tiny.objective, 0.0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


def test_regressors_fit_vectors_and_sequences_too():
    one, other = torch.nn.Sequential(torch.nn.Linear(3,
                                                     6)), torch.nn.Sequential(
                                                         torch.nn.Linear(3, 10))
    for shape in ((4, 3), (4, 5, 3)):
        between = distillation.regressors(one, other, {"0": "0"}, torch.zeros(shape))
        assert [tuple(r.weight.shape) for r in between.values()] == [(10, 6)]
    with pytest.raises(ValueError, match=r"regressors: 0 puts out \(2, 3, 4, 5, 6\), "
                       r".*expected feature maps"):
        distillation.regressors(one, one, {"0": "0"}, torch.zeros(2, 3, 4, 5, 3))
