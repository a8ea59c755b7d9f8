"""Calls a model without computing its convolutions and without side effects, for `explain` and `precompile`.

The model's own Python code runs, on stand-ins for its tensors. Whatever it changes is restored. In reading order:

    state     finds everything that a call could change, and restores it
    runner    calls the model and its backward pass
"""
