"""Which job reads and writes what, in which order, by whom, and what if it fails?"""
