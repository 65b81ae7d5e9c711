"""Its place puts this folder on the path, so that every test can import from it; and it steadies hypothesis."""

import os

from hypothesis import settings

# Where a build must not depend on luck the examples are the same every time; elsewhere they go on searching. None has to be
# quick: the first one of all may have to wait for the kernels to be compiled.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("searching", deadline=None)
settings.load_profile("steady" if os.environ.get("CI") else "searching")
