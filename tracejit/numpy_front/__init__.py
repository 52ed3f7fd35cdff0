"""Steps over numpy arrays: `np.*` functions and ndarray methods, compiled like torch calls.

    step(ndarrays) → step.py → the same step on tensors of the same memory → capture, as any step
    while it is traced:  the user's function sees `Array`s → numpy's rules → torch calls

`array.py` has the Array, `ufuncs.py` and `functions.py` the tables of what there is, `indexing.py`
what `x[key]` means, `step.py` the step, `gradient.py` its derivative, `table.py` the page about it.
"""
