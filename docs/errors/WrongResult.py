import torch

import tracejit
from tracejit.codegen.c_table import TEMPLATES

TEMPLATES["sub"] = "{0} + {1}"  # a fault of the printer of C


@tracejit.compile(backend="c", verify=1, on_unsupported="raise")
def step(x):
    return x.exp() - x


step(torch.ones(3))
