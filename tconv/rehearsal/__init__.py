"""Calls a model without computing a convolution and without leaving a trace, for `explain` and `precompile`.

The model's own Python code runs, on stand-ins for its tensors; whatever it changes is set back. In reading order:

    state     finds everything a call could change, and sets it back
    runner    calls the model, and its backward pass
"""
