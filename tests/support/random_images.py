"""Random programs of images: convolutions, pools, norms and resizing among the other statements."""

from __future__ import annotations

from support.random_programs import F32, F64, Writer
from support.random_text import Program

ACTIVATIONS = ("F.relu({x})", "F.silu({x})", "F.leaky_relu({x}, 0.1)", "torch.sigmoid({x})")


def generate_images(seed: int) -> Program:
    """The program of a seed."""
    return ImageWriter(seed).program()


def generate_plain(seed: int) -> Program:
    """One whose convolutions have 3 × 3 taps, no stride and no groups."""
    return PlainWriter(seed).program()


class ImageWriter(Writer):
    """Writes programs whose arguments are images [N, C, H, W], and their weights."""

    plain = False  # whether convolutions have 3 × 3 taps, no stride and no groups

    def __init__(self, seed: int):
        super().__init__(seed)
        self.dtype, self.mixed = self.rng.choice((F32, F32, F32, F64)), False
        self.channels = self.rng.choice((2, 3, 4, 6))

    def new_shape(self) -> tuple[int, ...]:
        choice = self.rng.choice
        return (choice((1, 2)), self.channels, choice((4, 5, 6, 7)), choice((3, 5, 6, 8)))

    def image(self) -> str | None:
        """A tensor of four axes, none of which is empty."""
        return self.pick(lambda t: t.is_floating_point() and t.ndim == 4 and t.numel() > 0)

    def weight(self, *shape: int) -> str:
        """A parameter of this shape: one that is there, or a new one."""
        found = self.pick(lambda t: t.dtype is self.dtype and tuple(t.shape) == shape)
        return found if found and self.maybe(0.3) else self.argument(shape, parameter=True)

    # ---- statements

    def convolution(self):
        x = self.image()
        if x is None:
            return None
        channels, choice = self.shape_of(x)[1], self.rng.choice
        size = (choice((1, 2, 3, 3)), choice((1, 3, 3)))
        groups = choice([g for g in (1, 1, 1, 2, 3, channels) if channels % g == 0])
        if self.plain:
            size, groups = (3, 3), 1
        out = groups * choice((1, 2, 3))
        options = [f"stride={choice((1, 1, 2))}"] * self.maybe(0.5)
        options = [] if self.plain else options
        options += [f"padding={choice((0, 1, '(1, 0)'))}"] * self.maybe(0.7)
        if self.maybe(0.25):
            w = self.weight(channels, out // groups, *size)
            more = "".join(f", {o}" for o in options)
            return self.assign(f"F.conv_transpose2d({x}, {w} * 0.2, groups={groups}{more})")
        options += [f"dilation={choice((1, 2))}"] * self.maybe(0.2)
        w = self.weight(out, channels // groups, *size)
        bias = self.weight(out) if self.maybe(0.5) else None
        more = "".join(f", {o}" for o in options)
        return self.assign(f"F.conv2d({x}, {w} * 0.2, {bias}, groups={groups}{more})")

    def pool(self):
        x = self.image()
        forms = (
            "F.max_pool2d({x}, 2)",
            "F.max_pool2d({x}, 3, 2, 1)",
            "F.max_pool2d({x}, 2, 1, ceil_mode=True)",
            "F.avg_pool2d({x}, 2)",
            "F.avg_pool2d({x}, 3, 1, 1, count_include_pad=False)",
            "F.adaptive_avg_pool2d({x}, 1)",
            "F.adaptive_avg_pool2d({x}, (2, 3))",
            "F.adaptive_max_pool2d({x}, 2)",
            "F.lp_pool2d({x}.abs() + 0.1, 2, 2)",
        )
        return x and self.assign(self.rng.choice(forms).format(x=x))

    def resize(self):
        x = self.image()
        forms = (
            "F.interpolate({x}, scale_factor=2)",
            "F.interpolate({x}, scale_factor=2, mode='bilinear')",
            "F.interpolate({x}, (5, 3), mode='bilinear', align_corners=True)",
            "F.interpolate({x}, scale_factor=0.5, mode='bilinear', antialias=True)",
            "F.interpolate({x}, (7, 4), mode='bicubic')",
            "F.interpolate({x}, (3, 4), mode='area')",
            "F.interpolate({x}, (4, 7), mode='nearest-exact')",
            "F.pad({x}, (1, 1, 0, 2))",
            "F.pad({x}, (1, 2, 1, 0), mode='reflect')",
            "F.pad({x}, (2, 1, 1, 0), mode='replicate')",
            "F.pad({x}, (1, 1, 1, 1), mode='circular')",
        )
        return x and self.assign(self.rng.choice(forms).format(x=x))

    def norm(self):
        x = self.image()
        if x is None:
            return None
        n, channels, *_ = self.shape_of(x)
        w, b = self.weight(channels), self.weight(channels)
        groups = self.rng.choice([g for g in (1, 2, 3, channels) if channels % g == 0])
        forms = [
            f"F.batch_norm({x}, None, None, {w}, {b}, training=True, eps=0.1)",
            f"F.group_norm({x}, {groups}, {w}, {b}, eps=0.1)",
            f"F.instance_norm({x}, eps=0.1)",
            f"F.local_response_norm({x}, 2, 0.1)",
        ]
        return self.assign(self.rng.choice(forms))

    def activation(self):
        x = self.image()
        return x and self.assign(self.rng.choice(ACTIVATIONS).format(x=x))

    def rearrange(self):
        x = self.image()
        if x is None:
            return None
        n, channels, rows, columns = self.shape_of(x)
        forms = [
            f"{x}.to(memory_format=torch.channels_last)",
            f"{x}.contiguous()",
            f"torch.cat([{x}, {x} * 0.5], 1)",
            f"{x}[:, :, 1:, :-1]",
            f"{x} * {x}.mean((2, 3), keepdim=True)",
            f"F.fold(F.unfold({x}, 2), {(rows, columns)}, 2)",
            f"{x}.flatten(2).transpose(1, 2)",
            f"{x}.unfold(3, 2, 1).amax(-1)",
        ]
        forms += [f"F.channel_shuffle({x}, 2)"] * (channels % 2 == 0)
        forms += [f"F.pixel_shuffle({x}, 2)"] * (channels % 4 == 0)
        forms += [f"F.pixel_unshuffle({x}, 2)"] * (rows % 2 == columns % 2 == 0)
        return self.assign(self.rng.choice(forms))

    def residual(self):
        x = self.image()
        if x is None:
            return None
        shape = self.shape_of(x)
        y = self.pick(lambda t: t.is_floating_point() and tuple(t.shape) == shape)
        y = y or self.argument(shape)
        return self.rng.choice((self.assign(f"{x} + {y}"), f"{x}.add_({y})", f"{x} += {y}"))

    def backward(self):
        """Without create_graph: eager's gradient of a bias is then said to require grad wherever
        one formula gives several gradients, and ours not."""
        text = super().backward()
        return text and text.replace("create_graph", "retain_graph")

    KINDS = (
        *["convolution"] * 8 + ["pool"] * 4 + ["resize"] * 4 + ["norm"] * 4 + ["activation"] * 4,
        *["rearrange"] * 4 + ["residual"] * 3 + ["unary", "binary", "reduce", "view", "inplace"],
        *["contraction", "leaf", "backward", "update"],
    )


class PlainWriter(ImageWriter):
    plain = True
