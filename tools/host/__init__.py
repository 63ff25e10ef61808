"""What the demo and the tests need around the pack: an environment, a running ComfyUI, a client for it."""
