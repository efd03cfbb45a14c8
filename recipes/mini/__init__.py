"""Skill transfer in miniature: four small models trained on the CPU, then the real command line."""
