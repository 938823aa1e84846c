"""Errors, paired differences, fits; without torch."""
import math

import numpy as np


def mean_and_error(losses, sets=None):
    """(mean, standard error of the mean, its degrees of freedom) of losses (n,) in the order of the text, where neighbours are alike.

    Batch means: the deviations of floor(sqrt(n)) stretches of as many losses, or of one more in the first of them (Flegal and Jones
    2010, https://doi.org/10.1214/09-AOS735). Below 4 losses there is one stretch and no telling: the error is nan."""
    losses = np.asarray(losses, np.float64)
    n, mean = len(losses), float(losses.mean())
    if sets is not None and len(np.unique(sets)) > 1:  # (n,) which set of a mixture each is from: of fixed shares, so that what sets differ by is no error
        parts = [mean_and_error(losses[sets == number]) for number in np.unique(sets)]
        counts = np.array([(sets == number).sum() for number in np.unique(sets)])
        return mean, math.sqrt(sum((count / n * error) ** 2 for count, (_, error, _) in zip(counts, parts))), sum(df for _, _, df in parts)
    blocks = math.isqrt(n)
    if blocks < 2:
        return mean, math.nan, 0
    deviations = np.array([(block - mean).sum() for block in np.array_split(losses, blocks)]) / n  # each block's part in the mean's error
    return mean, math.sqrt(blocks / (blocks - 1) * float(np.square(deviations).sum())), blocks - 1
