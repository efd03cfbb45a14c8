"""The block: the unit of work, of codecs and of random numbers."""

BLOCK_NUMEL = 1 << 20  # elements


def block_count(numel: int) -> int:
    """Return how many blocks of 2^20 elements a tensor has."""
    return -(-numel // BLOCK_NUMEL)
