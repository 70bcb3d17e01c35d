"""A package per task, of one shape: models, data, Lightning module, evaluation, predictions, recipes."""
