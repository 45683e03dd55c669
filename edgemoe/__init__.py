"""edgemoe: run Mixture-of-Experts GGUF models inside the RAM you give them."""
