"""Build data/wiki_decoder/: a small decoder in the hub's layout, trained on the embedded summaries
and definitions.

    python data/build_wiki_decoder.py [--device cuda] [--epochs 4]

A byte-level BPE of 4,096 entries is made from the training texts, then a Llama of 1.3 million
parameters is trained on them: the 6,033 training summaries of data/wiki_topics, eight to a text,
and the 117,659 definitions of data/wordnet, thirty-two to a text, cut at 512 tokens. Forty minutes
on one core. Weights are stored in float16.
"""

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workbench.measures import accuracy
from workbench.subjects import data, models, texts, wordnet
from workbench.subjects.training import Recipe, fit

OUT, END, SEED = Path(__file__).parent / "wiki_decoder", "<|end|>", 0
SHAPE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
         "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
         "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0}
LICENCE = """The weights and the tokenizer in this folder were made from the texts in ../wiki_topics (Wikipedia contributors,
CC BY-SA 4.0, see ../wiki_topics/LICENCE) and the definitions in ../wordnet (Princeton University, see ../wordnet/LICENCE)
by ../build_wiki_decoder.py. The weights are under the MIT licence; what they recite is under the licence of those texts.
"""  # noqa: E501


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--state", type=Path, help="where a run that is stopped goes on from")
    chosen = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    lines = [*data.load("wiki_text").train.inputs.lines,
             *texts.joined(wordnet.load().definition, 32)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=SHAPE["vocab_size"], special_tokens=[END],
                            show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END,
                            pad_token=END).save_pretrained(OUT)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False))
    task = data.load("wiki_text", preprocessing=models.preprocessing(f"hf:{OUT}", longest=512))
    task = replace(task, train=texts.plain(lines, task.test.prepare, "texts and definitions"))
    task = replace(task, validation=task.validation.subset(24))
    recipe = Recipe(epochs=chosen.epochs, batch_size=16, learning_rate=3e-3, optimizer="adamw",
                    weight_decay=0.05, warmup=0.05,
                    precision="bf16")
    made = fit(model, task, recipe=recipe, seed=SEED, device=chosen.device, state=chosen.state)
    made.model.config.architectures = [type(model).__name__]
    made.model.config.save_pretrained(OUT)
    weights = {name: value.detach().half().contiguous()
               for name, value in made.model.state_dict().items()
               if name != "lm_head.weight"}  # the table of words, tied
    save_file(weights, OUT / "model.safetensors", metadata={"format": "pt"})
    made.history.to_csv(OUT / "history.csv", index=False)
    score = accuracy.evaluate(models.load(f"hf:{OUT}", task), task.test)
    told = {"recipe": asdict(recipe), "seed": SEED, "device": chosen.device, "test": score.row()}
    (OUT / "recipe.json").write_text(json.dumps(told, indent=2) + "\n")
    (OUT / "LICENCE").write_text(LICENCE)
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n"
            for f in sorted(OUT.iterdir())]
    (OUT / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
