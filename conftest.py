"""What every test runs with. What tests share is in tests/helpers.py."""

import os
import signal

# Bit-identity with HF requires one summation order, and AMX adds in an order that depends on shapes
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# A shell that starts the tests in the background has them ignore Ctrl-C, which they would hand down to commands
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.helpers"]
