"""What torch saves of arguments and results for the derivative of a function, by function.

A word is a tensor: the number of an argument, "r" all that is returned, "r1" its second part.
"1<0": the second argument, only if the first requires grad. A function in place saves a copy of its
operand instead. Functions that are not listed save what our formulas read, and what their rules
say (`Trace.saves`).
"""

SAVES = {
    "0 1": "arctan2 atan2 huber_loss logaddexp logaddexp2 mse_loss soft_margin_loss xlogy",
    "0 r": "amax amin logsumexp prod",
    "0 1 r": "cdist dist",
    "0 1 2": "binary_cross_entropy",
    "0 1 2 6": "binary_cross_entropy_with_logits",
    "0<0 1<1 r": "hypot",
    "1<0 r": "ldexp",
}
