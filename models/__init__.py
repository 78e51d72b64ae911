"""Networks: modules of PyTorch that import nothing of the training code.

Each file has one frozen dataclass, whose fields are the network's section of the config, and whose
``build(shape, classes)`` makes the network for images of shape (C, H, W).

A denoiser is called as ``model(x, time, label)``: x float32 [B, C, H, W], time float32 [B] in the units of the noise
scheduler, label int64 [B] (-1 for no label; ignored by a network of 0 classes). It returns a tensor of x's shape.

A masked autoencoder is called as ``model(image, visible, hidden, valid)`` (see `models/mae.py`) and returns the
predicted patches [B, H, P].

A network that supports gradient checkpointing has the method ``enable_gradient_checkpointing()``, as in diffusers.
"""
