"""Names of the networks whose checkpoints are known; imports nothing, so that commands can offer them at once."""

from typing import Literal

Kind = Literal["lightningdit", "autoencoder", "semantic_vae", "cascade_unet"]
