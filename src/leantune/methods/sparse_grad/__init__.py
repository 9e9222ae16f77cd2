"""SparseGrad: train MLP weights through about 1 % of their gradient, in a basis where it is sparse.

Source: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
EMNLP 2024, arXiv 2410.07383.
"""
