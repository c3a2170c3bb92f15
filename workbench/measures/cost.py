"""Parameters, multiply-accumulates and bytes, layer by layer.

Source: torch.utils.flop_counter counts 2 floating-point operations per multiply-accumulate of each
convolution, matrix product and attention; MACs here are its count halved. A convolution (k_h x k_w,
groups g) has n H_out W_out C_out (C_in / g) k_h k_w of them; biases, norms and activations are not
counted.
"""

import pandas as pd
from torch import Tensor, nn

from workbench.batches import Inputs
from workbench.graph.layers import own_macs


def table(model: nn.Module, example: Inputs) -> pd.DataFrame:
    """One row per module that holds parameters or computes: layer, type, params, macs, size_bytes,
    output.

    macs are those of one example; parameters shared by two modules count once, embedding tables and
    packed projections among them; a functional operation (attention, say) counts for the module
    whose forward calls it. example: inputs, of which the first is used.

    Example: `cost.table(model, task.example).sort_values("macs")`
    """
    outputs: dict[str, tuple[int, ...]] = {}

    def note(name: str):
        def hook(_module, _inputs, output):
            first = output[0] if isinstance(output, tuple) and output else output
            outputs.setdefault(name, tuple(first.shape[1:]) if isinstance(first, Tensor) else ())
        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        macs_by_name = own_macs(model, example)
    finally:
        for handle in handles:
            handle.remove()
    root = type(model).__name__
    rows, seen = [], set()
    for name, module in model.named_modules():
        macs = macs_by_name[name]
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own or macs:
            size = sum(p.numel() * p.element_size() for p in own)
            rows.append({"layer": name or root, "type": type(module).__name__,
                         "params": sum(p.numel() for p in own),
                         "macs": macs, "size_bytes": size,
                         "output": " x ".join(map(str, outputs.get(name, ())))})
    return pd.DataFrame(rows, columns=["layer", "type", "params", "macs", "size_bytes", "output"])


def total(model: nn.Module, example: Inputs) -> dict[str, int]:
    """The sums of `table`: params, macs of one example, size_bytes.

    Example: `cost.total(model, task.example)["macs"]`
    """
    sums = table(model, example)[["params", "macs", "size_bytes"]].sum()
    return {key: int(value) for key, value in sums.items()}
