"""Networks: deterministic functions of tensors that know nothing of training.

Each file has one frozen dataclass, the network's section of the config, whose `build(shape, classes)`
makes the network for images of `shape` (C, H, W). A denoiser is called as ``model(x, time, label)``, with
x [B, C, H, W], time [B] in the scheduler's own unit and label int64 [B] (-1: none; a network for no classes
ignores it), and returns a tensor like x. A masked autoencoder is called as ``model(image, visible)`` with
visible int64 [B, V], and returns predicted patches [B, L, P]. A network that can compute its activations again in
the backward pass, instead of keeping them, has diffusers' switch ``enable_gradient_checkpointing()``.
"""
