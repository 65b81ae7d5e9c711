"""How the floating safetensors dtypes lie in host memory."""

import numpy as np

# BF16 has no numpy dtype: its bits are kept as uint16.
HOST_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
