"""PLACE as transformers knows it: configuration, model and image processor of an exported folder."""
