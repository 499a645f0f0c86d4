"""ComfyUI's custom nodes of diffusion-align: guiders for its SamplerCustomAdvanced. README.md says how to install."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
