"""Its place puts this folder on the path, so that every test can import from it; and it steadies hypothesis."""

import os

from hypothesis import settings

# Where a build must not depend on luck the examples are the same every time; elsewhere they go on searching.
settings.register_profile("steady", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("steady")
