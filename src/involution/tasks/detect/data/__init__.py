"""The data sets of object detection and instance segmentation, one per file."""
