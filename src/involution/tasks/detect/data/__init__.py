"""The data sets of object detection and instance segmentation, a file each."""
