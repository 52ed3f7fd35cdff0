import torch

import tracejit
from tracejit.codegen.c_table import TEMPLATES

TEMPLATES["exp"] = "exp({0}"  # a fault of the printer: no closing bracket


@tracejit.compile(backend="c", on_unsupported="raise")
def step(x):
    return x.exp()


step(torch.ones(3))
