"""A pretrained model for real text: Gemma 3 270M from packages on PyPI, converted once (`make real-model`)."""
