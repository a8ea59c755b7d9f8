"""What was measured on GPUs, kept on disk and found again: the fastest plan of a pass, and torch's time beside it.

A record is a file of JSON lines (docs/tuning.md). The user's own is in the platform's cache folder; others come with a model
(`tconv.load_record`) or with this package, as `*.jsonl` beside this file. In reading order:

    key   where something was measured (GPU, driver, versions, kernels), and of which pass: what a line is found by
    file  reads and appends lines, so that nothing is lost or half-written
    book  all lines of this process: finds the one that fits a pass best
"""
