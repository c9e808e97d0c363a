"""Habits of convolution classes that do more than compute: they draw, remember, write, and change gradients."""

from tests.nasty.habit import SCALED_GRADIENT, convolution, habit

# ---- randomness

convolution(
    "conv with noise",
    body="""
        y = super().forward(x)
        return y + 0.1 * torch.randn_like(y) if self.training else y
    """,
)
convolution("conv with Python's random", body="return super().forward(x) * (1 + (random.random() < 0.3))")
convolution("conv with NumPy's random", body="return super().forward(x) * (1 + (np.random.rand() < 0.3))")
convolution(
    "conv draws and forgets",
    body="""
        torch.rand(3)
        return super().forward(x)
    """,
)
convolution(
    "conv draws in training only",
    body="""
        if self.training:
            random.random()
        return super().forward(x)
    """,
)
convolution(
    "conv of dropped taps",
    body="return self._conv_forward(x, F.dropout(self.weight, 0.3, self.training), self.bias)",
)

# ---- memory

convolution(
    "conv counts calls",
    body="""
        self.calls += 1
        return super().forward(x)
    """,
    init="self.calls = 0",
)
convolution(
    "conv counts in a buffer",
    body="""
        self.calls.add_(1)
        return super().forward(x)
    """,
    init="self.register_buffer('calls', torch.zeros(()))",
)
convolution(
    "conv other from the fourth call",
    body="""
        self.calls += 1
        y = super().forward(x)
        return y * 2 if self.calls > 3 else y
    """,
    init="self.calls = 0",
)
convolution(
    "conv alternates",
    body="""
        self.flip = not self.flip
        y = super().forward(x)
        return y * 2 if self.flip else y
    """,
    init="self.flip = True",
)
convolution(
    "conv with a flag",
    body="""
        y = super().forward(x)
        return y * 2 if self.loud else y
    """,
    init="self.loud = False",
)
convolution(
    "conv remembers its first weights",
    body="""
        if self.kept is None:
            self.kept = self.weight.detach().clone()
        return self._conv_forward(x, self.kept, self.bias)
    """,
    init="self.kept = None",
)
convolution(
    "conv keeps its output",
    body="""
        self.last = super().forward(x)
        return self.last
    """,
    init="self.last = None",
)
convolution(
    "conv keeps a running mean",
    body="""
        if self.training:
            self.mean.lerp_(x.mean().detach(), 0.1)
        return super().forward(x)
    """,
    init="self.register_buffer('mean', torch.zeros(()))",
)

# ---- writes

convolution("conv halves its input", body="return super().forward(x.mul_(0.5))")
convolution("conv cuts its input", body="return super().forward(F.relu_(x))")
convolution(
    "conv empties its input afterwards",
    body="""
        y = super().forward(x)
        with torch.no_grad():
            x.zero_()
        return y
    """,
)
convolution(
    "conv clears a corner of the input",
    body="""
        x = x.clone() if x.requires_grad else x
        x[..., 0] = 0
        return super().forward(x)
    """,
)
convolution("conv relu in place", body="return super().forward(x).relu_()")
convolution(
    "conv clamps its weights",
    body="""
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)
    """,
)
convolution(
    "conv decays its weights",
    body="""
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)
    """,
)
convolution(
    "conv decays its weights in training",
    body="""
        if self.training:
            self.weight.data.mul_(0.9)
        return super().forward(x)
    """,
)

# ---- gradients

convolution("conv of detached weights", body="return self._conv_forward(x, self.weight.detach(), self.bias)")
convolution("conv of a detached input", body="return super().forward(x.detach())")
convolution(
    "conv without gradients",
    body="""
        with torch.no_grad():
            return super().forward(x)
    """,
)
convolution(
    "conv without gradients in training",
    body="""
        with torch.set_grad_enabled(not self.training):
            return super().forward(x)
    """,
)
convolution(
    "conv lets half the gradient pass",
    body="""
        y = super().forward(x)
        return y + (y.detach() - y) / 2
    """,
)
convolution("conv scales gradients", body="return ScaleGradient.apply(super().forward(x))", header=SCALED_GRADIENT)
convolution(
    "conv scales the weight's gradient",
    body="return self._conv_forward(x, ScaleGradient.apply(self.weight), self.bias)",
    header=SCALED_GRADIENT,
)
convolution(
    "conv hooks its output",
    body="""
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: 2 * g)
        return y
    """,
)
convolution(
    "conv under autocast",
    body="""
        with torch.autocast('cpu', torch.bfloat16):
            return self._conv_forward(x.float(), self.weight.float(), None).to(x)
    """,
)

# ---- methods

habit(
    "conv with its own __call__",
    "convolution",
    methods="""
        def __call__(self, x):
            return 2 * super().__call__(x)
    """,
)
habit(
    "conv with its own _conv_forward",
    "convolution",
    methods="""
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight, bias) * 2
    """,
)
habit(
    "conv that stays in eval",
    "convolution",
    methods="""
        def train(self, mode=True):
            return super().train(False)

        def forward(self, x):
            y = super().forward(x)
            return y * 2 if self.training else y
    """,
)
habit(
    "conv whose train writes",
    "convolution",
    methods="""
        def train(self, mode=True):
            with torch.no_grad():
                self.weight.mul_(0.5 if mode else 2)
            return super().train(mode)
    """,
)
habit(
    "conv whose state_dict is another",
    "convolution",
    methods="""
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "weight"] = destination[prefix + "weight"] * 2

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] / 2
            super()._load_from_state_dict(state_dict, prefix, *rest)
    """,
)
habit(
    "conv whose padding is computed",
    "convolution",
    methods="""
        @property
        def padding(self):
            return (0, 0) if getattr(self, "narrow", False) else self.__dict__.get("sides", (0, 0))

        @padding.setter
        def padding(self, value):
            self.__dict__["sides"] = value
    """,
)
