"""Converters: checkpoints and stock GGUF files to the GGUF files that the loader likes best.

The folder lies at the repository's root and is installed as ``edgemoe.converters``.
"""
