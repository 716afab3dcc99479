"""Image data sets in their original files: names, options, readers, preprocessing, decoding ahead and a cache."""
