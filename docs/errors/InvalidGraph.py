from tracejit.ir.text import parse

parse("f(%0: f32[4]) { %1: f32[4] = add(%0, %2)  return %1 }")
