"""What others generate with, to be measured beside ours: transformers on PyTorch, onnxruntime-genai
with its own builder."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from workbench.deployment.decoding import Decoder, Generated


class Transformers:
    """A causal language model as transformers generates with it, in PyTorch, its cache in
    float32.

    Example: `decoders.Transformers(models.load("wiki_decoder", data.load("wiki_text")), threads=1)`
    """

    def __init__(self, model: nn.Module, *, threads: int):
        self.model, self.threads = model, threads

    def generate(self, ids: Tensor, *, new: int) -> Generated:
        """The most likely tokens behind each prompt."""
        before, clock = torch.get_num_threads(), _Clock()
        torch.set_num_threads(self.threads)
        try:
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                       min_new_tokens=new, do_sample=False, use_cache=True,
                                       pad_token_id=0, streamer=clock)
        finally:
            torch.set_num_threads(before)
        took = np.diff(np.array(clock.seen)).tolist()
        return Generated(made[:, ids.shape[1]:], took[0], tuple(took[1:]), 0)


class _Clock:
    """What transformers tells of the prompt and of each token behind it, the moment that it has
    it."""

    def __init__(self):
        self.seen: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


class GenAI:
    """A model of transformers as onnxruntime-genai builds and runs it: `bits` 4 or 8 (its blocks of
    32), or 32, attention as its own operator with the cache in place. decoder: its file, opened by
    ONNX Runtime alone.

    model: as models.load gives it. tokenizer: that of its task. folder: where the files go. size:
    prompts that its engine serves at once.

    Raises ModuleNotFoundError where the package is not installed.

    Example: `decoders.GenAI(model, tokenizer, "folder", bits=4)`
    """

    def __init__(self, model: nn.Module, tokenizer, folder: Path | str, *, bits: int = 4,
                 threads: int = 1, size: int = 16):
        if bits not in PRECISIONS:
            raise ValueError(f"onnxruntime-genai: {bits} bits; expected one of "
                             f"{', '.join(map(str, PRECISIONS))}")
        genai = package()
        source, made = Path(folder) / "source", Path(folder) / f"{bits} bits"
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        built = subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", "-i",
                                source, "-o", made, "-e", "cpu", "-p", PRECISIONS[bits], "-c",
                                made / "cache"], capture_output=True, text=True, check=False)
        if built.returncode:
            raise ValueError("onnxruntime-genai's builder failed: "
                             f"{(built.stderr.strip().splitlines() or ['no reason'])[-1]}")
        settings = json.loads((made / "genai_config.json").read_text())
        settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        settings["engine"] = {"static_batching": {"max_batch_size": size}}
        (made / "genai_config.json").write_text(json.dumps(settings))
        self.model = genai.Model(str(made))
        self.decoder = Decoder(made / "model.onnx", threads=threads,
                               longest=model.config.max_position_embeddings,
                               width=settings["model"]["decoder"]["head_size"])

    def generate(self, ids: Tensor, *, new: int) -> Generated:
        """The most likely tokens behind each prompt."""
        genai, count = package(), len(ids)
        settings = genai.GeneratorParams(self.model)
        whole = ids.shape[1] + new
        settings.set_search_options(max_length=whole, min_length=whole, do_sample=False,
                                    batch_size=count)
        runner, took = genai.Generator(self.model, settings), []
        began = time.perf_counter()
        runner.append_tokens(ids.numpy().astype(np.int32))
        for _ in range(new):
            runner.generate_next_token()
            took.append(time.perf_counter() - began)
            began = time.perf_counter()
        made = np.stack([runner.get_sequence(k)[ids.shape[1]:]
                         for k in range(count)]).astype(np.int64)
        return Generated(torch.from_numpy(made), took[0], tuple(took[1:]), 0)

    def serve(self, prompts: Sequence[Tensor], *, new: Sequence[int]) -> tuple[list[Tensor], float]:
        """The tokens behind each prompt, `new` of them each, all asked at once of its engine, which
        lets a waiting prompt in as soon as another is done (continuous batching); and the seconds
        that all took."""
        genai = package()
        engine = genai.Engine(self.model)
        events, made, began = engine.create_event_buffer(64), {}, time.perf_counter()
        for place, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
            request = engine.create_request()
            turn = genai.TurnOptions(request)
            turn.set_do_sample(False)
            turn.set_max_generated_tokens(count)
            turn.set_min_generated_tokens(count)
            request.begin_turn(prompt.numpy().astype(np.int32), turn)
            made[request] = (place, [])
        while engine.has_pending_requests():
            for event in engine.run(events):
                if event.flags & genai.EngineEventFlags.TOKEN:
                    made[event.request][1].append(event.token)
        took = time.perf_counter() - began
        return [torch.tensor(tokens)
                for _, tokens in sorted(made.values(), key=lambda pair: pair[0])], took


def tokens_of(runner, new: int) -> Callable[[Tensor], Tensor]:
    """A function from prompts (n, T) to the `new` tokens that `runner` generates behind each, for
    latency.paired.

    Example: `latency.paired({"file": decoders.tokens_of(decoding.Decoder("decoder.onnx"), 20)},
    ids)`
    """
    return lambda ids: runner.generate(ids, new=new).tokens


def package():
    """onnxruntime-genai, told to send nothing. Raises ModuleNotFoundError with the way to install
    it.

    Example: `decoders.package()`
    """
    try:
        import onnxruntime_genai
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("onnxruntime-genai is not installed; pip install "
                                  "'workbench[decoder]'") from error
    onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


PRECISIONS = {4: "int4", 8: "int8", 32: "fp32"}
