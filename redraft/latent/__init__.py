"""Latent thinking: blocks of continuous thought, denoised one after another (docs/latent-thinking.md)."""
