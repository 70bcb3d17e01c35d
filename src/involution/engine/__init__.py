"""Training, evaluation and prediction, shared by all tasks."""
