"""Whole numbers as bytes, as few as their frequencies allow, and back bit for bit.

An asymmetric numeral system (Duda 2013, arXiv 1311.2540) of the library constriction, with the
counts of the numbers in front of it, so that the size is all that a reader needs; packed at a fixed
width where that is smaller.
"""

import struct
import zlib

import numpy as np

_PACKED, _CODED = 0, 1


def encode(symbols: np.ndarray) -> bytes:
    """The bytes of whole numbers 0 <= symbol < 2^24, of any shape (`decode` gives them flat).

    Raises ValueError for no symbols, or one that is negative or too large.

    Example: `len(encode(np.zeros(1000, dtype=int))) < 200`
    """
    symbols = np.ascontiguousarray(symbols).ravel()
    if not len(symbols) or symbols.min() < 0 or symbols.max() >= 2**24:
        raise ValueError("coding: expected one or more whole numbers from 0 to 2^24 - 1")
    counts = np.bincount(symbols)
    width = max(int(len(counts) - 1).bit_length(), 1)
    places = (symbols[:, None] >> np.arange(width)) & 1
    packed = (struct.pack("<BIB", _PACKED, len(symbols), width)
              + np.packbits(places.astype(np.uint8).ravel()).tobytes())
    table = zlib.compress(counts.astype("<u4").tobytes(), 9)
    if np.count_nonzero(counts) < 2:
        return packed
    coder = _coder()
    coder.encode_reverse(symbols.astype(np.int32), _model(counts))
    stream = coder.get_compressed().astype("<u4").tobytes()
    coded = struct.pack("<BII", _CODED, len(symbols), len(table)) + table + stream
    return min(packed, coded, key=len)


def decode(stream: bytes) -> np.ndarray:
    """The numbers, int64 (n,), that `encode` wrote. Raises ValueError where the bytes are cut or
    not of its kind.

    Example: `decode(encode(np.array([1, 2, 2, 3]))).tolist() == [1, 2, 2, 3]`
    """
    try:
        kind, count = struct.unpack_from("<BI", stream)
        if kind == _PACKED:
            width = stream[5]
            bits = np.unpackbits(np.frombuffer(stream, np.uint8, offset=6),
                                 count=count * width).reshape(count, width)
            return bits.astype(np.int64) @ (1 << np.arange(width))
        length = struct.unpack_from("<I", stream, 5)[0]
        counts = np.frombuffer(zlib.decompress(stream[9:9 + length]), "<u4")
        coder = _coder(np.frombuffer(stream, "<u4", offset=9 + length).astype(np.uint32))
        return coder.decode(_model(counts), count).astype(np.int64)
    except (struct.error, zlib.error, ValueError, IndexError) as error:
        raise ValueError("coding: these bytes are cut or were not written by encode "
                         f"({error})") from error


def coded_bytes(symbols: np.ndarray) -> int:
    """How many bytes `encode` needs, once they have been decoded and found the same. Raises
    ValueError where they are not.

    Example: `coded_bytes(np.zeros(1000, dtype=int)) < 200`
    """
    stream = encode(symbols)
    if not np.array_equal(decode(stream), np.ascontiguousarray(symbols).ravel()):
        raise ValueError("coding: the coded numbers do not decode to themselves")
    return len(stream)


def entropy(symbols: np.ndarray) -> float:
    """Bits a symbol: -sum p log2 p of the frequencies.

    Example: `entropy(np.array([0, 0, 1, 1])) == 1.0`
    """
    share = np.bincount(np.ascontiguousarray(symbols).ravel())
    share = share[share > 0] / share.sum()
    return float(-(share * np.log2(share)).sum())


def _coder(words: np.ndarray | None = None):
    import constriction

    return constriction.stream.stack.AnsCoder(*[] if words is None else [words])


def _model(counts: np.ndarray):
    import constriction

    return constriction.stream.model.Categorical((counts / counts.sum()).astype(np.float32),
                                                 perfect=False)
