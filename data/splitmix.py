"""splitmix64, the generator of all random choices about data: the same numbers on every machine, in every version.

No library promises a random stream that stays the same across its versions, so this one is written out here.
"""

import numpy as np

INCREMENT = 0x9E3779B97F4A7C15  # the golden ratio times 2^64
MASK = (1 << 64) - 1


def mix64(state: np.ndarray) -> np.ndarray:
    """The outputs of splitmix64 for states (uint64, any shape), each bit of which depends on every bit of the state.

    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014, figure 16. Arithmetic is modulo 2^64.
    """
    x = state + np.uint64(INCREMENT)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
