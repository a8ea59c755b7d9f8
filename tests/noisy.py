"""A module whose import writes to the file descriptor of stdout as C code does, for test_launch.py."""

import os

os.write(1, b"written by C\n")
