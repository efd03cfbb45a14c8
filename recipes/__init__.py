"""Runnable examples around skillvec; not part of the installed package."""
