"""The model on one device: the network, its text generation, its Hugging Face form and its costs."""
