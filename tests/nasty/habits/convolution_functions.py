"""Habits of convolution classes: subclasses of nn.Conv2d that compute the same otherwise, or something else."""

from tests.nasty.habit import bare, convolution, habit

# ---- the same function, said otherwise

convolution("conv says it again", body="return $plain")
convolution("conv calls super", body="return super().forward(x)")
convolution("conv of a contiguous input", body="return super().forward(x.contiguous())")
convolution("conv checkpointed", body="return checkpoint(super().forward, x, use_reentrant=False)")
convolution(
    "conv adds a zero buffer",
    body="return super().forward(x) + self.zero",
    init="self.register_buffer('zero', torch.zeros(()))",
)
habit(
    "conv pads by itself",
    "convolution",
    init="""
        self.margin = self.padding
        self.padding = (0, 0)
    """,
    methods="""
        def forward(self, x):
            (v, h) = self.margin
            return super().forward(F.pad(x, (h, h, v, v)))
    """,
    needs=lambda block: not isinstance(block.convolution.padding, str),
)
habit(
    "conv pads as TensorFlow does",
    "convolution",
    init="self.padding = (0, 0)",
    methods="""
        def forward(self, x):
            sides = []
            for axis in (1, 0):
                reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
                size = x.shape[-2:][axis]
                total = max((math.ceil(size / self.stride[axis]) - 1) * self.stride[axis] + reach - size, 0)
                sides += [total // 2, total - total // 2]
            return super().forward(F.pad(x, sides))
    """,
    needs=lambda block: not block.parts,
)
habit(
    "conv takes a scale",
    "convolution",
    methods="""
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale
    """,
)

# ---- another function

convolution("conv scaled", body="return 2 * super().forward(x)")
convolution(
    "conv of absolute weights",
    body="return F.conv2d(x, self.weight.abs(), self.bias, self.stride, self.padding, self.dilation, self.groups)",
)
convolution(
    "conv of standardised weights",
    body="""
        mean, deviation = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / deviation, self.bias)
    """,
)
convolution(
    "conv of masked weights",
    body="return self._conv_forward(x, self.weight * self.mask, self.bias)",
    init="self.register_buffer('mask', torch.ones_like(self.weight)); self.mask[:, :, 0] = 0",
)
convolution(
    "conv of weights whose mask comes later",
    body="return self._conv_forward(x, self.weight * self.mask, self.bias)",
    init="self.register_buffer('mask', torch.ones_like(self.weight))",
)
convolution("conv replaces NaN", body="return super().forward(torch.nan_to_num(x))")
convolution("conv replaces NaN in its output", body="return torch.nan_to_num(super().forward(x))")
convolution("conv clamps large values", body="return super().forward(x.clamp(-30, 30))")
convolution("conv of clamped output", body="return super().forward(x).clamp(max=1e3)")
convolution(
    "conv silent on loud maps",
    rough=True,
    body="""
        y = super().forward(x)
        return y * 0 if x.abs().max() > 20 else y
    """,
)
convolution(
    "conv other on wide maps",
    body="""
        y = super().forward(x)
        return y * 2 if x.shape[-1] > 14 else y
    """,
)
convolution(
    "conv other on one size",
    body="""
        y = super().forward(x)
        return y + 1 if x.shape[-2] == 9 else y
    """,
)
convolution(
    "conv other on single images",
    body="""
        y = super().forward(x)
        return y + 1 if x.shape[0] == 1 else y
    """,
)
convolution(
    "conv other on zeros",
    body="""
        y = super().forward(x)
        return y + 1 if not x.any() else y
    """,
)
convolution(
    "conv other in training",
    body="""
        y = super().forward(x)
        return y * 2 if self.training else y
    """,
)
convolution(
    "conv other without gradients",
    body="""
        y = super().forward(x)
        return y if torch.is_grad_enabled() else y * 2
    """,
)
convolution(
    "conv other where the input wants gradients",
    body="""
        y = super().forward(x)
        return y * 2 if x.requires_grad else y
    """,
)
convolution(
    "conv in single precision",
    body="""
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias).to(x)
    """,
)
habit(
    "conv takes a scale that the parent passes",
    "convolution",
    methods="""
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale
    """,
    arguments="x, scale=3.0",
    needs=lambda block: bare(block) and block.wrapper != "sequential",
)
