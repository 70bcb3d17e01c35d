"""The data sets of image classification, a file each."""
