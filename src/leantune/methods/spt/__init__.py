"""SPT: sparse attention over keys that product quantisation chooses.

Source: Gui, Yan, Yin, Yang and Cheng, "SPT: Fine-Tuning Transformer-based Language Models
Efficiently with Sparsification", arXiv 2312.10365.
"""
