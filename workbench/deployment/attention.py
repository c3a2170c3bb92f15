"""Attention as ONNX operators, whatever the number of axes: the exporter's own translation knows
four only."""

import math

from onnxscript import opset18 as op


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """softmax(Q K^T scale + mask) V over the last two axes, as
    torch.nn.functional.scaled_dot_product_attention in eval mode.

    Raises ValueError where the width of a head, or with grouped queries the number of heads, is not
    known.

    Example: `attention(query, key, value, is_causal=True)`
    """
    width, axes = query.shape[-1], len(key.shape)
    if not isinstance(width, int):
        raise ValueError("attention whose heads have a width that is not known cannot be exported")
    if enable_gqa:
        key, value = (_repeated(part, query.shape[-3]) for part in (key, value))
    swapped = op.Transpose(key, perm=[*range(axes - 2), axes - 1, axes - 2])
    scores = op.MatMul(op.Mul(query,
                              op.CastLike(op.Constant(value_float=scale or 1 / math.sqrt(width)),
                                          query)), swapped)
    if is_causal:
        size = op.Concat(op.Shape(query, start=-2, end=-1), op.Shape(key, start=-2, end=-1), axis=0)
        attn_mask = op.Cast(op.Trilu(op.Expand(op.Constant(value_float=1.0), size), upper=0), to=9)
    if attn_mask is not None:
        boolean = is_causal or attn_mask.dtype == 9
        lowest = op.CastLike(op.Constant(value_float=float("-inf")), scores)
        scores = op.Where(attn_mask, scores, lowest) if boolean else op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _repeated(part, heads: int):
    """Keys or values (..., few heads, places, width), each for the queries that share it."""
    few = part.shape[-3]
    if not (isinstance(few, int) and isinstance(heads, int)):
        raise ValueError("attention with grouped queries whose heads are not counted cannot be "
                         "exported")
    places = [group for group in range(few) for _ in range(heads // few)]
    return op.Gather(part, op.Constant(value_ints=places), axis=len(part.shape) - 3)
