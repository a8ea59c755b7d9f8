"""A module in whose import the process dies, for test_launch.py."""

import os

os._exit(3)
