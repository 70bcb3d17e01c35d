"""Training, evaluation and prediction, as far as all tasks share them."""
