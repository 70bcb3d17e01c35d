"""One room per task: model builder, data, Lightning module and recipes together. Tasks do not import each other."""
