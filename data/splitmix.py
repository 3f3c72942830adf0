"""splitmix64: generates all random choices about data, identically on every machine and in every version.

The storybook and the order of rows draw from it. It is implemented here because no library promises that its random
stream stays the same in all versions.
"""

import numpy as np

INCREMENT = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio
MASK = (1 << 64) - 1


def mix64(state: np.ndarray) -> np.ndarray:
    """The output of splitmix64 for each state (uint64, any shape): every bit of it depends on every bit of the state.

    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014, figure 16. Arithmetic is modulo 2^64.
    """
    x = state + np.uint64(INCREMENT)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
