"""Fronts of two numbers that are both to be low: what no other beats, and the area that it
dominates."""

import numpy as np

Box = tuple[float, float]  # the corner where the area begins: the most of either number that counts


def undominated(points: np.ndarray) -> np.ndarray:
    """Which rows (n, 2), both numbers to be low, no other row beats: bool (n,); of equal rows the
    first.

    Example: `undominated(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])).tolist() == [True, True,
    False]`
    """
    order, best, kept = np.lexsort((points[:, 1], points[:, 0])), np.inf, np.zeros(len(points),
                                                                                   dtype=bool)
    for place in order:
        if points[place, 1] < best:
            best, kept[place] = points[place, 1], True
    return kept


def dominated_area(points: np.ndarray, corner: Box) -> float:
    """The area between `corner` and the points (n, 2) below it: the hypervolume in two dimensions.

    Example: `dominated_area(np.array([[0.5, 0.5]]), (1.0, 1.0)) == 0.25`
    """
    inside = points[(points < np.array(corner)).all(1)]
    inside = inside[undominated(inside)]
    inside = inside[np.argsort(inside[:, 0])]
    ends = np.append(inside[1:, 0], corner[0])
    return float(((ends - inside[:, 0]) * (corner[1] - inside[:, 1])).sum())


def enlarged(points: np.ndarray, new: np.ndarray, corner: Box) -> np.ndarray:
    """By how much each of `new` (m, 2) alone would enlarge the dominated area of `points` (n, 2):
    float (m,).

    Example: `enlarged(np.array([[0.5, 0.5]]), np.array([[0.25, 0.5]]), (1.0, 1.0)).tolist() ==
    [0.125]`
    """
    inside = points[(points < np.array(corner)).all(1)]
    inside = inside[undominated(inside)]
    inside = inside[np.argsort(inside[:, 0])]
    starts = np.concatenate([[-np.inf], inside[:, 0]])
    ends = np.append(inside[:, 0], corner[0])
    # between starts and ends what lies above tops is dominated already
    tops = np.concatenate([[corner[1]], inside[:, 1]])
    wide = np.clip(ends[None] - np.maximum(starts[None], new[:, :1]), 0, None)
    high = np.clip(tops[None] - new[:, 1:], 0, None)
    return (wide * high).sum(1)
