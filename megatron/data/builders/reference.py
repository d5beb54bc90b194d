"""The index builders in NumPy. Tests compare the compiled builders with them, and they run if no builders were compiled.

Shapes: N documents of the data file; P positions in a shuffled order of documents; R rows = samples + 1; D data sets; I samples; B blocks simulated
side by side; K samples begun in one pass
"""

from __future__ import annotations

from array import array

import numpy as np

BLOCK = 2048
WARM_UP = 256


def cut_samples(sizes_N: np.ndarray, document_index_P: np.ndarray, seq_length: int, rows: int) -> np.ndarray:
    """[R, 2]: row k = (position, offset) of token k * seq_length in the concatenation of the documents; empty documents hold no token.

    int32, or int64 where a position or a row needs it. Raises ValueError when the documents hold no more than (rows - 1) * seq_length tokens.
    """
    sizes_P = sizes_N[document_index_P]
    ends_P = np.cumsum(sizes_P, dtype=np.int64)
    if not len(ends_P) or ends_P[-1] <= (rows - 1) * seq_length:
        raise ValueError(f"{int(ends_P[-1]) if len(ends_P) else 0} tokens are too few for {rows} rows every {seq_length} tokens")
    token_R = np.arange(rows, dtype=np.int64) * seq_length
    position_R = np.searchsorted(ends_P, token_R, side="right")
    position_R[0] = 0  # the walk starts at the first document even when that one is empty
    token_R -= ends_P[position_R]
    token_R += sizes_P[position_R]
    token_R[0] = 0
    sample_index = np.empty((rows, 2), index_dtype(len(sizes_P), rows))
    sample_index[:, 0] = position_R
    sample_index[:, 1] = token_R
    return sample_index


def index_dtype(positions: int, rows: int) -> type[np.signedinteger]:
    """int32 where it can hold every position and every row number."""
    return np.int32 if max(positions, rows) < np.iinfo(np.int32).max else np.int64


def pack_documents(sizes_P: np.ndarray, filled: int, limit: int) -> tuple[np.ndarray, int]:
    """(int64 [K]: the positions at which a new sample begins; tokens in the sample that is open at the end) of one pass over whole documents.

    A document joins the open sample, which holds `filled` tokens, as long as both together have at most `limit`; else it begins the next one.
    `filled` 0: none is open. Sizes must be positive.
    """
    ends_P = np.cumsum(sizes_P, dtype=np.int64)
    begins_P = ends_P - sizes_P
    next_P = np.maximum(np.searchsorted(ends_P, begins_P + limit, side="right"), np.arange(1, len(sizes_P) + 1))
    follow = memoryview(next_P)
    position = int(np.searchsorted(ends_P, limit - filled, side="right")) if filled else 0
    starts = array("q")  # a list of numbers takes five times the memory
    while position < len(sizes_P):
        starts.append(position)
        position = follow[position]
    tokens = int(ends_P[-1]) if len(ends_P) else 0
    return np.array(starts, np.int64), tokens - int(begins_P[starts[-1]]) if starts else filled + tokens


def blend(weights_D: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(data set uint8 [I], sample in it int64 [I]): argmax_d(weights_D[d] * max(i, 1) - count_d), the first of equals.

    Every choice depends on the one before. So blocks are simulated side by side from guessed starting counts. If a guess differs from the counts at
    the end of the block before, the block is computed again. The result is exact; guesses only save time.
    """
    blocks = -(-size // BLOCK)
    begin_B = np.arange(blocks) * BLOCK
    guess_BD = guess_counts(weights_D, np.maximum(begin_B - WARM_UP, 0))
    start_BD, _ = simulate(weights_D, np.maximum(begin_B - WARM_UP, 0), guess_BD, WARM_UP)
    start_BD[:1] = 0
    chosen_BI = np.empty((blocks, BLOCK), np.uint8)
    end_BD = np.empty_like(start_BD)
    todo = np.arange(blocks)
    while len(todo):
        end_BD[todo], chosen_BI[todo] = simulate(weights_D, begin_B[todo], start_BD[todo], BLOCK)
        todo = 1 + np.flatnonzero((start_BD[1:] != end_BD[:-1]).any(axis=1))
        start_BD[todo] = end_BD[todo - 1]
    chosen_I = chosen_BI.reshape(-1)[:size]
    sample_I = np.empty(size, np.int64)
    for dataset in range(len(weights_D)):
        places = np.flatnonzero(chosen_I == dataset)
        sample_I[places] = np.arange(len(places))
    return chosen_I, sample_I


def guess_counts(weights_D: np.ndarray, begin_B: np.ndarray) -> np.ndarray:
    """Likely counts after begin_B samples: the exact shares rounded so that each row sums to begin_B."""
    exact_BD = begin_B[:, None] * weights_D
    counts_BD = np.floor(exact_BD)
    missing_B = begin_B - counts_BD.sum(axis=1)
    rank_BD = np.argsort(np.argsort(counts_BD - exact_BD, axis=1, kind="stable"), axis=1)
    return counts_BD + (rank_BD < missing_B[:, None])


def simulate(weights_D: np.ndarray, begin_B: np.ndarray, counts_BD: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(counts after, choices [B, steps]) of `steps` steps of the rule in every block at once."""
    counts_BD = counts_BD.copy()
    chosen_BI = np.empty((len(begin_B), steps), np.uint8)
    every_B = np.arange(len(begin_B))
    for step in range(steps):
        lag_BD = weights_D * np.maximum(begin_B + step, 1).astype(np.float64)[:, None] - counts_BD
        choice_B = lag_BD.argmax(axis=1)
        counts_BD[every_B, choice_B] += 1
        chosen_BI[:, step] = choice_B
    return counts_BD, chosen_BI
