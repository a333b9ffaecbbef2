"""Hugging Face: models written for transformers and read from its folders, and our attention in its models."""

from phi1.huggingface.attention import register_attention
from phi1.huggingface.card import limits
from phi1.huggingface.export import export_folder, phi_config, to_phi
from phi1.huggingface.load import import_folder, import_tokenizer

__all__ = ["export_folder", "import_folder", "import_tokenizer", "limits", "phi_config", "register_attention", "to_phi"]
