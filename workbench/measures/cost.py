"""Parameters, multiply-accumulates and bytes, layer by layer.

Source: torch.utils.flop_counter counts 2 floating-point operations per multiply-accumulate of each convolution, matrix
product and attention; MACs here are its count halved. A convolution (k_h x k_w, groups g) has
n H_out W_out C_out (C_in / g) k_h k_w of them; biases, norms and activations are not counted.
"""

import pandas as pd
from torch import Tensor, nn

from workbench import layers


def table(model: nn.Module, example: Tensor) -> pd.DataFrame:
    """One row per module that holds parameters or computes: layer, type, params, macs, size_bytes, output.

    macs are those of one image; parameters shared by two modules count once; a functional operation (attention, say)
    counts for the module whose forward calls it. example: float32 (n, C, H, W), of which the first image is used.

    Example: `cost.table(model, task.example).sort_values("macs")`
    """
    outputs: dict[str, tuple[int, ...]] = {}

    def note(name: str):
        def hook(_module, _inputs, output):
            outputs.setdefault(name, tuple(output.shape[1:]) if isinstance(output, Tensor) else ())
        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        counted = layers.macs_by_module(model, example)
    finally:
        for handle in handles:
            handle.remove()
    root = type(model).__name__
    counts = {name: sum(ops.values()) for name, ops in counted.items()}
    path = {name: f"{root}.{name}" if name else root for name, _ in model.named_modules()}
    rows, seen = [], set()
    for name, module in model.named_modules():
        inner = [path.get(f"{name}.{child}" if name else child) for child, _ in module.named_children()]
        macs = counts.get(path[name], counts.get("Global", 0) if not name else 0) - sum(counts.get(i, 0) for i in inner)
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own or macs:
            size = sum(p.numel() * p.element_size() for p in own)
            rows.append({"layer": name or root, "type": type(module).__name__, "params": sum(p.numel() for p in own),
                         "macs": macs, "size_bytes": size, "output": " x ".join(map(str, outputs.get(name, ())))})
    return pd.DataFrame(rows, columns=["layer", "type", "params", "macs", "size_bytes", "output"])


def total(model: nn.Module, example: Tensor) -> dict[str, int]:
    """The sums of `table`: params, macs of one image, size_bytes."""
    sums = table(model, example)[["params", "macs", "size_bytes"]].sum()
    return {key: int(value) for key, value in sums.items()}
