"""How each element-wise primitive prints in C; `tj_` names are functions of C_PRELUDE.

A template is one text, or one per dtype kind of the operands. Unsigned integers and bools fall back
to the text of integers, and integers to that of floats; "bf16 to i16", or
else "f to u8", comes before "f" where such become uint8 or int16. {T} is the result's type, {f}
the suffix of float32 functions. The text is assigned to a variable of the result's C type (int8 to
int32 operands are promoted meanwhile), in a program of C_FLAGS.
"""

TEMPLATES = {
    "neg": "(-{0})",
    "abs": {"f": "fabs{f}({0})", "i": "({0} < 0 ? -{0} : {0})", "u": "{0}"},
    "sign": {"f": "(({0} > 0) - ({0} < 0))", "b": "{0}"},
    "exp": "tj_exp{f}({0})",
    "log": "tj_log{f}({0})",
    "expm1": "tj_expm1{f}({0})",
    "log1p": "tj_log1p{f}({0})",
    "erf": "tj_erf{f}({0})",
    "erfc": "tj_erfc{f}({0})",
    "sqrt": "sqrt{f}({0})",
    "tanh": "tj_tanh{f}({0})",
    "sin": "tj_sin{f}({0})",
    "cos": "tj_cos{f}({0})",
    "floor": "floor{f}({0})",
    "trunc": "trunc{f}({0})",
    "round": "rint{f}({0})",
    "not": {"i": "(~{0})", "b": "(!{0})"},
    "add": {"f": "({0} + {1})", "b": "({0} | {1})"},
    "sub": "({0} - {1})",
    "mul": {"f": "({0} * {1})", "b": "({0} & {1})"},
    "div": "({0} / {1})",
    "floordiv": {"f": "tj_floordiv{f}({0}, {1})", "i": "tj_floordiv_int({0}, {1})"},
    "mod": {"f": "tj_mod{f}({0}, {1})", "i": "tj_mod_int({0}, {1})"},
    "fmod": {"f": "fmod{f}({0}, {1})", "i": "tj_fmod_int({0}, {1})"},
    "copysign": "copysign{f}({0}, {1})",
    "atan2": "tj_atan2{f}({0}, {1})",
    "pow": {"f": "tj_pow{f}({0}, {1})", "i": "tj_pow_int({0}, {1})"},
    # One instruction where the second operand is a constant, which is no NaN.
    "maximum": "(({1} > {0}) | ({1} != {1}) ? {1} : {0})",
    "minimum": "(({1} < {0}) | ({1} != {1}) ? {1} : {0})",
    "and": "({0} & {1})",
    "or": "({0} | {1})",
    "xor": "({0} ^ {1})",
    "shl": "tj_shl({0}, {1})",
    "shr": "tj_shr({0}, {1})",
    "gcd": "tj_gcd({0}, {1})",
    "nextafter": "nextafter{f}({0}, {1})",
    "philox": "tj_philox({0}, {1})",
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "where": "({0} ? {1} : {2})",
    "cast": {
        "f": "(({T}){0})",
        "b": "(({T})({0} ? 1 : 0))",  # which is vectorized
        "f to i64": "tj_long{f}({0})",
        "f to i32": "tj_int{f}({0})",
        "f to i16": "(({T})tj_int{f}({0}))",
        "f to i8": "(({T})tj_int{f}({0}))",
        "f to u8": "(({T})tj_byte{f}({0}))",
    },
    "bitcast": {
        "f64 to i64": "((int64_t)tj_bits_f64({0}))",
        "f32 to i32": "((int32_t)tj_bits_f32({0}))",
        "bf16 to i16": "((int16_t)(tj_bits_f32({0}) >> 16))",
        "f16 to i16": "((int16_t)tj_store_f16({0}))",
        "i64 to f64": "tj_f64_of((uint64_t){0})",
        "i32 to f32": "tj_f32_of((uint32_t){0})",
        "i16 to bf16": "tj_load_bf16((uint16_t){0})",
        "i16 to f16": "tj_load_f16((uint16_t){0})",
    },
    "alias": "{0}",
    "full": "{0}",
}
