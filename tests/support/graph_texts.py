"""Texts of graphs that several test modules compile."""

from __future__ import annotations

PROGRAM_3 = """
step(%0: f32[1000,40], %1: f32[1000,40]) {
  %2: f32[1000,40] = maximum(%0, 0.0)      # step.py:1
  %3: f32[1000,40] = sub(%2, %1)
  %4: f32[1000,40] = mul(%3, %3)
  %5: f32[] = reduce_sum(%4, axes=(0, 1))  # step.py:2
  %6: b1[1000,40] = ge(%0, 0.0)
  %7: f32[1000,40] = mul(%3, 2.0)
  %8: f32[1000,40] = where(%6, %7, 0.0)
  return %5, %8
}"""
TWO_LAYERS = """
step(%0: f32[64,1000], %1: f32[1000,100], %2: f32[100,10], %3: f32[64,10],
     %4: f32[1000,100], %5: f32[100,10], %6: f64[]@host) {{
  %7: f32[64,100] = matmul(%0, %1)
  %8: f32[64,100] = maximum(%7, 0.0)
  %9: f32[64,10] = matmul(%8, %2)
  %10: f32[64,10] = sub(%9, %3)
  %11: f32[64,10] = mul(%10, %10)
  %12: f32[] = reduce_sum(%11, axes=(0, 1))
  %13: f32[64,10] = mul(%10, 2.0)
  %14: f32[100,64] = permute(%8, axes=(1, 0))
  %15: f32[100,10] = matmul(%14, %13)
  %16: f32[10,100] = permute(%2, axes=(1, 0))
  %17: f32[64,100] = matmul(%13, %16)
  %18: b1[64,100] = ge(%7, 0.0)
  %19: f32[64,100] = where(%18, %17, 0.0)
  %20: f32[1000,64] = permute(%0, axes=(1, 0))
  %21: f32[1000,100] = matmul(%20, %19)
  {gradients}
  %24: f32[1000,100] = mul(%22, %6)
  %25: f32[1000,100] = sub(%1, %24)
  %26: f32[100,10] = mul(%23, %6)
  %27: f32[100,10] = sub(%2, %26)
  {kept}
  return %12
  write %1 <- %25
  write %2 <- %27
  write %4 <- %28
  write %5 <- %29
}}"""
FRESH = "%22: f32[1000,100] = alias(%21)\n  %23: f32[100,10] = alias(%15)"
ADDED = "%22: f32[1000,100] = add(%4, %21)\n  %23: f32[100,10] = add(%5, %15)"
ZEROS = """%28: f32[1000,100] = full(0.0, shape=(1000, 100), dtype=f32, device='cpu')
  %29: f32[100,10] = full(0.0, shape=(100, 10), dtype=f32, device='cpu')"""
KEPT = "%28: f32[1000,100] = alias(%22)\n  %29: f32[100,10] = alias(%23)"


def two_layers(gradients: str, kept: str) -> str:
    text = TWO_LAYERS.format(gradients=gradients, kept=kept)
    return text.replace(",\n     %4", ", %4")


def softmax(rows: int, columns: int, axis: int) -> str:
    kept = (rows, 1) if axis else (1, columns)
    kind, short = f"f32[{rows},{columns}]", f"f32[{rows if axis else columns}]"
    one = f"f32[{kept[0]},{kept[1]}]"
    return f"""
    step(%0: {kind}) {{
      %1: {short} = reduce_max(%0, axes=({axis},))
      %2: {one} = reshape(%1, shape={kept})
      %3: {kind} = expand(%2, shape=({rows},{columns}))
      %4: {kind} = sub(%0, %3)
      %5: {kind} = exp(%4)
      %6: {short} = reduce_sum(%5, axes=({axis},))
      %7: {one} = reshape(%6, shape={kept})
      %8: {kind} = expand(%7, shape=({rows},{columns}))
      %9: {kind} = div(%5, %8)
      return %9
    }}"""


def normalized(rows: int, columns: int, rest: str) -> str:
    """A program that starts with %9 = (%0 - its rows' mean) · %1, and %1 is a number per row."""
    kind, one = f"f32[{rows},{columns}]", f"f32[{rows},1]"
    return f"""
    step(%0: {kind}, %1: f32[{rows}], %2: {kind}) {{
      %3: f32[{rows}] = reduce_sum(%0, axes=(1,))
      %4: f32[{rows}] = mul(%3, {1 / columns})
      %5: {one} = reshape(%4, shape=({rows}, 1))
      %6: {kind} = expand(%5, shape=({rows},{columns}))
      %7: {kind} = sub(%0, %6)
      %8: f32[{rows},1] = reshape(%1, shape=({rows}, 1))
      %30: {kind} = expand(%8, shape=({rows},{columns}))
      %9: {kind} = mul(%7, %30)
      {rest}
    }}"""


def weight_gradients(rows: int, columns: int) -> str:
    """The rows' sum of %2 · %9, which makes a row kernel of %9; and columns' sums."""
    kind = f"f32[{rows},{columns}]"
    return normalized(
        rows,
        columns,
        f"""
      %10: {kind} = mul(%2, %9)
      %11: f32[{rows}] = reduce_sum(%10, axes=(1,))
      %12: f32[{columns}] = reduce_sum(%10, axes=(0,))
      %13: f32[{columns}] = reduce_sum(%2, axes=(0,))
      return %11, %12, %13""",
    )


SIDE_BY_SIDE = """
step(%0: f32[20,16], %1: f32[16,24], %2: f32[9,30], %3: f32[30,70], %4: f32[700], %5: f32[33,50],
     %6: f32[123], %7: f64[]@host, %8: bf16[77], %9: f64[]@host) {
  %10: f32[20,24] = matmul(%0, %1)
  %11: f32[20,24] = mul(%10, %10)
  %12: f32[] = reduce_sum(%11, axes=(0, 1))
  %13: f32[9,70] = matmul(%2, %3)
  %14: f32[] = reduce_max(%13, axes=(0, 1))
  %15: f32[] = reduce_sum(%4, axes=(0,))
  %16: f32[700] = exp(%4)
  %17: f32[] = reduce_min(%16, axes=(0,))
  %18: f32[33] = reduce_max(%5, axes=(1,))
  %19: f32[33,1] = reshape(%18, shape=(33, 1))
  %20: f32[33,50] = expand(%19, shape=(33, 50))
  %21: f32[33,50] = sub(%5, %20)
  %22: f32[123] = mul(%6, %7)
  %23: bf16[77] = mul(%8, %9)
  %24: bf16[77] = mul(%23, %7)
  return %11, %12, %13, %14, %15, %17, %21, %22
  write %8 <- %24
}""".replace("\n     %6", " %6")


def softmax_gradient(rows: int, columns: int, dtype: str = "f32") -> str:
    """Softmax of rows and its derivative along %20."""
    kind, one = f"{dtype}[{rows},{columns}]", f"{dtype}[{rows},1]"
    forward, _, _ = softmax(rows, columns, 1).replace("f32", dtype).partition("return")
    return (
        forward.replace(f"%0: {kind}", f"%0: {kind}, %20: {kind}")
        + f"""%10: {kind} = mul(%20, %9)
      %11: {dtype}[{rows}] = reduce_sum(%10, axes=(1,))
      %12: {one} = reshape(%11, shape=({rows}, 1))
      %13: {kind} = expand(%12, shape=({rows},{columns}))
      %14: {kind} = mul(%9, %13)
      %15: {kind} = sub(%10, %14)
      return %9, %15
    }}"""
    )


def convolution(dtype: str = "f32", n: int = 4, c: int = 16, o: int = 32, side: int = 16) -> str:
    """A 3×3 convolution with a border of zeros, its bias, and a relu."""
    t, k, rows, wide = dtype, c * 9, n * side * side, side + 2
    return f"""
step(%0: {t}[{n},{c},{side},{side}], %1: {t}[{o},{c},3,3], %2: {t}[{o}]) {{
  %3: {t}[{n},{c},{wide},{wide}] = pad(%0, low=(0,0,1,1), high=(0,0,1,1), interior=(0,0,0,0), value=0)
  %4: {t}[{n},{c},{wide},{wide},1,1] = reshape(%3, shape=({n},{c},{wide},{wide},1,1))
  %5: {t}[{n},{c},{wide},{wide},3,3] = expand(%4, shape=({n},{c},{wide},{wide},3,3))
  %6: {t}[{n},{c},{side},{wide},3,3] = window(%5, axes=(2,4), stride=1, dilation=1, count={side})
  %7: {t}[{n},{c},{side},{side},3,3] = window(%6, axes=(3,5), stride=1, dilation=1, count={side})
  %8: {t}[{c},3,3,{n},{side},{side}] = permute(%7, axes=(1,4,5,0,2,3))
  %9: {t}[{k},{rows}] = reshape(%8, shape=({k},{rows}))
  %10: {t}[{o},{k}] = reshape(%1, shape=({o},{k}))
  %11: {t}[{o},{rows}] = matmul(%10, %9)
  %12: {t}[{o},{n},{side},{side}] = reshape(%11, shape=({o},{n},{side},{side}))
  %13: {t}[{n},{o},{side},{side}] = permute(%12, axes=(1,0,2,3))
  %14: {t}[1,{o},1,1] = reshape(%2, shape=(1,{o},1,1))
  %15: {t}[{n},{o},{side},{side}] = expand(%14, shape=({n},{o},{side},{side}))
  %16: {t}[{n},{o},{side},{side}] = add(%13, %15)
  %17: {t}[{n},{o},{side},{side}] = maximum(%16, 0.0)
  return %17
}}"""  # noqa: E501
