"""Where do the values of a delta come from? A class for each kind, with one contract."""
