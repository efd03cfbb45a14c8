"""Recipes that train: skillvec.recipes, from an installed package and from a clone alike.

The folder stands beside the package, which holds a link to it.
"""
