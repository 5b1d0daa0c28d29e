"""Pure PyTorch: networks, objectives, clocks, guidance, solvers, checkpoint formats.

Nothing here knows of Ray, Prefect, MLflow, file systems or devices. Time runs from noise (0) to data (1).
Shape suffixes: B images, C channels, H and W rows and columns of pixels or latent cells, h and w rows and
columns of tokens or features, N tokens, D width, G channel groups, I features per head, K heads.
"""
