"""Without a GPU the Triton kernels run in its interpreter."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreted

    interpreted.mend_bfloat16()
    interpreted.hasten()
