"""The data sets of image classification."""
