"""The tests. While they are imported nothing is looked through for what could be freed: all of it stays."""

import gc

gc.disable()  # until conftest's pytest_collection_finish
