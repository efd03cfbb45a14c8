"""Does a vector help? Evaluators, trials of points on one loaded model, sweeps and searches."""
