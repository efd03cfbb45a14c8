"""ToolBench: knowledge of APIs by supervised fine-tuning, the skill of calling them by RL."""
