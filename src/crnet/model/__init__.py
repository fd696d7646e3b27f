"""The language model: one device, no files, no training."""

from crnet.model.backbone import LanguageModel, build

__all__ = ["LanguageModel", "build"]
