"""Our artifacts against the stock artifacts of the same weights, in one interleaved run."""
