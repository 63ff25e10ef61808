"""Parts of ``tools/train_mini.py``: data, autoencoder, diffusion model, evaluation."""
