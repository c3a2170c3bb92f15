"""Hugging Face models from a folder in the hub's layout: loaded, cut, quantised, exported; and what
is refused."""

import datasets
import pytest
import torch
from torch import nn

from workbench.batches import answer, call, joined
from workbench.deployment import onnx, sessions
from workbench.graph import coupling
from workbench.graph.group import Kept
from workbench.measures import accuracy, equivalence, sensitivity
from workbench.methods import channels, quantization, rounding
from workbench.subjects import checkpoints, data, models
from workbench.subjects.objectives import IGNORED, NextToken, Tagging

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##ing", "the", "cat", "dog", "sing", "runs",
         "sleeps", "in",
         "london", "paris", "."]
LINES = ["the cat runs .", "the dog sleeps in london", "singing in paris .", "the dog runs",
         "the cat sleeps", "paris ."] * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT with its tokenizer, as a hub stores it."""
    path = tmp_path_factory.mktemp("hub") / "tiny-bert"
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab_file=str(path / "vocab.txt"),
                                   vocab=str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4,
                                     vocab_size=len(WORDS), max_position_embeddings=64,
                                     initializer_range=0.3)
    transformers.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def task(folder):
    made = datasets.Dataset.from_dict({"text": LINES, "label": [k % 3 for k in range(len(LINES))]})
    return data.of(made, made, prepare=models.preprocessing(f"hf:{folder}"), name="lines")


@pytest.fixture(scope="module")
def model(folder, task):
    return models.load(f"hf:{folder}", task)


@pytest.fixture(scope="module")
def exported(model, task, tmp_path_factory):
    return onnx.export(model, task.example, tmp_path_factory.mktemp("onnx") / "bert.onnx")


def test_text_is_prepared_by_the_models_own_tokenizer(task):
    inputs, targets = task.test.batch(torch.arange(3))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (3, 7)
    assert inputs["attention_mask"].sum(1).tolist() == [6, 7, 7]
    assert targets.tolist() == [0, 1, 2]


def test_the_file_answers_as_the_model_does_at_any_batch_and_length(model, exported, task):
    for places in (torch.arange(1), torch.arange(2, 7), torch.tensor([5])):
        inputs = task.test.batch(places).inputs
        torch.testing.assert_close(sessions.open(exported)(inputs), sessions.open(model)(inputs),
                                   atol=1e-5, rtol=1e-4)
    verdict = equivalence.compare(model, exported, task.test)
    assert verdict.cosine_min > 0.99999
    assert verdict.agreement == 1
    assert list(sessions.open(exported).inputs) == ["input_ids", "attention_mask"]
    frame = equivalence.by_layer(model, exported, task.test)
    assert len(frame) == 14
    assert not frame.parted.any()


def test_neurons_and_heads_can_go_and_the_width_of_the_norms_stays(model, task):
    groups = {group.layer: group for group in coupling.groups(model, task.example)}
    queries, neurons = groups["bert.encoder.layer.0.attention.self.query"], groups[
        "bert.encoder.layer.0.intermediate.dense"]
    assert (queries.unit, queries.channels, queries.kept) == ("head", 4, None)
    assert (neurons.unit, neurons.channels, neurons.kept) == ("neuron", 64, None)
    width = next(group for group in groups.values()
                 if "bert.encoder.layer.0.output.dense" in group.made_by)
    assert width.kept is Kept.NORMED


def test_a_model_without_some_heads_and_neurons_comes_back_from_its_checkpoint(
        model, task, tmp_path):
    removed = {"bert.encoder.layer.0.attention.self.query": [1, 2],
               "bert.encoder.layer.1.intermediate.dense": list(range(20))}
    small, masked = (make(model, removed, example=task.example)
                     for make in (channels.remove, channels.mask))
    inputs = task.test.batch(torch.arange(5)).inputs
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, masked(**inputs).logits)
        assert (masked(**inputs).logits - model(**inputs).logits).abs().max() > 1e-3
    models.save(small, tmp_path / "small.safetensors")
    again = models.load(str(tmp_path / "small.safetensors"), task)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, small(**inputs).logits)
    assert models.preprocessing(str(tmp_path / "small.safetensors")).longest == 64


@pytest.mark.parametrize("kind", ["packed", "grouped"])
def test_heads_of_other_spellings_can_go(kind):
    torch.manual_seed(0)
    if kind == "packed":
        import timm

        net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5,
                                depth=2).eval()
        inputs, layer, count = torch.randn(2, 3, 32, 32), "blocks.0.attn.qkv", 3
    else:
        config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                          num_attention_heads=4,
                                          num_key_value_heads=2, vocab_size=50, use_cache=False,
                                          initializer_range=0.3)
        net, layer, count = transformers.LlamaForCausalLM(
            config).eval(), "model.layers.0.self_attn.q_proj", 2
        inputs = {"input_ids": torch.randint(0, 50, (2, 6))}
    assert next(g for g in coupling.groups(net, inputs) if g.layer == layer).channels == count
    small, masked = (make(net, {layer: [0]}, example=inputs)
                     for make in (channels.remove, channels.mask))
    with torch.no_grad():
        torch.testing.assert_close(answer(call(small, inputs)), answer(call(masked, inputs)),
                                   atol=1e-4, rtol=1e-4)
        assert (answer(call(masked, inputs)) - answer(call(net, inputs))).abs().max() > 1e-4


def test_exact_counts_on_sentences_are_the_plain_loops(model, task):
    method = channels.silencing(model, example=task.example)
    both = [sensitivity.scan(model, task.test, method, levels=[0.25, 0.5], mode=mode, batch_size=20)
            for mode in ("exact", "plain")]
    assert both[0].top1.equals(both[1].top1)
    assert (both[0][both[0].removed > 0].distance > 0).all()


def test_layers_are_in_integers_and_the_rest_in_float(model, task, tmp_path):
    made = quantization.quantize(model, list(task.test.batches(20)))
    path = onnx.export(made, task.example, tmp_path / "int8.onnx")
    import onnx as standard
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(
        tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in standard.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 12
    assert kinds.count("LayerNormalization") == 5
    assert kinds.count("Softmax") == 2
    assert accuracy.evaluate(path, task.test).n == len(LINES)
    stored = {tensor.name: tensor.data_type for tensor in standard.load(path).graph.initializer}
    assert stored["bert.encoder.layer.0.intermediate.dense.weight"] == standard.TensorProto.INT8


def test_an_integer_answer_does_not_depend_on_the_batch(model, task, tmp_path):
    path = onnx.export(quantization.quantize(model, list(task.test.batches(20))), task.example,
                       tmp_path / "int8.onnx")
    alone = [task.test.batch(torch.tensor([k])).inputs for k in range(6)]
    proof = equivalence.batch_proof(path, alone, batches=(1, 3, 6), padding=(0, 5))
    assert proof.cosine_min.min() >= 0.9999
    assert proof.agreement.min() == 1


def test_few_bits_are_repaired_on_sentences_too(model, task):
    seen = list(task.test.batches(20))
    rough = quantization.quantize(model, seen,
                                  weights=quantization.Scheme(3, granularity="channel"),
                                  activations=None)
    fixed = rounding.descend(rough, model, seen)
    inputs = joined([batch.inputs for batch in seen])
    with torch.no_grad():
        apart = [(answer(call(net, inputs)) - answer(call(model, inputs))).norm()
                 for net in (rough, fixed)]
    assert apart[1] < 0.8 * apart[0]


def test_a_small_change_of_a_large_model_is_stored_small(model, folder, task, tmp_path):
    tuned = models.load(f"hf:{folder}", task)
    with torch.no_grad():
        for layer in tuned.modules():
            if isinstance(layer, nn.Linear):
                layer.weight += 0.1 * torch.randn(len(layer.weight),
                                                  2) @ torch.randn(2, layer.weight.shape[1])
    checkpoints.save_change(tuned, model, tmp_path / "change.safetensors", rank=2)
    again = models.load(f"hf:{folder}@{tmp_path / 'change.safetensors'}", task)
    inputs = task.test.batch(torch.arange(5)).inputs
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, tuned(**inputs).logits, atol=0.05,
                                   rtol=0.05)


def test_tags_and_next_tokens_are_tasks(folder):
    rows = {"tokens": [["the", "cat", "singing"], ["in", "london"]],
            "tags": [["O", "B-X", "I-X"], ["O", "B-Y"]]}
    prepare = models.preprocessing(f"hf:{folder}")
    made = datasets.Dataset.from_dict(rows)
    tagged = data.of(made, made, prepare=prepare)
    assert isinstance(tagged.objective, Tagging)
    inputs, targets = tagged.test.batch()
    pieces = tagged.test.prepare.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert pieces[3:5] == ["sing", "##ing"]
    assert targets[0].tolist() == [IGNORED, 0, 1, 3, IGNORED, IGNORED]
    score = accuracy.evaluate(models.load(f"hf:{folder}", tagged), tagged.test)
    assert set(score.row()) == {"f1", "f1_low", "f1_high", "n"}
    text = data.of(datasets.Dataset.from_dict({"text": LINES}), prepare=prepare)
    assert isinstance(text.objective, NextToken)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2,
                                      vocab_size=len(WORDS), use_cache=False)
    decoder = models.wrap(transformers.LlamaForCausalLM(config), text)
    perplexity = accuracy.evaluate(decoder, text.test).value
    assert perplexity == pytest.approx(len(WORDS), rel=0.2), "an untrained one guesses evenly"


def no_tokenizer(folder, task, tmp_path):
    transformers.BertModel(transformers.BertConfig(hidden_size=8, num_attention_heads=2,
                                                   num_hidden_layers=1, intermediate_size=8,
                                                   vocab_size=9)).save_pretrained(tmp_path)
    models.preprocessing(f"hf:{tmp_path}")


def other_head(folder, task, tmp_path):
    models.load(f"hf:{folder}", task).save_pretrained(tmp_path)
    models.load(f"hf:{tmp_path}", data.load("wiki_topics"))


@pytest.mark.parametrize(("call", "message"), [
    (no_tokenizer, "has no tokenizer"),
    (other_head, "has a head for 3 labels, wiki_topics has 11; load it with new_head=True"),
    (lambda *_: models.load("hf:/nowhere"), "hf:/nowhere could not be read"),
    (lambda *_: next(data.load("wiki_topics").test.batches()),
     "this task is text: a model reads tokens"),
    (lambda folder, *_: data.load("fashion_mnist",
                                  preprocessing=models.preprocessing(f"hf:{folder}")),
     "fashion_mnist has one channel"),
])
def test_what_does_not_fit_is_refused_in_one_line(folder, task, tmp_path, call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        call(folder, task, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    (lambda i: {"ids": i["input_ids"]}, r"BertForSequenceClassification has no input 'ids'|input "
     r"'ids' is not among its inputs"),
    (lambda i: {"input_ids": i["input_ids"]}, "input 'attention_mask' is missing"),
    (lambda i: i | {"input_ids": i["input_ids"] + 99},
     "largest id is .*, its vocabulary has 16 entries|refuses the inputs"),
    (lambda i: i | {"attention_mask": i["attention_mask"][:, :2]}, "refuses the inputs")])
@pytest.mark.parametrize("kind", ["module", "file"])
def test_inputs_that_do_not_fit_are_named(model, exported, task, change, message, kind):
    if kind == "module" and "missing" in message:
        pytest.skip("a module may have a default for it")
    with pytest.raises(ValueError, match=message) as caught:
        sessions.open(model if kind == "module"
                      else exported)(change(task.test.batch(torch.arange(2)).inputs))
    assert "\n" not in str(caught.value)


def test_sentences_of_other_lengths_are_served_together_and_answered_as_alone(exported, task):
    from workbench.deployment.batching import Batcher

    alone = [task.test.batch(torch.tensor([k])).inputs for k in range(6)]
    with Batcher(exported, size=6, deadline_ms=200) as served:
        answers = [served.submit({name: value[0] for name, value in inputs.items()})
                   for inputs in alone]
        found = torch.stack([answer.result() for answer in answers])
    assert served.batches == [6]
    torch.testing.assert_close(found, torch.cat([sessions.open(exported)(inputs)
                                                 for inputs in alone]), atol=1e-4, rtol=1e-4)
