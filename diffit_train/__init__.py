"""A training system for DiffiT diffusion vision transformers on Ray."""

__version__ = "0.1.0"
