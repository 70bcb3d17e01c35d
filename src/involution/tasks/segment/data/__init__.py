"""The data sets of semantic segmentation, a file each."""
