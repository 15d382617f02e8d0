"""Set-up of all tests. This file also puts its folder on the import path, for `hub_server` and `hub_fixtures`."""

import os


# Before torch is imported. Several threads are slower on models of this size, and a process that forks after OpenMP has
# started threads hangs in its next product.
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["hub_fixtures"]
