"""Images and latents: finding, decoding, transforming, loading and keeping them."""
