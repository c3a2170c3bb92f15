"""The examples of the docstrings run, on small data; where one compares, what it says holds."""

import ast
import copy
import importlib
import pkgutil
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import workbench
from workbench.__main__ import cli

PACKAGE = Path(workbench.__file__).parent
# examples that are not run here, and why
NOT_RUN = {
    "distillation.embeddings": "trains three encoders: test_alignment",
    "alignment.align": "trains encoders: test_alignment",
    "stamps.load": "seconds: test_stamps",
    "rejection.outside": "wants sentences: test_understanding",
    "accuracy.by": "wants commands: test_understanding",
    "rejection.sureness": "wants commands: test_understanding",
    "intents.recombined": "wants commands: test_understanding",
    "intents.load": "an optional package: test_understanding",
    "chain.understood": "seconds: test_streaming",
    "models.preprocessing": "wants a folder of photographs: test_data",
    "search.search": "a minute: test_search",
    "space.forecast": "a minute: test_search", "space.steps": "what a search found: test_search",
    "samplers.replayed": "a table of plans: test_search",
    "runtimes.open": "an optional runtime: test_deployment",
    "published.systems": "tables of 90_articles: test_published",
    "published.order": "tables of 91_published: test_published",
    "published.beside": "files of the notebook: test_published",
    "decoders.tokens_of": "a decoder: test_decoding",
    "decoding.export": "a decoder: test_decoding", "decoding.Decoder": "a decoder: test_decoding",
    "detection.scored": "a scene: test_streaming",
    "sessions.Stateful": "a recurrent file: test_streaming",
    "streaming.Stream": "a streaming file: test_streaming",
    "binding.Bound": "a streaming file: test_streaming",
    "streaming.export": "a streaming network: test_streaming",
    "rounding.adaround": "40 s: test_quantization", "chain.chain": "13 s: test_streaming",
    "parameters.plan": "runs in a clone",
    "latency.grid": "wants two cores: test_latency",
    "equivalence.batch_proof": "wants sentences: test_understanding",
    "understanding.Understanding": "changes a model: test_understanding",
    "recipe.load": "a file that recipe.dump's example writes",
    "compress.compress": "a minute: test_plans",
    "checkup.checkup": "seconds: the README's own model",
    "orders.order": "a minute: the notebook 41",
    **dict.fromkeys(("hearing.of_stream", "hearing.run", "hearing.told", "hearing.thresholds",
                     "listening.Listener", "listening.listen", "listening.Gate", "chain.listen",
                     "chain.write", "chain.microphone"),
                    "a streaming file: test_streaming"),
    **dict.fromkeys(("words.digits", "words.read_audio", "chain.recording"),
                    "recordings: test_streaming"),
    "words.train": "twenty minutes: data/build_word_spotter.py",
    **dict.fromkeys(("intents.chained", "intents.with_recombined", "understanding.head",
                     "networks.Remembered"), "wants commands: test_understanding"),
    **dict.fromkeys(("retrieval.answered", "retrieval.directions"), "encoders: test_alignment"),
    "decoding.Cached": "a decoder: test_decoding",
    "decoders.GenAI": "a decoder: test_decoding",
    "peers.quantize_nncf": "an optional package: test_deployment",
    **dict.fromkeys(("runtimes.OpenVinoSession", "runtimes.MnnSession"),
                    "an optional runtime: test_deployment"),
    "runtimes.CompiledSession": "compiles for seconds: test_deployment",
    "checkup.Checkup": "seconds: the README's own model",
    "compress.Compressed": "a minute: test_plans", "search.Found": "a minute: test_search",
    **dict.fromkeys(("alignment.embed", "alignment.save", "alignment.load", "encoders.items",
                     "encoders.build"), "encoders: test_alignment"),
    "tasks.Pictures": "wants a folder of photographs: test_data",
    "stamps.new_concepts": "seconds: test_stamps",
    **dict.fromkeys(("machine.stand_still", "machine.go_on"), "stops a process: test_reporting"),
    "machine.end_with_parent": "binds a process: test_reporting",
    **dict.fromkeys(("capture.as_typed", "capture.remembered_operators"),
                    "seconds: test_deployment"),
    "policy.Policy": "an optional package: test_search",
    **dict.fromkeys(("notebooks.run", "pages.write", "pages.notebook_page", "pages.committed"),
                    "runs notebooks: test_reporting"),
    **dict.fromkeys(("samplers.sampler", "samplers.Greedy", "samplers.Forecasting",
                     "asking.Sampler", "space.Forecast"), "a space of plans: test_search"),
    **dict.fromkeys(("evaluation.Evaluations", "evaluation.made", "evaluation.Makers"),
                    "a minute: test_search"),
    **dict.fromkeys(("surgery.finish", "surgery.replace", "attention.attention"),
                    "in the midst of an export: test_deployment"),
    **dict.fromkeys(("execution.start", "execution.packed", "execution.execute", "execution.main",
                     "kernels.Reserve", "kernels.copied", "kernels.prepare", "kernels.settle"),
                    "runs notebooks: test_reporting"),
    "__main__.main": "reads the command line: test_reporting",
    "language.rebuilt": "the header of a checkpoint: test_language",
}


def _examples() -> dict[str, tuple[str, str]]:
    """The code of each example by MODULE.NAME, with the whole name of the module that it stands
    in."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                code = re.search(r"Example: `([^`]+)`", ast.get_docstring(node) or "")
                if code:
                    found[f"{path.stem}.{node.name}"] = re.sub(r"\s+", " ", code[1]), module
    return found


EXAMPLES = _examples()


class Names:
    """What the examples call task, model, seen, ..., made when first asked for; steps by name;
    modules by their short names."""

    def __init__(self, task, model):
        self.made = {"task": task, "model": model, "teacher": model, "small": model, "cut": model,
                     "one": model, "other": model,
                     "torch": torch, "nn": nn, "copy": copy, "np": np, "pd": pd, "Path": Path,
                     "time": time,
                     "MyNetwork": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10))}
        self.modules = {info.name.rpartition(".")[2]: info.name
                        for info in pkgutil.walk_packages([str(PACKAGE)], "workbench.")
                        # of two of one name the later room's
                        if not info.ispkg and "__main__" not in info.name}

    def of(self, name: str):
        """The object that stands for this name in an example, None where there is none."""
        if name not in self.made and name in MADE:
            self.made[name] = MADE[name](self.of)
        if name not in self.made and name in FROM:
            self.made[name] = getattr(importlib.import_module(f"workbench.{FROM[name]}"), name)
        if name not in self.made and name in self.modules:
            self.made[name] = importlib.import_module(self.modules[name])
        return self.made.get(name)


FROM = {"Subject": "subjects.subject", "Prune": "methods.channels",
        "Quantize": "methods.quantization",
        "Repair": "methods.rounding",
        "Fold": "methods.reparameterization", "Train": "subjects.training",
        "Recipe": "subjects.training", "Batch": "batches",
        "Scheme": "numbers.grid"}
MADE = {
    "x": lambda of: of("task").example,
    "inputs": lambda of: of("task").test.batch(slice(64)).inputs,
    "targets": lambda of: of("task").test.targets[:64], "image": lambda of: of("x")[0],
    "images": lambda of: of("inputs"),
    "seen": lambda of: list(of("task").train.subset(64).batches(32)),
    "batches": lambda of: of("seen"),
    "folded": lambda of: of("norms").fold_batchnorm(of("model"), of("x")),
    "quantised": lambda of: of("quantization").quantize(of("folded"), of("seen")),
    "student": lambda of: of("models").load("resnet20", of("task"), pretrained=False),
    "start": lambda of: of("Subject")(of("model"), of("task")),
    "score": lambda of: of("accuracy").evaluate(of("model"), of("task").test),
    "before": lambda of: of("score"),
    "after": lambda of: of("score"),
    "scores": lambda of: of("channels").score(of("model"), "l1", example=of("x")),
    "curves": lambda of: of("sensitivity").scan(of("model"), of("task").test,
                                                of("quantization").quantizing(of("model")),
                                                levels=[0.5, 1.0]),
    "frame": lambda of: of("latency").paired({"torch": of("model")}, of("x"), threads=1, blocks=5),
    "mark": lambda of: "0", "a": lambda of: torch.randn(80, 256),
    "b": lambda of: torch.randn(80, 256),
    "of_a": lambda of: torch.arange(80), "of_b": lambda of: torch.arange(80),
    "book": lambda of: of("codebook").SharedCodebook(16, 32,
                                                     modalities={"image": 256, "speech": 256},
                                                     heads=8),
    "graph": lambda of: of("tracing").trace(of("model"), of("x")).graph,
    "node": lambda of: next(node for node in of("graph").nodes if node.target == "conv1"),
    "modules": lambda of: dict(of("model").named_modules()),
    "scene": lambda of: of("words").scene(of("words").embedded()[:2], seconds=3.0,
                                          draw=np.random.default_rng(0)),
    "known": lambda of: {group.layer: group
                         for group in of("coupling").groups(of("model"), of("x"))
                         if not group.kept},
    "points": lambda of: pd.DataFrame({"lost": [0.0, 0.1], "latency": [1.0, 0.5], "front": True}),
    "transformers": lambda of: importlib.import_module("transformers"),
    "samples": lambda of: np.zeros(1600, np.float32), "recording": lambda of: torch.zeros(1, 1600),
}


@pytest.fixture(scope="module")
def names(tiny, model):
    few = replace(tiny, train=tiny.train.subset(128), validation=tiny.validation.subset(64),
                  test=tiny.test.subset(64))
    return Names(few, copy.deepcopy(model))  # an example may change it


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_public_function_and_class_has_an_example():
    bare = [f"{path.stem}.{node.name}" for path in sorted(PACKAGE.rglob("*.py"))
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            and "Example:" not in (ast.get_docstring(node) or "")]
    assert not bare


def test_what_is_not_run_is_there():
    assert set(NOT_RUN) <= set(EXAMPLES), "an example that went is not to be named"


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - set(NOT_RUN)))
def test_an_example_runs(name, names, folder):
    code, module = EXAMPLES[name]
    tree, own = ast.parse(code), vars(importlib.import_module(module))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    space = {key: own[key] if callable(own.get(key)) and key not in MADE else names.of(key)
             for key in used}
    space = {key: value for key, value in space.items() if value is not None}
    if "recipe=recipe" in code:
        space["recipe"] = names.of("Recipe")(epochs=1)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and str(node.value).endswith(".onnx"):
            names.of("onnx").export(names.of("quantised" if "int8" in node.value else "model"),
                                    names.of("x"), node.value)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    if last:
        value = eval(compile(ast.Expression(last.value), name, "eval"), space)
        assert value is not False, code
        assert not isinstance(last.value, ast.Compare) or value, code


@pytest.mark.parametrize("command", list(cli.commands.values()), ids=list(cli.commands))
def test_a_commands_example_has_what_the_command_needs(command, folder):
    said = re.search(r"Example: workbench (\S+) (.*)", command.help)
    assert said[1] == command.name
    for name in re.findall(r"\S+\.(?:wav|onnx)", said[2]):
        Path(name).touch()
    command.make_context(said[1], said[2].split())
