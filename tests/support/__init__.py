"""What test modules share: checks against eager and the evaluator, samples, programs, worlds."""
