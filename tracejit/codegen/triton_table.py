"""How each element-wise primitive prints in Triton; `tj` is tracejit.kernels.device.

A template is one text, or one per dtype kind of the operands. Unsigned integers and bools fall back
to the text of integers, and integers to that of floats; "f to u8" comes before "f" where floats
become uint8. {T} is the result's type.
"""

TEMPLATES = {
    "neg": {"f": "tj.neg({0})", "i": "-{0}"},
    "abs": "tl.abs({0})",
    "sign": {"f": "tj.sign({0})", "b": "{0}"},
    "exp": "tj.exp({0})",
    "log": "tj.log({0})",
    "expm1": "tj.expm1({0})",
    "log1p": "tj.log1p({0})",
    "erf": "tj.erf({0})",
    "erfc": "tj.erfc({0})",
    "sqrt": "tj.sqrt({0})",
    "tanh": "tj.tanh({0})",
    "sin": "tj.sin({0})",
    "cos": "tj.cos({0})",
    "floor": "tl.floor({0})",
    "trunc": "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))",
    "round": "tj.round({0})",
    "not": {"i": "~{0}", "u": "({0} ^ 255)"},
    "add": {"f": "({0} + {1})", "b": "({0} | {1})"},
    "sub": "({0} - {1})",
    "mul": {"f": "({0} * {1})", "b": "({0} & {1})"},
    "div": "tj.div({0}, {1})",
    "floordiv": "tj.floor_div({0}, {1})",
    "mod": "tj.remainder({0}, {1})",
    "fmod": "tj.fmod({0}, {1})",
    "copysign": "tj.copysign({0}, {1})",
    "atan2": "tj.atan2({0}, {1})",
    "pow": {"f": "tj.pow({0}, {1})", "i": "tj.pow_int({0}, {1})"},
    "maximum": {"f": "tj.maximum({0}, {1})", "i": "tl.maximum({0}, {1})", "b": "({0} | {1})"},
    "minimum": {"f": "tj.minimum({0}, {1})", "i": "tl.minimum({0}, {1})", "b": "({0} & {1})"},
    "and": "({0} & {1})",
    "or": "({0} | {1})",
    "xor": "({0} ^ {1})",
    "shl": "({0} << {1})",
    "shr": "({0} >> {1})",
    "gcd": "tj.gcd({0}, {1})",
    "nextafter": "tj.nextafter({0}, {1})",
    "philox": "tj.philox({0}, {1})",
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "where": "tl.where({0}, {1}, {2})",
    "cast": {
        "f": "{0}.to({T})",
        "f to i16": "{0}.to(tl.int32).to({T})",
        "f to i8": "{0}.to(tl.int32).to({T})",
        "f to u8": "{0}.to(tl.int64).to({T})",
    },
    "alias": "{0}",
    "full": "{0}",
}

LOCAL_TABLES = frozenset({"sin", "cos"})  # they keep a table in local memory for large arguments
