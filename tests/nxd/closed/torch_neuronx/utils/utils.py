"""The same under the name that other parts of NxD use."""

from torch_neuronx.utils import SUPPORTED_TYPES, get_platform_target  # noqa: F401
