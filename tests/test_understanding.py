"""Commands with an intent and slots: data, objective, models, cutting, teaching, rejection; bad
input."""

import copy
import itertools
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import transformers
from seqeval.metrics import f1_score
from torch import nn

from workbench.batches import Batch
from workbench.deployment import onnx, sessions
from workbench.graph.coupling import groups
from workbench.measures import accuracy, cost, equivalence, rejection
from workbench.methods import distillation, fisher, quantization, transfer
from workbench.subjects import data, intents, language, models, networks, training
from workbench.subjects.objectives import IGNORED, Tagging, Understanding, likeliest
from workbench.subjects.subject import Subject
from workbench.subjects.tasks import Texts, shuffled
from workbench.subjects.understanding import Understanding as Model

TAGS, INTENTS = ("O", "B-room", "B-thing", "I-thing"), ("on", "off")


@pytest.fixture(scope="module")
def commands():
    return data.load("intents:en", preprocessing=models.preprocessing("minilm"))


@pytest.fixture(scope="module")
def small(commands):
    """A BERT of two layers, at random."""
    config = transformers.BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64,
                                     max_position_embeddings=64)
    torch.manual_seed(0)
    model = Model(transformers.BertModel(config), 48, len(commands.classes)).eval()
    model.origin = {"architecture": "own:Model"}
    return model


def test_the_metrics_are_those_of_seqeval_and_of_counting():
    asked, draw = (Understanding(intents=INTENTS, tags=TAGS, whole=False),
                   torch.Generator().manual_seed(0))
    logits, targets = torch.randn(40, 7, 4,
                                  generator=draw), torch.randint(0, 4, (40, 7), generator=draw)
    targets[:, 0] %= 2
    targets[::3, 5:] = IGNORED
    logits = asked.read(logits, targets)
    score = accuracy.scored(asked.statistics(logits, targets), asked)
    chosen = logits.argmax(2)
    assert int(chosen[:, 0].max()) < len(INTENTS), "no tag is taken for an intent"
    pairs = [[(TAGS[a], TAGS[b]) for a, b in zip(line[1:].tolist(), right[1:].tolist(), strict=True)
              if b != IGNORED]
             for line, right in zip(chosen, targets, strict=True)]
    theirs = f1_score([[right for _, right in line] for line in pairs],
                      [[found for found, _ in line] for line in pairs])
    assert accuracy.by(score, "f1").value == pytest.approx(theirs)
    assert accuracy.by(score,
                       "intent").value == pytest.approx(
                           (chosen[:, 0] == targets[:, 0]).double().mean())
    whole = [all(a == b for a, b in line) and int(c[0]) == int(t[0])
             for line, c, t in zip(pairs, chosen, targets, strict=True)]
    assert score.value == pytest.approx(np.mean(whole))
    loss = asked.loss(logits, targets)
    apart = [nn.functional.cross_entropy(logits[:, 0, :2], targets[:, 0]),
             nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), targets[:, 1:].flatten(),
                                         ignore_index=IGNORED)]
    assert float(loss) == pytest.approx(float(sum(apart)), rel=1e-5)


def test_the_likeliest_tags_are_those_of_trying_every_sentence():
    draw = torch.Generator().manual_seed(0)
    logits, counted = torch.randn(30, 5, 4, generator=draw), torch.rand(30, 5, generator=draw) > 0.3
    logits[0], counted[0] = torch.tensor([0.0, 0.0, 0.0, 9.0]), True  # I-thing, wherever it may be
    counted[1] = False
    found = likeliest(logits, counted, TAGS)
    assert found[0].tolist() == [2, 3, 3, 3, 3]
    for line, scores, mask in zip(found, logits.log_softmax(-1), counted, strict=True):
        scores, line = scores[mask], line[mask].tolist()
        lines = [tags for tags in itertools.product(range(4), repeat=len(scores))
                 if all(now != 3 or before in (2, 3)
                        for before, now in zip((0, *tags), tags, strict=False))]
        best = max(lines, key=lambda tags: sum(scores[k, tag] for k, tag in enumerate(tags)))
        assert line == list(best)


def test_only_whole_entities_are_told_apart_by_the_tag_before():
    asked = Understanding(intents=INTENTS, tags=TAGS)
    logits, targets = torch.zeros(1, 3, 4), torch.tensor([[1, 0, 0]])
    logits[0, 0, 1], logits[0, 1:, 0], logits[0, 2, 3] = 1.0, 2.0, 3.0  # I-thing behind O
    assert asked.right(logits, targets).item() == 1.0
    assert replace(asked, whole=False).right(logits, targets).item() == 0.0
    assert asked.statistics(logits, targets).tolist() == [[1, 1, 0, 0, 0]]
    assert replace(asked, whole=False).statistics(logits, targets).tolist() == [[0, 1, 0, 1, 0]]
    tagging = Tagging(tags=TAGS)
    assert tagging.right(logits[:, 1:], targets[:, 1:]).item() == 1.0
    assert replace(tagging, whole=False).right(logits[:, 1:], targets[:, 1:]).item() == 0.5


def test_sentences_of_like_length_come_together_and_each_comes_once(commands):
    split = commands.train
    lengths = torch.tensor([len(words) for words in split.inputs.lines])
    order = shuffled(split, 32, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == [*range(len(split))]
    spread = torch.stack([lengths[part].float().std() for part in order.split(32)[:-1]])
    assert spread.mean() < 0.3 * lengths.float().std()
    again = shuffled(split, 32, torch.Generator().manual_seed(0))
    other = shuffled(split, 32, torch.Generator().manual_seed(1))
    assert torch.equal(order, again)
    assert not torch.equal(order, other)
    means = torch.stack([lengths[part].float().mean() for part in order.split(32)[:-1]])
    assert (means.diff() < 0).float().mean() > 0.2, "not from short to long"


def test_a_remembered_teacher_answers_as_it_did_whatever_the_padding(small, commands):
    few = commands.train.subset(70)
    known = networks.Remembered(small, few, size=16)
    batch = few.batch(torch.tensor([5, 0, 69]))
    wide = {name: nn.functional.pad(value, (0, 3)) for name, value in batch.inputs.items()}
    mask = batch.inputs["attention_mask"].bool()
    with torch.inference_mode():
        wanted, found, padded = small(**batch.inputs), known(**batch.inputs), known(**wide)
    assert torch.allclose(found[mask], wanted[mask], atol=0.02), "bf16"
    assert torch.equal(padded[:, :-3], found)
    assert found[~mask].abs().sum() == 0
    teach = [distillation.loss(teacher)(copy.deepcopy(small), batch, few.objective, 0.0)
             for teacher in (small, known)]
    assert teach[0].item() == pytest.approx(teach[1].item(), rel=1e-2)
    labelled = replace(commands, train=few)
    assert networks.can_remember(few)
    step = distillation.Distil(training.Recipe(epochs=3, batch_size=35, optimizer="adamw",
                                               learning_rate=1e-3), teacher=small)
    start = Subject(copy.deepcopy(small), labelled)
    asked = []
    handle = small.register_forward_hook(lambda *_: asked.append(1))
    step.apply(start)
    handle.remove()
    assert len(asked) == 2, "70 sentences once, not at each of six steps"
    with pytest.raises(ValueError, match="sentence 0 of the batch is none of those"):
        known(**commands.test.batch(slice(1)).inputs)
    with pytest.raises(ValueError, match="holds no sentences"):
        networks.Remembered(nn.Identity(), data.load("fashion_mnist").test.subset(2))


def test_templates_are_held_out_and_every_language_is_listed(commands):
    seen = {tuple(words) for words in commands.train.inputs.lines}
    assert not any(tuple(words) in seen for words in commands.test.inputs.lines)
    known = {marks[0] for marks in commands.train.targets.lines}
    assert {marks[0] for marks in commands.test.targets.lines} <= known
    assert len(commands.train) > 4000
    assert len(commands.test) > 900
    assert len(commands.classes) >= 40
    again = intents.load("en")
    lines = [[*map(list, drawn.test.inputs.lines)] for drawn in (again, commands)]
    assert lines[0] == lines[1], "drawn by seed"
    assert len(intents.languages()) >= 40
    chinese, hindi = intents.load("zh-CN"), intents.load("hi")
    assert all(len(word) == 1 for words in chinese.test.inputs.lines for word in words
               if "一" <= word[0] <= "龥")
    assert any(len(word) > 3 for words in hindi.test.inputs.lines
               for word in words), "vowel signs belong to their words"


def test_recombined_sentences_keep_their_tags_in_step(commands):
    more = intents.recombined(commands.train, 300, seed=1)
    tags = commands.objective.tags
    assert len(more) == 300
    for words, marks in zip(more.inputs.lines, more.targets.lines, strict=True):
        assert len(marks) == len(words) + 1
        for mark, before in zip(marks[1:], [0, *marks[1:]], strict=False):
            assert not tags[mark].startswith("I-") or tags[before][2:] == tags[mark][2:]
    assert len(intents.with_recombined(commands.train, 10)) == len(commands.train) + 10


def test_requests_hold_several_commands(commands):
    chained = intents.chained(commands.test, 3, seed=0)
    lengths = [len(words) for words in chained.inputs.lines]
    assert len(chained) == len(commands.test)
    assert max(lengths) > 25
    assert all(len(marks) == len(words) + 1 for words, marks in zip(chained.inputs.lines,
                                                                    chained.targets.lines,
                                                                    strict=True))
    with pytest.raises(ValueError, match="most is 0"):
        intents.chained(commands.test, 0)


def test_shapes_of_published_models_come_at_random():
    network = language.shaped("distilbert", labels=3)
    assert network.config.num_labels == 3
    assert 60e6 < sum(p.numel() for p in network.parameters()) < 70e6
    with pytest.raises(ValueError, match="unknown shape 'gpt'; expected one of bert"):
        language.shaped("gpt")


def test_the_small_network_is_small_and_padding_changes_nothing(commands):
    model = models.load("hashed_cnn", commands)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    sentences = [commands.test.batch(torch.tensor([k])).inputs for k in range(6)]
    proof = equivalence.batch_proof(model, sentences, batches=(1, 3, 6), padding=(0, 20))
    assert proof.agreement.min() == 1
    assert proof.cosine_min.min() > 1 - 1e-6
    assert accuracy.by(accuracy.evaluate(model, commands.test.subset(200)), "intent").value > 0.7


def test_checkpoints_of_understanding_come_back(commands, tmp_path):
    model = models.load("hashed_cnn", commands, pretrained=False, seed=3)
    models.save(model, tmp_path / "mine.safetensors")
    again = models.load(tmp_path / "mine.safetensors", commands)
    example = commands.example
    assert torch.equal(model(**example), again(**example))
    assert models.preprocessing(str(tmp_path / "mine.safetensors")).longest == 64
    student = models.load("minilm@data/checkpoints/student-intents-en.safetensors", commands)
    assert len(student.encoder.encoder.layer) == 3
    assert accuracy.by(accuracy.evaluate(student, commands.test.subset(100)), "f1").value > 0.9


def test_it_trains_is_taught_and_adapters_merge(commands, small):
    task = replace(commands, train=commands.train.subset(96),
                   validation=commands.validation.subset(20))
    recipe = training.Recipe(epochs=1, batch_size=32, learning_rate=1e-3, optimizer="adamw",
                             precision="fp32")
    place = "encoder.encoder.layer.{}.attention.self.value"
    pairs = {place.format(1): place.format(0)}
    for options in ({}, {"kind": "hint", "layers": ["states"]},
                    {"kind": "relations", "layers": pairs}):
        made = training.fit(small, task, recipe=recipe, loss=distillation.loss(small, **options))
        assert np.isfinite(made.history.loss.iloc[-1])
        assert "validation_sentence" in made.history
    tuned = transfer.tuned(small, "adapters", rank=2, layers=("query", "dense"))
    trained = training.fit(tuned, task, recipe=recipe).model
    merged = transfer.merged(trained)
    assert merged.state_dict().keys() == small.state_dict().keys()
    torch.testing.assert_close(merged.eval()(**task.example), trained(**task.example), atol=1e-5,
                               rtol=1e-4)
    with pytest.raises(ValueError, match="has no adapters to merge"):
        transfer.merged(small)


def test_relations_are_those_of_a_naive_loop():
    draw = torch.Generator().manual_seed(0)
    mine, theirs = torch.randn(2, 5, 8, generator=draw), torch.randn(2, 5, 12, generator=draw)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    parts = []
    for k, length in enumerate(mask.sum(1).tolist()):
        for head in range(4):
            a, b = mine[k, :length, 2 * head:2 * head + 2], theirs[k, :length,
                                                                   3 * head:3 * head + 3]
            for token in range(length):
                p = torch.softmax(b @ b[token] / 3**0.5, 0)
                q = torch.softmax(a @ a[token] / 2**0.5, 0)
                parts.append(float((p * (p / q).log()).sum()))
    assert float(distillation.relations(mine, theirs, heads=4,
                                        mask=mask)) == pytest.approx(np.mean(parts), rel=1e-4)
    with pytest.raises(ValueError, match="multiple of 5"):
        distillation.relations(mine, theirs, heads=5)


def test_the_fisher_information_is_that_of_single_examples(commands, small):
    known = {group.layer: group for group in groups(small, commands.example) if not group.kept}
    assert {group.unit for group in known.values()} == {"head", "neuron"}
    batch = commands.train.batch(torch.arange(3))
    together = fisher.gradients(small, [batch], known, commands.objective)
    name, group = next((name, group) for name, group in known.items() if group.unit == "neuron")
    (reader, at), = group.read_by.items()
    step, weight = 1e-2, small.get_submodule(reader).weight
    losses = []
    for sign in (1, -1):  # the slope along the mask of one neuron, by differences
        saved = weight.detach().clone()
        with torch.no_grad():
            weight[:, at[7]] *= 1 + sign * step
            logits = commands.objective.read(small(**batch.inputs))
            losses.append(3 * float(commands.objective.loss(logits, batch.targets)))
            weight.copy_(saved)
    assert float(together[name][:, 7].sum()) == pytest.approx((losses[0] - losses[1]) / (2 * step),
                                                              rel=2e-2, abs=2e-4)


def test_exchanging_never_makes_the_information_greater():
    slopes = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)) @ torch.randn(12, 12)
    information = slopes.T @ slopes / 50
    places = slopes.pow(2).mean(0).argsort()[:5].tolist()
    new = fisher.exchanged(slopes, places)
    lost = [float(information[chosen][:, chosen].sum()) for chosen in (places, new)]
    assert len(new) == 5
    assert lost[1] <= lost[0]


def test_what_stays_is_scaled_by_the_least_squares():
    draw = torch.Generator().manual_seed(0)
    seen, weight, right = (torch.randn(*shape, generator=draw)
                           for shape in ((200, 12), (9, 12), (4,)))
    right = 1 + 0.5 * right
    wanted = (seen * right.repeat_interleave(3)) @ weight.T  # four channels of three columns each
    torch.testing.assert_close(fisher._scales(seen, wanted, weight, 4), right, atol=5e-3, rtol=5e-3)
    noisy = wanted + torch.randn(200, 9, generator=draw)
    columns = torch.stack([(seen.view(200, 4, 3)[:, k] @ weight.view(9, 4, 3)[:, k].T).flatten()
                           for k in range(4)], 1)
    least = torch.linalg.lstsq(columns, noisy.flatten()).solution
    torch.testing.assert_close(fisher._scales(seen, noisy, weight, 4), least, atol=5e-3, rtol=5e-3)
    assert fisher._scales(seen, 50 * wanted, weight, 4) is None, "beyond ten it is not believed"


def test_a_transformer_is_cut_without_training(commands, small):
    seen = [commands.train.batch(torch.arange(k, k + 16)) for k in (0, 16, 32)]
    cut = fisher.prune(small, seen, macs=0.6, example=commands.example,
                       objective=commands.objective, multiple=8)
    told = fisher.slopes(small, seen, example=commands.example, objective=commands.objective)
    again = fisher.prune(small, seen, macs=0.6, example=commands.example, multiple=8,
                         known_slopes=told)
    assert all(torch.equal(one, other) for one, other in zip(cut.state_dict().values(),
                                                             again.state_dict().values(),
                                                             strict=True))
    left = cost.total(cut, commands.example)["macs"] / cost.total(small, commands.example)["macs"]
    assert 0.45 < left <= 0.6
    step = fisher.Fisher(macs=0.8, examples=16)
    assert isinstance(step.apply(Subject(small, commands)).model, Model)
    with pytest.raises(ValueError, match="cannot be reached"):
        fisher.prune(small, seen, macs=0.01, example=commands.example, objective=commands.objective)
    with pytest.raises(ValueError, match="macs is 1.5"):
        fisher.prune(small, seen, macs=1.5, example=commands.example)


def test_what_stays_is_rescaled_layer_after_layer_as_the_model_runs(commands, small):
    seen = [commands.train.batch(torch.arange(k, k + 16)) for k in (0, 16)]
    known = {group.layer: group for group in groups(small, commands.example) if not group.kept}
    removed = {name: [0] if group.unit == "head" else [0, 3, 5] for name, group in known.items()}
    backwards = dict(reversed(removed.items()))
    first, second = (fisher.rescaled(small, gone, known, seen, commands.example)
                     for gone in (removed, backwards))
    readers = [next(iter(known[name].read_by)) for name in removed]
    for reader in readers:
        assert torch.equal(first.get_submodule(reader).weight, second.get_submodule(reader).weight)
        assert not torch.equal(first.get_submodule(reader).weight,
                               small.get_submodule(reader).weight)
    walk = fisher._Walk(small, commands.example, seen)
    # what is walked through is what a pass of its own reads
    for reader in sorted(readers, key=walk.graph.place.get):
        torch.testing.assert_close(walk.to(reader), fisher._reads(small, [reader], seen)[reader])


def test_what_is_out_of_scope_is_told_by_sureness(commands):
    model = models.load("hashed_cnn", commands)
    other = rejection.outside(commands.test, ["a large bird of the sea that eats fish"] * 5
                              + ["to sing in a choir"] * 5)
    inside = rejection.sureness(model, commands.test.subset(80))
    curve = rejection.roc(inside, rejection.sureness(model, other), samples=50)
    assert curve.attrs["auc_low"] <= curve.attrs["auc"] <= curve.attrs["auc_high"]
    assert curve.attrs["auc"] > 0.6
    assert curve.accepted.is_monotonic_increasing
    perfect = rejection.roc(np.array([0.9, 0.8]), np.array([0.1, 0.2]), samples=10)
    assert perfect.attrs["auc"] == 1.0
    with pytest.raises(ValueError, match="asks for no intents"):
        rejection.sureness(model, data.load("wordnet").test)


def table(**columns):
    given = {"tokens": [["turn", "it", "on"], ["lamp", "off"]],
             "tags": [["O", "B-x", "O"], ["B-x", "O"]],
             "intent": ["on", "off"]}
    return datasets.Dataset.from_dict(given | columns)


@pytest.mark.parametrize(("columns", "line"), [
    ({"tokens": [[], ["lamp", "off"]], "tags": [[], ["B-x", "O"]]}, "sentence 0 has no tokens"),
    ({"tags": [["O", "O"], ["B-x", "O"]]}, "sentence 0 has 3 tokens and 2 tags"),
    ({"tags": [["O", "I-x", "O"], ["B-x", "O"]]}, "I-x behind O; an entity begins with B-x"),
    ({"tags": [["O", "x", "O"], ["B-x", "O"]]}, "the tag 'x'; expected O, B-SLOT or I-SLOT"),
])
def test_each_bad_sentence_gets_its_line(columns, line):
    with pytest.raises(ValueError, match=line):
        data.of(table(**columns), prepare=models.preprocessing("minilm"))


def test_an_intent_that_training_lacks_is_refused():
    with pytest.raises(ValueError, match="sentence 1 has the intent 'dim', which no "
                       "training sentence"):
        data.of(table(), table(intent=["on", "dim"]), prepare=models.preprocessing("minilm"))


def test_sentences_longer_than_the_model_reads_and_other_tokenizers_are_refused():
    long = table(tokens=[["lamp", "on"], ["lamp"] * 90], tags=[["B-x", "O"], ["O"] * 90])
    task = data.of(long, long, validation=long, prepare=models.preprocessing("minilm"))
    with pytest.raises(ValueError, match=r"of 90 words .* longer than the 64 tokens"):
        task.train.batch()
    prepare = models.preprocessing("minilm")

    class Bare:
        def __call__(self, lines, **options):
            return prepare.tokenizer(lines, **options | {"add_special_tokens": False})

    with pytest.raises(ValueError, match="puts no token of its own"):
        replace(prepare, tokenizer=Bare())(Batch(Texts([["lamp", "off"]]), Texts([[1, 0, 0]])))


def test_languages_and_packages_that_are_missing_get_one_line(monkeypatch):
    with pytest.raises(ValueError, match="no templates in 'xx'; there are af, ar"):
        data.load("intents:xx")
    with pytest.raises(ValueError, match="'sw' has 3 intents, at least 15"):
        data.load("intents:sw")
    intents._packages.cache_clear()
    monkeypatch.setitem(sys.modules, "hassil", None)
    with pytest.raises(ModuleNotFoundError, match=r"workbench\[intents\]"):
        data.load("intents:en")
    monkeypatch.undo()
    intents._packages.cache_clear()


def test_other_models_and_tasks_say_what_they_need(commands):
    with pytest.raises(ValueError, match="needs a task"):
        models.load("hashed_cnn")
    with pytest.raises(ValueError, match="asks for Objective"):
        models.load("hashed_cnn", data.load("wordnet",
                                            preprocessing=models.preprocessing("minilm")),
                    pretrained=False)
    with pytest.raises(ValueError, match="unknown metric 'top1'"):
        Understanding(intents=INTENTS, tags=TAGS, metric="top1")
    with pytest.raises(ValueError, match="an intent in the first place"):
        commands.objective.read(torch.zeros(1, 5, 3))


def test_the_mean_of_several_networks_teaches():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    inputs = torch.randn(5, 3)
    assert torch.allclose(networks.Averaged([one, other])(inputs),
                          (one(inputs) + other(inputs)) / 2)
    with pytest.raises(ValueError, match="give at least one"):
        networks.Averaged([])


def test_a_table_that_is_looked_up_twice_is_stored_once_in_8_bits(tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = torch.nn.Embedding(1200, 16), torch.nn.Linear(16, 4)

        def forward(self, input_ids):
            return self.head((self.table(input_ids) + self.table(input_ids * 7 % 1200)).mean(1))

    torch.manual_seed(0)
    ids = torch.randint(1, 1200, (8, 5))
    rounded = quantization.quantize(Twice(), [({"input_ids": ids}, None)])
    path = onnx.export(rounded, {"input_ids": ids}, tmp_path / "twice.onnx")
    assert path.stat().st_size < 1200 * 16 * 2
    assert torch.allclose(sessions.open(path)({"input_ids": ids}),
                          sessions.open(rounded)({"input_ids": ids}), atol=1e-5)
    kept = quantization.quantize(Twice(), [({"input_ids": ids}, None)], tables=None)
    assert list(quantization.rounded(kept)) == ["head"]
