"""What random training programs are put together from, and what may happen to it between calls.

A `Part` is text: lines that build something in the object `w`, which the step reads, lines of the
step, and lines that change between calls what the part reads; `d` has the step's arguments. In the
text, `$f` stands for a random float, `$n` for a small int, `$b` for a bool, `$p` for one of the
parameters and `$q` for another or the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """`build` runs once; `forward` changes `h`, `loss` adds to `loss`, `gradient` comes after the
    backward, `after` comes after the update, and `changes` may run before a call."""

    name: str
    build: tuple[str, ...] = ()
    forward: tuple[str, ...] = ()
    loss: tuple[str, ...] = ()
    gradient: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


# One of each kind in every program.
MODELS = (
    Part(
        "plain",
        ("w.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))",),
    ),
    Part("square", ("w.model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(2)))",)),
    Part(
        "normalized",
        (
            "first, last = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)",
            "w.model = nn.Sequential(first, nn.BatchNorm1d(4), last)",
        ),
        changes=(
            "w.model[1].eval()",
            "w.model[1].train()",
            "w.model[1].momentum = 0.5",
            "w.model[1].eps = 0.1",
            "w.model[1].running_mean.add_(1.0)",
            "w.model[1].reset_running_stats()",
            "w.model[1].running_var = torch.full((4,), 2.0)",
        ),
    ),
    Part(
        "own module",
        (
            "class Net(nn.Module):",
            "    gain = 1.0",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(3))",
            "        self.depth, self.act, self.shift = 2, torch.tanh, 0.0",
            "    def forward(self, x):",
            "        for layer in self.layers[: self.depth]:",
            "            x = self.act(layer(x)) * self.gain + self.shift",
            "        return x if self.training else x * 2",
            "w.Net, w.model = Net, Net()",
        ),
        changes=(
            "w.model.depth = $n",
            "w.model.act = torch.sigmoid",
            "w.model.act = lambda x: x * 3",
            "w.model.gain = $f",
            "w.Net.gain = $f",
            "w.model.shift = $f",
            "w.model.layers.append(nn.Linear(3, 3))",
            "w.model.layers[1] = nn.Identity()",
            "w.model.forward = lambda x: x @ torch.eye(3) * 2 + w.model.layers[0](x)",
            "w.model.__dict__.pop('forward', None)",
            "w.Net.forward = lambda self, x: self.layers[0](x)",
            "w.model.layers[0], w.model.layers[1] = w.model.layers[1], w.model.layers[0]",
        ),
    ),
)
OPTIMIZERS = tuple(
    Part(name, (f"w.opt = torch.optim.{text}",), changes=changes)
    for name, text, changes in (
        (
            "SGD",
            "SGD(w.model.parameters(), lr=0.1)",
            ("w.opt.param_groups[0]['momentum'] = 0.5", "w.opt.param_groups[0]['maximize'] = $b"),
        ),
        (
            "momentum",
            "SGD(w.model.parameters(), lr=0.05, momentum=0.9, foreach=False)",
            (
                "w.opt.param_groups[0]['nesterov'] = $b",
                "w.opt.param_groups[0]['momentum'] = 0.3",
                "w.opt.param_groups[0]['dampening'] = 0.5",
            ),
        ),
        (
            "Adam",
            "Adam(w.model.parameters(), lr=0.02)",
            (
                "w.opt.param_groups[0]['betas'] = (0.5, 0.9)",
                "w.opt.param_groups[0]['eps'] = 0.1",
                "w.opt.param_groups[0]['amsgrad'] = False",
                "[s['step'].add_(5) for s in w.opt.state.values()]",
                "[s['exp_avg'].mul_(3) for s in w.opt.state.values()]",
            ),
        ),
        ("AdamW", "AdamW(w.model.parameters(), lr=0.02, foreach=False)", ()),
        (
            "RMSprop",
            "RMSprop(w.model.parameters(), lr=0.01)",
            ("w.opt.param_groups[0]['alpha'] = 0.5",),
        ),
        ("Adagrad", "Adagrad(w.model.parameters(), lr=0.05)", ()),
    )
)
# What may happen in every program, by kind.
ALWAYS = {
    "optimizer": (
        "w.opt.param_groups[0]['lr'] = 0.03",
        "w.opt.param_groups[0]['weight_decay'] = 0.1",
        "w.opt.state.clear()",
        "w.opt.load_state_dict(copy.deepcopy(w.opt.state_dict()))",
        "w.opt = torch.optim.SGD(w.model.parameters(), lr=0.01, momentum=0.5)",
        "w.opt.zero_grad(set_to_none=$b)",
        "w.opt.param_groups[0]['params'].reverse()",
        "w.opt.add_param_group({'params': [w.extra], 'lr': 0.5})",
    ),
    "model": (
        "w.model.train($b)",
        "w.model.eval()",
        "w.model.load_state_dict({k: v * 0.5 for k, v in w.model.state_dict().items()}, "
        "strict=False)",
        "w.model = copy.deepcopy(w.model)",
        "w.model.requires_grad_(True)",
        "nn.utils.parametrizations.weight_norm([*w.model.modules()][-1])",
    ),
    "parameters": (
        "$p.data.mul_(0.5)",
        "$p.data = $p.data * 2",
        "$p.data = $p.data.clone()",
        "$p.data = $p.data.t().contiguous().t() if $p.dim() == 2 else $p.data",
        "$p.requires_grad_(False)",
        "$p.requires_grad_($b)",
    ),
    "gradients": (
        "$p.grad = None",
        "$p.grad = torch.ones_like($p)",
        "$p.grad = None if $p.grad is None else $p.grad.clone() * 2",
        "$p.grad = None if $q.grad is None or $q.shape != $p.shape else $q.grad",
        "w.accumulate = $b",
    ),
    "arguments": (
        "d.x = torch.randn($n + 1, 3)",
        "d.x = torch.randn(3, 5).t()",
        "d.x = torch.randn(10, 3)[::2]",
        "d.y = torch.randn(1, 3)",
        "d.y = d.x",
        "d.x.requires_grad_($b)",
        "d.gain = $f",
        "d.gain = 2",
    ),
    "modes": (
        "d.around = 'no_grad'",
        "d.around = ''",
        "torch.set_float32_matmul_precision('high')",
        "torch.set_default_dtype(torch.float32)",
        "torch.set_default_dtype(torch.float64)",
    ),
    "hooks": (
        "w.handles.append($p.register_hook(lambda g: g * 2))",
        "w.handles.append($p.register_hook(lambda g, k=$f: g + k))",
        "w.handles.append($p.register_post_accumulate_grad_hook(w.after_gradient))",
        "w.handles.append(w.model.register_forward_hook(lambda m, args, out: out * 0.5))",
        "w.handles.append(w.model.register_forward_pre_hook(lambda m, a: (a[0] + w.offset,)))",
        "w.handles.append(w.model.register_full_backward_hook(lambda m, given, out: None))",
        "w.handles.append(w.opt.register_step_pre_hook(w.before_step))",
        "w.handles.append(w.model.register_forward_hook(lambda m, a, out: w.seen.append(1)))",
        "w.handles and w.handles.pop().remove()",
        "w.handles and w.handles.pop(0).remove()",
        "w.offset = $f",
        "w.scale_of_gradient = $f",
    ),
}
# Some of these in each program.
PARTS = (
    Part(
        "attribute",
        ("w.cfg = Config()",),
        loss=("loss = loss * w.cfg.scale + w.cfg.shift",),
        changes=(
            "w.cfg.scale = $f",
            "w.cfg.shift = $n",
            "w.cfg = copy.deepcopy(w.cfg)",
            "w.cfg = pickle.loads(pickle.dumps(w.cfg))",
            "w.cfg.__dict__.pop('scale', None)",
            "Config.scale = $f",
            "w.cfg.other = $f",
        ),
    ),
    Part(
        "dictionary",
        ("w.options = {'l2': 0.1, 'power': 2}",),
        loss=(
            "if w.options.get('l2'):",
            "    loss = loss + w.options['l2'] * sum(p.pow(w.options['power']).sum() for p in "
            "w.model.parameters())",
        ),
        changes=(
            "w.options['l2'] = $f",
            "w.options['l2'] = None",
            "w.options['power'] = $n",
            "w.options.pop('l2', None)",
            "w.options = dict(w.options)",
            "w.options['unread'] = $f",
        ),
    ),
    Part(
        "list of tensors",
        ("w.terms = [torch.ones(3), torch.full((3,), 0.5)]",),
        forward=("for i, term in enumerate(w.terms):", "    h = h + term * (i + 1)"),
        changes=(
            "w.terms.append(torch.full((3,), $f))",
            "w.terms and w.terms.pop()",
            "w.terms.reverse()",
            "w.terms[:] = [torch.full((3,), $f)]",
            "w.terms[0:1] = w.terms[1:2]",
            "w.terms and w.terms[0].mul_(3.0)",
            "w.terms = tuple(w.terms)[:1] or [torch.ones(3)]",
            "w.terms = list(w.terms)",
        ),
    ),
    Part(
        "flag",
        ("w.flag, w.mode = True, 'tanh'",),
        forward=("if w.flag:", "    h = h.tanh() if w.mode == 'tanh' else getattr(h, w.mode)()"),
        changes=("w.flag = $b", "w.flag = $n", "w.mode = 'sin'", "w.mode = 'cos'", "w.flag = []"),
    ),
    Part(
        "function",
        (
            "w.act = torch.tanh",
            "def helper(h, k=2.0, *, m=1.0):",
            "    return h * k + m",
            "w.helper = helper",
            "def another(h, k=1.0, *, m=1.0):",
            "    return h - k * m",
            "w.another = another",
        ),
        forward=("h = w.act(helper(h))",),
        changes=(
            "w.act = torch.sigmoid",
            "w.act = lambda h: h * 0.5",
            "w.act = functools.partial(torch.mul, other=$f)",
            "w.act = w.helper",
            "w.helper.__defaults__ = ($f,)",
            "w.helper.__kwdefaults__ = {'m': $f}",
            "w.helper.__code__ = w.another.__code__",
        ),
    ),
    Part(
        "class",
        (
            "class Scaled:",
            "    factor, bias = 1.5, torch.ones(3)",
            "    __slots__ = ('part', '__dict__')",
            "    @property",
            "    def total(self):",
            "        return self.factor * self.part",
            "    def __call__(self, h):",
            "        return h * self.total + self.bias",
            "w.Scaled, w.scaled = Scaled, Scaled()",
            "w.scaled.part = 0.5",
        ),
        forward=("h = w.scaled(h)",),
        changes=(
            "w.Scaled.factor = $f",
            "w.scaled.factor = $f",
            "w.scaled.__dict__.pop('factor', None)",
            "w.scaled.part = $f",
            "w.Scaled.bias = torch.full((3,), $f)",
            "w.Scaled.bias.add_(1.0)",
            "w.Scaled.total = property(lambda self: self.part)",
            "w.Scaled.__call__ = lambda self, h: h + self.part",
        ),
    ),
    Part(
        "cell",
        (
            "inner, table = 1.5, torch.ones(3)",
            "def set_inner(value):",
            "    nonlocal inner",
            "    inner = value",
            "def set_table(value):",
            "    nonlocal table",
            "    table = value",
            "w.set_inner, w.set_table = set_inner, set_table",
        ),
        loss=("loss = loss * inner + table.sum()",),
        changes=(
            "w.set_inner($f)",
            "w.set_inner($n)",
            "w.set_table(torch.full((3,), $f))",
            "w.set_table(torch.ones(2, 2))",
        ),
    ),
    Part(
        "decided by a float",
        loss=("if gain > 1.0:", "    loss = loss * 3 + gain", "loss = loss / (1 + gain * gain)"),
        changes=("d.gain = $f", "d.gain = 0.5", "d.gain = 1.5"),
    ),
    Part(
        "global",
        ("w.globals = globals()", "w.globals.update(LEVEL=0.5, TABLE=torch.ones(3))"),
        loss=("loss = loss + LEVEL * TABLE.sum()",),
        changes=(
            "w.globals['LEVEL'] = $f",
            "w.globals['LEVEL'] = $n",
            "w.globals['TABLE'] = torch.full((3,), $f)",
            "w.globals['TABLE'].mul_(2.0)",
        ),
    ),
    Part(
        "clipping",
        ("w.clip = 0.5",),
        gradient=("nn.utils.clip_grad_norm_(w.model.parameters(), w.clip)",),
        changes=("w.clip = 0.01", "w.clip = 100.0"),
    ),
    Part(
        "average",
        ("w.decay = 0.9", "w.average = [p.detach().clone() for p in w.model.parameters()]"),
        after=(
            "with torch.no_grad():",
            "    for mine, p in zip(w.average, w.model.parameters()):",
            "        mine.lerp_(p, 1 - w.decay) if mine.shape == p.shape else None",
        ),
        changes=(
            "w.decay = 0.5",
            "w.average[0].zero_()",
            "w.average[0] = $p.detach().clone()",
            "w.average[0] = $p.detach()",
            "w.average.pop()",
        ),
    ),
    Part(
        "counter",
        ("w.count = 0",),
        loss=("w.count += 1", "loss = loss * (1 + 0.1 * w.count)"),
        changes=("w.count = 0", "w.count = $n"),
    ),
    Part(
        "kept",
        ("w.last = torch.zeros(3)", "w.memory = collections.deque(maxlen=2)"),
        loss=("loss = loss + (h.detach().mean(0) - w.last).pow(2).sum()",),
        after=("w.last = h.detach().mean(0)", "w.memory.append(loss.detach())"),
        changes=("w.last = torch.ones(3)", "w.memory.clear()", "w.last.mul_(2.0)"),
    ),
    Part(
        "scheduler in the step",
        ("w.sched = torch.optim.lr_scheduler.ExponentialLR(w.opt, 0.9)",),
        after=("w.sched.step()",),
        changes=("w.sched.gamma = 0.5", "w.sched.step()", "w.sched.last_epoch = 3"),
    ),
    Part(
        "plateau",
        ("w.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(w.opt, patience=1)",),
        after=("w.plateau.step(loss.item())",),
        changes=("w.plateau.best = $f", "w.plateau.factor = 0.5", "w.plateau.mode = 'max'"),
    ),
    Part(
        "scheduler outside",
        ("w.sched2 = torch.optim.lr_scheduler.StepLR(w.opt, 1, 0.5)",),
        changes=("w.sched2.step()", "w.sched2.gamma = 0.9"),
    ),
    Part(
        "memory",
        ("w.big = torch.arange(8.0)", "w.part, w.other = w.big[1:4], torch.ones(3)"),
        forward=("h = h + w.part * w.other",),
        after=("w.other.add_(0.5)",),
        changes=(
            "w.part = w.big[2:5]",
            "w.part = w.big[::2][:3]",
            "w.big.mul_(0.5)",
            "w.part.data = torch.ones(3)",
            "w.other.data = w.big[4:7]",
            "w.other = w.part",
            "w.part = w.other.view(3)",
            "w.part = w.big.as_strided((3,), (2,), 1)",
            "w.other = torch.ones(1)",
        ),
    ),
    Part(
        "sets and enums",
        (
            "import enum",
            "w.Kind = enum.Enum('Kind', 'A B')",
            "w.kind, w.which, w.size = w.Kind.A, {1, 2}, (1, 3)",
        ),
        forward=(
            "h = h * (2.0 if w.kind is w.Kind.A else 0.5)",
            "h = h + len(w.which) * torch.ones(w.size)",
        ),
        changes=(
            "w.kind = w.Kind.B",
            "w.kind = w.Kind.A",
            "w.which.add($n)",
            "w.which.discard(2)",
            "w.size = (3,)",
        ),
    ),
    Part(
        "shared parameters",
        forward=("h = h + w.model(h) if w.again else h",),
        build=("w.again = False",),
        changes=("w.again = $b", "$p.tag = $f"),
    ),
    Part(
        "default dtype",
        loss=("loss = loss * (3.0 if torch.ones(1).dtype is torch.float64 else 1.0)",),
        changes=(
            "torch.set_default_dtype(torch.float32)",
            "torch.set_default_dtype(torch.float64)",
        ),
    ),
    Part(
        "counter",
        ("w.n, w.decay = 0, 1.0",),
        forward=("w.n += 1", "h = h * (1 - 0.9**w.n) * min(1.0, w.n / 3)"),
        after=("w.decay *= 0.9",),
        loss=("loss = loss * (1 + w.decay)",),
        changes=("w.n = $n", "w.n = 0", "w.n = 2.5", "w.n = True", "w.decay = $f", "w.decay = 1"),
    ),
    Part(
        "counter that decides",
        ("w.state = {'step': 0}",),
        forward=("w.state['step'] += 1", "if w.state['step'] % 2:", "    h = h * 2"),
        changes=("w.state = {'step': $n}", "w.state['step'] = $n", "w.state['more'] = 1"),
    ),
    Part(
        "hidden state",
        ("w.state_of_h = torch.zeros(3)",),
        forward=("h = h + 0.1 * w.state_of_h", "w.state_of_h = h.mean(0).detach()"),
        changes=("w.state_of_h = torch.ones(3)", "w.state_of_h.mul_(2.0)"),
    ),
    Part(
        "last two",
        ("w.queue = collections.deque(maxlen=2)",),
        forward=("w.queue.append(h.sum(0).detach())", "h = h + 0.1 * sum(w.queue)"),
        changes=("w.queue.clear()", "w.queue[0] = torch.ones(3)", "w.queue.append(torch.ones(3))"),
    ),
    Part(
        "moving averages",
        ("w.shadow = {}",),
        after=(
            "with torch.no_grad():",
            "    for name, p in w.model.named_parameters():",
            "        w.shadow[name] = 0.9 * w.shadow.get(name, 0.0) + 0.1 * p",
        ),
        changes=("w.shadow.clear()", "w.shadow.popitem() if w.shadow else None"),
    ),
    Part(
        "record",
        ("w.losses, w.log, w.total = [], {'n': []}, 0",),
        after=(
            "w.losses.append(loss.item())",
            "w.total += (h > 0).sum().item()",
            "w.log['n'].append(w.total)",
        ),
        changes=("w.losses.clear()", "w.losses = []", "w.log = {'n': [1]}", "w.total = $n"),
    ),
    Part(
        "attribute of a parameter",
        ("for p in w.model.parameters():", "    p.weight_of = 1.0"),
        gradient=(
            "for p in w.model.parameters():",
            "    if p.grad is not None and hasattr(p, 'weight_of'):",
            "        p.grad.mul_(p.weight_of)",
        ),
        changes=("$p.weight_of = $f", "$p.__dict__.pop('weight_of', None)", "$p.weight_of = 0.5"),
    ),
)
# Parts that decide by the values of tensors.
VALUES = (
    Part(
        "decided by a number",
        ("w.threshold = 0.5",),
        loss=("if loss.item() > w.threshold:", "    loss = loss * 0.5"),
        changes=("w.threshold = $f", "w.threshold = 100.0"),
    ),
    Part(
        "decided by a tensor",
        ("w.limit = torch.ones(3)",),
        forward=("if (h > w.limit).any():", "    h = h.tanh()"),
        changes=("w.limit = torch.full((3,), $f)", "w.limit.mul_(3.0)"),
    ),
)
