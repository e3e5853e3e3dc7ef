"""Which instance this is."""

SUPPORTED_TYPES = ["inf2", "trn1", "trn2"]


def get_platform_target(compiler_args: object = None) -> str:
    return "trn1"
