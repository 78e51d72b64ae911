"""Images and latents: finding, decoding, augmenting, loading and caching them."""
