"""Every version of a plugin layer."""

from __future__ import annotations

from gqa_plugins.grouped_attention.coded_layer import CodedLayer
from gqa_plugins.grouped_attention.launch import Layer
from gqa_plugins.grouped_attention.long_layer import LongLayer

LAYERS: dict[str, type[Layer]] = {layer.version: layer for layer in (Layer, LongLayer, CodedLayer)}
"""version of the plugin -> its layers"""
