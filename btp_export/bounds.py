"""The least and the largest values of what users choose, on the command line and from Python."""

import os
from typing import Final

MOST_SEEDS: Final = 2**24 - 1  # the calibration keeps the upper bits of a seed for its own draws
MOST_TOKENS: Final = 2**20  # more than any model has positions
MOST_THREADS: Final = max(64, 2 * (os.cpu_count() or 1))  # thousands of threads take a machine down

SEEDS: Final = (0, MOST_SEEDS)
TOKENS: Final = (1, MOST_TOKENS)
THREADS: Final = (1, MOST_THREADS)
BATCHES: Final = (1, 1024)
CALIBRATION_SAMPLES: Final = (1, 4096)
VERIFIED_SAMPLES: Final = (1, 1024)
QUESTIONS: Final = (1, 1_000_000)
ANSWER_TOKENS: Final = (1, 128)
ROUNDS: Final = (1, 10_000)
MEMORY: Final = (2**28, 2**46)  # bytes of a device
